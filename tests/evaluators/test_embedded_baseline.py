"""The committed detector of the embedded data: its figures are true, and compression can hurt it."""

import json
from pathlib import Path

import pytest
from torch import nn

from evaluators.accuracy import score_session
from evaluators.datasets.base import DataConfig, load_splits
from evaluators.datasets.digits import write_digits
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.postprocess import WholeDetector
from evaluators.torch_session import TorchSession
from spaces.apply import apply
from spaces.detectors.base import Postprocess
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import load_weights
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"
DETECTOR = make_detector("yolox_digits", 10)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> LetterboxedImages:
    """The report images of the embedded data; they do not depend on how many the other roles have."""
    folder = tmp_path_factory.mktemp("digits")
    root = write_digits(folder / "data", images={"fit": 1, "select": 1, "report": 300})
    split = load_splits(DataConfig(root=root, format="coco"))["report"]
    return LetterboxedImages.build(split, DETECTOR.preprocess.size, 114, folder / "cache")


@pytest.fixture(scope="module")
def base() -> nn.Module:
    network = DETECTOR.build().eval()
    load_weights(network, WEIGHTS)
    return network


def average_precision(network: nn.Module, images: LetterboxedImages) -> float:
    whole = WholeDetector(DETECTOR.simplified(network), DETECTOR, Postprocess(), images.split.categories)
    return score_session(TorchSession(whole), images.split, images, DETECTOR.preprocess)[0]["map"]


def test_its_figures_are_true(base: nn.Module, report: LetterboxedImages) -> None:
    written = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert average_precision(base, report) == pytest.approx(written["figures"]["report"]["map"], abs=0.2)
    assert written["figures"]["report"]["map"] > 60
    assert written["parameters"] == sum(p.numel() for p in base.parameters())


def test_it_is_converged() -> None:
    further = json.loads(WEIGHTS.with_suffix(".json").read_text())["further"]
    for role in ("select", "report"):
        assert further[role]["map"] - further[role]["map_before"] < 0.5


def test_halved_and_untrained_it_is_broken(base: nn.Module, report: LetterboxedImages) -> None:
    sites = find_sites(DETECTOR, base)
    recipe = Recipe(
        detector=DETECTOR.name, choices=tuple(Prune(site=name, sparsity=0.5) for name in sites.channel)
    )
    halved = apply(base, recipe, sites).network
    assert average_precision(halved, report) < 5
