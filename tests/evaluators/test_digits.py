"""The embedded data set: deterministic, disjoint, tight boxes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from evaluators.datasets.base import DataConfig, load_splits
from evaluators.datasets.digits import partition, write_digits
from evaluators.datasets.digits_canvas import compose
from spaces.errors import InputError

FEW = {"fit": 12, "select": 4, "report": 6}


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = content(write_digits(tmp_path / "a", images=FEW))
    assert len(first) == 22 + 3 + 1
    assert content(write_digits(tmp_path / "b", images=FEW)) == first
    other = content(write_digits(tmp_path / "c", seed=1, images=FEW))
    assert not set(first.values()) & set(other.values())


def test_a_role_does_not_depend_on_the_size_of_the_others(tmp_path: Path) -> None:
    few = content(write_digits(tmp_path / "a", images=FEW))
    more = content(write_digits(tmp_path / "b", images={**FEW, "fit": 15}))
    assert {k: v for k, v in few.items() if k.startswith("images")}.items() <= more.items()


def test_roles_share_no_source_digit(tmp_path: Path) -> None:
    parts = partition(0)
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == list(range(1797))
    targets = load_digits().target
    for indices in parts.values():
        shares = np.bincount(targets[indices], minlength=10) / len(indices)
        np.testing.assert_allclose(shares, 0.1, atol=0.01)
    folder = write_digits(tmp_path / "digits", images=FEW)
    for role, indices in parts.items():
        document = json.loads((folder / "annotations" / f"{role}.json").read_text())
        for annotation in document["annotations"]:
            assert annotation["source_digit"] in indices
            assert annotation["category_id"] == targets[annotation["source_digit"]] + 1


def test_it_loads_as_any_coco_data_set(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", images=FEW)
    splits = load_splits(DataConfig(root=tmp_path / "digits"))
    assert {role: len(split.images) for role, split in splits.items()} == FEW
    names = [(one.id, one.name) for one in splits["fit"].categories]
    assert names == [(digit + 1, str(digit)) for digit in range(10)]
    for split in splits.values():
        counts = [len(rows) for rows in split.by_image().values()]
        assert min(counts) >= 1
        assert max(counts) <= 8
        for annotation in split.annotations:
            x, y, w, h = annotation["bbox"]
            assert 0 <= x < x + w <= 160
            assert 0 <= y < y + h <= 160
            assert annotation["area"] == w * h
    with Image.open(splits["fit"].images[0].path) as image:
        assert (image.mode, image.size) == ("RGB", (160, 160))


def test_boxes_are_tight_around_what_was_drawn() -> None:
    tile = np.full((128, 128, 3), 90, dtype=np.uint8)
    digit = (load_digits().images[0] / 16).astype(np.float32)
    gaps: list[int] = []
    for seed in range(20):
        # The same draws with and without the digit: what differs is its ink.
        empty, _ = compose(np.random.RandomState(seed), tile, [])
        drawn, ((_, (x1, y1, x2, y2)),) = compose(np.random.RandomState(seed), tile, [digit])
        # Noise is drawn after the ink and differs; its amplitude is below 9, so 4 deviations of both are
        # 36, and only changes above that are looked at.
        changed = np.abs(drawn.astype(int) - empty.astype(int)).max(axis=2) > 51
        assert changed.any()
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert x1 <= columns[0]
        assert columns[-1] < x2
        assert y1 <= rows[0]
        assert rows[-1] < y2
        gaps += [columns[0] - x1, x2 - 1 - columns[-1], rows[0] - y1, y2 - 1 - rows[-1]]
    assert np.median(gaps) <= 1  # pale ink stays below the 51 at its rim, hence not all of them


def test_it_is_written_once_and_replaced_when_other_arguments_are_given(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits", images=FEW)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_digits(folder, images=FEW)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    write_digits(folder, images={**FEW, "fit": 3})
    assert len(list((folder / "images").iterdir())) == 13
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]  # no drafts left


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not a digits data set"):
        write_digits(tmp_path, images=FEW)
    with pytest.raises(InputError, match="not a digits data set"):
        write_digits(tmp_path / "mine.txt", images=FEW)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(InputError, match="at least one image"):
        write_digits(tmp_path / "new", images={**FEW, "fit": 0})
