"""Class predictors of a weights file, fitted to the categories of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from spaces.detectors.base import Category, Detector
from spaces.errors import InputError

_GAP = "N/A"
"""What torchvision calls the ids that COCO does not use."""


def with_classes_of(
    weights: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    detector: Detector,
    categories: Sequence[Category],
    start: bool = False,
) -> dict[str, Tensor]:
    """Weights of another number of classes, with the rows of the data set's categories in their order.

    Which class a row belongs to is known of COCO's alone: 91 with the background (torchvision's, by category
    id), 81 with it or 80 without (categories in the order of their ids). Categories are found by name;
    capitals, hyphens, underscores and spaces make no difference. Where the number of classes is the same,
    or the detector has no `class_layers`, nothing is changed.

    Args:
        weights: of a file.
        fresh: of the network that they are for.
        detector: says by `class_layers` where the classes are.
        categories: of the data set, in the order of the network's classes.
        start: training begins with these weights: a category without a row keeps that of `fresh`.

    Raises:
        InputError: a category has no row, unless `start`.
    """
    changed = dict(weights)
    layers: Mapping[str, tuple[int, int]] = getattr(detector, "class_layers", dict)()
    for layer, (outer, inner) in layers.items():
        pairs = {
            key: (weights[key], fresh[key])
            for key in (f"{layer}.weight", f"{layer}.bias")
            if key in weights and key in fresh
        }
        if any(
            rows.shape[1:] != own.shape[1:] or len(rows) % (outer * inner) for rows, own in pairs.values()
        ):
            continue  # made for another network
        for key, (rows, own) in pairs.items():
            count, wanted = (len(tensor) // (outer * inner) for tensor in (rows, own))
            if count == wanted:
                continue
            places = _places(count, wanted - detector.num_classes, categories, start)
            theirs = rows.reshape(outer, count, inner, *rows.shape[1:])
            ours = own.reshape(outer, wanted, inner, *rows.shape[1:]).to(rows.dtype)
            picked = [ours[:, k] if p is None else theirs[:, p] for k, p in enumerate(places)]
            changed[key] = torch.stack(picked, dim=1).reshape(own.shape)
    return changed


def _places(count: int, background: int, categories: Sequence[Category], start: bool) -> list[int | None]:
    """The row of each class in a file of `count` classes, None where there is none."""
    names = _coco_names(count, background)
    where = {_plain(name): k for k, name in enumerate(names) if k >= background and name != _GAP}
    places = [where.get(_plain(category.name)) for category in categories]
    if None in places and not start:
        missing = categories[places.index(None)].name
        theirs = "COCO's, of which" if names else "unknown by name, so"
        raise InputError(
            "checkpoint",
            None,
            f"has {count - background} classes, {theirs} none is {missing!r}; train on this data set with "
            "paredown train --start FILE",
        )
    return [*range(background), *places]


@cache
def _coco_names(count: int, background: int) -> tuple[str, ...]:
    """Names of the classes of a file by row; empty where they are not known."""
    by_id = tuple(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"])  # 91: background and gaps included
    used = tuple(name for name in by_id[1:] if name != _GAP)
    known = {(len(by_id), 1): by_id, (len(used) + 1, 1): (by_id[0], *used), (len(used), 0): used}
    return known.get((count, background), ())


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
