"""Boxes of two sessions paired within the stated tolerances."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators.jobs import Job
from evaluators.parity import ParityError, compare_sessions, require_parity
from evaluators.pipeline import CandidateWorker
from evaluators.targets.base import Detections
from spaces.recipe import identity

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "own_detector.py"


class Fixed:
    """Finds the same on every image; image k holds only the first `counts[k]` boxes."""

    def __init__(
        self, boxes: Sequence[Sequence[float]], scores: Sequence[float], labels: Sequence[int]
    ) -> None:
        self.found = Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(labels, np.int64),
        )

    def run(self, images: NDArray[np.float32]) -> Detections:
        count = int(images[0, 0, 0, 0])
        return Detections(self.found.boxes[:count], self.found.scores[:count], self.found.labels[:count])

    def kernels(self) -> dict[str, str]:
        return {}


def image(count: int) -> NDArray[np.float32]:
    return np.full((1, 3, 1, 1), count, np.float32)


BOXES = [[0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 9, 9]]


def test_boxes_pair_within_the_tolerances_whatever_their_order() -> None:
    a = Fixed(BOXES, [0.9, 0.5, 0.5], [1, 2, 3])
    b = Fixed([BOXES[0], [5, 5, 9, 9.05], [20.02, 20, 30, 30]], [0.9005, 0.5, 0.4999], [1, 3, 2])
    found = require_parity(a, b, [image(3), image(0)])
    assert (found.images, found.boxes, found.unmatched) == (2, 3.0, 0)
    assert found.score_error == pytest.approx(0.0005, abs=1e-6)
    assert found.box_error == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [
        ([[0, 0, 10, 10.2], *BOXES[1:]], [0.9, 0.5, 0.5], [1, 2, 3]),
        (BOXES, [0.902, 0.5, 0.5], [1, 2, 3]),
        (BOXES, [0.9, 0.5, 0.5], [2, 2, 3]),
        (BOXES[1:], [0.5, 0.5], [2, 3]),
    ],
)
def test_a_box_elsewhere_is_no_parity(
    boxes: list[list[float]], scores: list[float], labels: list[int]
) -> None:
    with pytest.raises(ParityError, match=r"1 of 5|2 of 6"):
        require_parity(Fixed(BOXES, [0.9, 0.5, 0.5], [1, 2, 3]), Fixed(boxes, scores, labels), [image(3)])


def test_one_in_a_hundred_may_differ_and_no_box_has_two_partners() -> None:
    many = [[10.0 * k, 0, 10.0 * k + 5, 5] for k in range(100)]
    a, b = Fixed(many, [0.5] * 100, [1] * 100), Fixed(many[:98], [0.5] * 98, [1] * 98)
    assert require_parity(a, b, [image(100)]).unmatched == 2
    twins = Fixed([BOXES[0], BOXES[0]], [0.9, 0.9], [1, 1])
    assert compare_sessions(twins, Fixed([BOXES[0]], [0.9], [1]), [image(2)]).unmatched == 1


def stages(worker: CandidateWorker) -> list[str]:
    """Of the base's trial, up to the comparison with torch."""
    job = Job(kind="trial", name="trial 0", number=0, recipe=identity(worker.bench.detector.name))
    found = []
    for report in worker.run(job):
        found.append(report.stage)
        if report.stage == "compare with torch":
            break
    return found


def test_what_simplified_must_not_change_is_compared_with_the_network_itself(
    make_lively_worker: Callable[..., CandidateWorker], tmp_path: Path
) -> None:
    """A norm registered right behind a convolution, but run behind the activation."""
    late = """

class Late(nn.Sequential):
    def forward(self, x):
        return self[1](self[2](self[0](x)))
"""
    source = EXAMPLE.read_text().replace("return nn.Sequential(conv", "return Late(conv") + late
    (tmp_path / "late.py").write_text(source)
    (tmp_path / "unfolded.py").write_text(source.replace("return folded(network)", "return network.eval()"))
    assert stages(make_lively_worker(f"{tmp_path / 'unfolded.py'}:OwnDetector"))[-1] == "compare with torch"
    with pytest.raises(ParityError, match="of the detector makes another network of the base"):
        stages(make_lively_worker(f"{tmp_path / 'late.py'}:OwnDetector"))
