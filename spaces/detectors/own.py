"""Detectors of users: classes found by `package.module:Class` or `path/of/file.py:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from spaces.detectors.base import Detector
from spaces.detectors.layout import keep_channels_first, takes_channels_last
from spaces.errors import InputError, own_place

MEMBERS = (*Detector.__annotations__, *(name for name in vars(Detector) if not name.startswith("_")))


def own_detector(name: str, num_classes: int, size: tuple[int, int] | None) -> Detector:
    """Make a detector of a class that is not ours.

    Its recipes carry its name: `package.module:Class`, or `file:Class` without the folder, so that studies
    can move with their file.

    Args:
        name: of the class, as in a configuration.
        num_classes: number of categories.
        size: height and width of the input in pixels; None leaves it to the class.

    Raises:
        InputError: the class cannot be imported, cannot be called so, or is no detector.
    """
    factory = imported(name, "model")
    place, _, attribute = name.rpartition(":")
    shown = f"{Path(place).stem}:{attribute}" if place.endswith(".py") else name
    options: dict[str, Any] = {"name": shown, "num_classes": num_classes}
    if size is not None:
        options["size"] = size
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise InputError("model", name, f"must take the keywords {', '.join(options)} ({error})") from error
    except ValueError:
        pass  # it does not say what it takes
    try:
        detector = factory(**options)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError("model", name, f"cannot be made ({_cause(error)})") from error
    missing = [member for member in MEMBERS if not hasattr(detector, member)]
    if missing:
        raise InputError("model", name, f"is no Detector; it lacks {', '.join(missing)}")
    found: Detector = detector
    return found


def built(name: str, detector: Detector) -> nn.Module:
    """The network of a detector; a user's is run once in either memory layout.

    Args:
        name: of the detector, as in a configuration.
        detector: of that name.

    Raises:
        InputError: a user's network cannot be built, fails or cannot be copied, with the place in the user's
            file.
    """
    if ":" not in name:
        return detector.build()
    try:
        network = detector.build()
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError("model", name, f"its build() fails ({_cause(error)})") from error
    try:
        draft = deepcopy(network).eval()
    except Exception as error:  # whatever the user's code raises, or torch for weights that are computed
        raise InputError("model", name, f"its network fails in copy.deepcopy ({_cause(error)})") from error
    require_runs(name, detector, draft)
    if not takes_channels_last(network, detector.preprocess.size):
        keep_channels_first(network)
    return network


def _cause(error: Exception) -> str:
    """What was raised, and where in the user's file."""
    said = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {said}; {own_place(''.join(traceback.format_exception(error)))}"


def require_runs(name: str, detector: Detector, network: nn.Module) -> None:
    """Run a user's network once, on zeros of its size.

    Raises:
        InputError: it fails, with the place in the user's file; or it returns no tuple of tensors.
    """
    height, width = detector.preprocess.size
    at = f"{height} x {width} pixels"
    try:
        with torch.no_grad():
            outputs = network(torch.zeros(1, 3, height, width))
    except Exception as error:  # whatever the user's code raises
        raise InputError("model", name, f"its network fails on an input of {at} ({_cause(error)})") from error
    if not isinstance(outputs, tuple) or not all(isinstance(one, torch.Tensor) for one in outputs):
        returned = type(outputs).__name__
        raise InputError("model", name, f"its network must return a tuple of tensors, not a {returned}")


def located(name: str, folder: Path) -> str:
    """A name with its file, if any, as an absolute path: in `folder`, else in the working directory."""
    place, _, attribute = name.rpartition(":")
    if not place.endswith(".py"):
        return name
    beside = folder / Path(place).expanduser()
    found = beside if beside.is_file() else Path(place).expanduser()
    return f"{found.absolute()}:{attribute}"


def imported(name: str, field: str) -> Callable[..., Any]:
    """A user's class by its name.

    Args:
        name: `package.module:Class` or `path/of/file.py:Class`; the working directory counts.
        field: of the configuration, for the message.

    Raises:
        InputError: no such file, module or class, or it fails while it is imported.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(place), field) if place.endswith(".py") else _from_path(place)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises while it is imported
        cause = str(error).splitlines()[0] if str(error) else ""
        raise InputError(field, name, f"cannot be imported ({type(error).__name__}: {cause})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(field, name, f"cannot be imported ({place} has no class {attribute!r})")
    factory: Callable[..., Any] = found
    return factory


def _from_path(module: str) -> ModuleType:
    """Import by name; the working directory counts, as it does for `python -m`, in every process."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)


def _from_file(file: Path, field: str) -> ModuleType:
    """Import a file once; what lies beside it can be imported, too."""
    file = file.expanduser().absolute()
    if not file.is_file():
        raise InputError(field, str(file), "no such file")
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module  # dataclasses look their module up while it is made
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
