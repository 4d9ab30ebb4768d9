"""Ultralytics YOLO (v8, 11, 26) as a Detector, by their package, which is under AGPL-3.0 and optional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.best_boxes import BestBoxes, best_pairs, best_rows
from spaces.detectors.base import Labels, Outputs, Postprocess, Preprocess
from spaces.detectors.folding import folded
from spaces.detectors.ultralytics_loss import UltralyticsLoss, distillation, joined
from spaces.detectors.ultralytics_network import Generation, build
from spaces.detectors.yolox_network import STRIDES, cells
from spaces.errors import InputError

LICENCE = (
    "built by Ultralytics' package, which is under AGPL-3.0, as their weights are; who serves or passes on "
    "what is made of it must follow that licence, or have their enterprise licence"
)


class UltralyticsYolo:
    """A network of one generation and scale at one input size.

    Their package is imported by `build` and `loss`, not before. The head of v8 and 11 gives a score for each
    class and a distribution of the distance to each side. That of 26 is end-to-end: it gives distances and
    finds each object once, so nothing is suppressed. Images lie at the top left of the input here, in the
    middle of it in their own program; their figures can differ for that.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set.
        size: height and width of the input in pixels, multiples of 32.
        generation: of the family.
        scale: `n`, `s`, `m`, `l` or `x`.

    Raises:
        InputError: a size that is no multiple of 32, or no category.
    """

    multi_label = True
    """Each class of a box may become a detection, as in their validation."""

    def __init__(
        self, name: str, num_classes: int, size: tuple[int, int], generation: Generation, scale: str
    ) -> None:
        if num_classes < 1:
            raise InputError("num_classes", num_classes, "a detector needs at least one category")
        if min(size) < STRIDES[-1] or any(side % STRIDES[-1] for side in size):
            raise InputError("size", tuple(size), f"height and width must be multiples of {STRIDES[-1]}")
        self.name, self.num_classes = name, num_classes
        self.generation, self.scale = generation, scale
        self.preprocess = Preprocess(size=size, scale=1 / 255)
        # Their validation's; IoU 1 suppresses nothing.
        self.postprocess = (
            Postprocess(score_threshold=0.001, nms_iou=1.0, pre_nms_topk=300)
            if generation.end_to_end
            else Postprocess(score_threshold=0.001, nms_iou=0.7)
        )
        height, width = size
        corners, self._strides = cells(tuple((height // stride, width // stride) for stride in STRIDES))
        self._centres = corners + self._strides / 2
        self._criteria: dict[torch.device, UltralyticsLoss] = {}

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode.

        Raises:
            InputError: their package is not installed, or too old.
        """
        return build(self.generation, self.scale, self.num_classes)

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """The last convolutions of the head: box sides and classes, at all levels."""
        prefix = f"model.{self.generation.head}.{self.generation.prefix}"
        return frozenset(f"{prefix}{part}.{level}.2" for part in ("cv2", "cv3") for level in range(3))

    def opaque_modules(self, network: nn.Module) -> tuple[str, ...]:
        """Attention: its heads have fixed sizes."""
        return tuple(name for name, module in network.named_modules() if type(module).__name__ == "Attention")

    def block_of(self, layer: str) -> str:
        """`backbone.0` ..., `neck.12` ..., `head.level0` ... `head.level2`."""
        parts = layer.split(".")
        number = int(parts[1])
        if number == self.generation.head:
            return f"head.level{parts[3]}"
        return f"{'neck' if number >= self.generation.neck else 'backbone'}.{number}"

    def stage_of(self, layer: str) -> str:
        """`stem` (stride 2), `stride4`, `stride8`, `stride16`, `stride32`, `neck` or `head`."""
        number = int(layer.split(".")[1])
        if number >= self.generation.neck:
            return "head" if number == self.generation.head else "neck"
        # The backbone halves the resolution in its layers 0, 1, 3, 5 and 7.
        return ("stem", "stride4", "stride8", "stride16", "stride32")[min((number + 1) // 2, 4)]

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """Their loss; see `UltralyticsLoss`."""
        device = outputs[0].device
        if device not in self._criteria:
            self._criteria[device] = UltralyticsLoss(self.generation, self.num_classes, STRIDES, device)
        return self._criteria[device](outputs, labels)

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance to a teacher's raw outputs; see `ultralytics_loss.distillation`."""
        return distillation(outputs, teacher, self.generation.bins)

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, C)` in 0..1.

        A counts the cells of the levels, finest first, row by row. A side lies at the mean of its distance's
        distribution, in strides from the cell's centre. The outputs must be those of images of
        `preprocess.size`: the cells' places are constants here, which keeps the exported graph small.
        """
        sides, logits, _ = joined(outputs)
        return self._boxes(sides.transpose(1, 2), slice(None)), logits.sigmoid().transpose(1, 2)

    def best_boxes(self, outputs: Outputs, limit: int) -> BestBoxes:
        """The best pairs of a box and a class of one image; see `Detector`.

        Cells are rows from the start: engines lay out results of convolutions like that, and take rows fast.
        """
        levels = len(outputs) // 2
        sides, logits = (
            torch.cat([level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in part])
            for part in (outputs[:levels], outputs[levels:])
        )
        rows = best_rows(logits.amax(dim=1), limit)
        return best_pairs(self._boxes(sides[rows], rows), logits[rows].sigmoid(), limit)

    def _boxes(self, sides: Tensor, rows: Tensor | slice) -> Tensor:
        """Boxes `(..., K, 4)` xyxy in pixels of sides `(..., K, 4 * bins)` of some of the cells."""
        bins = self.generation.bins
        if bins > 1:
            chances = sides.reshape(*sides.shape[:-1], 4, bins).softmax(dim=-1)
            sides = (chances * torch.arange(bins).to(sides)).sum(dim=-1)
        strides, centres = self._strides.to(sides)[rows, None], self._centres.to(sides).T[rows]
        near = centres - strides * sides[..., :2]
        far = centres + strides * sides[..., 2:]
        return torch.cat((near, torch.maximum(near, far)), dim=-1)

    def simplified(self, network: nn.Module) -> nn.Module:
        """A copy in evaluation mode with BatchNorm folded."""
        return folded(network)
