"""Every method on a detector: accuracy before, after one shot and after training, latency in both engines."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig
from evaluators.evaluation import Evaluation
from evaluators.exported import ModelCard, model_in
from evaluators.jobs import Job
from evaluators.kernels import by_kind, fell_back
from evaluators.pipeline import CandidateWorker
from evaluators.targets.base import Detections, Session
from search.benchmarks.method_recipes import recipe_of
from spaces.apply import rebuild
from spaces.detectors.folding import by_module
from spaces.effects import bits_by_layer
from spaces.recipe import Recipe

ENGINES = ("openvino", "onnxruntime")
BRIEF = LatencyConfig(images=1, min_rounds=8, max_rounds=8, time_limit_s=0.1)
"""Of the trials, whose latencies nobody reads: their files are timed afterwards, in each engine."""


class InEngine(BaseModel):
    """A model in an engine.

    Attributes:
        ratio, low, high: latency over that of the base's float32 file there, and the 95 % interval.
        base_ms: of that file in the same batch.
        stable: False where the machine drifted.
        map: AP on report.
        size_mb: of the file.
        kernels: number of layers by the type that the engine's own profile shows.
        fell_back: layers that run in another type than chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float
    low: float
    high: float
    base_ms: float
    stable: bool
    map: float
    size_mb: float
    kernels: dict[str, int]
    fell_back: int


