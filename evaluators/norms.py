"""BatchNorm statistics, measured anew for a network whose layers have changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.teacher import batch_of
from spaces.detectors.base import Detector

NORM_IMAGES = 512
"""That BatchNorm statistics are measured on. YOLOX-nano with hard-swish in three stages, not trained, had
31.1 AP after 64 of them and 31.9 after 337, of 31.6 (on 164 COCO images).
"""
BEFORE_TRAINING = 128
"""The same, of a network that is trained next. An epoch that began with 32, 64, 128, 256 or 512 of them ended
at 32.2, 32.5, 32.3, 32.1 and 32.0 AP (digits, a quarter of all channels gone, means of three seeds), and at
67.8 each where fewer channels were.
"""


def recalibrate_norms(
    network: nn.Module,
    detector: Detector,
    images: LetterboxedImages,
    batch_size: int,
    limit: int = NORM_IMAGES,
    kept: Collection[nn.Module] = (),
) -> None:
    """Measure the BatchNorm statistics anew, as averages over up to `limit` images; weights stay.

    So do the statistics of the norms in `kept`.
    """
    count = min(limit, len(images))
    chunks = norm_chunks(count, batch_size)
    measure_norms(network, (batch_of(images, detector, chunk, mirrored=False) for chunk in chunks), kept)


def norm_chunks(count: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Indices of `count` images in batches of at least 2; a last one alone joins the batch before it.

    A norm behind a global pool has no variance of a single image.
    """
    batch_size = max(batch_size, 2)
    chunks = np.split(np.arange(count), range(batch_size, count, batch_size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [np.concatenate(chunks[-2:])]
    return chunks


def measure_norms(network: nn.Module, batches: Iterable[Tensor], kept: Collection[nn.Module] = ()) -> None:
    """Set the BatchNorm statistics to their averages over batches `(B, 3, H, W)`; ends in evaluation mode.

    Those of the norms in `kept` stay.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m not in kept]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
