"""Which images of select are scored for what AP alone tells."""

from __future__ import annotations

from pathlib import Path

from evaluators.datasets.split import DetectionSplit, ImageRecord, checked_split
from evaluators.scored_damage import scored_images
from spaces.detectors.base import Category


def split_of(count: int, *with_objects: int) -> DetectionSplit:
    """Images numbered from 0; a crowd region on image 1, which is no object."""
    images = [ImageRecord(k, Path(f"{k}.png"), 40, 30) for k in range(count)]
    boxes = [
        {"id": n, "image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9]}
        for n, k in enumerate(with_objects, 1)
    ]
    crowd = {"id": len(boxes) + 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 1}
    return checked_split("select", "s", Path("s.json"), images, [Category(1, "a")], [*boxes, crowd])


def test_few_images_with_objects_are_all_scored_and_others_fill_up() -> None:
    split = split_of(2000, 5, 500, 1001, 1500, 1777)
    picked = scored_images(split, 128)
    assert len(picked) == 128
    assert {5, 500, 1001, 1500, 1777} <= picked
    assert max(picked) == 1999
    split.part("select", "s", lambda image: image.id in picked)  # refuses a part without objects


def test_many_images_with_objects_are_spread() -> None:
    assert scored_images(split_of(9, *range(0, 9, 2)), 3) == {0, 4, 8}
    assert scored_images(split_of(4, *range(4)), 128) == {0, 1, 2, 3}
