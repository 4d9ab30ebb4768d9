"""PyTorch itself as an engine: a TorchScript file, operator by operator or frozen, on CPU or CUDA."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluators.signature import machine_signature
from evaluators.targets.base import Detections, Written
from spaces.capabilities import Capabilities
from spaces.errors import InputError

if TYPE_CHECKING:  # a process that serves with another engine need not load torch
    import torch

    from evaluators.calibration import LayerRanges
    from evaluators.postprocess import WholeDetector

TORCH_FILE = "model.pt"
ABOUT = "paredown.json"
"""Within the file: the shape of its input, so that it can be run without `model.json`."""
BFLOAT16_ISA = {"avx512_bf16", "amx_bf16", "bf16"}
WARM_UP = 3
"""Runs after which TorchScript's executor has settled on its optimised graph."""


class TorchEngine:
    """TorchScript on one device.

    The file is a TorchScript archive of the whole detector, made by tracing: torch's operators and
    torchvision's `nms` as a program, and the weights. Loading it runs no Python of the file; still, it is
    a program, so load no stranger's. Serving it needs torch, and `import torchvision` for `nms`.

    Args:
        name: in the registry.
        compiled: freeze the program (weights become constants) and keep tensors in channels_last. That
            was the fastest of what torch offers for YOLOX-nano on one thread: inductor took half a minute
            a model to compile for the same speed, `optimize_for_inference` reorders weights in each run.
            Otherwise operators run one by one, as in eager mode, without Python between them.
        device: `cpu` or `cuda`. TF32 stays off: float32 is float32.
    """

    model_file = TORCH_FILE

    def __init__(self, name: str, compiled: bool, device: str = "cpu") -> None:
        self.name, self._compiled, self._device = name, compiled, device

    @cached_property
    def capabilities(self) -> Capabilities:
        """Float32, and bfloat16 where the device has it. Raises InputError where there is no CUDA."""
        import torch

        if self._device == "cuda":
            if not torch.cuda.is_available():
                raise InputError("target", self.name, "no CUDA device here; choose torch or torch-compiled")
            half = torch.cuda.is_bf16_supported()
        else:
            half = bool(BFLOAT16_ISA & set(machine_signature()["isa"]))
        return Capabilities((32, 16) if half else (32,), channel_granule=8)

    def signature(self, threads: int) -> dict[str, Any]:
        """Machine, torch and its version, threads; the GPU and its CUDA where it is one."""
        import torch

        found = machine_signature() | {"engine": f"{self.name} {torch.__version__}", "threads": threads}
        if self._device == "cuda" and torch.cuda.is_available():
            found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        return found

    def write(
        self,
        whole: WholeDetector,
        bits: Mapping[str, int],
        ranges: Mapping[str, LayerRanges],
        directory: Path,
    ) -> Written:
        """Trace the detector; layers at 16 bits hold and compute bfloat16, what lies between them, too.

        It is traced on the device that runs it, for a trace keeps the device of all that it makes anew.
        """
        import torch

        typed = _typed(copy.deepcopy(whole), bits).to(self._device)
        images = torch.zeros(1, 3, *whole.detector.preprocess.size, device=self._device)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / (self.model_file + ".tmp")
        about = {ABOUT: json.dumps({"input": list(images.shape)})}
        script: Any = torch.jit  # its functions have no annotations
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is old and says so; shapes are constant here
            traced = script.trace(typed, (images,), check_trace=False)
            script.save(traced, str(temporary), _extra_files=about)
        os.replace(temporary, directory / self.model_file)
        return Written(directory / self.model_file)

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> TorchEngineSession:
        """Load and warm up. `hint` changes nothing; `threads` is set for the whole process, as torch does.

        Raises:
            InputError: the file is missing or not readable as a model.
        """
        module, shape = self._load(model, threads)
        return TorchEngineSession(module, self._ready(module), shape, self._compiled, self._device)

    def prepare_tensor_part(self, model: Path, threads: int, hint: str = "f32") -> TorchTensorPart:
        """The submodule `network` of the file."""
        module, _ = self._load(model, threads)
        return TorchTensorPart(self._ready(module.network), self._compiled, self._device)

    def _load(self, model: Path, threads: int) -> tuple[Any, tuple[int, ...]]:
        import torch
        import torchvision  # noqa: F401  # registers the operator `nms`

        assert self.capabilities  # raises where there is no such device
        if not model.is_file():
            raise InputError("model", str(model), "no such file")
        torch.set_num_threads(threads)
        about: dict[str, Any] = {ABOUT: ""}
        script: Any = torch.jit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = script.load(str(model), map_location=self._device, _extra_files=about).eval()
            shape = tuple(int(side) for side in json.loads(about[ABOUT])["input"])
        except (RuntimeError, ValueError, KeyError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise InputError("model", str(model), f"torch cannot load it ({reason})") from None
        if self._compiled:
            module = module.to(memory_format=torch.channels_last)
        return module, shape

    def _ready(self, module: Any) -> Any:
        import torch

        if not self._compiled:
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(module.eval())


class TorchEngineSession:
    """A loaded program with its warm-up behind it."""

    def __init__(self, module: Any, ready: Any, shape: tuple[int, ...], compiled: bool, device: str) -> None:
        self._shape = shape
        self._weights = {p.data_ptr(): name for name, p in module.named_parameters()}
        self._module = module  # keeps the weights that `kernels` looks for
        self._runner = _runner(ready, compiled, device)
        for _ in range(WARM_UP):
            self._runner(np.zeros(shape, np.float32))

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector on one preprocessed image `(1, 3, H, W)`."""
        boxes, scores, labels = self._runner(images)
        return Detections(boxes.cpu().numpy(), scores.cpu().numpy(), labels.cpu().numpy())

    def kernels(self) -> dict[str, str]:
        """Types in which torch's dispatcher was asked for each convolution and product."""
        return self._profile

    @cached_property
    def _profile(self) -> dict[str, str]:
        from evaluators.torch_session import executed_types

        types = executed_types(lambda: self._runner(np.zeros(self._shape, np.float32)), self._weights)
        return {name.removeprefix("network.").removesuffix(".weight"): kind for name, kind in types.items()}


class TorchTensorPart:
    """The network of a loaded program."""

    def __init__(self, ready: Any, compiled: bool, device: str) -> None:
        import torch

        self._runner = _runner(ready, compiled, device)
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(self, images: NDArray[np.float32]) -> object:
        """Raw outputs of one preprocessed image `(1, 3, H, W)`, on the device."""
        outputs = self._runner(images)
        self._wait()
        return outputs


def _runner(module: Any, compiled: bool, device: str) -> Callable[[NDArray[np.float32]], Any]:
    """A call from an array to the program's outputs."""
    import torch

    script: Any = torch.jit
    layout = torch.channels_last if compiled else torch.contiguous_format

    def exact() -> AbstractContextManager[Any]:
        if device == "cuda":
            return torch.backends.cudnn.flags(allow_tf32=False)
        return nullcontext()

    def run(images: NDArray[np.float32]) -> Any:
        with torch.inference_mode(), script.optimized_execution(compiled), exact():
            return module(torch.from_numpy(images).to(device).contiguous(memory_format=layout))

    return run


def _typed(typed: WholeDetector, bits: Mapping[str, int]) -> WholeDetector:
    """Layers made to cast what they read to their own type; elsewhere torch promotes types, or is made to.

    Layers whose weights the module around them reads stay float32 with it.
    """
    import torch

    from spaces.layers import READ_BY_PARENT

    strict = (torch.nn.modules.conv._ConvTransposeNd, torch.nn.PReLU, torch.nn.Bilinear, *READ_BY_PARENT)
    if not any(width == 16 for width in bits.values()):
        return typed

    def reads(kind: torch.dtype) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        return lambda _, inputs: tuple(one.to(kind) for one in inputs)

    _untie(typed.network, bits)
    for name, other in typed.network.named_modules():
        if isinstance(other, strict) and name not in bits:
            other.register_forward_pre_hook(reads(torch.float32))
    for layer, width in bits.items():
        if isinstance(typed.network.get_submodule(layer.rpartition(".")[0]), READ_BY_PARENT):
            continue
        kind = torch.bfloat16 if width == 16 else torch.float32
        module = typed.network.get_submodule(layer).to(kind)
        module.register_forward_pre_hook(reads(kind))
    typed.network.register_forward_hook(lambda _, __, outputs: tuple(one.float() for one in outputs))
    return typed


def _untie(network: torch.nn.Module, bits: Mapping[str, int]) -> None:
    """Give layers of their own what modules of several bit-widths share, for it has one type alone."""
    import torch

    widths: dict[torch.nn.Parameter, set[int]] = defaultdict(set)
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            widths[parameter].add(bits.get(name, 32))
    for layer in bits:
        module = network.get_submodule(layer)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if len(widths[parameter]) > 1:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
