"""A peer: a file that somebody else's package made of the same base."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.targets.base import Session
from evaluators.targets.registry import target_named
from spaces.errors import InputError


@dataclass(frozen=True)
class PeerModel:
    """A model file of a peer, the engine that runs it, and the precision hint that it is run with."""

    name: str
    model: Path
    engine: str = "openvino"
    hint: str = "f32"

    def session(self, threads: int) -> Session:
        """The file in its engine."""
        return target_named(self.engine).prepare(self.model, threads, self.hint)


def installed(module: str, package: str) -> Any:
    """A peer's package.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(package, None, f"cannot be imported ({error}); pip install {package}") from None
