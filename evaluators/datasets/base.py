"""Where the data are, and which part of them plays which role.

*fit* trains and calibrates, *select* is all that a search may look at, *report* is touched only for the
figures one publishes. An image belongs to one role.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from evaluators.datasets import coco, yolo
from evaluators.datasets.digits import write_digits
from evaluators.datasets.split import DetectionSplit, ImageRecord, is_object, joined
from spaces.errors import InputError

ROLES = ("fit", "select", "report")
DIGITS_ROOT = Path("runs/data/digits")

# What a role is read from where the configuration does not say, the first that exists.
_FIT = ("fit", "train", "instances_train2017", "instances_train2014")
_SELECT = ("select",)
_REPORT = ("report", "val", "instances_val2017", "instances_val2014", "test")


class DataConfig(BaseModel):
    """A data set and the annotations that each role is read from.

    `fit`, `select` and `report` are names of annotations (`train` for `annotations/train.json`; in a YOLO
    data set a key of `data.yaml`) or, for COCO, paths of such files. Where they are not given: fit is `fit`
    or else `train`; select is `select` or else a share of fit's images, which fit then gives up; report is
    `report` or else `val` or else `test`.

    `select_fraction` is that share. `fit_to_select` is one that fit gives up to a select with annotations of
    its own: for searches that train little or nothing, where fit's images are of more use as judges.
    """

    model_config = ConfigDict(extra="forbid")

    root: Path | None = None
    format: Literal["auto", "coco", "yolo", "digits"] = "auto"
    fit: str | None = None
    select: str | None = None
    report: str | None = None
    select_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    fit_to_select: float = Field(default=0.0, ge=0.0, lt=1.0)
    seed: int = Field(default=0, description="which images select takes from fit")


def load_splits(config: DataConfig) -> dict[str, DetectionSplit]:
    """All three roles, by name.

    Raises:
        InputError: the data are not as they must be, an image is in two roles, or the roles' categories
            differ.
    """
    source = _Source(config)
    fit, select = source.fit_and_select()
    splits = {"fit": fit, "select": select, "report": source.report()}
    _check_together(config, splits)
    return splits


def load_split(config: DataConfig, name: str) -> DetectionSplit:
    """One role (`fit`, `select`, `report`), or the annotations of that name.

    Raises:
        InputError: there is neither such a role nor such annotations, or the data are not as they must be.
    """
    source = _Source(config)
    if name in ("fit", "select"):
        fit, select = source.fit_and_select()
        return fit if name == "fit" else select
    return source.report() if name == "report" else source.read(name, name)


class _Source:
    """A data set of either format: named annotations that can be read."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.root, self.format = _locate(config)
        self.names: Mapping[str, Path] = {}
        if self.format == "yolo":
            self.yaml = yolo.find_yaml(self.root)
            self.names = dict.fromkeys(yolo.split_names(self.yaml), self.yaml)
        else:
            self.names = coco.annotation_files(self.root)

    def read(self, role: str, name: str) -> DetectionSplit:
        """The annotations of a name (or, for COCO, a path), in a role."""
        if self.format == "yolo" and name in self.names:
            return yolo.read_yolo(self.yaml, name, role)
        if self.format == "coco" and name in self.names:
            return coco.read_coco(self.root, self.names[name], role)
        if self.format == "coco" and Path(name).suffix == ".json" and Path(name).is_file():
            return coco.read_coco(self.root, Path(name), role)
        have = ", ".join(self.names) or "none"
        field = f"data.{role}" if role in ("fit", "select", "report") else "split"
        raise InputError(field, name, f"no such annotations in {self.root}; there are: {have}")

    def fit_and_select(self) -> tuple[DetectionSplit, DetectionSplit]:
        """fit and select, after fit has given select the share that is asked for."""
        fit = self.read("fit", self._name("fit", self.config.fit, _FIT))
        name = self.config.select or next((name for name in _SELECT if name in self.names), None)
        more, seed = self.config.fit_to_select, self.config.seed
        if name is None:
            if more > 0:
                remedy = "goes beside annotations of select's own, and there are none; use select_fraction"
                raise InputError("data.fit_to_select", more, remedy)
            return _divide(fit, self.config.select_fraction, seed)
        select = self.read("select", name)
        if more == 0:
            return fit, select
        _check_together(self.config, {"fit": fit, "select": select})
        rest, given = _divide(fit, more, seed)
        return rest, joined(select, given)

    def report(self) -> DetectionSplit:
        return self.read("report", self._name("report", self.config.report, _REPORT))

    def _name(self, role: str, given: str | None, defaults: tuple[str, ...]) -> str:
        name = given or next((name for name in defaults if name in self.names), None)
        if name is None:
            have = ", ".join(self.names) or "none"
            raise InputError(
                f"data.{role}",
                None,
                f"name its annotations; {self.root} has {have}, none of {', '.join(defaults)}",
            )
        return name


