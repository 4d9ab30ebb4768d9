"""Importance of channels on data, handed to `spaces` as plain numbers."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.quiet import QuietSlot
from evaluators.teacher import batch_of
from spaces.detectors.base import Detector
from spaces.norms import NORMS

Importance = Literal["magnitude", "batchnorm", "taylor"]


def batchnorm_scores(network: nn.Module) -> dict[str, Tensor]:
    """Scales of the norms: `|gamma|` `(channels,)` float64 by normalisation layer.

    Network slimming (Liu et al. 2017, arXiv 1708.06519), without its sparse training beforehand.
    """
    return {name: norm.weight.detach().double().abs() for name, norm in _norms(network).items()}


def taylor_scores(
    network: nn.Module,
    detector: Detector,
    images: LetterboxedImages,
    slot: QuietSlot,
    batches: int = 8,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Squared first-order change of the task loss when a channel's norm output is set to 0.

    `sum over batches of (gamma * dL/dgamma + beta * dL/dbeta)^2` per channel of each normalisation layer
    (Molchanov et al. 2019, arXiv 1906.10771, at gates behind the norm), so that dead channels score 0. A norm
    without beta has the first term alone.

    Args:
        network: the base; left untouched.
        images: of the fit role.

    Returns:
        `(channels,)` float64 by normalisation layer; empty for a network without any, whose channels are
        then judged by magnitude.
    """
    if not _norms(network):
        return {}
    network = copy.deepcopy(network).eval()  # running statistics, as when it serves
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    norms = _norms(network)
    for norm in norms.values():
        for learned in _affine(norm):
            learned.requires_grad_(True)
    scores: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for first in range(0, min(batches * batch_size, len(images)), batch_size):
        indices = np.arange(first, min(first + batch_size, len(images)))
        with slot.computing():
            outputs = network(batch_of(images, detector, indices, mirrored=False))
            loss = detector.loss(outputs, [images.labels(int(k)) for k in indices])
            for norm in norms.values():  # not by network.zero_grad: the weights of frozen ones are buffers
                for learned in _affine(norm):
                    learned.grad = None
            if loss.requires_grad:  # else no norm is on the way to it
                loss.backward()  # type: ignore[no-untyped-call]
        for name, norm in norms.items():
            changes = [one.detach() * one.grad for one in _affine(norm) if one.grad is not None]
            if changes:
                scores[name] = scores[name] + torch.stack(changes).sum(dim=0).double().square()
    return {name: score for name, score in scores.items() if score.dim() == 1}


def _affine(norm: Any) -> list[Tensor]:
    """Its scale, and its shift if it has one."""
    return [norm.weight] if norm.bias is None else [norm.weight, norm.bias]


def _norms(network: nn.Module) -> dict[str, Any]:
    """Normalisation layers with a scale, by name; those of frozen ones are buffers."""
    return {name: m for name, m in network.named_modules() if isinstance(m, NORMS) and m.weight is not None}
