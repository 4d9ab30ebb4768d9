"""What Faster R-CNN is trained with: torchvision's targets, losses of both stages, and distillation.

Shapes: N images, A anchors, P proposals, G boxes of an image, C classes without the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from spaces.detectors.base import Labels, Outputs
from spaces.detectors.faster_rcnn_network import BOX_WEIGHTS, anchors_of, decoded, grids_of
from spaces.detectors.torchvision_parts import targets_of

Targets = list[dict[str, Tensor]]

BETA = 1 / 9  # where smooth L1 turns from a square to a line
SAME_REGION = 0.6  # IoU from which on two proposals are taken to look at the same thing
_MISSED = 4.6  # -log 1 %: what a student that proposes nothing there says of the teacher's object


class FasterRCNNLoss:
    """Losses for images of one size.

    Args:
        rpn: of torchvision's model; its matcher and numbers are used, no weights.
        roi_heads: the same.
        size: height and width of the images in pixels.
        strides: of the backbone's levels.
    """

    def __init__(
        self, rpn: RegionProposalNetwork, roi_heads: RoIHeads, size: tuple[int, int], strides: Sequence[int]
    ) -> None:
        self._rpn, self._roi_heads = rpn, roi_heads
        self._anchors = anchors_of(rpn.anchor_generator, size, grids_of(size, strides))

    def task(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """The sum of four losses: objectness and boxes of anchors, classes and boxes of proposals.

        torchvision draws 256 anchors and 512 proposals of an image at random; this is the expectation of
        its losses over all draws, so that a training that is taken up again ends as it would have. It adds
        the true boxes to the proposals, too; here the box head has seen the images before the labels are
        known. That costs examples early on, when few proposals overlap an object by half: the box head
        then learns little but the background until the proposal network has learned where objects are.
        """
        objectness, deltas, proposals, classes, moves = outputs
        targets = targets_of(labels, deltas.device)
        first = self._first_stage(objectness, deltas, targets)
        return first + self._second_stage(proposals, classes, moves, targets)

    def _first_stage(self, objectness: Tensor, deltas: Tensor, targets: Targets) -> Tensor:
        rpn, anchors = self._rpn, self._anchors.to(deltas.device)
        with torch.no_grad():
            found, truth = rpn.assign_targets_to_anchors([anchors] * len(targets), targets)
            labels = torch.stack(list(found))  # (N, A): 1 object, 0 background, -1 neither
            sampler = rpn.fg_bg_sampler
            weights = expected_share(labels, sampler.batch_size_per_image, sampler.positive_fraction)
            total = weights.sum().clamp(min=1.0)
            image, anchor = (labels == 1).nonzero(as_tuple=True)
            wanted = rpn.box_coder.encode_single(torch.stack(list(truth))[image, anchor], anchors[anchor])
        error = F.binary_cross_entropy_with_logits(objectness, labels.clamp(min=0), reduction="none")
        off = F.smooth_l1_loss(deltas[image, anchor], wanted, beta=BETA, reduction="none").sum(dim=1)
        return ((error * weights).sum() + (off * weights[image, anchor]).sum()) / total

    def _second_stage(self, proposals: Tensor, classes: Tensor, moves: Tensor, targets: Targets) -> Tensor:
        heads, boxes = self._roi_heads, [target["boxes"] for target in targets]
        with torch.no_grad():
            known = [target["labels"] for target in targets]
            matched, found = heads.assign_targets_to_proposals(list(proposals), boxes, known)
            labels = torch.stack(found).masked_fill(~taken(proposals), -1)  # (N, P)
            sampler = heads.fg_bg_sampler
            weights = expected_share(labels, sampler.batch_size_per_image, sampler.positive_fraction)
            total = weights.sum().clamp(min=1.0)
            image, place = (labels > 0).nonzero(as_tuple=True)
            truth = torch.cat(
                [own[match[label > 0]] for own, match, label in zip(boxes, matched, labels, strict=True)]
            )
            wanted = heads.box_coder.encode_single(truth, proposals[image, place])
        error = F.cross_entropy(classes.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
        own = moves[image, place, labels[image, place]]
        off = F.smooth_l1_loss(own, wanted, beta=BETA, reduction="none").sum(dim=1)
        return ((error * weights.flatten()).sum() + (off * weights[image, place]).sum()) / total

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance of raw outputs to a teacher's; 0 where they are equal, finite for any finite outputs.

        Anchors are compared one by one: Kullback-Leibler divergence of the objectness, and smooth L1 of the
        deltas weighted by the teacher's objectness. Each of the teacher's proposals is compared with the
        student's proposal that overlaps it most: divergence of the class distributions, and smooth L1 of
        the boxes of each class, in tenths of the proposal's size, weighted by the teacher's probability.
        Where none overlaps it by `SAME_REGION` the student is taken to see background there. Both parts are
        divided by the teacher's sum of objects, at least one an image.
        """
        objectness, deltas, proposals, classes, moves = outputs
        with torch.no_grad():
            presence = teacher[0].sigmoid()
            mass = presence.sum().clamp(min=len(presence))
        surprise = F.softplus(objectness) - F.softplus(teacher[0])
        binary = surprise - presence * (objectness - teacher[0])
        shift = F.smooth_l1_loss(deltas, teacher[1], beta=BETA, reduction="none").sum(dim=2)
        first = (binary + presence * shift).sum() / mass

        with torch.no_grad():
            known = teacher[3].log_softmax(dim=2)  # (N, P, C + 1)
            real = taken(teacher[2])
            objects = (1 - known[..., 0].exp()) * real
            amount = objects.sum().clamp(min=len(objects))
            overlap = _overlaps(teacher[2], proposals)  # (N, P, P')
            best, partner = overlap.max(dim=2)
            same = real & (best >= SAME_REGION)
            image, place = same.nonzero(as_tuple=True)
            extent = (teacher[2][..., 2:] - teacher[2][..., :2])[image, place].repeat(1, 2).clamp(min=1.0)
            aim = _class_boxes(teacher[4][image, place], teacher[2][image, place])
            missed = _MISSED * (objects * ~same).sum()
        other = partner[image, place]
        said = classes[image, other].log_softmax(dim=1)
        wise = known[image, place]
        divergence = wise.exp() * (wise - said)
        reached = _class_boxes(moves[image, other], proposals[image, other])
        scale = 10.0 / extent.unsqueeze(1)
        apart = F.smooth_l1_loss(reached * scale, aim * scale, beta=BETA, reduction="none").sum(dim=2)
        second = (divergence.sum() + (wise[:, 1:].exp() * apart).sum() + missed) / amount
        return first + second