class Row(BaseModel):
    """A method on a detector.

    Attributes:
        key: of the recipe.
        one_shot: AP on report with the BatchNorm statistics measured anew and nothing trained.
        tuned: AP on report after the configuration's brief training; None where the method leaves the
            weights as they are and the search does not train it.
        difference: of the final AP to the base's, with a 95 % interval over the images of report.
        engines: by name.
        seconds: that the row took.
        note: why there are no figures.
        failed: something went wrong, so that another run tries again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    key: str
    one_shot: float | None = None
    tuned: float | None = None
    difference: tuple[float, float, float] | None = None
    engines: dict[str, InEngine] = {}
    seconds: float = 0.0
    note: str = ""
    failed: bool = False


class Section(BaseModel):
    """The rows of one configuration; `key` names all that they depend on besides their recipes."""

    model_config = ConfigDict(extra="forbid")

    name: str
    key: str
    detector: str
    epochs: int
    base_map: float
    base_mb: float
    facts: dict[str, str]
    rows: list[Row] = []


class MethodBench:
    """One detector in all engines, and the worker that trains its candidates as a search does.

    Args:
        name: of the section.
        config: of the bench; its target is the engine whose accuracy counts, and comes first.
        folder: for model files.
        say: takes one line at a time.

    Raises:
        InputError: the configuration cannot be used.
    """

    def __init__(self, name: str, config: BenchConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.name, self._folder, self._say = name, folder, say
        names = dict.fromkeys([config.target, *ENGINES])
        self.engines = {n: Bench(config.model_copy(update={"target": n})) for n in names}
        self.bench = self.engines[config.target]
        brief = config.model_copy(update={"latency": BRIEF})
        untrained = config.finetune.model_copy(update={"epochs": 0})
        self._trained = (CandidateWorker(brief, folder / "trained"), config.finetune.epochs)
        self._one_shot = CandidateWorker(
            brief.model_copy(update={"finetune": untrained}), folder / "one-shot"
        )
        self._report = self.bench.split("report")
        self._bases: dict[str, Session] = {}
        self._found: dict[int, Detections] = {}

    @property
    def key(self) -> str:
        """12 hex digits of what figures depend on; the space that would be searched is not of it."""
        said = {k: str(v) for k, v in self.bench.fingerprint().items() if k != "space"}
        engines = {name: str(b.target.signature(b.config.threads)) for name, b in self.engines.items()}
        return hashlib.sha256(json.dumps([said, engines], sort_keys=True).encode()).hexdigest()[:12]

    def section(self, facts: Mapping[str, str]) -> Section:
        """The section without rows: the base is exported and scored."""
        figures, _ = self.bench.scored(self._base(self.bench.config.target), self._report)
        return Section(
            name=self.name,
            key=self.key,
            detector=self.bench.detector.name,
            epochs=self._trained[1],
            base_map=figures["map"],
            base_mb=_megabytes(self._base_folder(self.bench.config.target)),
            facts=dict(facts),
        )

    def recipe(self, method: str) -> Recipe | None:
        """The recipe of a method here."""
        return recipe_of(method, self.bench)

    def row(self, method: str, number: int) -> Row:
        """Measure a method; what fails is a row that says so.

        Args:
            method: one of `MODERATE`.
            number: of its folders.
        """
        recipe = self.recipe(method)
        if recipe is None:
            return Row(method=method, key="", note="nothing here for it")
        started = time.monotonic()
        try:
            row = self._measured(method, recipe, number)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Row(method=method, key=recipe.key, note=f"failed: {reason}", failed=True)
        return row.model_copy(update={"seconds": time.monotonic() - started})

    def _measured(self, method: str, recipe: Recipe, number: int) -> Row:
        worker, _ = self._trained
        job = Job(kind="trial", name=method, number=number, recipe=recipe, seed=self.bench.config.seed)
        tuned = result_of(worker, job)
        trained = "train_step_ms" in tuned.metrics
        one_shot = None
        if trained:
            file = Path(str(result_of(self._one_shot, job).artifact))
            one_shot = self.bench.scored(session_of(self.bench, file), self._report)[0]["map"]
        folder = Path(str(tuned.artifact)).parent
        engines, found = {}, {}
        for engine in self.engines:
            engines[engine], found[engine] = self._in_engine(engine, folder, number)
        own = self.bench.config.target
        base = self._base_detections()
        final = engines[own].map
        return Row(
            method=method,
            key=recipe.key,
            one_shot=one_shot if trained else final,
            tuned=final if trained else None,
            difference=map_difference_interval(self._report, found[own], base),
            engines=engines,
        )

    def _in_engine(self, engine: str, trial: Path, number: int) -> tuple[InEngine, dict[int, Detections]]:
        """Time and score a trial: its own file, or in another engine one made of its stored state."""
        bench, file = self.engines[engine], model_in(trial)
        recipe, draft = rebuild(bench.detector.build(), trial)
        bits = bits_by_layer(recipe, bench.sites)
        if bench is not self.bench:
            with bench.slot.computing():
                place = self._folder / engine / str(number)
                file, _ = bench.export(draft.network.eval(), bits, recipe, place)
        session = session_of(bench, file)
        self._say(f"  timing it in {engine}")
        paired = bench.timed(session, self._base(engine))
        figures, found = bench.scored(session, self._report)
        with bench.slot.computing():
            kernels = session.kernels()
        asked = by_module(draft.network, bench.detector.simplified(draft.network), bits)
        return (
            InEngine(
                ratio=paired.ratio,
                low=paired.low,
                high=paired.high,
                base_ms=paired.base_ms.p50,
                stable=paired.stable,
                map=figures["map"],
                size_mb=_megabytes(file.parent),
                kernels=by_kind(kernels),
                fell_back=len(fell_back(asked, kernels, bench.capabilities.bit_widths)),
            ),
            found,
        )

    def _base_folder(self, engine: str) -> Path:
        return self._folder / "base" / engine.replace(":", "-").replace("/", "-")

    def _base(self, engine: str) -> Session:
        if engine not in self._bases:
            bench = self.engines[engine]
            with bench.slot.computing():
                file = bench.base_model(self._base_folder(engine))
            self._bases[engine] = session_of(bench, file)
        return self._bases[engine]

    def _base_detections(self) -> dict[int, Detections]:
        if not self._found:
            _, self._found = self.bench.scored(self._base(self.bench.config.target), self._report)
        return self._found


def result_of(worker: CandidateWorker, job: Job) -> Evaluation:
    """Run a job to its end."""
    result = None
    for report in worker.run(job):
        result = report.result or result
    return Evaluation.model_validate(result)


def session_of(bench: Bench, file: Path) -> Session:
    with bench.slot.computing():
        return bench.target.prepare(file, bench.config.threads, ModelCard.beside(file).runtime.hint)


def _megabytes(folder: Path) -> float:
    return model_in(folder).stat().st_size / 1e6
