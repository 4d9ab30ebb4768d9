"""Weights of more classes than the data set has: which rows are taken, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from spaces.detectors.base import Category, Detector
from spaces.detectors.classes import with_classes_of
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import load_weights
from spaces.errors import InputError
from spaces.testing import noise, outputs_of

# Not in COCO's order; COCO's ids are 64, 1 and 13.
PLANT, PERSON, SIGN = Category(7, "Potted-Plant"), Category(2, "person"), Category(1, "stop_sign")
CHOSEN = (PLANT, PERSON, SIGN)
IN_91, IN_80 = [64, 1, 13], [58, 0, 11]
BY_ID = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
FAMILIES = {
    "ssdlite320_mobilenet_v3_large": 91,
    "ssd300_vgg16": 81,
    "fcos_resnet18_fpn": 91,
    "retinanet_resnet18_fpn": 81,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 91,
    "yolox_nano": 80,
}


def scrambled(network: nn.Module) -> nn.Module:
    """Every bias its own, so that rows differ by more than chance."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape))
    return network.eval()


@pytest.mark.parametrize(("name", "count"), FAMILIES.items())
def test_the_scores_of_a_category_are_those_of_its_class(name: str, count: int, tmp_path: Path) -> None:
    """For softmax its logits, which are scores up to what the other classes take."""
    whole = make_detector(name, 80 if count == 80 else count - 1, (96, 96))
    network = scrambled(whole.build())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    few = make_detector(name, 3, (96, 96))
    mine = few.build().eval()
    load_weights(mine, tmp_path / "w.pth", few, CHOSEN)
    rows = IN_91 if count == 91 else [1 + k for k in IN_80] if count == 81 else IN_80
    images = noise(few, 1)
    all_scores = whole.decode(outputs_of(network, images))[1]
    scores = few.decode(outputs_of(mine, images))[1]
    background = 0 if count == 80 else 1
    theirs = all_scores[..., [row - background for row in rows]]
    if name.startswith(("ssd", "fasterrcnn")):
        scores, theirs = (x / x.sum(dim=-1, keepdim=True).clamp(min=1e-9) for x in (scores, theirs))
    torch.testing.assert_close(scores, theirs, rtol=1e-3, atol=1e-5)


def test_boxes_of_a_category_are_those_of_its_class(tmp_path: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    whole, few = (make_detector(name, count, (96, 96)) for count in (90, 3))
    network = scrambled(whole.build())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    mine = few.build().eval()
    load_weights(mine, tmp_path / "w.pth", few, CHOSEN)
    images = noise(few, 1)
    theirs = whole.decode(outputs_of(network, images))[0][:, :, [63, 0, 12]]
    torch.testing.assert_close(few.decode(outputs_of(mine, images))[0], theirs)


def refusal(count: int, categories: tuple[Category, ...], tmp_path: Path) -> str:
    few = make_detector("yolox_digits", len(categories), (64, 64))
    network, file = few.build(), tmp_path / "w.pth"
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(make_detector("yolox_digits", count, (64, 64)).build().state_dict(), file)
    with pytest.raises(InputError) as caught:
        load_weights(network, file, few, categories)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return str(caught.value)


def test_categories_that_are_none_of_the_classes_are_named(tmp_path: Path) -> None:
    said = refusal(80, (PERSON, Category(3, "RBC")), tmp_path)
    assert "80 classes, COCO's, of which none is 'RBC'" in said
    assert "paredown train --start" in said
    assert "20 classes, unknown by name, so none is 'person'" in refusal(20, (PERSON,), tmp_path)


def test_training_begins_with_known_rows_and_fresh_ones(tmp_path: Path) -> None:
    detector = make_detector("yolox_digits", 2, (64, 64))
    source, target = make_detector("yolox_digits", 80, (64, 64)).build(), detector.build()
    fresh = target.get_submodule("head.cls_preds.1").weight.clone()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth", detector, (Category(1, "RBC"), PERSON), start=True)
    mine, theirs = (net.get_submodule("head.cls_preds.1").weight for net in (target, source))
    assert torch.equal(mine[0], fresh[0])
    assert torch.equal(mine[1], theirs[0])


def test_the_same_number_of_classes_is_left_alone() -> None:
    detector: Detector = make_detector("yolox_digits", 3, (64, 64))
    weights, fresh = detector.build().state_dict(), detector.build().state_dict()
    assert with_classes_of(weights, fresh, detector, CHOSEN) == dict(weights)
    wider = make_detector("yolox_s", 80, (64, 64)).build().state_dict()  # no class row fits this network
    assert with_classes_of(wider, fresh, detector, CHOSEN) == dict(wider)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("retinanet_resnet50_fpn", detection.retinanet_resnet50_fpn),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", detection.fasterrcnn_mobilenet_v3_large_320_fpn),
    ],
)
def test_names_of_older_torchvisions_load(name: str, make: type[nn.Module], tmp_path: Path) -> None:
    """Published files of 2019: a pyramid's blocks and a head's layers had one level of names less."""
    source = make(weights=None, weights_backbone=None, num_classes=91)
    current = source.state_dict()
    old = {}
    for key, value in current.items():
        parts = key.split(".")
        if "fpn" in parts and "blocks" in key and "extra" not in key:
            parts.pop(-2)
        if parts[:2] in (["head", "classification_head"], ["head", "regression_head"]) and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        if parts[:3] == ["rpn", "head", "conv"]:
            parts[3:5] = []
        if not key.endswith("num_batches_tracked"):  # frozen norms had none
            old[".".join(parts)] = value
    assert len(old.keys() - current.keys()) >= 8
    torch.save(old, tmp_path / "old.pth")
    detector = make_detector(name, 3, (64, 64))
    network = detector.build()
    load_weights(network, tmp_path / "old.pth", detector, CHOSEN)
    loaded = network.state_dict()
    layers = detector.class_layers()  # type: ignore[attr-defined]
    same = [k for k in loaded if k.rpartition(".")[0] not in layers and "num_batches" not in k]
    assert all(torch.equal(loaded[key], current[key]) for key in same)
    assert BY_ID[64] == "potted plant"
