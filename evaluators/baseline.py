"""From a data set to a baseline: train, score, and write weights with the figures and how they came about."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from evaluators.accuracy import score_session
from evaluators.datasets.base import DataConfig, load_splits
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.postprocess import WholeDetector
from evaluators.torch_session import TorchSession
from evaluators.training import EpochReport, TrainingPlan, train
from spaces.detectors.base import Postprocess, postprocess_of
from spaces.detectors.own import built, located
from spaces.detectors.published import weights_file
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import load_weights, save_weights
from spaces.documents import refused
from spaces.errors import InputError
from spaces.layers import frozen_parameters, learning


class BaselineConfig(BaseModel):
    """What is trained, on what, and how.

    `further` is a candidate's full budget: the baseline is trained on by that much, to see that it gains
    less than half an AP, which is what converged means here. What comes of it is not kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    size: tuple[int, int] | None = None
    data: DataConfig
    plan: TrainingPlan
    further: TrainingPlan | None = None
    postprocess: Postprocess | None = None

    @staticmethod
    def read(path: Path) -> BaselineConfig:
        """Read a YAML file.

        Raises:
            InputError: there is no such file, or it is no such configuration.
        """
        try:
            config = BaselineConfig.model_validate(yaml.safe_load(path.read_text()))
            return config.model_copy(update={"model": located(config.model, path.parent)})
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            raise InputError("config", str(path), "is missing or no YAML file") from None
        except ValidationError as error:
            raise refused(error, str(path), BaselineConfig) from None


def train_baseline(
    config: BaselineConfig,
    output: Path,
    folder: Path,
    start: Path | None = None,
    score_every: int = 0,
    say: Callable[[str], None] = print,
    device: str = "cpu",
    loaders: int = 0,
) -> dict[str, Any]:
    """Train on fit, score on select and report, and write the weights and a JSON of figures beside them.

    Args:
        config: what to train.
        output: the weights, `.safetensors`, parameters in half precision; figures are of what was stored.
        folder: for the images' cache and the checkpoint that a second call goes on from.
        start: weights to begin with, a file or a name that torchvision publishes; classes that they lack
            begin with fresh ones.
        score_every: epochs between scores on select, 0 for none.
        say: takes one line at a time.
        device: that trains, as torch names it.
        loaders: processes that prepare batches, see `evaluators.training.train`.

    Returns:
        What the JSON holds.

    Raises:
        InputError: the configuration, the data or the checkpoint are not as they must be.
    """
    if output.suffix != ".safetensors":
        raise InputError("--output", str(output), "must end in .safetensors")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError("--device", device, "choose cpu, or cuda where there is one") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", device, "torch sees no CUDA device here; choose cpu")
    splits = load_splits(config.data)
    detector = make_detector(config.model, len(splits["fit"].categories), config.size)
    look, rules = detector.preprocess, postprocess_of(detector, config.postprocess)
    images = {
        role: LetterboxedImages.build(split, look.size, look.pad_value, folder / "cache", fit=look.fit)
        for role, split in splits.items()
    }
    torch.manual_seed(config.plan.seed)
    network = built(config.model, detector)
    if start is not None:
        load_weights(network, weights_file(config.model, start), detector, splits["fit"].categories, True)
    network.to(device)

    def figures(role: str, network: nn.Module) -> dict[str, float]:
        whole = WholeDetector(detector.simplified(network), detector, rules, splits[role].categories).to(
            device
        )
        return score_session(TorchSession(whole), splits[role], images[role], look)[0]

    def report(epoch: EpochReport, average: nn.Module) -> None:
        line = f"epoch {epoch.epoch}/{config.plan.epochs}  loss {epoch.loss:.3f}  {epoch.seconds:.1f} s"
        if score_every and epoch.epoch % score_every == 0:
            line += f"  select AP {figures('select', average)['map']:.2f}"
        say(line)

    trained = train(
        detector,
        network,
        images["fit"],
        config.plan,
        folder / f"{output.stem}.checkpoint.pt",
        report,
        loaders,
        "" if start is None else str(start),
    )
    average = trained.network
    save_weights(average, output, torch.float16)
    stored = detector.build()  # a fresh one, for what is infinite in its own buffers may be in the file
    load_weights(stored, output)
    average.load_state_dict(stored.state_dict())
    scores = {role: _rounded(figures(role, average)) for role in ("select", "report")}
    further = None
    if config.further is not None:
        say(f"training on for {config.further.epochs} epochs, to see what it gains")
        onward = learning(deepcopy(average), frozen_parameters(network))
        beyond = train(detector, onward, images["fit"], config.further, loaders=loaders)
        maps = {role: _rounded(figures(role, beyond.network))["map"] for role in scores}
        further = {role: {"map": maps[role], "map_before": scores[role]["map"]} for role in scores}
    result = {
        "model": config.model,
        "parameters": sum(p.numel() for p in average.parameters()),
        "figures": scores,
        "further": further,
        "training_hours": round(trained.seconds / 3600, 2),
        "config": config.model_dump(mode="json"),
        "data": {role: split.fingerprint() for role, split in splits.items()},
        "environment": _environment(device),
        "command": " ".join(sys.argv),
    }
    draft = output.with_suffix(f".json.{os.getpid()}")
    draft.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(draft, output.with_suffix(".json"))
    for role in scores:
        beyond_it = f", trained on {further[role]['map']}" if further else ""
        say(f"{role}: AP {scores[role]['map']}  AP50 {scores[role]['map_50']}{beyond_it}")
    return result


def _rounded(figures: dict[str, float]) -> dict[str, float | None]:
    """Two decimals; NaN, which JSON does not know, as null."""
    return {name: None if value != value else round(value, 2) for name, value in figures.items()}


def _environment(device: str) -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        **({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "date": time.strftime("%Y-%m-%d"),
    }
