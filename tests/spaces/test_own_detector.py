"""The worked example of a detector of one's own: the contract, what it learns, and how it is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spaces.detectors.base import Detector, Labels
from spaces.detectors.own import built, located, require_runs
from spaces.detectors.registry import make_detector
from spaces.errors import InputError
from spaces.testing import DetectorContract, noise
from tests.spaces.toy import ToyDetector

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "own_detector.py"
MODEL = f"{EXAMPLE}:OwnDetector"


class TestOwnDetector(DetectorContract):
    @pytest.fixture
    def detector(self) -> Detector:
        return make_detector(MODEL, 3, size=(64, 96))


def test_its_name_does_not_depend_on_where_the_file_lies() -> None:
    detector = make_detector(MODEL, 3)
    assert detector.name == "own_detector:OwnDetector"
    assert detector.preprocess.size == (160, 160)
    assert type(make_detector(MODEL, 3)) is type(detector)


def test_targets_by_hand() -> None:
    detector = make_detector(MODEL, 3, size=(32, 32))
    # Cell centres lie at 4, 12, 20, 28. A box around (12, 12), and a smaller one inside it around (20, 12).
    boxes = torch.tensor([[2.0, 2.0, 22.0, 22.0], [15.0, 7.0, 25.0, 17.0]])
    classes, wanted = detector._targets(Labels(boxes, torch.tensor([2, 0])))  # type: ignore[attr-defined]
    assert classes.view(4, 4).tolist() == [[2, 2, 2, 3], [2, 2, 0, 3], [2, 2, 2, 3], [3, 3, 3, 3]]
    assert wanted.view(4, 4, 4)[1, 2].tolist() == boxes[1].tolist()
    empty = Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert (detector._targets(empty)[0] == 3).all()  # type: ignore[attr-defined]


def test_it_learns_boxes_by_heart() -> None:
    torch.manual_seed(0)
    detector = make_detector(MODEL, 2, size=(64, 64))
    network, images = detector.build(), noise(detector, 2)
    boxes = torch.tensor([[10.0, 12.0, 40.0, 44.0]])
    labels = [Labels(boxes, torch.tensor([0])), Labels(boxes + 12, torch.tensor([1]))]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        detector.loss(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found, scores = detector.decode(network(images))
    for image in range(2):
        best = scores[image].amax(dim=1).argmax()
        assert scores[image, best].argmax() == image
        torch.testing.assert_close(found[image, best], boxes[0] + 12 * image, atol=3.0, rtol=0.0)


def test_a_package_in_the_working_directory_is_found(tmp_path: Path) -> None:
    """As `paredown` starts it, without the working directory on the path of modules."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "sizes.py").write_text("SIDE = 64\n")
    (package / "nets.py").write_text(
        EXAMPLE.read_text()
        .replace("(160, 160)", "(SIDE, SIDE)")
        .replace("import math\n", "import math\n\nfrom mine.sizes import SIDE\n")
    )
    code = (
        "from spaces.detectors.registry import make_detector;"
        "detector = make_detector('mine.nets:OwnDetector', 3);"
        "print(detector.name, detector.preprocess.size)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[0] == "mine.nets:OwnDetector (64, 64)", done.stderr


def test_files_are_found_beside_the_configuration_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "configs"
    beside.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").touch()
    assert located("here.py:A", beside) == f"{tmp_path / 'here.py'}:A"
    (beside / "here.py").touch()
    assert located("here.py:A", beside) == f"{beside / 'here.py'}:A"
    assert located("package.module:A", beside) == "package.module:A"
    assert located("yolox_nano", beside) == "yolox_nano"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file"),
        ("class Other: ...", "has no class 'Mine'"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("class Mine(:", "SyntaxError"),
        ("class Mine:\n    def __init__(self): ...", "must take the keywords name, num_classes"),
        (
            "class Mine:\n    build = 0\n    def __init__(self, name, num_classes): self.name = name",
            "is no Detector; it lacks num_classes, preprocess, output_layers, block_of",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(source: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(InputError, match=message) as caught:
        make_detector(f"{file}:Mine", 3)
    assert "\n" not in str(caught.value)


class Failing(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + images[:, :, 1:]


class Listing(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]


def test_a_network_that_does_not_run_is_refused_with_the_place() -> None:
    detector = ToyDetector()
    require_runs("mine.py:Mine", detector, detector.build().eval())
    with pytest.raises(InputError, match=r"fails on an input of 16 x 16 pixels \(RuntimeError: .*own_det"):
        require_runs("mine.py:Mine", detector, Failing())
    with pytest.raises(InputError, match="must return a tuple of tensors, not a list"):
        require_runs("mine.py:Mine", detector, Listing())


class Breaking(ToyDetector):
    def build(self) -> torch.nn.Module:
        raise AttributeError("no such thing")


class Wrong(ToyDetector):
    def build(self) -> torch.nn.Module:
        return Listing()


def test_what_a_users_build_raises_is_said_with_the_place() -> None:
    with pytest.raises(InputError, match=r"build\(\) fails \(AttributeError: no such thing; .*in build"):
        built("mine.py:Mine", Breaking())
    with pytest.raises(InputError, match="must return a tuple of tensors"):
        built("mine.py:Mine", Wrong())
    assert built("mine.py:Mine", ToyDetector()).training, "as build() left it"


def test_what_a_users_constructor_raises_is_said_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("class Mine:\n    def __init__(self, name, num_classes):\n        {}['x']\n")
    with pytest.raises(InputError, match=r"cannot be made \(KeyError: 'x'; .*broken.py, line 3"):
        make_detector(f"{file}:Mine", 3)


@pytest.mark.parametrize("line", ["len(5)", "open(mode=3)"])
def test_a_type_error_of_a_constructor_is_its_own(tmp_path: Path, line: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(f"class Mine:\n    def __init__(self, name, num_classes):\n        {line}\n")
    with pytest.raises(InputError, match=r"cannot be made \(TypeError: .*broken.py, line 3"):
        make_detector(f"{file}:Mine", 3)
    with pytest.raises(
        InputError, match=r"must take the keywords name, num_classes, size \(got an unexpected"
    ):
        make_detector(f"{file}:Mine", 3, (64, 64))


class Uncopied(ToyDetector):
    def build(self) -> torch.nn.Module:
        network = super().build()
        network.wide = torch.nn.utils.weight_norm(network.wide[0])
        return network


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_network_that_cannot_be_copied_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"fails in copy.deepcopy \(RuntimeError: Only Tensors") as caught:
        built("mine.py:Mine", Uncopied())
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"yolox_nano.*package.module:Class or file.py:Class"):
        make_detector("yolo", 3)
