"""RetinaNet and FCOS: the shipped contract, and torchvision's own models beside ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import batched_nms

from spaces.detectors.base import Detector, Labels
from spaces.detectors.fcos import FCOS_RESNET18
from spaces.detectors.registry import make_detector
from spaces.detectors.retinanet import RETINANET_RESNET18
from spaces.errors import InputError
from spaces.testing import DetectorContract, lively_network, noise, outputs_of

SIZE = (96, 128)
SMALL = {"retinanet_resnet18_fpn": RETINANET_RESNET18, "fcos_resnet18_fpn": FCOS_RESNET18}
PUBLISHED: dict[str, Callable[..., nn.Module]] = {
    "retinanet_resnet50_fpn": detection.retinanet_resnet50_fpn,
    "retinanet_resnet50_fpn_v2": detection.retinanet_resnet50_fpn_v2,
    "fcos_resnet50_fpn": detection.fcos_resnet50_fpn,
}
NO_BOXES = Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
LABELS = [
    Labels(torch.tensor([[5.0, 8.0, 60.0, 70.0], [70.0, 20.0, 125.0, 90.0]]), torch.tensor([0, 2])),
    NO_BOXES,
]


class TestDense(DetectorContract):
    @pytest.fixture(params=SMALL)
    def detector(self, request: pytest.FixtureRequest) -> Detector:
        return make_detector(request.param, 3, size=(64, 96))


@cache
def pair(name: str) -> tuple[Detector, nn.Module, Any]:
    """A detector, a network of it, and torchvision's model of the same state; not to be changed."""
    detector = make_detector(name, 3, SIZE)
    network = lively_network(detector)
    model: Any = SMALL[name].make(4)
    model.load_state_dict(network.state_dict())
    model.transform.image_mean, model.transform.image_std = [0.0] * 3, [1.0] * 3
    model.transform.min_size, model.transform.max_size = (SIZE[0],), SIZE[1]
    return detector, network, model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_those_of_torchvision(name: str) -> None:
    """The same suppression over our decoded boxes; its detections of the background are left out."""
    detector, network, model = pair(name)
    model.topk_candidates = model.detections_per_img = 10**6
    model.score_thresh = 0.6
    images = noise(detector, 2)
    with torch.no_grad():
        theirs = model(list(images))
    boxes, scores = detector.decode(outputs_of(network, images))
    corner = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    for k, found in enumerate(theirs):
        place, position = (scores[k] > model.score_thresh).nonzero(as_tuple=True)
        near = torch.minimum(boxes[k][place].clamp(min=0), corner)
        kept = batched_nms(near, scores[k][place, position], position, model.nms_thresh)
        objects = found["labels"] > 0
        assert int(objects.sum()) > 10
        assert len(kept) == int(objects.sum())
        # Scores that differ by rounding alone come in either order, so each row is compared with its like.
        ours = rows(position[kept] + 1, near[kept], scores[k][place, position][kept])
        wanted = rows(*(found[key][objects] for key in ("labels", "boxes", "scores")))
        apart = torch.cdist(ours, wanted, p=torch.inf)
        torch.testing.assert_close(ours, wanted[apart.argmin(dim=1)], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(wanted, ours[apart.argmin(dim=0)], rtol=1e-4, atol=1e-2)


def rows(labels: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """Detections `(N, 6)` whose columns count alike: a label by 1000, a score by 1000 for each unit."""
    return torch.cat([1e3 * labels[:, None], boxes, 1e3 * scores[:, None]], dim=1)


@pytest.mark.parametrize("labels", [LABELS, [LABELS[0], LABELS[0]]])
@pytest.mark.parametrize("name", SMALL)
def test_loss_is_that_of_torchvision(name: str, labels: list[Labels]) -> None:
    detector, network, model = pair(name)
    images = noise(detector, 2)
    targets = [{"boxes": image.boxes, "labels": image.classes + 1} for image in labels]
    outputs = outputs_of(network, images)
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    with torch.no_grad():
        expected = sum(model(list(images), targets).values())
    model.eval()
    assert float(expected) > 0.1
    torch.testing.assert_close(detector.loss(outputs, labels), expected)


@pytest.mark.parametrize("name", SMALL)
def test_images_without_boxes_count_alike_in_batches_of_any_size(name: str) -> None:
    detector, network, _ = pair(name)
    outputs = outputs_of(network, noise(detector, 1))
    thrice = tuple(torch.cat([output] * 3) for output in outputs)
    alone = detector.loss(outputs, [NO_BOXES])
    assert float(alone) > 0
    torch.testing.assert_close(detector.loss(thrice, [NO_BOXES] * 3), alone)


@pytest.mark.parametrize("name", PUBLISHED)
def test_states_are_those_of_published_models(name: str) -> None:
    with torch.device("meta"):
        theirs: Any = PUBLISHED[name](weights=None, weights_backbone=None, num_classes=4)
        detector = make_detector(name, 3, (64, 64))
        ours = detector.build()
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert {ours.get_submodule(layer).weight.shape[0] for layer in detector.output_layers(ours)} == {
        theirs.get_submodule(layer).weight.shape[0] for layer in detector.output_layers(ours)
    }
    epsilon = {m.eps for m in ours.modules() if isinstance(m, nn.BatchNorm2d)}
    assert epsilon == {1e-10 if name == "retinanet_resnet50_fpn" else 1e-5}


def test_a_class_row_is_where_class_layers_say() -> None:
    """The scores of one class change, and no others, with the rows that belong to it."""
    for name in SMALL:
        detector = make_detector(name, 3, SIZE)
        network = lively_network(detector)
        before = detector.decode(outputs_of(network, noise(detector, 1)))[1]
        for layer, (outer, inner) in detector.class_layers().items():  # type: ignore[attr-defined]
            bias = network.get_submodule(layer).bias
            assert isinstance(bias, nn.Parameter)
            with torch.no_grad():
                bias.view(outer, 4, inner)[:, 2] += 1.0
        after = detector.decode(outputs_of(network, noise(detector, 1)))[1]
        assert bool((after[..., 1] > before[..., 1]).all())
        assert torch.equal(after[..., [0, 2]], before[..., [0, 2]])


@pytest.mark.parametrize("name", SMALL)
def test_sizes_and_categories_are_checked(name: str) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        make_detector(name, 3, (100, 96))
    with pytest.raises(InputError, match="at least one category"):
        make_detector(name, 0, (96, 96))
