"""`paredown benchmark latency | predict | evaluate | quantize | importance | rates | roofline`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    RESULTS,
    Checkpoint,
    ConfigFile,
    Data,
    OptionalStudyName,
    Seed,
    Storage,
    Target,
    Threads,
    benchmark_command,
    config_of,
    overrides,
    say,
    tell_licence,
)

if TYPE_CHECKING:
    from evaluators.bench import Bench
    from search.benchmarks.quietness import Model
    from search.config import SearchConfig

Output = Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")]
Seen = Annotated[int, typer.Option("--seen", min=8, help="Recipes to fit on.")]
Unseen = Annotated[int, typer.Option("--unseen", min=4, help="Recipes to try it on.")]


def latency(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the search; or use --study.")
    ] = None,
    study: OptionalStudyName = None,
    storage: Storage = DEFAULT_STORAGE,
    models: Annotated[int, typer.Option("--models", min=2, help="Models that are timed.")] = 10,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Training processes.")] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    output: Output = RESULTS,
) -> int:
    """Time models idle and beside training workers: those of a study, or random ones of a configuration."""
    from search.benchmarks.quietness import Model, compare_conditions, tensor_times, write_quietness
    from search.benchmarks.recipes import exported

    changes = overrides(data, checkpoint, target, threads, seed)
    with _benchmark("latency", config, changes, output, study, storage) as at:
        bench, settings = at.bench, at.settings
        base = exported(bench, bench.identity, at.folder / "base")
        parts = bench.target.prepare_tensor_part(base.file, settings.threads)
        chosen = _models(bench, study if config is None else None, storage, models, settings.seed, at.folder)
        count = workers or settings.search.workers
        results = compare_conditions(bench, chosen, base.session, count, at.folder / "slot", say)
        tensors = tensor_times(bench, [Model("base", base.session, parts), *chosen], base.session)
        title = f"Latency of {settings.name} in {bench.target.name}, idle and beside training workers"
        write_quietness(at.report, title, results, tensors, count, at.facts)
    return 0


def predict(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    seen: Seen = 32,
    unseen: Unseen = 30,
    output: Output = RESULTS,
) -> int:
    """Fit the latency model on measured random recipes and try it on others."""
    from search.benchmarks.predict import predictions, write_predictions

    with _benchmark("predict", config, overrides(data, checkpoint, target, threads, seed), output) as at:
        tried = predictions(at.bench, seen, unseen, at.settings.seed, at.folder, say)
        title = f"Latency model of {at.settings.name} in {at.bench.target.name}"
        write_predictions(at.report, title, tried, at.facts)
    return 0


def evaluate_profile(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    split: Annotated[str, typer.Option("--split", help="select, report, or annotations.")] = "select",
    output: Output = RESULTS,
) -> int:
    """Profile the scoring of the base: what surrounds the engine, COCO figures, bootstrap, parity."""
    from search.benchmarks.scoring import profile_of, write_profile

    with _benchmark("evaluate", config, overrides(data, checkpoint, target, threads, seed), output) as at:
        found = profile_of(at.bench, at.bench.split(split), at.folder, say)
        write_profile(at.report, f"Scoring {at.settings.name} in {at.bench.target.name}", found, at.facts)
    return 0


def quantize(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    split: Annotated[str, typer.Option("--split", help="select, report, or annotations.")] = "report",
    timed: Annotated[bool, typer.Option("--timed", help="Measure latencies as well.")] = False,
    trained: Annotated[
        bool, typer.Option("--trained", help="Integers after quantisation-aware fine-tuning as well.")
    ] = False,
    output: Output = RESULTS,
) -> int:
    """AP, size and kernels of the base with all its layers at each bit-width, or with codebooks."""
    from search.benchmarks.widths import costs, variants, write_costs

    with _benchmark("quantize", config, overrides(data, checkpoint, target, threads, seed), output) as at:
        images = at.bench.split(split)
        found = costs(at.bench, variants(at.bench, trained), images, at.folder, timed, say)
        title = f"Bit-widths of {at.settings.name} in {at.bench.target.name}"
        write_costs(at.report, title, found, f"{split} ({len(images.images)} images)", at.facts)
    return 0


def importance(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    output: Output = RESULTS,
) -> int:
    """Pruning by each criterion of importance: AP after one shot and after training."""
    from search.benchmarks.criteria import SPARSITIES, compare_criteria, write_criteria

    changes = overrides(data, checkpoint, target, threads, seed)
    with _benchmark("importance", config, changes, output) as at:
        base, rows = compare_criteria(at.bench, SPARSITIES, at.folder, say)
        title = f"Criteria of importance on {at.settings.name}"
        write_criteria(at.report, title, base, at.settings.finetune.epochs, rows, at.facts)
    return 0


def rates(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    rate: Annotated[
        list[float] | None,
        typer.Option("--rate", min=1e-6, help="May be repeated. Default: 0.001 to 0.016, doubled."),
    ] = None,
    output: Output = RESULTS,
) -> int:
    """Fine-tuning at several learning rates: what each brings back of pruned channels."""
    from search.benchmarks.rates import RATES, compare_rates, write_rates
    from spaces.errors import InputError

    with _benchmark("rates", config, overrides(data, checkpoint, target, threads, seed), output) as at:
        epochs = at.settings.finetune.epochs
        if epochs < 1:
            raise InputError("finetune.epochs", epochs, "nothing is trained; name at least one")
        base, rows = compare_rates(at.bench, rate or RATES, at.folder, say)
        write_rates(at.report, f"Learning rates on {at.settings.name}", base, epochs, rows, at.facts)
    return 0


def roofline(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    seen: Seen = 32,
    unseen: Unseen = 30,
    description: Annotated[
        Path | None, typer.Option("--description", help="YAML file to write.", metavar="FILE")
    ] = None,
    output: Output = RESULTS,
) -> int:
    """Fit a description of this machine, for `target: analytic:FILE`, and try it on other recipes."""
    from search.benchmarks.fit_roofline import (
        fit_description,
        recipes_for_roofline,
        write_description,
        write_fit,
    )
    from search.benchmarks.peaks import machine_limits

    with _benchmark("roofline", config, overrides(data, checkpoint, target, threads, seed), output) as at:
        bench = at.bench
        say("measuring what the engine reaches on large convolutions")
        limits = machine_limits(bench)
        first, others = recipes_for_roofline(bench, seen, unseen, at.settings.seed, at.folder, say)
        name = f"{at.facts['cpu']}, {bench.target.name}, {at.settings.threads} thread(s)"
        fitted = fit_description(name, first, bench.capabilities.channel_granule, limits)
        write_description(description or at.report.with_suffix(".yaml"), fitted, at.facts)
        write_fit(at.report, f"Roofline of {name}", fitted, first, others, at.facts)
    return 0


@dataclass(frozen=True)
class _Benchmark:
    """What every benchmark here works with.

    Attributes:
        settings, bench: of the configuration or study.
        folder: empty, gone afterwards.
        report: Markdown file to write.
        facts: machine, versions, command, date.
    """

    settings: SearchConfig
    bench: Bench
    folder: Path
    report: Path
    facts: Mapping[str, str]


@contextmanager
def _benchmark(
    kind: str,
    config: Path | None,
    changes: dict[str, object],
    output: Path,
    study: str | None = None,
    storage: str = "",
) -> Iterator[_Benchmark]:
    """Load what a benchmark needs; show its report at the end."""
    from evaluators.bench import Bench
    from search.comparison import facts_of

    settings = _settings(config, study, storage, changes)
    tell_licence(settings.model)
    bench = Bench(settings.bench)
    report = output / f"{kind}_{settings.name}_{Path(settings.target).stem}.md"
    with tempfile.TemporaryDirectory() as folder:
        yield _Benchmark(settings, bench, Path(folder), report, facts_of(bench, benchmark_command()))
    say(report.read_text())


def _settings(
    config: Path | None, study: str | None, storage: str, changes: dict[str, object]
) -> SearchConfig:
    from search.config import load_config
    from search.study import load_study
    from spaces.errors import InputError

    if config is not None:
        return load_config(config, changes)
    if study is None:
        raise InputError("benchmark", None, "name a configuration or a study")
    return config_of(load_study(study, url=storage), changes)


def _models(
    bench: Bench, study: str | None, storage: str, count: int, seed: int, folder: Path
) -> list[Model]:
    """Models of a study that are on disk, the front first; or random recipes of the space."""
    from evaluators.exported import ModelCard, model_in
    from search.benchmarks.quietness import Model
    from search.benchmarks.recipes import exported
    from search.chosen import chosen_numbers
    from search.judge import base_number
    from search.strategy import probe_recipes
    from search.study import load_study
    from spaces.table import SpaceTable

    target, threads = bench.target, bench.config.threads
    if study is None:
        made = []
        for k, recipe in enumerate(probe_recipes(SpaceTable(bench.space), count, seed)):
            one = exported(bench, recipe, folder / str(k))
            hint = ModelCard.beside(one.file).runtime.hint
            part = target.prepare_tensor_part(one.file, threads, hint)
            made.append(Model(f"recipe {k}", one.session, part, recipe))
        return made
    opened = load_study(study, url=storage)
    base, front = base_number(opened), chosen_numbers(opened)
    others = [trial.number for trial in opened.optuna.get_trials(deepcopy=False)]
    numbers = [n for n in dict.fromkeys([*sorted(front), *others]) if n != base]
    files = {n: model_in(opened.trial_folder(n)) for n in numbers}
    there = [(n, file) for n, file in files.items() if file.is_file()][:count]
    models = []
    for number, file in there:
        card = ModelCard.beside(file)
        session = target.prepare(file, threads, card.runtime.hint)
        part = target.prepare_tensor_part(file, threads, card.runtime.hint)
        models.append(Model(f"trial {number}", session, part, card.recipe))
    return models
