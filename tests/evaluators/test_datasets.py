"""Both layouts, the three roles, and one clear line for everything that can be wrong with data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from evaluators.datasets.base import DataConfig, load_split, load_splits
from spaces.errors import InputError

Document = dict[str, Any]


def document(first_image: int = 1, count: int = 2, **changes: Any) -> Document:
    """A COCO document over images of 40x30 pixels, one box of category 5 on each."""
    numbers = range(first_image, first_image + count)
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in numbers],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 5, "bbox": [4, 3, 20, 10], "area": 77.5, "iscrowd": 0}
            for n in numbers
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
        **changes,
    }


def write(root: Path, folder: str = "images", **documents: Document | str) -> DataConfig:
    """Write annotations and the images that they name."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "annotations" / f"{name}.json").write_text(text)
        for image in [] if isinstance(content, str) else content.get("images", []):
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                draw(root / folder / image["file_name"])
    return DataConfig(root=root)


def draw(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def message(config: DataConfig, name: str | None = None) -> str:
    """The one line that loading ends with."""
    with pytest.raises(InputError) as caught:
        load_split(config, name) if name else load_splits(config)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_annotations_named_after_roles_are_used_as_they_are(tmp_path: Path) -> None:
    config = write(tmp_path, fit=document(1), select=document(3), report=document(5), val=document(1))
    splits = load_splits(config)
    assert {role: [image.id for image in split.images] for role, split in splits.items()} == {
        "fit": [1, 2],
        "select": [3, 4],
        "report": [5, 6],
    }
    assert [(one.id, one.name) for one in splits["fit"].categories] == [(5, "cat"), (9, "dog")]
    assert splits["fit"].annotations[0]["area"] == 77.5
    assert load_split(config, "val").source.name == "val.json"


def test_select_is_a_stable_share_of_train_where_it_is_not_given(tmp_path: Path) -> None:
    train = document(1, 50)
    config = write(tmp_path, train=train, val=document(51))
    splits = load_splits(config)
    fit, select = ({image.path.name for image in splits[role].images} for role in ("fit", "select"))
    assert (len(fit), len(select)) == (40, 10)
    assert not fit & select
    assert splits["report"].name == "val"
    assert {image.path.name for image in load_split(config, "select").images} == select

    write(tmp_path, train={**train, "images": train["images"][::-1]})
    assert {image.path.name for image in load_splits(config)["select"].images} == select
    other = load_splits(config.model_copy(update={"seed": 1}))["select"]
    assert {image.path.name for image in other.images} != select
    half = load_splits(config.model_copy(update={"select_fraction": 0.5}))
    assert len(half["select"].images) == 25


@pytest.mark.parametrize("seed", range(6))
def test_images_with_objects_are_on_both_sides_where_there_are_two(tmp_path: Path, seed: int) -> None:
    few = document(count=10)
    few["annotations"] = few["annotations"][3:5]
    config = write(tmp_path, train=few, val=document(first_image=11)).model_copy(update={"seed": seed})
    splits = load_splits(config)
    assert [len(splits[role].images) for role in ("fit", "select")] == [8, 2]
    assert [len(splits[role].annotations) for role in ("fit", "select")] == [1, 1]


def test_a_share_of_fit_judges_beside_the_annotations_of_select(tmp_path: Path) -> None:
    config = write(tmp_path, train=document(1, 10), select=document(11), val=document(13))
    assert len(load_splits(config)["fit"].images) == 10
    shared = config.model_copy(update={"fit_to_select": 0.3})
    splits = load_splits(shared)
    fit, select = splits["fit"], splits["select"]
    assert (len(fit.images), len(select.images)) == (7, 5)
    assert [image.path.name for image in select.images[:2]] == ["11.png", "12.png"]
    assert {image.id for image in fit.images} | {image.id for image in select.images} == set(range(1, 13))
    assert {one["image_id"] for one in select.annotations} == {image.id for image in select.images}
    assert [one["id"] for one in select.annotations] == [1, 2, 3, 4, 5]
    assert select.origin == f"{select.source} and 3 images of train.json"
    assert (fit.whole, load_splits(config)["fit"].whole) == ("train", "")
    assert select.name == "select + train[select, 30% to select by seed 0]"
    assert load_split(shared, "select").fingerprint() == select.fingerprint()
    assert len(select.part("select", "one", lambda image: image.path.name == "11.png").annotations) == 1


def test_images_of_two_files_with_the_same_ids_are_numbered_anew(tmp_path: Path) -> None:
    own = document(1)
    for image in own["images"]:
        image["file_name"] = f"own{image['id']}.png"
    own["annotations"][1]["bbox"] = [1, 2, 3, 4]
    config = write(tmp_path, train=document(1, 10), select=own, val=document(13))
    select = load_splits(config.model_copy(update={"fit_to_select": 0.3}))["select"]
    assert [image.id for image in select.images] == [1, 2, 3, 4, 5]
    boxes = {image.path.name: select.by_image()[image.id][0]["bbox"] for image in select.images}
    assert (boxes["own1.png"], boxes["own2.png"]) == ([4, 3, 20, 10], [1, 2, 3, 4])


def test_a_share_of_fit_is_refused_where_it_does_not_go_with_select(tmp_path: Path) -> None:
    share = {"fit_to_select": 0.3}
    same = write(tmp_path / "a", train=document(1, 10), select=document(9), val=document(13))
    assert "is in two roles: fit (train) and select (select)" in message(same.model_copy(update=share))
    cats = {"categories": [{"id": 9, "name": "horse"}, {"id": 5, "name": "cat"}]}
    other = write(tmp_path / "b", train=document(1, 10), select=document(11, **cats), val=document(13))
    assert "differ from those of" in message(other.model_copy(update=share))
    alone = write(tmp_path / "c", train=document(1, 10), val=document(13))
    assert "use select_fraction" in message(alone.model_copy(update=share))


def test_the_layout_of_the_published_coco_is_found(tmp_path: Path) -> None:
    write(tmp_path, "train2017", instances_train2017=document(1, 5))
    config = write(tmp_path, "val2017", instances_val2017=document(6, 3))
    splits = load_splits(config)
    assert [len(splits[role].images) for role in ("fit", "select", "report")] == [4, 1, 3]
    assert splits["report"].images[0].path == tmp_path / "val2017" / "6.png"


def test_images_may_lie_in_a_folder_of_their_split(tmp_path: Path) -> None:
    config = write(tmp_path, "images/val", val=document(1))
    assert load_split(config, "val").images[0].path == tmp_path / "images" / "val" / "1.png"


def test_explicit_names_and_paths_win(tmp_path: Path) -> None:
    config = write(tmp_path, fit=document(1), select=document(3), report=document(5), mine=document(7))
    chosen = config.model_copy(
        update={"report": str(tmp_path / "annotations" / "mine.json"), "fit": "report"}
    )
    splits = load_splits(chosen)
    assert (splits["fit"].name, splits["report"].name) == ("report", "mine")


def test_crowds_and_boxes_that_stick_out_by_a_pixel_stay_for_scoring(tmp_path: Path) -> None:
    content = document(1)
    content["annotations"][0]["bbox"] = [-0.5, 3, 41, 10]
    content["annotations"][1] = {"id": 2, "image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    split = load_split(write(tmp_path, val=content), "val")
    assert split.annotations[0]["bbox"] == [-0.5, 3, 41, 10]
    assert (split.annotations[1]["iscrowd"], split.annotations[1]["area"]) == (1, 81)


def test_the_fingerprint_follows_what_scores_depend_on(tmp_path: Path) -> None:
    base = load_split(write(tmp_path / "a", val=document(1)), "val").fingerprint()
    moved = load_split(write(tmp_path / "b", "images/val", val=document(1)), "val").fingerprint()
    assert moved == base
    shuffled = document(1)
    shuffled["annotations"].reverse()
    assert load_split(write(tmp_path / "c", val=shuffled), "val").fingerprint() == base
    changes: list[Callable[[Document], Any]] = [
        lambda d: d["annotations"][0].update(bbox=[4, 3, 20, 11]),
        lambda d: d["annotations"][0].update(category_id=9),
        lambda d: d["annotations"][0].update(iscrowd=1),
        lambda d: d["annotations"][0].update(area=5.0),
        lambda d: d["categories"][0].update(name="wolf"),
        lambda d: d["images"][0].update(file_name="z.png"),
        lambda d: d["images"][0].update(width=39),
    ]
    prints = {base}
    for number, change in enumerate(changes):
        content = document(1)
        change(content)
        prints.add(load_split(write(tmp_path / str(number), val=content), "val").fingerprint())
    assert len(prints) == len(changes) + 1


def put(kind: str, position: int, **values: Any) -> Callable[[Document], Any]:
    return lambda d: d[kind][position].update(values)


def drop(kind: str, position: int, key: str) -> Callable[[Document], Any]:
    return lambda d: d[kind][position].pop(key)


NAN, LONG = float("nan"), 10**400
BROKEN: list[tuple[str, Callable[[Document], Any], str]] = [
    (
        "outside",
        put("annotations", 1, bbox=[30, 3, 20, 10]),
        "annotation 2: bbox: [30, 3, 20, 10]: lies outside the image of 40 x 30 pixels by 10, where 1 is",
    ),
    (
        "above",
        put("annotations", 0, bbox=[0, -2, 20, 10]),
        "annotation 1: bbox: [0, -2, 20, 10]: lies outside",
    ),
    ("turned", put("annotations", 0, bbox=[4, 3, -1, 10]), "annotation 1: bbox: [4, 3, -1, 10]: has no area"),
    ("sliver", put("annotations", 0, bbox=[40, 3, 0.5, 9]), "[40, 3, 0.5, 9]: has no area inside"),
    ("nan", put("annotations", 0, bbox=[NAN, 3, 2, 2]), "annotation 1: bbox: [nan, 3, 2, 2]: must be finite"),
    ("infinite", put("annotations", 0, bbox=[1, 3, float("inf"), 2]), "must be finite"),
    ("short", put("annotations", 0, bbox=[1, 2, 3]), "annotation 1: bbox: [1, 2, 3]: must be four numbers"),
    ("text box", put("annotations", 0, bbox="1 2 3 4"), "bbox: '1 2 3 4': must be four numbers"),
    ("no box", drop("annotations", 0, "bbox"), "annotation 1: has no bbox"),
    ("area", put("annotations", 0, area=NAN), "annotation 1: area: nan: must be a number"),
    ("crowd", put("annotations", 0, iscrowd=2), "annotation 1: iscrowd: 2: must be 0 or 1"),
    ("no crowd", put("annotations", 0, iscrowd=None), "annotation 1: iscrowd: is null; must be 0 or 1"),
    ("null area", put("annotations", 0, area=None), "annotation 1: area: is null; must be a number"),
    ("null box", put("annotations", 0, bbox=None), "annotation 1: bbox: is null; must be four numbers"),
    ("long area", put("annotations", 0, area=LONG), "000: must be a number of at least 0"),
    ("long box", put("annotations", 0, bbox=[1, 3, LONG, 2]), "000, 2]: must be finite numbers"),
    ("long side", put("images", 0, width=LONG), "000: must be below 2^31"),
    ("category", put("annotations", 0, category_id=6), "category_id: 6: unknown category; known are 5, 9"),
    ("image id", put("annotations", 0, image_id=99), "annotation 1: image_id: 99: no such image"),
    ("same annotation", put("annotations", 1, id=1), "annotation id: 1: is used twice"),
    ("same image", put("images", 1, id=1), "image id: 1: is used twice"),
    ("same category", put("categories", 1, id=9), "category id: 9: is used twice"),
    (
        "image number",
        put("images", 0, id=2**63),
        "id: 9223372036854775808: must be below 2^63 in size; renum",
    ),
    ("category number", put("categories", 0, id=-(2**31) - 1), "id: -2147483649: must be below 2^31 in size"),
    ("text id", put("images", 0, id="1"), "image at position 0: id: '1': must be a whole number"),
    ("true id", put("annotations", 0, id=True), "annotation at position 0: id: True: must be a whole number"),
    ("no id", drop("annotations", 1, "id"), "annotation at position 1: has no id"),
    ("no name", drop("images", 0, "file_name"), "image 1: has no file_name"),
    ("no width", drop("images", 0, "width"), "image 1: has no width"),
    ("width", put("images", 0, width=0), "image 1: width: 0: must be a whole number of at least 1"),
    ("name", put("categories", 0, name=3), "category 9: name: 3: must be a text"),
    ("no images", lambda d: d.update(images=[], annotations=[]), "the split is empty; it needs at least one"),
    ("no boxes", lambda d: d.update(annotations=[]), "the split is empty: val has no box"),
    ("only crowds", lambda d: [one.update(iscrowd=1) for one in d["annotations"]], "val has no box"),
    ("no key", lambda d: d.pop("categories"), "val.json: categories: is missing or no list"),
    ("no list", lambda d: d.update(images={}), "val.json: images: is missing or no list"),
    ("no object", lambda d: d["annotations"].append(3), "val.json: annotations[2]: 3: must be an object"),
]


@pytest.mark.parametrize(
    ("change", "expected"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_broken_annotations_get_one_clear_line(
    tmp_path: Path, change: Callable[[Document], Any], expected: str
) -> None:
    content = document(1)
    change(content)
    line = message(write(tmp_path, val=content), "val")
    assert expected in line
    assert "val.json" in line


def test_a_line_says_how_many_boxes_are_like_the_first(tmp_path: Path) -> None:
    content = document(1, count=4)
    for position in (1, 3):
        put("annotations", position, bbox=[30, 3, 20, 10])(content)
    line = message(write(tmp_path, val=content), "val")
    assert "annotation 2: bbox" in line
    assert "correct or remove it (1 more of this file cannot be used, either)" in line


def test_boxes_without_area_are_read_and_counted(tmp_path: Path) -> None:
    content = document(1)
    put("annotations", 0, bbox=[4, 3, 20, 0])(content)
    split = load_split(write(tmp_path, val=content), "val")
    assert split.annotations[0]["bbox"] == [4, 3, 20, 0], "scored as pycocotools does it"
    assert split.boxes_without_area == 1
    put("annotations", 1, bbox=[4, 3, 0, 10])(content)
    assert "val has no box to learn" in message(write(tmp_path, val=content), "val")


def test_unreadable_json_gets_one_clear_line(tmp_path: Path) -> None:
    whole = json.dumps(document(1))
    assert "no complete JSON file" in message(write(tmp_path, val=whole[:100]), "val")
    assert "an object is expected" in message(write(tmp_path, val="[1]"), "val")
    config = write(tmp_path, val=whole)
    (tmp_path / "annotations" / "val.json").write_bytes(b"\xff\xfe\x00broken")
    assert "no complete JSON file" in message(config, "val")


def test_a_missing_image_is_named_with_the_places_looked_at(tmp_path: Path) -> None:
    config = write(tmp_path, val=document(1))
    (tmp_path / "images" / "2.png").unlink()
    line = message(config, "val")
    assert "val.json: file_name: '2.png': no such image; looked in" in line
    assert str(tmp_path / "images") in line
    content = document(1)
    content["images"][0]["file_name"] = "x" * 300  # longer than a file system takes
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    assert "xxx': no such image; looked in" in message(config, "val")


def test_an_image_in_two_roles_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, train=document(1, 4), val=document(4))
    line = message(config)
    assert "4.png" in line
    assert "is in two roles" in line
    assert "report (val)" in line
    again = document(1)
    again["images"][0].update(file_name="../images/2.png")
    assert "is in two roles" in message(write(tmp_path / "b", fit=document(2), select=document(4), val=again))


def test_roles_with_other_categories_are_refused(tmp_path: Path) -> None:
    other = document(5, categories=[{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}])
    line = message(write(tmp_path, train=document(1, 4), val=other))
    assert "categories: ['5 dog', '9 cat']: differ from those of" in line


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "data.root: name the folder" in message(DataConfig())
    assert "no such folder" in message(DataConfig(root=tmp_path / "nowhere"))
    assert "neither annotations/*.json (COCO) nor data.yaml" in message(DataConfig(root=tmp_path))
    config = write(tmp_path, train=document(1, 4))
    assert "data.report: name its annotations" in message(config)
    assert "split: 'best': no such annotations" in message(config, "best")
    assert "there are: train" in message(config, "best")
    assert "one image cannot be shared" in message(write(tmp_path / "b", train=document(1, 1)))
    with pytest.raises(ValidationError, match="select_fraction"):
        DataConfig(select_fraction=1.0)
    with pytest.raises(ValidationError, match="unknown"):
        DataConfig.model_validate({"unknown": 1})


def write_yolo(root: Path, labels: dict[str, str], yaml: str = "", suffix: str = "png") -> DataConfig:
    """Images of 40x30 pixels in images/train and images/val, and their text files."""
    for name, text in labels.items():
        draw(root / "images" / f"{name}.{suffix}")
        path = root / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    head = yaml or "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
    (root / "data.yaml").write_text(head)
    return DataConfig(root=root)


LABELS = {
    "train/a": "0 0.5 0.5 0.5 0.2\n1 0.25 0.5 0.1 0.1\n",
    "train/b": "1 0.1 0.1 0.9 0.1 0.9 0.9 0.5 0.95\n\n",
    "train/c": "",
    "val/d": "0 0.5 0.5 1.0 1.0\n",
}


def test_yolo_boxes_are_those_of_the_same_data_set_in_coco(tmp_path: Path) -> None:
    config = write_yolo(tmp_path / "yolo", LABELS)
    splits = load_splits(config)
    assert (len(splits["fit"].images), len(splits["select"].images), splits["report"].name) == (2, 1, "val")
    train = load_split(config, "train")
    boxes = [
        # class, cx cy w h as fractions of 40x30 -> x y w h in pixels, worked out by hand
        (1, 0, [10.0, 12.0, 20.0, 6.0]),
        (1, 1, [8.0, 13.5, 4.0, 3.0]),
        (2, 1, [4.0, 3.0, 32.0, 25.5]),
    ]
    content = {
        "images": [
            {"id": n, "file_name": f"{name}.png", "width": 40, "height": 30}
            for n, name in enumerate("abc", 1)
        ],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box}
            for n, (image, category, box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    coco = load_split(write(tmp_path / "coco", train=content), "train")
    assert train.categories == coco.categories
    assert [image.id for image in train.images] == [image.id for image in coco.images]
    for ours, theirs in zip(train.annotations, coco.annotations, strict=True):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=1e-9)


def test_yolo_splits_may_be_lists_of_folders_or_text_files(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("images/val/d.png\n\n")
    yaml = "train: [images/train, images/more]\nval: val.txt\nnames: {0: cat, 1: dog}\nnc: 2\n"
    config = write_yolo(tmp_path, {**LABELS, "more/e": "0 0.5 0.5 0.5 0.5"}, yaml)
    assert len(load_split(config, "train").images) == 4
    assert load_split(config, "val").annotations[0]["bbox"] == [0.0, 0.0, 40.0, 30.0]
    roboflow = "train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n"
    assert len(load_split(write_yolo(tmp_path, LABELS, roboflow), "train").images) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 0.5 0.5 0.5 0.5", "a.txt:1: class: '2': unknown category; data.yaml names 0 to 1"),
        ("0.5 0.5 0.5 0.5 0.5", "unknown category"),
        ("nan 0.5 0.5 0.5 0.5", "unknown category"),
        ("0 0.5 0.5 0.5 0.5\n0 20 15 10 10", "a.txt:2: bbox: [600.0, 300.0, 400.0, 300.0]: lies outside"),
        ("0 0.5 0.5 -0.1 0.5", "has no area"),
        ("0 nan 0.5 0.5 0.5", "must be finite"),
        ("0 0.5 0.5 0.5", "must be class cx cy w h"),
        ("0 0.5 0.5 0.5 0.5 0.5", "or class and the points of a polygon"),
        ("cat 0.5 0.5 0.5 0.5", "must be numbers"),
    ],
)
def test_broken_yolo_labels_get_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    line = message(write_yolo(tmp_path, {"train/a": text}), "train")
    assert expected in line
    assert "a.txt:" in line


def test_yolo_boxes_without_area_are_kept_apart_as_in_coco(tmp_path: Path) -> None:
    split = load_split(write_yolo(tmp_path, {"train/a": "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0 0.5\n"}), "train")
    assert split.annotations[1]["bbox"] == [20.0, 7.5, 0.0, 15.0]
    assert split.boxes_without_area == 1
    alone = write_yolo(tmp_path / "b", {"train/a": "1 0.5 0.5 0 0.5\n"})
    assert "train has no box to learn" in message(alone, "train")


@pytest.mark.parametrize("points", ["0.1 0.1 0.9 0.9", "0.1 0.1 2 0.9 0.9 2"])
def test_key_points_of_poses_are_no_polygons(tmp_path: Path, points: str) -> None:
    yaml = f"train: images/train\nnames: [cat]\nkpt_shape: [2, {len(points.split()) // 2}]\n"
    split = load_split(write_yolo(tmp_path, {"train/a": f"0 0.5 0.5 0.5 0.2 {points}"}, yaml), "train")
    assert split.annotations[0]["bbox"] == [10.0, 12.0, 20.0, 6.0]


def test_what_windows_and_macos_leave_in_files_and_folders_is_passed_over(tmp_path: Path) -> None:
    mark = "\ufeff"  # byte order mark, which editors on Windows write
    yaml = f"{mark}train: images/train\nval: val.txt\nnames: {{'0': cat, '1': dog}}\n"
    config = write_yolo(tmp_path, {"train/a": mark + LABELS["train/a"], "val/d": LABELS["val/d"]}, yaml)
    (tmp_path / "val.txt").write_text(f"{mark}images/val/d.png\n")
    (tmp_path / "images" / "train" / "._a.png").write_bytes(b"\0\5\x16\7")
    split = load_split(config, "train")
    assert [image.path.name for image in split.images] == ["a.png"]
    assert [(one.id, one.name) for one in split.categories] == [(0, "cat"), (1, "dog")]
    assert [one["category_id"] for one in split.annotations] == [0, 1]
    assert len(load_split(config, "val").images) == 1
    coco = write(tmp_path / "coco", val=mark + json.dumps(document(1)))
    write(tmp_path / "coco", fit=document(1))  # for its images
    assert len(load_split(coco, "val").images) == 2


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("names: [cat\n", "is no YAML file"),
        ("- 1\n", "must map names"),
        ("train: images/train\n", "names: list the class names"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "numbered from 0 without a gap"),
        ("train: images/train\nnames: {'0': a, '2': b}\n", "numbered from 0 without a gap"),
        ("train: images/away\nnames: [a, b]\n", "'images/away': no such folder or file"),
        ("train: list.txt\nnames: [a, b]\n", "list.txt:1: 'gone.png': no such image"),
        ("train: [images/train, images/train]\nnames: [a, b]\n", "listed twice"),
        ("val: images/val\nnames: [a, b]\n", "there are: val"),
        ("train: images/empty\nnames: [a, b]\n", "the split is empty"),
        ("!!python/object/apply:os.system ['touch hacked']\n", "is no YAML file"),
    ],
)
def test_a_broken_data_yaml_gets_one_clear_line(tmp_path: Path, yaml: str, expected: str) -> None:
    (tmp_path / "list.txt").write_text("gone.png\n")
    (tmp_path / "images" / "empty").mkdir(parents=True)
    assert expected in message(write_yolo(tmp_path, LABELS, yaml), "train")


def test_a_yolo_image_that_is_none_is_named(tmp_path: Path) -> None:
    config = write_yolo(tmp_path, LABELS)
    (tmp_path / "images" / "train" / "a.png").write_text("not a picture")
    assert "a.png': cannot be decoded" in message(config, "train")


def test_a_yolo_image_with_an_exif_orientation_is_named(tmp_path: Path) -> None:
    config = write_yolo(tmp_path, LABELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train" / "b.png", exif=exif)
    assert "b.png': has the EXIF orientation 6; turn its pixels" in message(config, "train")
