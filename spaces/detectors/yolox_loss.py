"""What YOLOX is trained with: SimOTA assignment, task loss and distillation (arXiv 2107.08430, section 2).

Shapes: N images, A cells of all levels, G boxes of the image that has most, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spaces.detectors.base import Labels, Outputs
from spaces.detectors.dense import divergence
from spaces.detectors.yolox_network import cells

BOX_WEIGHT = 5.0
L1_WEIGHT = 1.0
_RADIUS = 2.5  # cells around a box's centre that may be assigned to it
_CANDIDATES = 10  # best overlaps that say how many cells a box gets, so also the most that it can get
_IOU_COST = 3.0
_OUTSIDE = 1e5  # cost of a cell that lies near the centre or inside the box, but not both
_MAX_LOG = 8.0  # exp of more would be wider than any image; keeps an untrained network finite


@dataclass(frozen=True)
class Predictions:
    """Raw outputs of all levels side by side, float32.

    Attributes:
        raw: `(N, 4, A)` dx, dy, log w, log h in cells.
        objectness: `(N, A)` logits.
        classes: `(N, C, A)` logits.
        boxes: `(N, 4, A)` centre x, y, w, h in pixels.
        corners: `(2, A)` pixels, upper left of each cell.
        strides: `(A,)` pixels.
    """

    raw: Tensor
    objectness: Tensor
    classes: Tensor
    boxes: Tensor
    corners: Tensor
    strides: Tensor

    @staticmethod
    def of(outputs: Outputs) -> Predictions:
        """Raw outputs, taken apart."""
        flat = torch.cat([level.flatten(2) for level in outputs], dim=2).float()
        corners, strides = cells(tuple((level.shape[2], level.shape[3]) for level in outputs))
        corners, strides = corners.to(flat.device), strides.to(flat.device)
        raw = flat[:, :4]
        centre = raw[:, :2] * strides + corners
        extent = raw[:, 2:].clamp(max=_MAX_LOG).exp() * strides
        boxes = torch.cat((centre, extent), dim=1)
        return Predictions(raw, flat[:, 4], flat[:, 5:], boxes, corners, strides)


@dataclass(frozen=True)
class Assignment:
    """Which cell learns which box.

    Attributes:
        image, cell, box: `(P,)` int64: the cell of that image learns the box of that number in its labels.
        iou: `(P,)` float32, overlap of prediction and box, the target of the box's class score.
    """

    image: Tensor
    cell: Tensor
    box: Tensor
    iou: Tensor


def loss(outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
    """Task loss: objectness of all cells; class, IoU and L1 of the assigned ones; per assigned cell.

    IoU loss is 1 - IoU^2, weighted 5; the class target is the IoU at the box's class, 0 elsewhere. A batch
    with fewer assigned cells than images counts one for each image, so blank images are welcome.
    """
    predictions = Predictions.of(outputs)
    boxes, classes, valid = _padded(labels, predictions.raw.device)
    found = assign(predictions, boxes, classes, valid)
    image, cell = found.image, found.cell
    count = max(len(cell), len(labels))

    target = torch.zeros_like(predictions.objectness)
    target[image, cell] = 1.0
    total = F.binary_cross_entropy_with_logits(predictions.objectness, target, reduction="sum")
    if len(cell):
        truth = boxes[image, found.box]  # (P, 4)
        logits = predictions.classes[image, :, cell]  # (P, C)
        wanted = F.one_hot(classes[image, found.box], logits.shape[1]) * found.iou.unsqueeze(1)
        total = total + F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        overlap = pair_iou(predictions.boxes[image, :, cell].T, truth.T)
        total = total + BOX_WEIGHT * (1 - overlap.square()).sum()
        stride = predictions.strides[cell].unsqueeze(1)
        offset = (truth[:, :2] - predictions.corners[:, cell].T) / stride
        aim = torch.cat((offset, (truth[:, 2:] / stride).clamp(min=1e-3).log()), dim=1)
        total = total + L1_WEIGHT * (predictions.raw[image, :, cell] - aim).abs().sum()
    return total / count


@torch.no_grad()
def assign(predictions: Predictions, boxes: Tensor, classes: Tensor, valid: Tensor) -> Assignment:
    """SimOTA: each box takes the few cells that predict it at the least cost.

    A cell is a candidate of a box when its centre lies in the box or within 2.5 cells of the box's centre.
    A box takes as many candidates as its ten best overlaps sum up to, at least one; the cost is that of
    the class plus 3 times -log IoU, and cells that are not both inside and near come last. A cell wanted
    by several boxes goes to the cheapest, so a box that equals another may end with none.

    Args:
        predictions: of the network.
        boxes: `(N, G, 4)` centre x, y, w, h in pixels, padded.
        classes: `(N, G)` int64.
        valid: `(N, G)`, False where padded.
    """
    centres = predictions.corners + predictions.strides / 2
    middle, extent = boxes[..., :2, None], boxes[..., 2:, None]  # (N, G, 2, 1)
    distance = (centres - middle).abs()  # (N, G, 2, A)
    inside = (distance < extent / 2).all(dim=2)
    near = (distance < _RADIUS * predictions.strides).all(dim=2)
    candidate = (inside | near) & valid.unsqueeze(2)

    iou = pair_iou(predictions.boxes.unsqueeze(1), boxes.unsqueeze(3), dim=2)  # (N, G, A)
    cost = _class_cost(predictions, classes) - _IOU_COST * torch.log(iou + 1e-8)
    cost = (cost + _OUTSIDE * ~(inside & near)).masked_fill(~candidate, torch.inf)

    reach = min(_CANDIDATES, cost.shape[2])
    wanted = iou.masked_fill(~candidate, 0).topk(reach, dim=2).values.sum(dim=2).int().clamp(min=1)
    cheapest = cost.topk(reach, dim=2, largest=False).indices
    taken = torch.arange(reach, device=iou.device) < wanted.unsqueeze(2)
    matched = torch.zeros_like(candidate).scatter_(2, cheapest, taken) & candidate
    # The cheapest of the boxes that want a cell, and only that, gets it.
    image, cell = matched.any(dim=1).nonzero(as_tuple=True)
    box = cost.masked_fill(~matched, torch.inf)[image, :, cell].argmin(dim=1)
    return Assignment(image, cell, box, iou[image, box, cell])


def _class_cost(predictions: Predictions, classes: Tensor) -> Tensor:
    """Cross entropy `(N, G, A)` of the scores with each box's class.

    Over C classes it is that of "no class at all" plus a correction at the class itself, which spares a
    tensor of N x G x A x C.
    """
    scores = (predictions.objectness.sigmoid().unsqueeze(1) * predictions.classes.sigmoid()).sqrt()
    absent = -torch.log1p(-scores.clamp(max=1 - 1e-6))
    present = -torch.log(scores.clamp(min=1e-8))
    index = classes.unsqueeze(2).expand(-1, -1, scores.shape[2])
    return absent.sum(dim=1, keepdim=True) + (present - absent).gather(1, index)


def distillation(outputs: Outputs, teacher: Outputs) -> Tensor:
    """Distance of raw outputs to a teacher's; 0 where they agree, finite for any finite outputs.

    Kullback-Leibler divergence of all objectness scores, that of the class scores weighted by the
    teacher's objectness, and 5 (1 - IoU^2) plus L1 of the boxes weighted by the teacher's best score; all
    over the teacher's sum of objectness, at least one for each image.
    """
    student = Predictions.of(outputs)
    with torch.no_grad():
        wise = Predictions.of(teacher)
        presence = wise.objectness.sigmoid()
        score = presence * wise.classes.amax(dim=1).sigmoid()
        mass = presence.sum().clamp(min=len(presence))
    objectness = divergence(student.objectness, wise.objectness)
    classes = divergence(student.classes, wise.classes).sum(dim=1)
    overlap = pair_iou(student.boxes, wise.boxes, dim=1)
    l1 = (student.raw - wise.raw).abs().sum(dim=1)
    boxes = BOX_WEIGHT * (1 - overlap.square()) + L1_WEIGHT * l1
    return (objectness + presence * classes + score * boxes).sum() / mass


def pair_iou(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Intersection over union of centre x, y, w, h boxes, which lie along `dim`; the rest broadcasts."""
    ax, ay, aw, ah = a.unbind(dim)
    bx, by, bw, bh = b.unbind(dim)
    width = torch.minimum(ax + aw / 2, bx + bw / 2) - torch.maximum(ax - aw / 2, bx - bw / 2)
    height = torch.minimum(ay + ah / 2, by + bh / 2) - torch.maximum(ay - ah / 2, by - bh / 2)
    common = width.clamp(min=0) * height.clamp(min=0)
    return common / (aw * ah + bw * bh - common).clamp(min=1e-9)


def _padded(labels: Sequence[Labels], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes `(N, G, 4)` as centre x, y, w, h, classes `(N, G)` and which are real `(N, G)`."""
    most = max(1, *(len(image.boxes) for image in labels))  # at least one, so that no tensor is empty
    boxes = torch.ones(len(labels), most, 4)
    classes = torch.zeros(len(labels), most, dtype=torch.int64)
    valid = torch.zeros(len(labels), most, dtype=torch.bool)
    for row, image in enumerate(labels):
        count = len(image.boxes)
        first, last = image.boxes[:, :2], image.boxes[:, 2:]
        boxes[row, :count] = torch.cat(((first + last) / 2, last - first), dim=1)
        classes[row, :count] = image.classes
        valid[row, :count] = True
    return boxes.to(device), classes.to(device), valid.to(device)
