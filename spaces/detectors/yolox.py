"""YOLOX as a Detector: what Paredown must know about the family (Ge et al. 2021, arXiv 2107.08430)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.best_boxes import BestBoxes, best_rows
from spaces.detectors import yolox_loss, yolox_network
from spaces.detectors.base import Labels, Outputs, Preprocess
from spaces.detectors.yolox_network import STRIDES, YoloXNetwork, cells
from spaces.errors import InputError


class YoloX:
    """YOLOX at one depth, width and input size.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set.
        size: height and width of the input in pixels, multiples of 32.
        depth: repeats of the bottlenecks over those of YOLOX-l.
        width: channels over those of YOLOX-l.
        depthwise: depthwise and pointwise convolutions in the place of 3x3 ones.

    Raises:
        InputError: a size that is no multiple of 32, or no category.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        size: tuple[int, int],
        depth: float,
        width: float,
        depthwise: bool = False,
    ) -> None:
        if num_classes < 1:
            raise InputError("num_classes", num_classes, "a detector needs at least one category")
        if min(size) < STRIDES[-1] or any(side % STRIDES[-1] for side in size):
            raise InputError("size", tuple(size), f"height and width must be multiples of {STRIDES[-1]}")
        self.name, self.num_classes = name, num_classes
        self.depth, self.width, self.depthwise = depth, width, depthwise
        self.preprocess = Preprocess(size=size, channel_order="BGR")
        height, width = size
        self._levels = tuple((height // stride, width // stride) for stride in STRIDES)
        self._corners, self._strides = cells(self._levels)

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode."""
        return YoloXNetwork(self.num_classes, self.depth, self.width, self.depthwise)

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """The last convolutions of the head, at all levels."""
        return frozenset(
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and name.split(".")[1].endswith("_preds")
        )

    def block_of(self, layer: str) -> str:
        """`stem`, `dark2.0` ... `dark5.2`, the neck's members such as `C3_p4`, `head.level0` ..."""
        parts = layer.split(".")
        if parts[0] == "head":
            return f"head.level{parts[2]}"
        if parts[1] != "backbone":
            return parts[1]
        return parts[2] if parts[2] == "stem" else ".".join(parts[2:4])

    def stage_of(self, layer: str) -> str:
        """`stem`, `dark2` ... `dark5`, `neck` or `head`."""
        parts = layer.split(".")
        if parts[0] == "head":
            return "head"
        return parts[2] if parts[1] == "backbone" else "neck"

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """SimOTA loss; see `yolox_loss.loss`."""
        return yolox_loss.loss(outputs, labels)

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance to a teacher's raw outputs; see `yolox_loss.distillation`."""
        return yolox_loss.distillation(outputs, teacher)

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, C)` in 0..1.

        A counts the cells of the levels, finest first, row by row. The score of a class is its own
        probability times the objectness. The outputs must be those of images of `preprocess.size`, for
        the cells' places are constants here, which keeps the exported graph small.
        """
        flat = [
            level.reshape(-1, 5 + self.num_classes, height * width)
            for level, (height, width) in zip(outputs, self._levels, strict=True)
        ]
        raw = torch.cat(flat, dim=2)  # (N, 5 + C, A)
        scores = raw[:, 4:5].sigmoid() * raw[:, 5:].sigmoid()
        return self._boxes(raw[:, :4], slice(None)), scores.transpose(1, 2)

    def best_boxes(self, outputs: Outputs, limit: int) -> BestBoxes:
        """The best cells of one image; see `Detector`.

        The best class is that of the largest logit, so the others need no probability. Cells are rows at
        first: engines lay out results of convolutions like that, and take rows fast.
        """
        width = 5 + self.num_classes
        raw = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, width) for level in outputs])  # (A, 5 + C)
        places, logits = raw[:, :5].T, raw[:, 5:]
        scores = places[4].sigmoid() * logits.amax(dim=1).sigmoid()
        rows = best_rows(scores, limit)
        return self._boxes(places[:4, rows], rows), scores[rows], logits[rows].T.argmax(dim=0)

    def _boxes(self, places: Tensor, rows: Tensor | slice) -> Tensor:
        """Boxes `(..., K, 4)` xyxy in pixels of the first four outputs `(..., 4, K)` of some of the cells."""
        strides = self._strides.to(places)[rows]
        centre = places[..., :2, :] * strides + self._corners.to(places)[:, rows]
        half = torch.exp(places[..., 2:, :]) * (strides / 2)
        return torch.cat((centre - half, centre + half), dim=-2).transpose(-2, -1)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        """The class predictors, without background; see `Detector`."""
        return {f"head.cls_preds.{level}": (1, 1) for level in range(len(self._levels))}

    def simplified(self, network: nn.Module) -> nn.Module:
        """BatchNorm folded, the focus stem as one convolution; see `yolox_network.simplified`."""
        return yolox_network.simplified(network)
