"""Faster R-CNN beside torchvision's own: state, proposals, crops, boxes, losses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from spaces.apply import apply, rebuild, same_state, save
from spaces.detectors.base import Labels, Outputs
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_loss import expected_share, taken
from spaces.detectors.faster_rcnn_network import BOX_WEIGHTS, decoded, pooled
from spaces.detectors.faster_rcnn_variants import MOBILENET_320, RESNET50_V2
from spaces.errors import InputError
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from spaces.testing import lively_network, noise, outputs_of

MOBILENET = "fasterrcnn_mobilenet_v3_large_320_fpn"
SIZE = (96, 128)
LABELS = [
    Labels(torch.tensor([[5.0, 8.0, 60.0, 70.0], [70.0, 20.0, 120.0, 90.0]]), torch.tensor([0, 2])),
    Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]


@cache
def detector() -> FasterRCNN:
    return FasterRCNN(MOBILENET, 3, SIZE, MOBILENET_320)


@cache
def network() -> nn.Module:
    """Not to be changed."""
    return lively_network(detector())


@cache
def outputs() -> Outputs:
    return outputs_of(network(), noise(detector(), 2))


@cache
def theirs() -> nn.Module:
    """torchvision's model with our state."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=4)
    model.load_state_dict(network().state_dict())
    return model.eval()


def test_state_is_that_of_torchvision() -> None:
    assert theirs().state_dict().keys() == network().state_dict().keys()
    with torch.device("meta"):
        plain = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4).state_dict()
        ours = FasterRCNN("v2", 3, (64, 64), RESNET50_V2).build().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


def test_proposals_and_detections_are_those_of_torchvision() -> None:
    """Same images past torchvision's own resizing. Ours are filled up to 150, which adds nothing."""
    model, images = theirs(), noise(detector(), 2)
    with torch.no_grad():
        features = model.backbone(images)
        proposals, _ = model.rpn(ImageList(images, [SIZE, SIZE]), features)
        detections, _ = model.roi_heads(features, proposals, [SIZE, SIZE])
    boxes, scores = detector().decode(outputs())
    for k in range(2):
        count = len(proposals[k])
        assert 20 < count < 150
        assert taken(outputs()[2])[k].tolist() == [True] * count + [False] * (150 - count)
        torch.testing.assert_close(outputs()[2][k, :count], proposals[k], rtol=1e-4, atol=1e-2)
        assert not scores[k, count:].any()
        found = detections[k]
        corner = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
        ours = torch.minimum(boxes[k].clamp(min=0), corner)
        assert len(found["boxes"]) > 10
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
            distance = (ours[:, label - 1] - box).abs().amax(dim=1) + 100 * (
                scores[k, :, label - 1] - score
            ).abs()
            assert float(distance.min()) < 0.05  # pixels, and 0.0005 of score


def test_boxes_are_decoded_as_torchvision_does() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + 1 + torch.rand(30, 2, generator=generator) * 50), dim=1)
    deltas = torch.randn(30, 3, 4, generator=generator) * 4
    for weights in ((1.0, 1.0, 1.0, 1.0), BOX_WEIGHTS):
        expected = BoxCoder(weights).decode(deltas.flatten(1), [boxes])
        torch.testing.assert_close(decoded(deltas, boxes.unsqueeze(1), weights), expected)


