"""`paredown benchmark methods | built | finetune`: what each method is worth on each family."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import (
    RESULTS,
    Checkpoint,
    ConfigFile,
    Data,
    Seed,
    Threads,
    benchmark_command,
    overrides,
    say,
    tell_licence,
)

if TYPE_CHECKING:
    from evaluators.bench import Bench

Output = Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")]


def methods(
    config: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML files of searches.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Default: all; may be repeated.", metavar="NAME")
    ] = None,
    threads: Threads = None,
    output: Output = RESULTS,
) -> int:
    """Every method on every detector: AP before, after one shot and after training; latency in two engines.

    Called again it goes on: rows that are measured under the same configuration, machine and version stay.
    """
    from search.benchmarks.method_recipes import MODERATE
    from search.benchmarks.method_table import measure_methods
    from search.benchmarks.methods import MethodBench
    from search.config import load_config
    from spaces.errors import InputError

    wanted = method or list(MODERATE)
    unknown = [name for name in wanted if name not in MODERATE]
    if unknown:
        raise InputError("--method", unknown[0], f"choose from {', '.join(MODERATE)}")
    report = output / "methods.md"
    settings = [load_config(file, overrides(threads=threads)) for file in config]
    for one in settings:
        tell_licence(one.model)
        with tempfile.TemporaryDirectory() as folder:
            bench = MethodBench(one.name, one.bench, Path(folder), say)
            facts, run = _facts(list(bench.engines.values()))
            measure_methods(report, bench, wanted, facts, run, say)
    say(report.read_text())
    return 0


def built(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a detector.")] = "ssd300_vgg16",
    sparsity: Annotated[float, typer.Option("--sparsity", min=0.0, max=0.875, help="At every site.")] = 0.25,
    rank: Annotated[float, typer.Option("--rank", min=0.05, max=1.0, help="Over the full rank.")] = 0.5,
    bits: Annotated[int, typer.Option("--bits", help="Of every layer.")] = 8,
    target: Annotated[str, typer.Option("--target", help="Engine.", metavar="NAME")] = "openvino",
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Images to time on; default: the digits.", metavar="DIR"),
    ] = None,
    threads: Threads = None,
    seed: Seed = None,
    output: Output = RESULTS,
) -> int:
    """Latency of a detector with random weights, pruned, of low rank and in int8, over its float32 file."""
    from evaluators.datasets.base import DataConfig
    from search.benchmarks.built import built_bench, measure_built, write_built
    from search.comparison import facts_of

    tell_licence(model)
    source = DataConfig(format="digits") if data is None else DataConfig(root=data)
    with tempfile.TemporaryDirectory() as folder:
        bench = built_bench(model, source, target, threads or 1, seed or 0, Path(folder))
        rows = measure_built(bench, sparsity, rank, bits, Path(folder) / "models", say)
    report = output / f"built_{model}.md"
    write_built(report, model, bench.target.name, rows, facts_of(bench, benchmark_command()))
    say(report.read_text())
    return 0


def finetune(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    threads: Threads = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Default: the config's.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, in another order.")] = 1,
    output: Output = RESULTS,
) -> int:
    """Fine-tuning beside a plain torchvision loop on the same recipe: images a second and core, accuracy."""
    from evaluators.bench import Bench
    from search.benchmarks.recipes import exported
    from search.benchmarks.training_speed import compare_training, write_training
    from search.comparison import facts_of
    from search.config import load_config
    from spaces.errors import InputError

    changes = overrides(data, checkpoint, threads=threads) | {"finetune.epochs": epochs}
    settings = load_config(config, changes)
    tell_licence(settings.model)
    if settings.finetune.epochs < 1:
        raise InputError("finetune.epochs", settings.finetune.epochs, "name at least one, or give --epochs")
    bench = Bench(settings.bench)
    with tempfile.TemporaryDirectory() as folder:
        base = exported(bench, bench.identity, Path(folder) / "base")
        figures, _ = bench.scored(base.session, bench.split("report"))
        rows = compare_training(bench, range(seeds), Path(folder) / "model", say)
    report = output / f"finetune_{settings.name}.md"
    title = f"Fine-tuning {settings.name} beside a plain loop"
    facts = facts_of(bench, benchmark_command()) | {"torch": version("torch")}
    write_training(report, title, figures["map"], settings.finetune.epochs, rows, facts)
    say(report.read_text())
    return 0


def _facts(benches: list[Bench]) -> tuple[dict[str, str], dict[str, str]]:
    """Machine, engines and threads; and command and date."""
    from search.comparison import facts_of

    every = [facts_of(bench, benchmark_command()) for bench in benches]
    machine = ("cpu", "isa", "cores", "os", "python", "threads")
    facts = {key: every[0][key] for key in machine if key in every[0]}
    facts["engines"] = " and ".join(dict.fromkeys(one["engine"] for one in every))
    return facts, {key: every[0][key] for key in ("command", "date")}