def expected_share(labels: Tensor, count: int, positive: float) -> Tensor:
    """How often each of `(N, K)` candidates is drawn when `count` of an image are, `(N, K)` in 0..1.

    At most the share `positive` of them have a label above 0; the rest have 0; -1 is never drawn. As
    torchvision's BalancedPositiveNegativeSampler.
    """
    objects, background = labels > 0, labels == 0
    many = objects.sum(dim=1, keepdim=True)
    few = many.clamp(max=int(count * positive))
    others = background.sum(dim=1, keepdim=True)
    rest = torch.minimum(others, count - few)
    return objects * (few / many.clamp(min=1)) + background * (rest / others.clamp(min=1))


def taken(proposals: Tensor) -> Tensor:
    """`(N, P)`: True where there is a proposal, False where a place was left empty."""
    return (proposals[..., 2] > proposals[..., 0]) & (proposals[..., 3] > proposals[..., 1])


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU `(N, P, Q)`; 0 where either has no area."""
    pairs = [box_iou(a, b) for a, b in zip(first.float(), second.float(), strict=True)]
    return torch.stack(pairs).nan_to_num(0.0)


def _class_boxes(moves: Tensor, proposals: Tensor) -> Tensor:
    """Boxes `(K, C, 4)` of each class."""
    return decoded(moves[:, 1:], proposals.unsqueeze(1), BOX_WEIGHTS)
