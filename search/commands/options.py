"""Options that several commands share, and how they change a configuration."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch and Ray are behind these; `paredown --help` must not wait for them
    from search.config import SearchConfig
    from search.study import SearchStudy

DEFAULT_STORAGE = "sqlite:///runs/paredown.db"
RESULTS = Path("scripts/results")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the search.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of the data set, COCO or YOLO layout.", metavar="DIR")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Weights of the base: a file, or torchvision's by name (COCO_V1).",
        metavar="FILE",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", help="Engine: openvino, onnxruntime, torch, ..., analytic:FILE.", metavar="NAME"
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each worker and engine.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Storage = Annotated[
    str, typer.Option("--storage", help="Database of the studies, a SQLAlchemy URL.", metavar="URL")
]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study.", metavar="NAME")]
OptionalStudyName = Annotated[
    str | None,
    typer.Option("--study", help="Name of the study; default: the config's.", metavar="NAME"),
]
MaxMapDrop = Annotated[
    float | None, typer.Option("--max-map-drop", min=0.0, help="Limit: AP points that may be lost.")
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--limit", help="Further limit such as 'size_mb<=2'; may be repeated.", metavar="TEXT"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def overrides(
    data: Path | None = None,
    checkpoint: Path | None = None,
    target: str | None = None,
    threads: int | None = None,
    seed: int | None = None,
    max_map_drop: float | None = None,
    limits: list[str] | None = None,
) -> dict[str, Any]:
    """The options as overrides of `search.config.load_config`."""
    from search.config import read_limits
    from spaces.errors import InputError

    changes: dict[str, Any] = {
        "data.root": None if data is None else str(data),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "target": target,
        "threads": threads,
        "seed": seed,
        "problem.limits.map_drop": None if max_map_drop is None else ["<=", max_map_drop],
    }
    read = read_limits(limits or [])
    if max_map_drop is not None and "problem.limits.map_drop" in read:
        raise InputError("--max-map-drop", max_map_drop, "there is a --limit of map_drop, too; keep one")
    return changes | read


def config_of(study: SearchStudy, changes: dict[str, Any]) -> SearchConfig:
    """The configuration that a study was searched with, so that its bench can be built again.

    Raises:
        InputError: the study holds none, or a change does not fit.
    """
    from search.config import changed_config
    from search.study import CONFIG
    from spaces.errors import InputError

    document = study.optuna.user_attrs.get(CONFIG)
    if not isinstance(document, dict):
        raise InputError("study", study.name, "holds no configuration; it was not made by paredown search")
    return changed_config(document, changes, f"study {study.name}")


def require_place(field: str, path: Path) -> None:
    """Look at where something is to be written, before work is done for it.

    Raises:
        InputError: `path` itself, where it is a folder, or the nearest one above it that is there cannot be
            written to.
    """
    from spaces.errors import InputError

    place = path.absolute()
    parent = place if place.is_dir() else next(folder for folder in place.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(field, str(path), f"{parent} cannot be written to ({error.strerror})") from None


def benchmark_command() -> str:
    """The command line of a benchmark as a report shows it."""
    given = [word for word in sys.argv[1:] if word != "benchmark"]  # the script leaves it out
    return shlex.join(["paredown", "benchmark", *given])


def benchmark_facts(**versions: str) -> dict[str, str]:
    """What a report says where no one target is behind it: CPU, versions, command and date."""
    from evaluators.signature import machine_signature

    when = time.strftime("%Y-%m-%d %H:%M")
    return {"cpu": machine_signature()["cpu"], **versions, "command": benchmark_command(), "date": when}


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def note(line: str) -> None:
    """Print a line beside the results, to stderr."""
    print(f"paredown: {line}", file=sys.stderr, flush=True)


def tell_licence(model: str) -> None:
    """Say under which licence a detector is, where it is not Paredown's own."""
    from spaces.detectors.registry import licence_of

    licence = licence_of(model)
    if licence is not None:
        note(f"{model} is {licence}")
