"""What RetinaNet and FCOS have in common: a ResNet with a pyramid, and one head for all its levels."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from spaces.detectors.base import Postprocess, Preprocess
from spaces.detectors.folding import folded
from spaces.detectors.torchvision_parts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SCALE,
    HeadOutputs,
    anchors_of,
    without_weights,
)
from spaces.errors import InputError

_STRIDE = 32  # of the backbone's coarsest level
_PYRAMID = 256  # channels


@dataclass(frozen=True)
class DenseVariant:
    """A detector of torchvision's parts.

    Attributes:
        make: torchvision's model with fresh weights, from the number of outputs, the background included.
        norm_epsilon: added to the variances of all BatchNorm.
    """

    make: Callable[[int], nn.Module]
    norm_epsilon: float = 1e-5


class DenseDetector(ABC):
    """A detector whose head predicts classes and a box at every anchor of a pyramid.

    Its network's state is that of torchvision's model of the same name. BatchNorm is not frozen: the same
    numbers, and pruned networks can have their statistics measured anew. torchvision gives the background a
    class of its own, the first, although scores are sigmoids; it is kept so that weights fit, and never
    detected.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set, the background not counted.
        size: height and width of the input in pixels, multiples of 32.
        variant: which of torchvision's models.
        postprocess: what the family's scores ask for.

    Raises:
        InputError: a size that is no multiple of 32, or no category.
    """

    multi_label = True
    _outputs: tuple[str, ...]  # of the head, in the order of the raw outputs
    _predictors: tuple[str, ...]  # the head's last layers
    _anchors_per_cell: int

    def __init__(
        self,
        name: str,
        num_classes: int,
        size: tuple[int, int],
        variant: DenseVariant,
        postprocess: Postprocess,
    ) -> None:
        if num_classes < 1:
            raise InputError("num_classes", num_classes, "a detector needs at least one category")
        if min(size) < _STRIDE or any(side % _STRIDE for side in size):
            raise InputError("size", tuple(size), f"height and width must be multiples of {_STRIDE}")
        self.name, self.num_classes, self._variant = name, num_classes, variant
        self.preprocess = Preprocess(size=size, scale=SCALE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.postprocess = postprocess
        self._rules: Any = without_weights(self._model)
        self._anchors, self._level_counts = anchors_of(self._rules, size)

    def _model(self) -> nn.Module:
        return self._variant.make(self.num_classes + 1)

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode."""
        network = HeadOutputs(self._model(), self._outputs)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self._variant.norm_epsilon
        return network

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """The head's last layers."""
        return frozenset(self._predictors)

    def class_layers(self) -> dict[str, tuple[int, int]]:
        """The class predictor; see `Detector`."""
        return {"head.classification_head.cls_logits": (self._anchors_per_cell, 1)}

    def block_of(self, layer: str) -> str:
        """`stem`, `layer1.0` ... `layer4.2`, `fpn.0` ... `fpn.p7`, or a half of the head by its name."""
        parts = layer.split(".")
        if parts[0] == "head":
            return parts[1]
        if parts[1] == "fpn":
            return f"fpn.{parts[3]}"
        return f"{parts[2]}.{parts[3]}" if parts[2].startswith("layer") else "stem"

    def stage_of(self, layer: str) -> str:
        """`stem`, `layer1` ... `layer4`, `fpn` or `head`."""
        block = self.block_of(layer)
        return "head" if block.endswith("_head") else block.split(".")[0]

    def simplified(self, network: nn.Module) -> nn.Module:
        """A copy in evaluation mode with BatchNorm folded into the convolutions before it."""
        return folded(network)


def resnet18_pyramid() -> BackboneWithFPN:
    """A ResNet-18 with the pyramid of strides 8 to 128 that torchvision's models of this kind have."""
    return resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(_PYRAMID, _PYRAMID),
    )


def divergence(logits: Tensor, wise: Tensor) -> Tensor:
    """Kullback-Leibler divergence of sigmoid probabilities from a teacher's, one for each element."""
    return F.softplus(logits) - F.softplus(wise) - wise.sigmoid() * (logits - wise)
