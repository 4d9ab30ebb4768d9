"""SSD and SSDLite: the shipped contract, and torchvision's own models beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large

from spaces.detectors.base import Detector, Labels
from spaces.detectors.registry import make_detector
from spaces.testing import DetectorContract, lively_network, noise, outputs_of

MODELS: dict[str, Callable[..., Any]] = {
    "ssdlite320_mobilenet_v3_large": ssdlite320_mobilenet_v3_large,
    "ssd300_vgg16": ssd300_vgg16,
}


class TestSsdLite(DetectorContract):
    @pytest.fixture
    def detector(self) -> Detector:
        return make_detector("ssdlite320_mobilenet_v3_large", 3, size=(64, 96))


def everything(name: str, num_classes: int) -> Any:
    """torchvision's model that takes normalised images and returns all boxes of all classes."""
    model = MODELS[name](
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        score_thresh=-1.0,
        nms_thresh=1.0,
        topk_candidates=10**6,
        detections_per_img=10**6,
    )
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_boxes_and_scores_are_those_of_torchvision(name: str) -> None:
    theirs = everything(name, 3)
    detector = make_detector(name, 3)
    network = detector.build()
    network.load_state_dict(theirs.state_dict())
    images = noise(detector, 1)
    boxes, scores = detector.decode(outputs_of(network.eval(), images))
    with torch.no_grad():
        found = theirs([images[0]])[0]
    height, width = detector.preprocess.size
    clipped = torch.minimum(boxes[0].clamp(min=0), torch.tensor([width, height, width, height]))
    for position in range(3):
        of_class = found["labels"] == position + 1
        order = scores[0, :, position].argsort(descending=True, stable=True)
        torch.testing.assert_close(found["scores"][of_class], scores[0, order, position])
        torch.testing.assert_close(sums(found["boxes"][of_class]), sums(clipped))


def sums(boxes: Tensor) -> Tensor:
    """A number for each box, in an order that equal scores do not change."""
    return (boxes @ torch.tensor([1.0, 0.7, 0.3, 0.1])).sort().values


def test_names_of_weights_are_those_of_torchvision_at_every_size() -> None:
    for name, model in MODELS.items():
        for size in ((128, 160), (224, 224)):
            detector = make_detector(name, 3, size)
            with torch.device("meta"):
                theirs = model(weights=None, weights_backbone=None, num_classes=4).state_dict()
                ours = detector.build().state_dict()
            assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_loss_is_that_of_torchvision_where_there_are_boxes() -> None:
    detector = make_detector("ssdlite320_mobilenet_v3_large", 3)
    theirs = everything("ssdlite320_mobilenet_v3_large", 3)
    network = detector.build()
    network.load_state_dict(theirs.state_dict())
    for module in (theirs, network):
        module.train()
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()
    images = noise(detector, 2)
    boxes = torch.tensor([[20.0, 30.0, 150.0, 160.0], [200.0, 100.0, 290.0, 310.0]])
    labels = [Labels(boxes, torch.tensor([0, 2])), Labels(boxes[:1], torch.tensor([1]))]
    targets = [{"boxes": each.boxes, "labels": each.classes + 1} for each in labels]
    with torch.no_grad():
        expected = sum(theirs(list(images), targets).values())
        torch.testing.assert_close(detector.loss(network(images), labels), expected)


def test_images_without_boxes_teach_that_nothing_is_there() -> None:
    detector = make_detector("ssdlite320_mobilenet_v3_large", 3, (64, 64))
    logits, codes = outputs_of(lively_network(detector), noise(detector, 1))
    nothing = [Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))]
    quiet = logits.clone()
    quiet[..., 0] += 20  # background everywhere
    assert (
        float(detector.loss((quiet, codes), nothing)) < 0.01 < float(detector.loss((logits, codes), nothing))
    )


@pytest.mark.parametrize("side", [64, 128, 160, 224, 267, 268, 300])
def test_ssd300_has_cells_at_all_levels_of_small_images(side: int) -> None:
    detector = make_detector("ssd300_vgg16", 3, (side, side))
    with torch.device("meta"):
        backbone = detector.build().get_submodule("backbone")
        grids = [tuple(level.shape[2:]) for level in backbone(torch.zeros(1, 3, side, side)).values()]
    assert len(grids) == 6
    assert min(min(grid) for grid in grids) >= 1
    padded = backbone.get_submodule("extra.4.2").padding
    assert padded == ((0, 0) if side >= 268 else (1, 1))
    if side == 300:
        assert grids == [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
