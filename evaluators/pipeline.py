"""One candidate's way: prune, fine-tune, export, score, time. A worker runs it stage by stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from evaluators.accuracy import score_session
from evaluators.bench import Bench, BenchConfig
from evaluators.damage import Damage
from evaluators.evaluation import Evaluation, Measurement
from evaluators.exported import ModelCard, model_in
from evaluators.finetune import fine_tune, recalibrate_norms
from evaluators.jobs import Job, StageReport
from evaluators.kernels import by_kind, fell_back, stored_and_run, unseen
from evaluators.latency import PairedLatency
from evaluators.memory import peak_memory_mb
from evaluators.parity import require_parity
from evaluators.qat import as_plain, fake_quantized, rounds_in_training
from evaluators.rungs import TrialRungs
from evaluators.stage_clock import StageClock
from evaluators.targets.base import Predicting, Session
from evaluators.torch_session import TorchSession
from spaces.apply import apply, parameters, save
from spaces.effects import bits_by_layer, integers_by_layer, widths_by_layer
from spaces.layers import count_macs
from spaces.lowrank import by_part
from spaces.methods.base import Draft
from spaces.recipe import Recipe

BASE_FOLDER = "base"
REFERENCE_FILE = "reference.json"


class CandidateWorker:
    """Evaluates candidates of one study, one after another, in this process.

    Args:
        config: of the bench.
        artifacts: folder of the study's model files.
    """

    def __init__(self, config: BenchConfig, artifacts: Path) -> None:
        self.bench, self.artifacts = Bench(config), artifacts
        self._base: Session | None = None
        self._whole = self

    def run(self, job: Job) -> Iterator[StageReport]:
        """Do a job: a `trial`, the `damage` of single choices, or the `probe` of a recipe's latency."""
        worker = self if job.recipe is None else self._at(job.recipe)
        stages = {"trial": worker._trial, "damage": worker._damage, "probe": worker._probe}
        return stages[job.kind](job)

    def _at(self, recipe: Recipe) -> CandidateWorker:
        """This worker with the bench of the recipe's input size; candidates of all meet the same base."""
        with self.bench.slot.computing():
            bench = self.bench.at(recipe)
        if bench is self.bench:
            return self
        resized = copy.copy(self)
        resized.bench, resized._whole = bench, self
        return resized

    # -- trials

    def _trial(self, job: Job) -> Iterator[StageReport]:
        assert job.recipe is not None
        clock, bench, recipe = StageClock(self.bench.slot), self.bench, job.recipe
        folder = self.artifacts / f"trial-{job.number:05d}"
        with bench.slot.computing():
            draft = apply(bench.base, recipe, bench.sites, bench.statistics_for(recipe))
        draft.network.requires_grad_(True)
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
        card, session = self._exported(draft, recipe, folder)
        if recipe.is_identity:
            yield clock.ended("export", "compare with torch")
            with bench.slot.computing():
                require_parity(session, TorchSession(bench.whole(draft.network)), bench.timing_inputs)
            yield clock.ended("compare with torch", "score")
        else:
            yield clock.ended("export", "score")
        figures = self._scored(session)
        yield clock.ended("score", "wait for a quiet moment to time it")
        paired = bench.timed(session, self._base_session())
        yield clock.ended("latency", "")
        metrics = self._metrics(draft, recipe, folder, figures, paired, step_ms, card.runtime.hint)
        with bench.slot.computing():  # the profile loads and runs the model once more
            kernels = session.kernels()
        bits = by_part(draft.network, bits_by_layer(recipe, bench.sites))
        details = {
            "latency": paired.model_dump(mode="json"),
            **_kernels(kernels, bits, bench.capabilities.bit_widths),
            "stored": stored_and_run(bits, card.packed, kernels),
            "layers": self._layers(recipe),
            "factors": {name: [plan.kind, *plan.ranks] for name, plan in draft.factors.items()},
        }
        if isinstance(session, Predicting):
            details["roofline"] = session.roofline.described()
        if recipe.is_identity:
            yield from self._trained_further(job.seed, clock, metrics)
        evaluation = Evaluation(
            recipe_key=recipe.key,
            status="ok",
            metrics=metrics,
            split=str(bench.splits["select"].source),
            artifact=str(model_in(folder)),
            environment=bench.target.signature(bench.config.threads) | {"hint": card.runtime.hint},
            details=details,
            seconds=clock.seconds,
        )
        shown = {name: m.value for name, m in metrics.items()} | {"split": bench.splits["select"].name}
        card.model_copy(update={"figures": shown}).write(folder)
        rungs.clear()
        yield StageReport(stage="done", result=evaluation.model_dump(mode="json"))

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

    def _exported(self, draft: Draft, recipe: Recipe, folder: Path) -> tuple[ModelCard, Session]:
        bench = self.bench
        with bench.slot.computing():
            bits = bits_by_layer(recipe, bench.sites)
            model, card = bench.export(draft.network, bits, recipe, folder, draft.learned)
            save(draft, recipe, folder)
            session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
        return card, session

    def _scored(self, session: Session) -> dict[str, float]:
        bench = self.bench
        with bench.slot.computing():
            figures, _ = score_session(
                session, bench.splits["select"], bench.select, bench.detector.preprocess
            )
        return figures

    def _base_session(self) -> Session:
        whole = self._whole
        if whole._base is None:
            with whole.bench.slot.computing():
                model = whole.bench.base_model(self.artifacts / BASE_FOLDER)
                whole._base = whole.bench.target.prepare(model, whole.bench.config.threads)
        return whole._base

    def _metrics(
        self,
        draft: Draft,
        recipe: Recipe,
        folder: Path,
        figures: dict[str, float],
        paired: PairedLatency,
        step_ms: list[float],
        hint: str,
    ) -> dict[str, Measurement]:
        reference = self._reference(paired, recipe)
        metrics = {
            name: Measurement(value=value, unit="AP, 0..100")
            for name, value in figures.items()
            if value == value
        }
        metrics |= {
            "latency_ratio": Measurement(
                value=paired.ratio, unit="candidate / base", low=paired.low, high=paired.high
            ),
            "latency_ms": Measurement(
                value=paired.ratio * reference,
                unit="ms",
                low=paired.low * reference,
                high=paired.high * reference,
            ),
            "size_mb": Measurement(value=model_in(folder).stat().st_size / 1e6, unit="MB"),
            "params": Measurement(value=parameters(draft.network), unit="parameters"),
            "macs": Measurement(value=self._macs(draft.network), unit="MACs"),
            "peak_memory_mb": Measurement(value=self._memory(model_in(folder), hint), unit="MB"),
        }
        if step_ms:
            metrics["train_step_ms"] = Measurement(value=sum(step_ms) / len(step_ms), unit="ms")
        return metrics

    def _macs(self, network: nn.Module) -> int:
        """Counted, for a spatial split takes fewer than the space says of a factorised layer."""
        with self.bench.slot.computing():
            return count_macs(network, self.bench.detector.preprocess.size)

    def _memory(self, model: Path, hint: str) -> float:
        bench = self.bench
        with bench.slot.computing():
            return peak_memory_mb(
                model, bench.target.name, bench.config.threads, hint, bench.detector.preprocess.size
            )

    def _layers(self, recipe: Recipe) -> dict[str, list[int]]:
        """Of each layer that lost channels: inputs and outputs kept, inputs and outputs removed."""
        sites = self.bench.sites
        widths = widths_by_layer(recipe, sites)
        found = {}
        for name, facts in sites.facts.items():
            inputs, outputs = widths[name]
            if (inputs, outputs) != (facts.inputs, facts.outputs):
                found[name] = [inputs, outputs, facts.inputs - inputs, facts.outputs - outputs]
        return found

    def _reference(self, paired: PairedLatency, recipe: Recipe) -> float:
        """The study's latency of the base, ms: what the base took when it was measured first."""
        file = self.artifacts / BASE_FOLDER / REFERENCE_FILE
        if not file.exists():
            if not recipe.is_identity:
                return paired.base_ms.p50
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"base_ms": paired.base_ms.p50}))
            temporary.replace(file)
        return float(json.loads(file.read_text())["base_ms"])

    def _trained_further(
        self, seed: int, clock: StageClock, metrics: dict[str, Measurement]
    ) -> Iterator[StageReport]:
        """What the base gains from a candidate's budget: a base that still learns would flatter losses."""
        bench = self.bench
        if bench.config.finetune.epochs == 0:
            return
        further = apply(bench.base, bench.identity, bench.sites)
        further.network.requires_grad_(True)
        step_ms: list[float] = []
        yield from self._fine_tune(further.network, seed, clock, step_ms, named="train the base further")
        metrics["train_step_ms"] = Measurement(value=sum(step_ms) / len(step_ms), unit="ms")
        folder = self.artifacts / BASE_FOLDER / "trained-further"
        _, session = self._exported(further, bench.identity, folder)
        gained = self._scored(session)["map"]
        metrics["map_trained_further"] = Measurement(value=gained, unit="AP, 0..100")
        yield clock.ended("score the base trained further", "")

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
        folder = self.artifacts / "probes" / job.recipe.key
        with bench.slot.computing():
            draft = apply(bench.base, job.recipe, bench.sites)
            bits = bits_by_layer(job.recipe, bench.sites)
            model, card = bench.export(draft.network, bits, job.recipe, folder)
            session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
        yield clock.ended("export", "wait for a quiet moment to time it")
        paired = bench.timed(session, self._base_session())
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


def _kernels(kernels: dict[str, str], bits: dict[str, int], native: Sequence[int]) -> dict[str, Any]:
    """Number of executed kernels by precision, and the layers that do not run as the recipe says."""
    return {
        "kernels": by_kind(kernels),
        "fell_back": fell_back(bits, kernels, native),
        "unseen": unseen(bits, kernels),
    }


def worker_factory(config: BenchConfig, artifacts: Path) -> partial[CandidateWorker]:
    """What `search.workers` calls in each process."""
    return partial(CandidateWorker, config, artifacts)