@pytest.mark.parametrize("size", [(256, 512), (96, 128)])
def test_crops_are_those_of_torchvision_from_one_map(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.randn(2, 5, size[0] // stride, size[1] // stride, generator=generator)
        for stride in (4, 8, 16, 32)
    ]
    limit = torch.tensor([size[1], size[0]])
    middle = torch.rand(2, 40, 2, generator=generator) * limit
    half = 10 * 2 ** (5 * torch.rand(2, 40, 2, generator=generator))
    boxes = torch.cat(((middle - half).clamp(min=0), torch.minimum(middle + half, limit)), dim=2)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    expected = pool({str(k): level for k, level in enumerate(levels)}, list(boxes), [size, size])
    torch.testing.assert_close(pooled(levels, boxes, size, pool), expected, rtol=1e-4, atol=1e-4)


def test_a_blank_image_and_no_proposals_at_all() -> None:
    silent = lively_network(detector())
    with torch.no_grad():
        silent.rpn.head.cls_logits.bias.fill_(-100.0)
    found = outputs_of(silent, torch.zeros(1, 3, *SIZE))
    assert not taken(found[2]).any()
    boxes, scores = detector().decode(found)
    assert bool(torch.isfinite(boxes).all())
    assert not scores.any()
    for labels in LABELS:
        assert bool(torch.isfinite(detector().loss(found, [labels])))
    assert float(detector().distillation(found, found)) == 0.0


def test_expected_share_is_the_mean_of_what_torchvision_draws() -> None:
    labels = torch.tensor([1, 3, 1, 2, 1, 0, 0, 0, 0, 0, 0, -1, -1])
    for count, positive in ((4, 0.5), (8, 0.25), (64, 0.5)):
        torch.manual_seed(0)
        sampler = BalancedPositiveNegativeSampler(count, positive)
        drawn = [sum(masks[0] for masks in sampler([labels])).float() for _ in range(2000)]
        share = expected_share(labels.unsqueeze(0), count, positive)[0]
        torch.testing.assert_close(torch.stack(drawn).mean(dim=0), share, rtol=0, atol=0.05)


def test_loss_is_torchvisions_where_it_takes_every_candidate() -> None:
    """With as many draws as there are candidates nothing is left to chance."""
    model, found = theirs(), outputs()
    targets = [{"boxes": image.boxes, "labels": image.classes + 1} for image in LABELS]
    anchors = [network().anchors] * 2
    labels, truth = model.rpn.assign_targets_to_anchors(anchors, targets)
    model.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(10**6, 0.5)
    wanted = model.rpn.box_coder.encode(truth, anchors)
    first = sum(model.rpn.compute_loss(found[0].flatten(), found[1].reshape(-1, 4), labels, wanted))
    proposals = [boxes[real] for boxes, real in zip(found[2], taken(found[2]), strict=True)]
    matched, classes = model.roi_heads.assign_targets_to_proposals(
        proposals, [t["boxes"] for t in targets], [t["labels"] for t in targets]
    )
    aims = [LABELS[0].boxes[matched[0]], torch.zeros(len(proposals[1]), 4)]
    moves = model.roi_heads.box_coder.encode(aims, proposals)
    real = taken(found[2])
    second = sum(fastrcnn_loss(found[3][real], found[4][real].flatten(1), classes, list(moves)))
    assert sum(int((c > 0).sum()) for c in classes) > 0
    ours = FasterRCNN(MOBILENET, 3, SIZE, MOBILENET_320)
    ours._losses()._rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(10**6, 0.5)
    torch.testing.assert_close(ours.loss(found, LABELS), first + second, rtol=1e-4, atol=1e-5)


def test_distillation_sees_what_fewer_proposals_miss() -> None:
    """Of its own outputs cut short, and more the shorter they are."""
    found, distances = outputs(), []
    for count in (150, 50, 20, 5):
        short = (*found[:2], *(o[:, :count] for o in found[2:]))
        distances.append(float(detector().distillation(short, found)))
    assert distances[0] == 0.0
    assert distances == sorted(set(distances))


def test_distillation_compares_proposals_wherever_they_stand() -> None:
    found = outputs()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    shuffled = (*found[:2], *(o[:, order] for o in found[2:]))
    assert float(detector().distillation(shuffled, found)) == pytest.approx(0.0, abs=1e-4)


def test_layers_that_run_several_times_count_every_time() -> None:
    facts = find_sites(detector(), network()).facts
    levels = 3 * 4 + 3 * 4 + 2 * 2  # cells at strides 32, 32 and 64
    assert facts["rpn.head.conv.0.0"].positions == levels
    assert facts["roi_heads.box_head.fc6"].positions == 150


def test_a_pruned_network_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    sites = find_sites(detector(), network())
    recipe = Recipe(
        detector=MOBILENET, choices=tuple(Prune(site=name, sparsity=0.5) for name in sites.channel)
    )
    draft = apply(network(), recipe, sites)
    fc6, head = draft.network.roi_heads.box_head.fc6, draft.network.rpn.head
    assert (fc6.in_features, fc6.out_features) == (128 * 49, 512)
    assert (head.conv[0][0].in_channels, head.conv[0][0].out_channels) == (128, 128)
    assert head.bbox_pred.out_channels == 15 * 4
    save(draft, recipe, tmp_path)
    _, again = rebuild(detector().build().eval(), tmp_path)
    assert same_state(again.network.state_dict(), draft.network.state_dict())
    images = noise(detector(), 1)
    assert all(map(torch.equal, outputs_of(again.network, images), outputs_of(draft.network, images)))


def test_sizes_and_categories_are_checked() -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        FasterRCNN(MOBILENET, 3, (100, 128), MOBILENET_320)
    with pytest.raises(InputError, match="at least one category"):
        FasterRCNN(MOBILENET, 0, SIZE, MOBILENET_320)
