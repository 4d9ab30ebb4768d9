"""The Detector protocol: what Paredown must know about a family of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Category:
    """A category of the data set, with the id that its annotations use."""

    id: int
    name: str


@dataclass(frozen=True)
class Labels:
    """Ground truth of one image.

    Attributes:
        boxes: `(G, 4)` float32 xyxy, pixels of the letterboxed image.
        classes: `(G,)` int64 in `0..num_classes-1`, positions in the data set's list of categories.
    """

    boxes: Tensor
    classes: Tensor


class Preprocess(BaseModel):
    """From a decoded image to the network's input.

    The image, its pixels as stored (EXIF orientation is not applied), is scaled to fit `size`: keeping its
    aspect (`letterbox`), placed at the top left, the rest filled with `pad_value`, or each side by itself
    (`stretch`). The scaled size is rounded to whole pixels, which are Pillow's bilinear ones: with
    antialiasing, in torch `antialias=True`, and of 8 bits. Channels are ordered as said; then
    `x = (pixel * scale - mean) / std`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int] = Field(description="height, width in pixels")
    channel_order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pad_value: int = 114
    fit: Literal["letterbox", "stretch"] = "letterbox"


class Postprocess(BaseModel):
    """From scored boxes to detections; the same for base, peers and candidates of a study.

    A recipe may lower `pre_nms_topk`, where the space has the method `topk`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    score_threshold: float = Field(default=0.01, ge=0.0, lt=1.0)
    pre_nms_topk: int = Field(default=1000, ge=1)
    nms_iou: float = Field(default=0.65, gt=0.0, le=1.0)
    max_detections: int = Field(default=100, ge=1)


@runtime_checkable
class Detector(Protocol):
    """A family of detectors at one size, for one list of categories. It holds no weights.

    Networks are plain modules: `network(images)` takes `(N, 3, H, W)` float32 and returns raw head
    outputs, a tuple of tensors with N first, the same in training and evaluation mode, traceable.

    Five more attributes are looked for, and may be missing:

    - `multi_label: bool`, True where every pair of a box and a class may become a detection, as in
      torchvision's families; otherwise a box has one label, that of its best class. Boxes may then be
      `(N, A, C, 4)`, one for each class.
    - `postprocess: Postprocess`, what the family's scores ask for; `Postprocess()` where it is missing. A
      configuration's own wins.
    - `best_boxes(outputs, limit) -> BestBoxes`, of the raw outputs of one image what `decode` and
      `best_of_each_box` (`best_pairs` where it is `multi_label`) of `spaces.best_boxes` would give, but
      faster: logits tell which boxes are best, and those alone are decoded.
    - `opaque_modules(network) -> Iterable[str]`, names of modules that keep height and width and whose
      channels stay, as dependencies that are read from them would be wrong: attention that is written with
      views. Where they cannot be followed to an end, they are left alone without being named here.
    - `class_layers() -> Mapping[str, tuple[int, int]]`, the layers whose output channels are
      `(outer, classes, inner)` in that order, background first among the classes where there is one, by
      name, with outer and inner. The classes of a data set are then taken out of weights trained on more.
    """

    name: str
    num_classes: int
    preprocess: Preprocess

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode.

        What has `requires_grad` off in it, such as a fixed filter, is never trained.
        """
        ...

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """Names of the layers whose output channels carry a meaning and must stay."""
        ...

    def block_of(self, layer: str) -> str:
        """The block that a layer belongs to (`granularity: block`)."""
        ...

    def stage_of(self, layer: str) -> str:
        """The stage that a layer belongs to (`granularity: stage`)."""
        ...

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """The task loss, a scalar, averaged over the batch so that its size does not matter."""
        ...

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance of raw outputs to a teacher's on the same images, a scalar, 0 where they agree."""
        ...

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, num_classes)` in 0..1, exportable."""
        ...

    def simplified(self, network: nn.Module) -> nn.Module:
        """A copy in evaluation mode with exact rewrites for inference (BatchNorm folded and the like).

        Module names of the layers that `spaces.sites` names are kept.
        """
        ...


def postprocess_of(detector: Detector, given: Postprocess | None = None) -> Postprocess:
    """`given` by a configuration, else the detector's own, else the usual one."""
    own: Postprocess = getattr(detector, "postprocess", Postprocess())
    return own if given is None else given
