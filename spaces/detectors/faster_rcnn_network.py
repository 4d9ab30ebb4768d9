"""Faster R-CNN as a plain module (Ren et al. 2015, arXiv 1506.01497), made of torchvision's parts.

Shapes: N images, A anchors of all levels, P proposals an image, C classes without the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align

from spaces.detectors.base import Outputs
from spaces.suppression import suppress

Size = tuple[int, int]

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""What the box head's deltas are multiplied by, as torchvision's; the proposal network's are plain."""
_LARGEST_LOG = math.log(1000.0 / 16)  # exp of more would be wider than any image
_SMALLEST_SIDE = 1e-3  # pixels
_LEVEL_EPSILON = 1e-6  # octaves, as in torchvision's choice of a box's level
_BORDER = 2  # cells of repeated edge around a level: one that sampling touches, one to the next level


class FasterRCNNNetwork(nn.Module):
    """`(N, 3, H, W)` images to raw outputs of both stages, of fixed shapes.

    1. objectness logits `(N, A)`, 2. deltas of the anchors `(N, A, 4)`, 3. proposals `(N, P, 4)` xyxy in
    pixels, without gradient, best first, 4. class logits `(N, P, C + 1)`, background first, 5. deltas of
    the proposals for each class `(N, P, C + 1, 4)`. Where fewer than P boxes survive suppression, the
    rest are boxes without area at the origin.

    The state is that of torchvision's `FasterRCNN`. P is `roi_heads.proposals` and may change at any time.

    Args:
        model: torchvision's model, whose parts are taken over.
        size: height and width of the images that it is exported for, pixels; others work, too.
        strides: of the backbone's levels, to which the pyramid adds one of twice the last stride.
        proposals: P.
        candidates: best anchors of each level that go into suppression.
        score_threshold: probability of an object that a proposal needs.
    """

    anchors: Tensor

    def __init__(
        self,
        model: TorchvisionFasterRCNN,
        size: Size,
        strides: Sequence[int],
        proposals: int,
        candidates: int,
        score_threshold: float,
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = model.backbone, model.rpn, model.roi_heads
        self.roi_heads.proposals = proposals
        self.candidates, self.score_threshold = candidates, score_threshold
        self._grids = grids_of(size, strides)
        anchors = anchors_of(self.rpn.anchor_generator, size, self._grids)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        size = (int(images.shape[2]), int(images.shape[3]))
        pyramid = self.backbone(images)
        features = list(pyramid.values())
        logits, deltas = self.rpn.head(features)
        counts = [int(level.shape[1] * level.shape[2] * level.shape[3]) for level in logits]
        objectness = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in logits], dim=1)
        shifts = torch.cat(
            [
                level.permute(0, 2, 3, 1).reshape(-1, count, 4)
                for level, count in zip(deltas, counts, strict=True)
            ],
            dim=1,
        )
        with torch.no_grad():
            anchors = self._anchors(size, features)
            proposals = self._propose(objectness.detach(), shifts.detach(), anchors, counts, size)
        pool = self.roi_heads.box_roi_pool
        levels = [level for name, level in pyramid.items() if name in pool.featmap_names]
        crops = pooled(levels, proposals, size, pool)
        classes, boxes = self.roi_heads.box_predictor(self.roi_heads.box_head(crops))
        count = proposals.shape[1]
        outputs = int(classes.shape[1])
        return (
            objectness,
            shifts,
            proposals,
            classes.reshape(-1, count, outputs),
            boxes.reshape(-1, count, outputs, 4),
        )

    def _anchors(self, size: Size, features: Sequence[Tensor]) -> Tensor:
        grids = tuple((int(level.shape[2]), int(level.shape[3])) for level in features)
        if grids == self._grids:
            return self.anchors  # a constant of the exported graph
        return anchors_of(self.rpn.anchor_generator, size, grids).to(self.anchors)

    def _propose(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, counts: Sequence[int], size: Size
    ) -> Tensor:
        """Proposals `(N, P, 4)`: the best anchors of each level, moved, suppressed within their level."""
        best, levels, first = [], [], 0
        for level, count in enumerate(counts):
            if count > self.candidates:
                scores = objectness[:, first : first + count]
                best.append(scores.topk(self.candidates, dim=1).indices + first)
            else:
                everything = torch.arange(first, first + count, device=objectness.device)
                best.append(everything.expand(int(objectness.shape[0]), -1))
            levels += [float(level)] * min(count, self.candidates)
            first += count
        picked = torch.cat(best, dim=1)  # (N, K)
        moves = deltas.gather(1, picked.unsqueeze(2).expand(-1, -1, 4))
        boxes = decoded(moves, anchors[picked])
        corner = torch.tensor([size[1], size[0], size[1], size[0]]).to(boxes)
        boxes = torch.minimum(boxes.clamp(min=0), corner)
        scores = objectness.gather(1, picked).sigmoid()
        large = ((boxes[..., 2:] - boxes[..., :2]) >= _SMALLEST_SIDE).all(dim=2)
        scores = scores * large.to(scores)
        # Levels moved apart by more than the image overlap nowhere: one suppression for all of them.
        apart = torch.tensor(levels).to(boxes).unsqueeze(1) * (max(size) + 1.0)  # (K, 1)
        return torch.stack(
            [
                self._survivors(own, own + apart, score)
                for own, score in zip(boxes.unbind(), scores.unbind(), strict=True)
            ]
        )

    def _survivors(self, boxes: Tensor, apart: Tensor, scores: Tensor) -> Tensor:
        """The P best boxes `(P, 4)` of one image's `(K, 4)`, filled up with zeros."""
        limit = int(self.roi_heads.proposals)
        kept = boxes[suppress(apart, scores, self.rpn.nms_thresh, self.score_threshold, limit)]
        return torch.cat((kept, boxes.new_zeros(limit, 4)))[:limit].reshape(limit, 4)


