"""The whole detector in torch against plain suppression, and its export against torch."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from evaluators.postprocess import WholeDetector
from evaluators.torch_session import TorchSession
from spaces.detectors.base import Category, Postprocess
from spaces.detectors.yolox import YoloX
from spaces.suppression import suppress

CATEGORIES = [Category(7, "a"), Category(3, "b"), Category(90, "c")]
DETECTOR = YoloX("tiny", 3, (96, 128), depth=0.33, width=0.125)


@cache
def busy_network() -> nn.Module:
    """A fresh network whose logits spread over noise as a trained one's do over photographs."""
    torch.manual_seed(0)
    network = DETECTOR.build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = torch.rand(16, 3, 96, 128) * 255
    with torch.no_grad():
        network(images)
        outputs = network.eval()(images)
        head = network.get_submodule("head")
        spreads = ((head.reg_preds, slice(0, 4), 0.5), (head.obj_preds, slice(4, 5), 2.0))
        for predictors, channels, spread in (*spreads, (head.cls_preds, slice(5, 8), 2.0)):
            for predictor, level in zip(predictors, outputs, strict=True):
                predictor.weight *= spread / level[:, channels].std(dim=(0, 2, 3))[:, None, None, None]
                nn.init.zeros_(predictor.bias)
    return network


def whole(**rules: float) -> WholeDetector:
    network = DETECTOR.simplified(busy_network())
    return WholeDetector(network, DETECTOR, Postprocess(**rules), CATEGORIES).eval()


def noise(seed: int) -> Tensor:
    return torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(seed)) * 255


def plain(detector: WholeDetector, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best class of each box, torchvision's suppression class by class, without top-k or offsets of ours."""
    rules = detector.postprocess
    boxes, scores = DETECTOR.decode(detector.network(images))
    best, classes = scores[0].max(dim=1)
    boxes = boxes[0].clamp(min=0).minimum(torch.tensor([128.0, 96.0, 128.0, 96.0]))
    seen = best > rules.score_threshold
    boxes, best, classes = boxes[seen], best[seen], classes[seen]
    kept = batched_nms(boxes, best, classes, rules.nms_iou)[: rules.max_detections]
    ids = torch.tensor([category.id for category in CATEGORIES])
    return boxes[kept], best[kept], ids[classes[kept]]


@pytest.mark.parametrize("rules", [{}, {"nms_iou": 0.3}, {"max_detections": 7}, {"score_threshold": 0.4}])
@torch.inference_mode()
def test_one_suppression_does_the_work_of_one_per_class(rules: dict[str, float]) -> None:
    detector = whole(**rules)
    found = 0
    for seed in range(5):
        images = noise(seed)
        ours, expected = detector(images), plain(detector, images)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)
        found += len(ours[0])
        assert (ours[1].diff() <= 0).all()
    assert found >= 25, "too few boxes to show anything"


@torch.inference_mode()
def test_topk_keeps_the_best() -> None:
    few, unlimited = whole(pre_nms_topk=40), whole()
    images = noise(0)
    boxes, scores, _ = few(images)
    best = DETECTOR.decode(few.network(images))[1][0].amax(dim=1).sort(descending=True).values
    assert scores[-1] >= best[39]
    assert torch.equal(scores[0], unlimited(images)[1][0])
    assert 0 < len(boxes) <= 40


def test_suppression_by_hand() -> None:
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [20.0, 0.0, 30.0, 10.0], [40, 0, 50, 10]]
    )
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1])
    assert suppress(boxes, scores, 0.79, 0.1, 9).tolist() == [1, 2]  # IoU of the first two is 0.8
    assert suppress(boxes, scores, 0.81, 0.05, 9).tolist() == [1, 2, 0, 3]
    assert suppress(boxes, scores, 0.81, 0.05, 2).tolist() == [1, 2]
    assert suppress(boxes[:0], scores[:0], 0.5, 0.1, 2).tolist() == []


@pytest.fixture(scope="module", params=[1000, 40])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("export") / "model.onnx"
    names = ["boxes", "scores", "labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole(pre_nms_topk=request.param),
            (noise(0),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "detections"} for name in names},
        )
    return path.rename(path.with_name(f"{request.param}.onnx"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_exported_file_finds_what_torch_finds(exported: Path, engine: str) -> None:
    reference = TorchSession(whole(pre_nms_topk=int(exported.stem)))
    if engine == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime").InferenceSession(exported)

        def run(images: np.ndarray) -> list[np.ndarray]:
            return runtime.run(None, {"images": images})
    else:
        compiled = (
            pytest.importorskip("openvino")
            .Core()
            .compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
        )

        def run(images: np.ndarray) -> list[np.ndarray]:
            return list(compiled({"images": images}).values())

    found = 0
    for images in (noise(0), noise(1), noise(2)):
        boxes, scores, labels = run(images.numpy())
        expected = reference.run(images.numpy())
        np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
        # Detections whose scores differ by a rounding error may change places.
        away = np.abs(boxes[:, None] - expected.boxes[None]).max(axis=2)
        near = (
            (away < 0.02)
            & (labels[:, None] == expected.labels)
            & (np.abs(scores[:, None] - expected.scores) < 1e-4)
        )
        assert near.any(axis=0).all()
        assert near.any(axis=1).all()
        assert labels.dtype == np.int64
        found += len(scores)
    assert found >= 15, "too few boxes to show anything"


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_no_detection_at_all_is_no_crash(tmp_path: Path, engine: str) -> None:
    detector = whole(score_threshold=0.999999)
    images = torch.full((1, 3, 96, 128), 114.0)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(detector, (images,), path, dynamo=False, opset_version=17, input_names=["images"])
    if engine == "torch":
        found = TorchSession(detector).run(images.numpy())
        boxes, scores, labels = found.boxes, found.scores, found.labels
    elif engine == "onnxruntime":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        boxes, scores, labels = session.run(None, {"images": images.numpy()})
    else:
        compiled = pytest.importorskip("openvino").Core().compile_model(path, "CPU")
        boxes, scores, labels = compiled({"images": images.numpy()}).values()
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))


