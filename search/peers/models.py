"""A peer: a file that somebody else's package made of the same base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluators.targets.base import Session
from evaluators.targets.registry import target_named


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