def grids_of(size: Size, strides: Sequence[int]) -> tuple[Size, ...]:
    """Height and width in cells of each level of the pyramid, the added one last."""
    height, width = size
    grids = [(height // stride, width // stride) for stride in strides]
    return (*grids, (math.ceil(grids[-1][0] / 2), math.ceil(grids[-1][1] / 2)))


def anchors_of(generator: AnchorGenerator, size: Size, grids: Sequence[Size]) -> Tensor:
    """Anchors `(A, 4)` xyxy in pixels, level by level, row by row, those of one cell together."""
    strides = [[size[0] // height, size[1] // width] for height, width in grids]
    anchors: Tensor = torch.cat(generator.grid_anchors([list(grid) for grid in grids], strides))
    return anchors


def decoded(
    deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Boxes `(..., 4)` xyxy moved by deltas `(..., 4)` (Girshick et al. 2014, arXiv 1311.2524, appendix C).

    Deltas are dx, dy in sizes of the box and the logarithms of the growth, each times its weight. The
    shapes broadcast. torchvision's coder does the same, in three times the operations of a graph.
    """
    extent = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + extent / 2
    if set(weights) != {1.0}:
        deltas = deltas / torch.tensor(weights).to(deltas)
    middle = centre + deltas[..., :2] * extent
    half = deltas[..., 2:].clamp(max=_LARGEST_LOG).exp() * (extent / 2)
    return torch.cat((middle - half, middle + half), dim=-1)


def pooled(features: Sequence[Tensor], boxes: Tensor, size: Size, pool: MultiScaleRoIAlign) -> Tensor:
    """RoIAlign of boxes `(N, P, 4)`, each on its level of the pyramid, to `(N * P, channels, h, w)`.

    The same as `pool`, whose rules are used (Lin et al. 2017, arXiv 1612.03144, equation 1), but with
    shapes that do not depend on the boxes: the levels lie below one another in one map, so one RoIAlign
    serves all, and levels for boxes larger than the image are left out. Boxes narrower than a cell at the
    far edge of the image read the repeated edge where `pool` reads zeros.

    Args:
        features: `(N, channels, H / s, W / s)` for strides s, finest first.
        boxes: xyxy in pixels, inside the image.
        size: height and width of the image in pixels.
        pool: says how boxes are shared out among levels, and the size of the crops.
    """
    images, count = int(boxes.shape[0]), int(boxes.shape[1])
    scales = [2.0 ** round(math.log2(int(level.shape[2]) / size[0])) for level in features]
    finest, coarsest = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
    sides = [
        pool.canonical_scale * 2.0 ** (level - pool.canonical_level - _LEVEL_EPSILON)
        for level in range(finest + 1, coarsest + 1)
    ]
    areas = [side**2 for side in sides if side**2 <= size[0] * size[1]]
    flat = boxes.reshape(images * count, 4)
    canvas, scale = features[0], scales[0]
    if areas:
        extent = flat[:, 2:] - flat[:, :2]
        area = (extent[:, 0] * extent[:, 1]).unsqueeze(1)
        level = (area >= torch.tensor(areas).to(area)).sum(dim=1)
        canvas, tops = _one_below_the_other(features[: len(areas) + 1])
        rows = torch.tensor([[0.0, top, 0.0, top] for top in tops]).to(flat)
        shrink = torch.tensor(scales[: len(tops)]).to(flat).unsqueeze(1)
        flat, scale = flat * shrink[level] + rows[level], 1.0
    image = torch.arange(images).repeat_interleave(count).to(flat).unsqueeze(1)
    crops: Tensor = roi_align(
        canvas,
        torch.cat((image, flat), dim=1),
        output_size=pool.output_size,
        spatial_scale=scale,
        sampling_ratio=pool.sampling_ratio,
    )
    return crops


def _one_below_the_other(levels: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """Levels in one map, each with its edge repeated, and the row where each begins."""
    width = int(levels[0].shape[3]) + _BORDER
    padded = [
        nn.functional.pad(level, (0, width - int(level.shape[3]), 0, _BORDER), mode="replicate")
        for level in levels
    ]
    tops = [0.0]
    for level in padded[:-1]:
        tops.append(tops[-1] + int(level.shape[2]))
    return torch.cat(padded, dim=2), tops
