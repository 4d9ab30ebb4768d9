"""`paredown evaluate`: COCO figures and latency of a base or of an exported file."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.commands.finish import GONE
from search.commands.hints import of_study
from search.commands.options import (
    DEFAULT_STORAGE,
    AsJson,
    Checkpoint,
    ConfigFile,
    Data,
    OptionalStudyName,
    Seed,
    Storage,
    Threads,
    overrides,
    tell_licence,
)

if TYPE_CHECKING:
    from evaluators.datasets.split import DetectionSplit
    from evaluators.quiet import QuietSlot
    from evaluators.targets.base import Session
    from search.config import SearchConfig
    from spaces.detectors.base import Preprocess

TIMED_IMAGES, TIMED_ROUNDS, WARM_UP = 16, 48, 5


@dataclass(frozen=True)
class Subject:
    """A loaded model and what must be known to feed and describe it."""

    session: Session
    preprocess: Preprocess
    described: dict[str, Any]


def evaluate(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Exported model.onnx (model.json beside it); else the base."),
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", min=0, help="Of --study: the base or a trial of the front.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Engine; default: the model's own.", metavar="NAME")
    ] = None,
    hint: Annotated[
        str | None, typer.Option("--hint", help="OpenVINO's precision hint, f32 or bf16.", metavar="TYPE")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="select, report, fit, or the name of annotations.")
    ] = "report",
    as_json: AsJson = False,
    storage: Storage = DEFAULT_STORAGE,
    study: OptionalStudyName = None,
    threads: Threads = None,
    seed: Seed = None,
) -> int:
    """Score a model on a split: the 12 COCO figures, latency and file size.

    The latency is absolute and of one run, so compare it with nothing of another hour or machine; the
    ratios of a search are what compares.
    """
    import torch

    from evaluators.datasets.base import load_split
    from search.config import load_config
    from spaces.errors import InputError

    changes = overrides(data, checkpoint, threads=threads, seed=seed) | {"name": study}
    settings = load_config(config, changes, needs_weights=model is None and trial is None)
    tell_licence(settings.model)
    if hint not in (None, "f32", "bf16"):
        raise InputError("--hint", hint, "choose f32 or bf16")
    torch.set_num_threads(settings.threads)
    if trial is not None:
        model = _model_of_trial(settings.name, trial, storage)
    images = load_split(settings.data, split)
    with tempfile.TemporaryDirectory() as folder:
        subject = (
            _base(settings, images, target or settings.target, hint, Path(folder))
            if model is None
            else _exported(settings, model, target, hint)
        )
        result = _measured(settings, subject, images)
    print(json.dumps(result, indent=1) if as_json else _as_text(result))
    return 0


def _model_of_trial(study: str, trial: int, storage: str) -> Path:
    from evaluators.exported import model_in
    from search.retention import can_be_made_again, trial_with_model
    from search.study import load_study
    from search.trials import number_of_files
    from spaces.errors import InputError

    opened = load_study(study, url=storage)
    folder = opened.trial_folder(number_of_files(trial_with_model(opened, trial)))
    model = model_in(folder)
    if model.is_file():
        return model
    if not can_be_made_again(folder):
        raise InputError("--trial", trial, GONE)
    remake = of_study("finish", study, storage, "--trial", str(trial), "--output", "DIR")
    remedy = f"only models of the front and the base are kept; make it again with {remake}"
    raise InputError("--trial", trial, remedy)


def _base(
    settings: SearchConfig, split: DetectionSplit, target: str, hint: str | None, folder: Path
) -> Subject:
    """The base, exported in float32 for an engine."""
    from evaluators.postprocess import WholeDetector
    from evaluators.targets.registry import target_named
    from spaces.detectors.base import postprocess_of
    from spaces.detectors.own import built
    from spaces.detectors.registry import make_detector
    from spaces.detectors.weights import load_weights

    _refuse_hint(hint, target)
    engine = target_named(target)
    detector = make_detector(settings.model, len(split.categories), settings.size)
    network = built(settings.model, detector)
    load_weights(network, settings.checkpoint, detector, split.categories)
    network.eval()
    rules = postprocess_of(detector, settings.postprocess)
    whole = WholeDetector(detector.simplified(network), detector, rules, split.categories)
    file = engine.write(whole.eval(), {}, {}, folder).model
    session = engine.prepare(file, settings.threads, hint or "f32")
    described = {"model": str(settings.checkpoint), "target": target, "hint": hint or "f32"}
    return Subject(session, detector.preprocess, {**described, "size_mb": file.stat().st_size / 1e6})


def _refuse_hint(hint: str | None, engine: str) -> None:
    from spaces.errors import InputError

    if hint == "bf16" and engine != "openvino":
        raise InputError("--hint", hint, f"is OpenVINO's, the engine is {engine}")


def _exported(settings: SearchConfig, model: Path, target: str | None, hint: str | None) -> Subject:
    """An exported pair, in the engine that it was made for or in another one."""
    from evaluators.exported import ModelCard
    from evaluators.targets.registry import target_named
    from spaces.errors import InputError

    if not model.is_file():
        raise InputError("--model", str(model), "no such file")
    card = ModelCard.beside(model)
    engine = target or card.runtime.engine
    _refuse_hint(hint, engine)
    hint = hint or card.runtime.hint
    session = target_named(engine).prepare(model, settings.threads, hint)
    megabytes = model.stat().st_size / 1e6
    described = {"model": str(model), "target": engine, "hint": hint, "size_mb": megabytes}
    return Subject(session, card.preprocess, described)


def _measured(settings: SearchConfig, subject: Subject, split: DetectionSplit) -> dict[str, Any]:
    from evaluators.accuracy import score_session
    from evaluators.datasets.letterbox import LetterboxedImages, network_input
    from evaluators.quiet import QuietSlot
    from evaluators.targets.base import Predicting

    look, session = subject.preprocess, subject.session
    images = LetterboxedImages.build(split, look.size, look.pad_value, settings.cache, fit=look.fit)
    slot = QuietSlot()
    with slot.computing():
        figures, _ = score_session(session, split, images, look)
    inputs = [network_input(images.pixels[k : k + 1], look) for k in range(min(TIMED_IMAGES, len(images)))]
    if isinstance(session, Predicting):
        latency = {"latency_ms_predicted": round(session.predicted_ms, 3)} | session.roofline.described()
    else:
        latency = {"latency_ms_p50": round(_timed(session, inputs, slot), 3)}
    return {
        **subject.described,
        "split": split.origin,
        "split_name": split.name,
        "images": len(split.images),
        "threads": settings.threads,
        **{name: None if value != value else round(value, 3) for name, value in figures.items()},
        **latency,
    }


def _timed(session: Session, inputs: list[Any], slot: QuietSlot) -> float:
    """Median of some runs while the machine is quiet, milliseconds."""
    milliseconds = []
    with slot.quiet():
        for k in range(WARM_UP + TIMED_ROUNDS):
            before = time.perf_counter()
            session.run(inputs[k % len(inputs)])
            milliseconds.append((time.perf_counter() - before) * 1e3)
    return median(milliseconds[WARM_UP:])


def _as_text(result: dict[str, Any]) -> str:
    from evaluators.accuracy import FIGURES

    lines = [
        f"{result['model']}: {result['target']}, {result['hint']}, {result['threads']} thread(s), "
        f"{result['size_mb']:.2f} MB",
        f"on {result['split']} ({result['split_name']}, {result['images']} images)",
    ]
    for name in FIGURES:
        value = result[name]
        lines.append(f"  {name:<12} {'no such objects' if value is None else f'{value:6.2f}'}")
    if "latency_ms_p50" in result:
        lines.append(
            f"  latency      {result['latency_ms_p50']:6.2f} ms, median of this one run, whole detector"
        )
    else:
        lines.append(f"  latency      {result['latency_ms_predicted']:6.2f} ms, predicted, not measured:")
        lines.append(
            f"               {result['share']:.0%} of the roofline, {result['attained_gmacs']:.1f} of "
            f"{result['peak_gmacs']:.1f} GMAC/s"
        )
    return "\n".join(lines)
