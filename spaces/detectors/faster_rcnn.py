"""Faster R-CNN as a Detector: what Paredown must know about it (Ren et al. 2015, arXiv 1506.01497)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spaces.detectors.base import Labels, Outputs, Postprocess, Preprocess
from spaces.detectors.faster_rcnn_loss import FasterRCNNLoss
from spaces.detectors.faster_rcnn_network import BOX_WEIGHTS, FasterRCNNNetwork, decoded
from spaces.detectors.faster_rcnn_variants import Variant
from spaces.detectors.folding import folded
from spaces.detectors.torchvision_parts import IMAGENET_MEAN, IMAGENET_STD, SCALE, without_weights
from spaces.errors import InputError

STRIDE = 32  # of the backbone's coarsest level


class FasterRCNN:
    """Faster R-CNN of one variant at one input size.

    Its network's state is that of torchvision's model of the same name, background first among the
    outputs, so published weights and files of users load. BatchNorm is not frozen: the same numbers, and
    pruned networks can have their statistics measured anew.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set, the background not counted.
        size: height and width of the input in pixels, multiples of 32.
        variant: backbone, heads and number of proposals.

    Raises:
        InputError: a size that is no multiple of 32, or no category.
    """

    multi_label = True
    """A proposal has a box and a score of its own for each class, and each may become a detection."""

    postprocess = Postprocess(nms_iou=0.5)

    def __init__(self, name: str, num_classes: int, size: tuple[int, int], variant: Variant) -> None:
        if num_classes < 1:
            raise InputError("num_classes", num_classes, "a detector needs at least one category")
        if min(size) < STRIDE or any(side % STRIDE for side in size):
            raise InputError("size", tuple(size), f"height and width must be multiples of {STRIDE}")
        self.name, self.num_classes, self._variant = name, num_classes, variant
        self.preprocess = Preprocess(size=size, scale=SCALE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self._loss: FasterRCNNLoss | None = None

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode."""
        variant = self._variant
        model = variant.make(self.num_classes + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = variant.norm_epsilon
        return FasterRCNNNetwork(
            model,
            self.preprocess.size,
            variant.strides,
            variant.proposals,
            variant.candidates,
            variant.score_threshold,
        )

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """The last layers of the proposal network and of the box head."""
        heads = ("rpn.head", "roi_heads.box_predictor")
        names = ("cls_logits", "bbox_pred", "cls_score")
        return frozenset(
            name
            for name, _ in network.named_modules()
            if name.startswith(heads) and name.rpartition(".")[2] in names
        )

    def class_layers(self) -> dict[str, tuple[int, int]]:
        """The box head's last layers: one output a class, and four."""
        predictor = "roi_heads.box_predictor"
        return {f"{predictor}.cls_score": (1, 1), f"{predictor}.bbox_pred": (1, 4)}

    def block_of(self, layer: str) -> str:
        """`stem`, `body.4` or `layer1.0` ..., `fpn.0` ..., `rpn`, `box_head` or `box_predictor`."""
        parts = layer.split(".")
        if parts[0] != "backbone":
            return "rpn" if parts[0] == "rpn" else parts[1]
        if parts[1] == "fpn":
            return f"fpn.{parts[3]}"
        if parts[2].startswith("layer"):
            return f"{parts[2]}.{parts[3]}"
        return f"body.{parts[2]}" if parts[2].isdigit() and parts[2] != "0" else "stem"

    def stage_of(self, layer: str) -> str:
        """`stem`, the backbone's stages, `fpn`, `rpn` or `roi_heads`."""
        parts = layer.split(".")
        if parts[0] != "backbone":
            return parts[0]
        if parts[1] == "fpn":
            return "fpn"
        if not parts[2].isdigit():
            return parts[2] if parts[2].startswith("layer") else "stem"
        number = int(parts[2])  # MobileNetV3's blocks, by the resolution at which they end
        return "stem" if number == 0 else next(s for last, s in _MOBILENET_STAGES if number <= last)

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """Losses of both stages, summed; see `FasterRCNNLoss.task`."""
        return self._losses().task(outputs, labels)

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance to a teacher's raw outputs, whose proposals differ; see `FasterRCNNLoss.distillation`."""
        return self._losses().distillation(outputs, teacher)

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, P, C, 4)` xyxy in input pixels, one for each class, and scores `(N, P, C)` in 0..1.

        Places that no proposal took have a score of 0.
        """
        _, _, proposals, classes, deltas = outputs
        boxes = decoded(deltas[:, :, 1:], proposals.unsqueeze(2), BOX_WEIGHTS)
        taken = (proposals[..., 2:3] > proposals[..., 0:1]).to(classes)
        return boxes, classes.softmax(dim=2)[..., 1:] * taken

    def simplified(self, network: nn.Module) -> nn.Module:
        """A copy in evaluation mode with BatchNorm folded into the convolutions before it."""
        return folded(network)

    def _losses(self) -> FasterRCNNLoss:
        if self._loss is None:
            variant = self._variant
            model = without_weights(lambda: variant.make(self.num_classes + 1))
            self._loss = FasterRCNNLoss(model.rpn, model.roi_heads, self.preprocess.size, variant.strides)
        return self._loss


_MOBILENET_STAGES = ((1, "stage1"), (3, "stage2"), (6, "stage3"), (12, "stage4"), (16, "stage5"))
