"""`paredown train`: train a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import Seed, require_place, say, tell_licence


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the training.")],
    output: Annotated[
        Path, typer.Option("--output", help="Weights to write, .safetensors; figures go beside them.")
    ],
    folder: Annotated[Path, typer.Option("--folder", help="For the cache and the checkpoint.")] = Path(
        "runs/baselines"
    ),
    start: Annotated[
        Path | None, typer.Option("--start", help="Weights to begin with: a file, or COCO_V1.")
    ] = None,
    score_every: Annotated[
        int, typer.Option("--score-every", min=0, help="Epochs between scores on select, 0 for none.")
    ] = 10,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the training.")] = 1,
    data: Annotated[Path | None, typer.Option("--data", help="Data set, instead of the file's.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="That trains: cpu, or cuda where there is one.")
    ] = "cpu",
    loaders: Annotated[
        int, typer.Option("--loaders", min=0, help="Processes that prepare batches; worth it beside a GPU.")
    ] = 0,
    seed: Seed = None,
) -> int:
    """Train a base model on fit; called again, go on where it stopped."""
    import torch

    from evaluators.baseline import BaselineConfig, train_baseline

    require_place("--output", output)
    require_place("--folder", folder / "checkpoint")
    torch.set_num_threads(threads)
    settings = BaselineConfig.read(config)
    tell_licence(settings.model)
    if seed is not None:
        plan = settings.plan.model_copy(update={"seed": seed})
        settings = settings.model_copy(update={"plan": plan})
    if data is not None:
        chosen = settings.data.model_copy(update={"root": data})
        settings = settings.model_copy(update={"data": chosen})
    train_baseline(settings, output, folder, start, score_every, say, device, loaders)
    return 0
