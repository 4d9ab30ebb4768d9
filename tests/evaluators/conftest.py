"""A few images of the embedded data, and the committed detector on them, small enough for quick tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from evaluators.bench_config import BenchConfig, LatencyConfig, SpaceConfig
from evaluators.datasets.base import DataConfig, load_splits
from evaluators.datasets.digits import write_digits
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.finetune import FineTunePlan
from evaluators.pipeline import CandidateWorker
from evaluators.quiet import QuietSlot
from spaces.detectors.base import Detector
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import load_weights, save_weights
from spaces.testing import lively_network

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits data set in COCO layout: 20 images of fit, 8 of select, 1 of report."""
    root = tmp_path_factory.mktemp("few") / "digits"
    return write_digits(root, images={"fit": 20, "select": 8, "report": 1})


@pytest.fixture(scope="session")
def digits_detector() -> Detector:
    """The embedded default at 96 pixels, where it is quick and still finds digits."""
    return make_detector("yolox_digits", 10, size=(96, 96))


@pytest.fixture(scope="session")
def digits_base(digits_detector: Detector) -> nn.Module:
    """Its trained weights, frozen; not to be changed."""
    network = digits_detector.build().eval().requires_grad_(False)
    load_weights(network, WEIGHTS)
    return network


@pytest.fixture(scope="session")
def fit_images(few_digits: Path, digits_detector: Detector) -> LetterboxedImages:
    """The 20 images of fit at 96 pixels."""
    split = load_splits(DataConfig(root=few_digits, format="coco"))["fit"]
    return LetterboxedImages.build(split, digits_detector.preprocess.size, 114, few_digits.parent / "cache")


@pytest.fixture
def slot(tmp_path: Path) -> QuietSlot:
    """A quiet slot of the test's own, so that studies on this machine are not held up."""
    return QuietSlot(tmp_path / "slot")


@pytest.fixture(scope="session")
def make_worker(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CandidateWorker]:
    """Makes workers on these images with a budget of seconds; keywords are fields of `BenchConfig`."""

    def make(**fields: Any) -> CandidateWorker:
        folder = tmp_path_factory.mktemp("study")
        fields.setdefault("finetune", FineTunePlan(epochs=1, batch_size=5, mirror=False))
        model = {"model": "yolox_digits", "checkpoint": WEIGHTS}
        config = BenchConfig(
            data=DataConfig(root=few_digits, format="coco"),
            latency=LatencyConfig(images=4, min_rounds=8, max_rounds=16, time_limit_s=0.5),
            calibration_images=4,
            cache=folder / "cache",
            **(model | fields),
        )
        worker = CandidateWorker(config, folder / "artifacts")
        worker.bench.slot = QuietSlot(folder / "slot")  # so that studies on this machine are not held up
        return worker

    return make


@pytest.fixture(scope="session")
def make_lively_worker(
    make_worker: Callable[..., CandidateWorker], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., CandidateWorker]:
    """Makes workers at 96 pixels on weights of a detector that answer noise, with methods of a space."""

    def make(model: str, *methods: str) -> CandidateWorker:
        file = tmp_path_factory.mktemp("weights") / "lively.safetensors"
        save_weights(lively_network(make_detector(model, 10, (96, 96))), file)
        return make_worker(model=model, checkpoint=file, size=(96, 96), space=SpaceConfig(methods=methods))

    return make
