"""Reading and writing weights; no file that is read can run code."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spaces.detectors.base import Category, Detector
from spaces.detectors.classes import with_classes_of
from spaces.errors import InputError

_WRAPPERS = ("ema", "model", "state_dict", "model_state_dict", "module")
"""Keys under which training programs keep the state_dict, one in another."""
_PARALLEL = "module."
"""What torch's wrappers for several devices put before every name."""


class MixedFileError(InputError):
    """A file that holds more than tensors; nothing of it was run."""


def load_weights(
    network: nn.Module,
    path: Path,
    detector: Detector | None = None,
    categories: Sequence[Category] = (),
    start: bool = False,
) -> None:
    """Put the weights of a file into `network`, all of them or none.

    Reads `.safetensors`, and PyTorch files (`.pth`, `.pt`, with `weights_only=True`) that hold a state_dict,
    bare or under `ema`, `model`, `state_dict` and the like; `module.` before every name is taken off where
    the network has none. Half-precision weights become those of the network, and names of older versions of
    torchvision those of today. Where files hold parts that a network does not run, it says so by
    `spare_weights`, the beginnings of names; where inner layers depend on the number of classes, by
    `class_branch`, the same for these, and by `class_rows`, a tensor with a row for each class.

    Args:
        network: takes the weights.
        path: of the file.
        detector: of the network. With it, files that were trained on more classes give those of the
            categories, see `spaces.detectors.classes`.
        categories: of the data set, in the order of the network's classes.
        start: training begins with these weights, so that classes which they lack may stay as they are.

    Raises:
        InputError: the file is missing, damaged, holds more than tensors, or does not fit the network.
    """
    spare: tuple[str, ...] = getattr(network, "spare_weights", ())
    weights = {name: value for name, value in read_weights(path).items() if not name.startswith(spare)}
    expected = network.state_dict()
    if not weights.keys() & expected.keys() and all(name.startswith(_PARALLEL) for name in weights):
        weights = {name.removeprefix(_PARALLEL): value for name, value in weights.items()}
    if weights.keys() - expected.keys():
        weights = _with_new_names(network, weights)
    if detector is not None:
        try:
            weights = with_classes_of(weights, expected, detector, categories, start)
        except InputError as error:
            raise InputError(error.field, str(path), error.remedy) from None
    weights = _under_all_names(weights, expected)
    missing = sorted(k for k in expected.keys() - weights.keys() if not k.endswith("num_batches_tracked"))
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{len(missing)} weights are missing, {missing[0]} first"] if missing else []
        parts += [f"{len(unknown)} are unknown, {unknown[0]} first"] if unknown else []
        raise InputError("checkpoint", str(path), f"made for another model: {' and '.join(parts)}")
    others = [k for k, value in weights.items() if value.shape != expected[k].shape]
    if others:
        raise InputError("checkpoint", str(path), _mismatch(network, others, weights, expected))
    parameters = _parameters(network)
    broken = [
        name
        for name, value in weights.items()
        if not bool((value.isfinite() | _open(expected[name], name in parameters)).all())
    ]
    if broken:
        raise InputError("checkpoint", str(path), f"holds values that are not finite, in {broken[0]} first")
    network.load_state_dict({**expected, **weights})


def _parameters(network: nn.Module) -> set[str]:
    """Names of what is learned, those of shared parameters all; the others of a state_dict are buffers."""
    return {name for name, _ in network.named_parameters(remove_duplicate=False)}


def _open(own: Tensor, learned: bool) -> Tensor:
    """Where a file may hold what is not finite: where the network's own buffer does, a mask of -inf."""
    own = own.cpu()
    return torch.zeros_like(own, dtype=torch.bool) if learned else ~own.isfinite()


def _under_all_names(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a network has under several names, of which files may hold one."""
    by_place: dict[tuple[int, torch.Size], str] = {}
    for name in expected.keys() & weights.keys():
        by_place[expected[name].data_ptr(), expected[name].shape] = name
    places = {name: (value.data_ptr(), value.shape) for name, value in expected.items() if value.numel()}
    same = {name: by_place[at] for name, at in places.items() if name not in weights and at in by_place}
    return weights | {name: weights[other] for name, other in same.items()}


def save_weights(network: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights as safetensors, whole or not at all.

    Args:
        network: whose they are.
        path: of the file.
        dtype: of floating-point parameters, where one is given; those that hold more than it can stay what
            they are. So do buffers: statistics, and what a network computes with, such as the middles of
            cells, which half precision would move by up to half a pixel.
    """
    parameters = _parameters(network)
    tensors = {}
    for name, value in network.state_dict().items():
        tensors[name] = value.detach().cpu().contiguous()
        if dtype is not None and name in parameters and value.is_floating_point():
            short = tensors[name].to(dtype)
            if torch.equal(short.isfinite(), tensors[name].isfinite()):
                tensors[name] = short
    write_tensors(tensors, path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as safetensors, whole or not at all.

    What a network has under two names, a layer that two heads share, is written under both.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():  # safetensors refuses tensors that share memory
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(save(apart))  # save_file would make a file that only its owner can read
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, as `load_weights` takes it, by name.

    Raises:
        MixedFileError: the file holds more than tensors.
        InputError: it is missing, damaged, or holds no state_dict.
    """
    if not path.is_file():
        raise InputError("checkpoint", str(path), "no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not (zipfile.is_zipfile(path) or path.read_bytes()[:1] == pickle.PROTO):
            raise InputError("checkpoint", str(path), "is no weights file, or a damaged one") from None
        remedy = "holds more than tensors and was not run; save its state_dict alone, or see paredown convert"
        raise MixedFileError("checkpoint", str(path), remedy) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError):
        raise InputError("checkpoint", str(path), "is no weights file, or a damaged one") from None
    while isinstance(content, Mapping):
        inner = next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(
            "checkpoint", str(path), f"holds no state_dict, bare or under {', '.join(_WRAPPERS)}"
        )
    return dict(content)


def _with_new_names(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As modules of torchvision rename what older versions wrote; unchanged if that does not help."""
    draft = copy.deepcopy(network)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    fitting = {key: value for key, value in weights.items() if shapes.get(key, value.shape) == value.shape}
    try:
        result = draft.load_state_dict(fitting, strict=False)
    except RuntimeError:
        return weights
    if result.unexpected_keys:
        return weights
    kept = {key: value for key, value in weights.items() if key in shapes}
    absent = {*result.missing_keys, *kept}
    return kept | {key: value for key, value in draft.state_dict().items() if key not in absent}


def _mismatch(
    network: nn.Module, others: list[str], weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str:
    """Say what differs; where only the first axis of biased layers does, that is the number of classes."""
    branch, rows = getattr(network, "class_branch", None), getattr(network, "class_rows", None)
    if isinstance(branch, str) and rows in others and all(name.startswith(branch) for name in others):
        return f"has {len(weights[rows])} classes, the data set has {len(expected[rows])}"
    first = others[0]
    ours, theirs = tuple(expected[first].shape), tuple(weights[first].shape)
    only_outputs = all(
        weights[k].ndim == expected[k].ndim and weights[k].shape[1:] == expected[k].shape[1:] for k in others
    )
    class_layers = all("cls_pred" in k for k in others)
    if only_outputs and class_layers:
        return f"has {theirs[0]} classes, the data set has {ours[0]}"
    return f"made for another model: {first} is {theirs}, {ours} is needed ({len(others)} such weights)"
