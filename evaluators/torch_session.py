"""A detector run by PyTorch itself, as a session: the reference for what engines make of it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.postprocess import WholeDetector
from evaluators.targets.base import Detections


class TorchSession:
    """A whole detector in evaluation mode, on the device that its weights are on."""

    def __init__(self, whole: WholeDetector) -> None:
        self._whole = whole.eval()
        self._device = whole.category_ids.device

    @torch.inference_mode()
    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector: `(1, 3, H, W)` float32, preprocessed, to final boxes."""
        boxes, scores, labels = self._whole(torch.from_numpy(images).to(self._device))
        return Detections(boxes.cpu().numpy(), scores.cpu().numpy(), labels.cpu().numpy())

    def kernels(self) -> dict[str, str]:
        """PyTorch runs every layer in the type of its weights."""
        return {
            name: {torch.float32: "f32", torch.bfloat16: "bf16"}.get(parameter.dtype, str(parameter.dtype))
            for name, parameter in self._whole.network.named_parameters()
            if name.endswith(".weight")
        }
