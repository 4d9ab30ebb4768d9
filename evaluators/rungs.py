"""The rungs of one trial: figures in the middle of its training, and the state to go on from."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluators.bench import Bench
from evaluators.finetune import Epoch
from evaluators.jobs import Job, Rung, StageReport
from evaluators.norms import recalibrate_norms
from evaluators.qat import FakeQuantized, as_plain
from evaluators.stage_clock import StageClock
from evaluators.training_state import TrainingState
from spaces.apply import parameters
from spaces.effects import bits_by_layer
from spaces.layers import count_macs
from spaces.methods.base import Draft
from spaces.recipe import Recipe

CHECKPOINT = "rung.pt"
_EXPORT = "rung"


def forget_rungs(folder: Path) -> None:
    """A trial is trained and measured: the checkpoint in its folder is of no use any more."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


class TrialRungs:
    """The rungs that a trial's job asks for.

    The figures are those of the exported file in the engine, as at the end: rounding to 8 bits costs one
    candidate more than another, and export and scoring take seconds where an epoch takes tens of them.
    What is scored is a copy, and no random number is drawn for it: a trial that passes its rungs ends
    as it would have without them.

    Args:
        bench: of the study.
        draft: the candidate's network, about to be trained.
        recipe: that made it.
        folder: of the trial; holds the checkpoint of the last rung until the trial is trained.
        job: its payload's `rungs` are the epochs; others than 0 up to the last epoch but one are ignored.
    """

    def __init__(self, bench: Bench, draft: Draft, recipe: Recipe, folder: Path, job: Job) -> None:
        self._bench, self._draft, self._recipe, self._folder = bench, draft, recipe, folder
        plan = bench.config.finetune
        self.epochs = {int(k) for k in job.payload.get("rungs", ()) if 0 <= int(k) < plan.epochs}
        self._seed = job.seed
        self.start: TrainingState | None = None
        """Where an interrupted trial goes on; known after `begin`."""
        self.fake: FakeQuantized | None = None
        """Of a network that rounds in training."""

    @cached_property
    def _key(self) -> str:
        """What a checkpoint must have been made for; the folder may hold one of a study that is gone."""
        bench = self._bench
        return json.dumps([self._recipe.key, self._seed, bench.fingerprint()])

    def begin(self, clock: StageClock) -> Iterator[StageReport]:
        """Before the training: the one-shot rung or, of an interrupted trial, its last rung once more."""
        stored = self._read() if (self._folder / CHECKPOINT).is_file() else None
        if stored is not None:
            rung, self.start = stored
            report = clock.ended(f"go on after rung {rung.epochs}", "teacher")
            yield report.model_copy(update={"rung": rung})
        elif 0 in self.epochs:
            network, learned = self._copied()
            if self.fake is None:  # whose norms are measured already
                with self._bench.slot.computing():
                    recalibrate_norms(
                        network, self._bench.detector, self._bench.fit, self._bench.config.finetune.batch_size
                    )
            yield self._reached(0, network, learned, None, clock, "teacher")

    def after(self, epoch: Epoch, clock: StageClock, coming: str) -> StageReport:
        """The rung after an epoch that is one of `epochs`."""
        network, learned = self._copied()
        return self._reached(epoch.number, network, learned, epoch.state(), clock, coming)

    def _copied(self) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the network as it is to be exported, and what was learned of its integer layers."""
        if self.fake is None:
            return copy.deepcopy(self._draft.network), {}
        network, ranges = self.fake.plain_copy()
        return network, as_plain(ranges)

    def _reached(
        self,
        epochs: int,
        network: nn.Module,
        learned: dict[str, Any],
        state: TrainingState | None,
        clock: StageClock,
        coming: str,
    ) -> StageReport:
        rung = Rung(epochs=epochs, figures=self._figures(network, learned))
        with self._bench.slot.computing():
            self._write(rung, state)
        report = clock.ended(f"rung {epochs}", coming)
        return report.model_copy(update={"rung": rung})

    def _figures(self, network: nn.Module, learned: dict[str, Any]) -> dict[str, float]:
        """Of a copy of the network, which is taken over."""
        bench, folder = self._bench, self._folder / _EXPORT
        network.eval().requires_grad_(False)
        draft = replace(self._draft, network=network)
        bits = bits_by_layer(self._recipe, bench.sites)
        with torch.random.fork_rng(devices=[]):
            with bench.slot.computing():
                model, card = bench.export(draft.network, bits, self._recipe, folder, learned)
                session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
            found, _ = bench.scored(session)
            with bench.slot.computing():
                macs = count_macs(network, bench.detector.preprocess.size)
        figures = {
            "map": found["map"],
            "size_mb": model.stat().st_size / 1e6,
            "params": float(parameters(network)),
            "macs": float(macs),
        }
        shutil.rmtree(folder, ignore_errors=True)
        return figures

    def _write(self, rung: Rung, state: TrainingState | None) -> None:
        content = {
            "key": self._key,
            "rung": rung.model_dump(),
            "state": None if state is None else {**vars(state)},
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / (CHECKPOINT + ".tmp")
        torch.save(content, temporary)
        os.replace(temporary, self._folder / CHECKPOINT)

    def _read(self) -> tuple[Rung, TrainingState | None] | None:
        """The last rung and the state behind it; None where there is none that fits."""
        try:
            content: dict[str, Any] = torch.load(self._folder / CHECKPOINT, weights_only=True)
            if content["key"] != self._key:
                return None
            rung, state = Rung.model_validate(content["rung"]), content["state"]
            return rung, None if state is None else TrainingState(**state)
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            return None  # then it begins anew
