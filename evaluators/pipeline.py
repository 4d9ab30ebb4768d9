"""One candidate's way: prune, fine-tune, export, score, time. A worker runs it stage by stage."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from evaluators.base_reference import BaseReference
from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig
from evaluators.damage import Damage
from evaluators.evaluation import Measurement
from evaluators.finetune import fine_tune
from evaluators.jobs import HANDED_ON, Job, StageReport, trial_folder
from evaluators.measuring import BASE_FOLDER, FURTHER_FOLDER, Measuring
from evaluators.norms import recalibrate_norms
from evaluators.qat import as_plain, fake_quantized, rounds_in_training
from evaluators.rungs import TrialRungs, forget_rungs
from evaluators.stage_clock import StageClock
from spaces.apply import apply, rebuild, save
from spaces.effects import bits_by_layer, integers_by_layer
from spaces.layers import learning
from spaces.methods.base import Draft
from spaces.recipe import Recipe


class CandidateWorker:
    """Evaluates candidates of one study, one after another, in this process.

    Args:
        config: of the bench.
        artifacts: folder of the study's model files.
        signature: of the target, that latencies of the study are measured under. A machine with another one
            trains candidates and hands them on. None measures here, whatever this machine is.
    """

    def __init__(
        self, config: BenchConfig, artifacts: Path, signature: Mapping[str, Any] | None = None
    ) -> None:
        self.bench, self.artifacts = Bench(config), artifacts
        self.measures = signature is None or dict(signature) == self.bench.target.signature(config.threads)
        self._base = BaseReference(self.bench, artifacts / BASE_FOLDER)

    def run(self, job: Job) -> Iterator[StageReport]:
        """Do a job: a `trial`, the `damage` of single choices, or the `probe` of a recipe's latency.

        `measure` is the second half of a trial whose first half was handed on; a probe is handed on whole.
        """
        worker = self if job.recipe is None else self._at(job.recipe)
        stages = {
            "trial": worker._trial,
            "measure": worker._handed,
            "damage": worker._damage,
            "probe": worker._probe,
        }
        return stages[job.kind](job)

    def _at(self, recipe: Recipe) -> CandidateWorker:
        """This worker with the bench of the recipe's input size; candidates of all meet the same base."""
        with self.bench.slot.computing():
            bench = self.bench.at(recipe)
        if bench is self.bench:
            return self
        resized = copy.copy(self)
        resized.bench = bench
        return resized

    # -- trials

    def _trial(self, job: Job) -> Iterator[StageReport]:
        assert job.recipe is not None
        clock, bench, recipe = StageClock(self.bench.slot), self.bench, job.recipe
        folder = self._folder(job)
        with bench.slot.computing():
            draft = apply(bench.base, recipe, bench.sites, bench.statistics_for(recipe))
        learning(draft.network, bench.frozen)
        aware = rounds_in_training(bench.config.finetune, integers_by_layer(recipe, bench.sites))
        trained = draft.changed or aware  # what only changes its bit-widths keeps its weights
        yield clock.ended("compress", "load the teacher" if trained else "export")
        step_ms: list[float] = []
        rungs = TrialRungs(bench, draft, recipe, folder, job)
        if aware:
            with bench.slot.computing():
                rungs.fake = fake_quantized(bench, draft, recipe)
            yield clock.ended("calibrate", "load the teacher")
        if trained:
            changed = draft.changed_modules if not aware else ()
            yield from self._fine_tune(draft.network, job.seed, clock, step_ms, rungs=rungs, changed=changed)
        if rungs.fake is not None:
            draft.learned = as_plain(rungs.fake.removed())
        if not self.measures:
            with bench.slot.computing():
                save(draft, recipe, folder)
            yield clock.ended("hand on", "")
            yield StageReport(stage="handed on", result=_handed_on(step_ms, clock.seconds))
            return
        yield from self._measured(draft, recipe, job, clock, step_ms)

    def _measured(
        self, draft: Draft, recipe: Recipe, job: Job, clock: StageClock, step_ms: Sequence[float]
    ) -> Iterator[StageReport]:
        """Export, score and time a network whose training is over."""
        folder = self._folder(job)
        further = partial(self._trained_further, job.seed, clock)
        for report in self._measuring.stages(draft, recipe, folder, clock, step_ms, further):
            if report.result is not None:
                forget_rungs(folder)
            yield report

    def _handed(self, job: Job) -> Iterator[StageReport]:
        """The end of a trial that a machine of another signature began."""
        assert job.recipe is not None
        clock = StageClock(self.bench.slot)
        earlier = job.payload[HANDED_ON]
        with self.bench.slot.computing():
            recipe, draft = rebuild(self.bench.detector.build(), self._folder(job))
            draft.network.eval()
        if recipe != job.recipe:
            raise ValueError(f"{self._folder(job)} holds another recipe's network")
        yield clock.ended("take over", "export")
        clock.seconds = {**earlier["seconds"], **clock.seconds}
        yield from self._measured(draft, recipe, job, clock, earlier["step_ms"])

    @property
    def _measuring(self) -> Measuring:
        return Measuring(self.bench, self.artifacts, self._base)

    def _fine_tune(
        self,
        network: nn.Module,
        seed: int,
        clock: StageClock,
        step_ms: list[float],
        named: str = "fine-tune",
        rungs: TrialRungs | None = None,
        changed: Collection[str] = (),
    ) -> Iterator[StageReport]:
        """Train in place, a report an epoch. The teacher's outputs are made by whoever comes first."""
        bench = self.bench
        epochs = bench.config.finetune.epochs
        if epochs == 0:
            with bench.slot.computing():
                recalibrate_norms(network, bench.detector, bench.fit, bench.config.finetune.batch_size)
            yield clock.ended("measure the norms anew", "export")
            return
        if rungs is not None:
            yield from rungs.begin(clock)
        start = None if rungs is None else rungs.start
        teacher = bench.teacher
        yield clock.ended("teacher", f"{named} {1 if start is None else start.epochs + 1}/{epochs}")
        for epoch in fine_tune(
            *(network, bench.detector, bench.fit, teacher, bench.config.finetune, bench.slot),
            seed,
            start,
            changed,
            norms_measured=rungs is not None and rungs.fake is not None,
        ):
            step_ms.append(epoch.step_s * 1e3)
            coming = f"{named} {epoch.number + 1}/{epochs}" if epoch.number < epochs else "export"
            at_rung = rungs is not None and epoch.number in rungs.epochs
            yield clock.ended(
                f"{named} {epoch.number}/{epochs}", f"rung {epoch.number}" if at_rung else coming
            )
            if rungs is not None and at_rung:
                yield rungs.after(epoch, clock, coming)
        network.eval()

    def _trained_further(
        self, seed: int, clock: StageClock, metrics: dict[str, Measurement]
    ) -> Iterator[StageReport]:
        """What the base gains from a candidate's budget: a base that still learns would flatter losses."""
        bench = self.bench
        if bench.config.finetune.epochs == 0:
            return
        further = apply(bench.base, bench.identity, bench.sites)
        learning(further.network, bench.frozen)
        step_ms: list[float] = []
        yield from self._fine_tune(further.network, seed, clock, step_ms, named="train the base further")
        metrics["train_step_ms"] = Measurement(value=sum(step_ms) / len(step_ms), unit="ms")
        folder = self.artifacts / BASE_FOLDER / FURTHER_FOLDER
        _, session = self._measuring.exported(further, bench.identity, folder)
        gained, _ = bench.scored(session)
        metrics["map_trained_further"] = Measurement(value=gained["map"], unit="AP, 0..100")
        yield clock.ended("score the base trained further", "")

    def _folder(self, job: Job) -> Path:
        assert job.number is not None, "a trial has a number"
        return trial_folder(self.artifacts, job.number)

    # -- preparatory jobs

    def _damage(self, job: Job) -> Iterator[StageReport]:
        """Damage of single choices, without training; payload `recipes`: JSON of each."""
        clock = StageClock(self.bench.slot)
        damage = Damage(self.bench)
        yield clock.ended("load", "measure")
        found = {}
        for text in job.payload["recipes"]:
            recipe = Recipe.from_json(text)
            with self.bench.slot.computing():
                found[recipe.key] = damage.of(recipe)
        yield StageReport(stage="measure", result={"damage": found, "seconds": clock.total})

    def _probe(self, job: Job) -> Iterator[StageReport]:
        """Latency of a recipe without training: shapes and bit-widths alone decide it."""
        assert job.recipe is not None
        clock, bench = StageClock(self.bench.slot), self.bench
        if not self.measures:
            yield StageReport(stage="handed on", result=_handed_on([], clock.seconds))
            return
        folder = self.artifacts / "probes" / job.recipe.key
        with bench.slot.computing():
            draft = apply(bench.base, job.recipe, bench.sites)
            bits = bits_by_layer(job.recipe, bench.sites)
            model, card = bench.export(draft.network, bits, job.recipe, folder)
            session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
        yield clock.ended("export", "wait for a quiet moment to time it")
        paired = bench.timed(session, self._base.session)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        result = {
            "recipe": job.recipe.to_json(),
            "ratio": paired.ratio,
            "low": paired.low,
            "high": paired.high,
            "base_ms": paired.base_ms.p50,
        }
        yield StageReport(stage="latency", result=result)


def _handed_on(step_ms: Sequence[float], seconds: dict[str, float]) -> dict[str, Any]:
    return {HANDED_ON: {"step_ms": list(step_ms), "seconds": seconds}}


def worker_factory(
    config: BenchConfig, artifacts: Path, signature: dict[str, Any] | None = None
) -> partial[CandidateWorker]:
    """What `search.workers` calls in each process; see `CandidateWorker`."""
    return partial(CandidateWorker, config, artifacts, signature)
