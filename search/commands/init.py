"""`paredown init`: look at a data set and write a configuration for it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.hints import command
from search.commands.options import require_place, say, tell_licence
from search.files import whole_file

if TYPE_CHECKING:
    from evaluators.datasets.split import DetectionSplit

_TEMPLATE = """\
# {model} on {root}, written by paredown init.
# {categories} categories: {names}

model: {model}
size: [{height}, {width}]        # of the network's input, height and width in pixels
{checkpoint}

data:
  root: {root}
  format: {format}
  fit: {fit}{select}
  report: {report}

space:                   # what may change; also there: {others}
  methods: [{methods}]

target: openvino         # or onnxruntime: the engine that is scored and timed
threads: 1               # of each worker, and of the engine

search:
  trials: 40             # the first one is the base
  workers: {workers}             # candidates at a time; memory for each: about 1.5 GB
  sampler: front         # or tpe, nsga2, nsga3, gp, random, module:Class

finetune:
  epochs: 3              # of each candidate; more recovers more and takes longer
  mirror: true           # false where left and right carry a meaning, as in text

problem:
  limits:
    max_map_drop: 2.0    # AP points: where the trials go; a little more than you will give up
"""


def init(
    model: Annotated[str, typer.Option("--model", help="Detector, such as yolox_nano.", metavar="NAME")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the data set.", metavar="DIR")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Weights of the base: a file, or COCO_V1.", metavar="FILE"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="Of the input, pixels: SIDE or HEIGHTxWIDTH. Default: the detector's usual one."
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", help="Annotations that train and calibrate.", metavar="NAME")
    ] = None,
    select: Annotated[
        str | None, typer.Option("--select", help="Annotations that choose.", metavar="NAME")
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", help="Annotations for the final figures.", metavar="NAME")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Default: MODEL_DATA.yaml here.", metavar="FILE")
    ] = None,
) -> int:
    """Look at a data set (COCO or YOLO layout) and write a configuration that searches on it.

    Annotations are found by their usual names, such as train and val; --fit, --select and --report name
    others.
    """
    from evaluators.datasets.base import DataConfig, load_splits
    from evaluators.datasets.coco import annotation_files
    from spaces.activations import COSTLY
    from spaces.blocks import blocks_of
    from spaces.detectors.own import built
    from spaces.detectors.published import weights_file
    from spaces.detectors.registry import make_detector
    from spaces.detectors.weights import load_weights
    from spaces.errors import InputError
    from spaces.gates import gate_sites
    from spaces.layers import trace_layers
    from spaces.methods.registry import METHODS
    from spaces.proposals import proposal_sites

    root = data.expanduser().absolute()
    file = output or Path(f"{_slug(model)}_{_slug(root.name)}.yaml")
    if file.exists():
        raise InputError("--output", str(file), "is there already; name another file")
    if not file.parent.is_dir():
        raise InputError("--output", str(file), "its folder is missing")
    require_place("--output", file)
    shape = None if size is None else _size(size)
    if ":" not in model:
        make_detector(model, 1, shape)  # an unknown name is refused before much is read
    splits = load_splits(DataConfig(root=root, fit=fit, select=select, report=report))
    for role, split in splits.items():
        say(f"{role}: {len(split.images)} images, {len(split.annotations)} boxes ({split.name})")
    trains = splits["fit"]
    detector = make_detector(model, len(trains.categories), shape)
    tell_licence(model)
    network = built(model, detector)
    if checkpoint is not None:
        weights = weights_file(model, checkpoint.expanduser())
        load_weights(network, weights, detector, trains.categories)
        checkpoint = checkpoint if weights != checkpoint.expanduser() else weights.absolute()
    costly = any(type(module) in COSTLY for module in network.modules())
    facts = trace_layers(network, detector.preprocess.size)
    gates = gate_sites(blocks_of(detector, network.eval(), facts))
    asked = {"activate": costly, "gate": bool(gates), "proposals": bool(proposal_sites(network, facts))}
    methods = ["prune", "quantize", *(kind for kind, there in asked.items() if there), "topk"]
    names = [category.name for category in trains.categories]
    height, width = detector.preprocess.size
    text = _TEMPLATE.format(
        model=model,
        root=_quoted(str(root)),
        categories=len(names),
        names=", ".join(" ".join(name.split()) for name in names[:12]) + (", ..." if len(names) > 12 else ""),
        height=height,
        width=width,
        checkpoint="# checkpoint: FILE       # or --checkpoint FILE: weights trained on these categories"
        if checkpoint is None
        else f"checkpoint: {_quoted(str(checkpoint))}",
        methods=", ".join(methods),
        others=", ".join(kind for kind in METHODS if kind not in methods and asked.get(kind, True)),
        format="coco" if annotation_files(root) else "yolo",
        fit=_quoted(trains.whole) if trains.whole else _described(trains),
        select=f"\n  select_fraction: 0.2   # of fit: {len(splits['select'].images)} images, to choose by"
        if trains.whole
        else f"\n  select: {_described(splits['select'])}",
        report=f"{_described(splits['report'])}, only for the final figures",
        workers=_workers(),
    )
    with whole_file(file) as draft:
        draft.write_text(text, encoding="utf-8")
    say(f"wrote {file}; search with")
    say(f"  {command('search', str(file), *(['--checkpoint', 'FILE'] if checkpoint is None else []))}")
    return 0


def _described(split: DetectionSplit) -> str:
    return f"{_quoted(split.name)}    # {len(split.images)} images"


def _quoted(text: str) -> str:
    """As YAML, quoted only where it must be."""
    import yaml

    return str(yaml.safe_dump(text, width=10_000)).split("\n")[0]


def _size(text: str) -> tuple[int, int]:
    """Height and width of `320` or `256x320`."""
    from spaces.errors import InputError

    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError("--size", text, "write it as SIDE or HEIGHTxWIDTH, such as 320 or 256x320")
    return int(sides[0]), int(sides[-1])


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "data"


def _workers() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