def test_boxes_of_many_classes_keep_their_places(tmp_path: Path) -> None:
    """1203 of 1280 pixels, as LVIS has: one behind the other, corners would be an eighth of a pixel apart."""
    detector = WholeDetector(
        nn.Identity(),
        YoloX("tiny", 1203, (1280, 1280), depth=0.33, width=0.125),
        Postprocess(score_threshold=0.0, nms_iou=0.65),
        [Category(k, str(k)) for k in range(1203)],
    )
    assert detector.places.max() < 2**16
    assert len(detector.places.unique(dim=0)) == 1203
    assert not hasattr(whole(), "places"), "files of few classes stay as they are"
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(400, 2, generator=random) * 40 + 300
    boxes = torch.cat((corner, corner + torch.rand(400, 2, generator=random) * 6 + 4), dim=1)
    scores, classes = torch.rand(400, generator=random), torch.arange(400) % 2 * 1200 + 1
    kept = torch.cat([(classes == k).nonzero()[:, 0] for k in (1, 1201)])
    alone = [kept[classes[kept] == k] for k in (1, 1201)]
    stay = torch.cat([one[nms(boxes[one], scores[one], 0.65)] for one in alone])
    stay = stay[scores[stay].argsort(descending=True)][:100]
    assert torch.equal(detector.suppressed(boxes, scores, classes)[1], scores[stay])
    detector.forward = detector.suppressed  # type: ignore[method-assign]
    names, path = ["boxes", "scores", "classes"], tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = (boxes, scores, classes)
        torch.onnx.export(detector, given, path, dynamo=False, opset_version=17, input_names=names)
    feed = {name: one.numpy() for name, one in zip(names, given, strict=True)}
    found = pytest.importorskip("onnxruntime").InferenceSession(path).run(None, feed)[1]
    np.testing.assert_array_equal(found, scores[stay])
    compiled = pytest.importorskip("openvino").Core().compile_model(path, "CPU")
    np.testing.assert_array_equal(list(compiled(list(feed.values())).values())[1], scores[stay])


class Scored:
    """Gives boxes and scores as they are."""

    multi_label = True
    preprocess = DETECTOR.preprocess

    def decode(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs


def pairs(boxes: Tensor, scores: Tensor, **rules: float) -> tuple[Tensor, Tensor, Tensor]:
    post = Postprocess.model_validate({"score_threshold": 0.1, "nms_iou": 0.5, **rules})
    found: tuple[Tensor, Tensor, Tensor] = WholeDetector(
        nn.Identity(),
        Scored(),  # type: ignore[arg-type]  # only what post-processing looks at
        post,
        CATEGORIES,
    )((boxes[None], scores[None]))
    return found


def test_every_pair_of_a_box_and_a_class_counts_where_the_detector_says_so() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])
    scores = torch.tensor([[0.9, 0.6, 0.05], [0.8, 0.7, 0.0], [0.3, 0.0, 0.2]])
    found, confidence, labels = pairs(boxes, scores)
    assert labels.tolist() == [7, 3, 7, 90]
    torch.testing.assert_close(confidence, torch.tensor([0.9, 0.7, 0.3, 0.2]))
    assert torch.equal(found, boxes[[0, 1, 2, 2]])
    assert pairs(boxes, scores, pre_nms_topk=2)[2].tolist() == [7]  # 0.9 and 0.8, of which one stays


def test_classes_may_have_boxes_of_their_own() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 1.0, 1.0]]])
    found, _, labels = pairs(boxes, torch.tensor([[0.4, 0.9, 0.0]]))
    assert labels.tolist() == [3, 7]
    assert torch.equal(found, boxes[0, [1, 0]])


@pytest.mark.parametrize("limit", [5, 50, 1000])
def test_pairs_are_the_best_of_all_pairs(limit: int) -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=random) * 60
    boxes = torch.cat((corner, corner + 5 + 30 * torch.rand(60, 2, generator=random)), dim=1)
    scores = torch.rand(60, 3, generator=random)
    best, kept = scores.flatten().topk(min(limit, 180))
    classes = kept % 3
    held = boxes[kept // 3]
    stay = batched_nms(held, best, classes, 0.5)
    stay = stay[best[stay] > 0.1][:100]
    found, confidence, labels = pairs(boxes, scores, pre_nms_topk=limit)
    assert torch.equal(confidence, best[stay])
    assert torch.equal(found, held[stay])
    assert labels.tolist() == [CATEGORIES[int(c)].id for c in classes[stay]]