def _locate(config: DataConfig) -> tuple[Path, Literal["coco", "yolo"]]:
    if config.format == "digits":
        return write_digits(config.root or DIGITS_ROOT), "coco"
    if config.root is None:
        raise InputError("data.root", None, "name the folder of the data set here, or with --data DIR")
    root = config.root.expanduser()
    if not root.exists():
        raise InputError("data", str(root), "no such folder")
    if config.format != "auto":
        return root, config.format
    if coco.annotation_files(root):
        return root, "coco"
    if yolo.has_yaml(root):
        return root, "yolo"
    raise InputError("data", str(root), "neither annotations/*.json (COCO) nor data.yaml (YOLO) is there")


def _divide(whole: DetectionSplit, fraction: float, seed: int) -> tuple[DetectionSplit, DetectionSplit]:
    """Part select from fit by a hash of the file names: stable whatever the order of the file."""
    if len(whole.images) < 2:
        raise InputError("data.fit", str(whole.source), "one image cannot be shared between fit and select")

    def rank(image: ImageRecord) -> str:
        return hashlib.sha256(f"{seed}:{image.path.name}:{image.id}".encode()).hexdigest()

    count = min(max(round(len(whole.images) * fraction), 1), len(whole.images) - 1)
    ordered = sorted(whole.images, key=rank)
    chosen = {image.id for image in _with_objects_on_both_sides(whole, ordered, count)[:count]}
    label = f"{whole.name}[{{}}, {fraction:.0%} to select by seed {seed}]"
    fit = whole.part("fit", label.format("fit"), lambda image: image.id not in chosen)
    return fit, whole.part("select", label.format("select"), lambda image: image.id in chosen)


def _with_objects_on_both_sides(
    whole: DetectionSplit, ordered: list[ImageRecord], count: int
) -> list[ImageRecord]:
    """The images in an order whose first `count` and whose others have objects, as far as there are any.

    Only where few images have some does it differ from the order given.
    """
    objects = {one["image_id"] for one in whole.annotations if is_object(one)}
    there = [k for k, image in enumerate(ordered) if image.id in objects]
    if len(there) < 2:
        return ordered
    changed = list(ordered)
    if there[0] >= count:  # none in the first part
        changed[count - 1], changed[there[0]] = ordered[there[0]], ordered[count - 1]
    elif there[-1] < count:
        changed[count], changed[there[-1]] = ordered[there[-1]], ordered[count]
    return changed


def _check_together(config: DataConfig, splits: Mapping[str, DetectionSplit]) -> None:
    """Refuse roles that share an image or differ in their categories."""
    _check_disjoint(splits, [role for role in ROLES if getattr(config, role) is None])
    fit = splits["fit"]
    for split in splits.values():
        if split.categories != fit.categories:
            raise InputError(
                f"{split.source}: categories",
                [f"{one.id} {one.name}" for one in split.categories][:5],
                f"differ from those of {fit.source}; all roles need the same ids and names",
            )


def _check_disjoint(splits: Mapping[str, DetectionSplit], not_given: Collection[str]) -> None:
    seen: dict[Path, DetectionSplit] = {}
    for split in splits.values():
        for image in split.images:
            path = image.path.resolve()
            other = seen.setdefault(path, split)
            if other is not split:
                default = f" (data.{split.role} is not given)" if split.role in not_given else ""
                raise InputError(
                    "image",
                    str(image.path),
                    f"is in two roles: {other.role} ({other.name}) and {split.role} ({split.name}){default}; "
                    "keep it in one of them",
                )


__all__ = ["ROLES", "DataConfig", "DetectionSplit", "ImageRecord", "load_split", "load_splits"]
