"""The one place where a pickle is run: `python -I unpickling.py FILE OUTPUT`, a process of its own.

It imports nothing of Paredown. `conversion` starts it, once a user has said that the file is to be trusted.
It writes the tensors as safetensors and prints nothing; what is wrong goes to stderr in one line, with exit
code 3.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

REFUSED = 3
_WRAPPERS = ("ema", "model", "state_dict")  # where training programs keep networks, the best one first


def main(file: str, output: str) -> int:
    """Read, write, and return the exit code."""
    try:
        content = _loaded(file)
    except ModuleNotFoundError as error:
        root = (error.name or "").split(".")[0]
        remedy = "pip install -e '.[ultralytics]'" if root == "ultralytics" else f"install {root}"
        return _refuse(f"needs the module {error.name} to be read; {remedy}")
    except Exception as error:  # whatever a pickle's own code raises
        return _refuse(f"cannot be unpickled ({type(error).__name__}: {error})")
    state = _state(content)
    if not state:
        return _refuse(f"holds no network and no state_dict, bare or under {', '.join(_WRAPPERS)}")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, output)
    return 0


def _loaded(file: str) -> Any:
    if importlib.util.find_spec("ultralytics") is not None:
        from ultralytics.nn.tasks import torch_safe_load  # knows where classes of older files are now

        return torch_safe_load(file)[0]
    return torch.load(file, map_location="cpu", weights_only=False)


def _state(content: Any) -> dict[str, Tensor]:
    """The tensors of a network, of a state_dict, or of either in a training program's file."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates = [content[key] for key in _WRAPPERS if content.get(key) is not None] + candidates
    for candidate in candidates:
        state = candidate.state_dict() if isinstance(candidate, nn.Module) else candidate
        if isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values()):
            return dict(state)
    return {}


def _refuse(reason: str) -> int:
    print(" ".join(reason.split()), file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
