"""The YOLOX network: CSPDarknet, PAFPN and a decoupled head (Ge et al. 2021, arXiv 2107.08430).

Module names, and so the keys of the state_dict, are those of the published checkpoints; their spelling
(`C3_p4`, `bu_conv2`) is therefore not ours to choose.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor, nn

from spaces.detectors.base import Outputs
from spaces.detectors.folding import folded

STRIDES = (8, 16, 32)
"""Input pixels per cell of the three levels of raw outputs."""


@lru_cache(maxsize=16)
def cells(shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Upper left corners x, y `(2, A)` and strides `(A,)`, pixels, of all cells of levels of these h, w."""
    corners, strides = [], []
    for (height, width), stride in zip(shapes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        corners.append(torch.stack((x, y)).flatten(1) * float(stride))
        strides.append(torch.full((height * width,), float(stride)))
    return torch.cat(corners, dim=1), torch.cat(strides)


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()  # in place it would copy its input for the backward pass

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class DepthwiseBlock(nn.Module):
    """A depthwise block, then a pointwise one, in the place of one full convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = ConvBlock(inputs, inputs, kernel, stride, groups=inputs)
        self.pconv = ConvBlock(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pconv(self.dconv(x))
        return y


def _spatial(inputs: int, outputs: int, stride: int, depthwise: bool) -> ConvBlock | DepthwiseBlock:
    """A 3x3 block of the kind that the network is made of."""
    block = DepthwiseBlock if depthwise else ConvBlock
    return block(inputs, outputs, 3, stride)


class Bottleneck(nn.Module):
    """1x1, then 3x3, added to its input where `shortcut` says so."""

    def __init__(self, channels: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, channels, 1)
        self.conv2 = _spatial(channels, channels, 1, depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSPLayer(nn.Module):
    """Two halves, one of them through `depth` bottlenecks, joined by a 1x1 (CSPNet, arXiv 1911.11929)."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        hidden = outputs // 2
        self.conv1 = ConvBlock(inputs, hidden, 1)
        self.conv2 = ConvBlock(inputs, hidden, 1)
        self.conv3 = ConvBlock(2 * hidden, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, depthwise) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
        return y


class SPPBottleneck(nn.Module):
    """Max-pooling over 5, 9 and 13 cells beside the identity, between two 1x1 blocks.

    The wider pools are chained out of the 5x5 one, which gives the same values for fewer comparisons.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = inputs // 2
        self.conv1 = ConvBlock(inputs, hidden, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.conv2 = ConvBlock(4 * hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x5 = self.pool(x)
        x9 = self.pool(x5)
        y: Tensor = self.conv2(torch.cat((x, x5, x9, self.pool(x9)), dim=1))
        return y


class Focus(nn.Module):
    """Each 2x2 square of pixels becomes 12 channels, then a 3x3 block."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = ConvBlock(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = x[..., ::2, :], x[..., 1::2, :]
        squares = (top[..., ::2], bottom[..., ::2], top[..., 1::2], bottom[..., 1::2])
        y: Tensor = self.conv(torch.cat(squares, dim=1))
        return y


class CSPDarknet(nn.Module):
    """The backbone; returns the features of strides 8, 16 and 32."""

    def __init__(self, depth: float, width: float, depthwise: bool) -> None:
        super().__init__()
        base, repeats = int(64 * width), max(round(3 * depth), 1)
        self.stem = Focus(base)

        def stage(inputs: int, repeats: int) -> list[nn.Module]:
            return [
                _spatial(inputs, 2 * inputs, 2, depthwise),
                CSPLayer(2 * inputs, 2 * inputs, repeats, True, depthwise),
            ]

        self.dark2 = nn.Sequential(*stage(base, repeats))
        self.dark3 = nn.Sequential(*stage(2 * base, 3 * repeats))
        self.dark4 = nn.Sequential(*stage(4 * base, 3 * repeats))
        self.dark5 = nn.Sequential(
            _spatial(8 * base, 16 * base, 2, depthwise),
            SPPBottleneck(16 * base, 16 * base),
            CSPLayer(16 * base, 16 * base, repeats, False, depthwise),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3 = self.dark3(self.dark2(self.stem(x)))
        c4 = self.dark4(c3)
        return c3, c4, self.dark5(c4)


class PAFPN(nn.Module):
    """Features passed down from coarse to fine and up again (PANet, arXiv 1803.01534)."""

    def __init__(self, depth: float, width: float, depthwise: bool) -> None:
        super().__init__()
        c3, c4, c5 = (int(c * width) for c in (256, 512, 1024))
        repeats = round(3 * depth)
        self.backbone = CSPDarknet(depth, width, depthwise)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = ConvBlock(c5, c4, 1)
        self.C3_p4 = CSPLayer(2 * c4, c4, repeats, False, depthwise)
        self.reduce_conv1 = ConvBlock(c4, c3, 1)
        self.C3_p3 = CSPLayer(2 * c3, c3, repeats, False, depthwise)
        self.bu_conv2 = _spatial(c3, c3, 2, depthwise)
        self.C3_n3 = CSPLayer(2 * c3, c4, repeats, False, depthwise)
        self.bu_conv1 = _spatial(c4, c4, 2, depthwise)
        self.C3_n4 = CSPLayer(2 * c4, c5, repeats, False, depthwise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3, c4, c5 = self.backbone(x)
        top = self.lateral_conv0(c5)
        middle = self.reduce_conv1(self.C3_p4(torch.cat((self.upsample(top), c4), dim=1)))
        p3 = self.C3_p3(torch.cat((self.upsample(middle), c3), dim=1))
        p4 = self.C3_n3(torch.cat((self.bu_conv2(p3), middle), dim=1))
        p5 = self.C3_n4(torch.cat((self.bu_conv1(p4), top), dim=1))
        return p3, p4, p5


class Head(nn.Module):
    """One tower for classes, one for boxes and objectness, at each level."""

    def __init__(self, num_classes: int, width: float, depthwise: bool) -> None:
        super().__init__()
        channels = int(256 * width)

        def towers() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(*(_spatial(channels, channels, 1, depthwise) for _ in range(2)))
                for _ in STRIDES
            )

        def predictors(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in STRIDES)

        self.cls_convs, self.reg_convs = towers(), towers()
        self.cls_preds, self.reg_preds, self.obj_preds = predictors(num_classes), predictors(4), predictors(1)
        self.stems = nn.ModuleList(ConvBlock(int(c * width), channels, 1) for c in (256, 512, 1024))
        prior = -math.log((1 - 0.01) / 0.01)  # all scores start at 1 %, or background would swamp the loss
        for predictor in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(predictor.bias, prior)

    def forward(self, features: tuple[Tensor, ...]) -> Outputs:
        outputs = []
        for level, feature in enumerate(features):
            x = self.stems[level](feature)
            box = self.reg_convs[level](x)
            cls = self.cls_preds[level](self.cls_convs[level](x))
            outputs.append(torch.cat((self.reg_preds[level](box), self.obj_preds[level](box), cls), dim=1))
        return tuple(outputs)


class YoloXNetwork(nn.Module):
    """`(N, 3, H, W)` images to raw outputs, one `(N, 5 + C, H / s, W / s)` for each stride s of 8, 16, 32.

    Channels: dx, dy (cells, from the cell's corner), log w, log h (w, h in cells), objectness logit,
    class logits. H and W are multiples of 32.
    """

    def __init__(self, num_classes: int, depth: float, width: float, depthwise: bool) -> None:
        super().__init__()
        self.backbone = PAFPN(depth, width, depthwise)
        self.head = Head(num_classes, width, depthwise)

    def forward(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.head(self.backbone(images))
        return outputs


def simplified(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with BatchNorm folded and the focus stem as one 6x6 convolution of stride 2.

    Exact up to rounding, for pruned networks, too. Layers keep their names.
    """
    copy = folded(network)
    darknet = copy.get_submodule("backbone.backbone")
    if isinstance(darknet.stem, Focus):
        stem = darknet.stem.conv
        if isinstance(stem.conv, nn.Conv2d):
            stem.conv = _without_focus(stem.conv)
            darknet.stem = nn.Sequential(OrderedDict(conv=stem))
    return copy


def _without_focus(conv: nn.Conv2d) -> nn.Conv2d:
    """The 6x6 convolution over the image that equals `conv` (3x3) over the image's 2x2 squares.

    Tap k of the 3x3 kernel at offset d within a square reads the pixel 2k + d; the squares' channels are
    ordered (dx, dy, colour). Zero padding of one square is zero padding of two pixels.
    """
    wide = nn.Conv2d(3, conv.out_channels, 6, stride=2, padding=2, bias=conv.bias is not None)
    taps = conv.weight.detach().reshape(-1, 2, 2, 3, 3, 3)  # (O, dx, dy, colour, ky, kx)
    wide.weight = nn.Parameter(taps.permute(0, 3, 4, 2, 5, 1).reshape(-1, 3, 6, 6).contiguous())
    if conv.bias is not None:
        wide.bias = nn.Parameter(conv.bias.detach().clone())
    return wide.requires_grad_(conv.weight.requires_grad).eval()
