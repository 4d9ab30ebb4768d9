"""A detector run by PyTorch itself, as a session: the reference for what engines make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evaluators.postprocess import WholeDetector
from evaluators.targets.base import Detections

KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
PRODUCTS = ("convolution", "_convolution", "mm", "addmm", "bmm", "matmul", "linear")


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
            name: KINDS.get(parameter.dtype, str(parameter.dtype))
            for name, parameter in self._whole.network.named_parameters()
            if name.endswith(".weight")
        }


def executed_types(run: Callable[[], object], weights: Mapping[int, str]) -> dict[str, str]:
    """The type in which each convolution and product was computed, by the name of its weight.

    Operators are seen in torch's dispatcher, so those of a TorchScript program, too. One whose weight is
    not known goes by its own name and number.

    Args:
        run: computes something.
        weights: names by the address of the data.
    """
    watch = _Watch(weights)
    with watch:
        run()
    return watch.types


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self.types: dict[str, str] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = operator.overloadpacket.__name__
        if kind in PRODUCTS:
            tensors = [one for one in args if isinstance(one, Tensor)]
            known = [self._weights[t.data_ptr()] for t in tensors if t.data_ptr() in self._weights]
            weights = [name for name in known if name.endswith(".weight")]
            name = weights[0] if weights else f"{kind} {len(self.types)}"
            read = tensors[1 if kind == "addmm" else 0].dtype
            self.types[name] = KINDS.get(read, str(read))
        return operator(*args, **(kwargs or {}))
