"""What bit-widths and codebooks cost: all layers of the base at each, by every way of finding ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.calibration import QuantizationPlan
from evaluators.datasets.split import DetectionSplit
from evaluators.kernels import by_kind, fell_back, stored_and_run
from evaluators.targets.base import Detections
from search.benchmarks.recipes import exported
from search.benchmarks.reports import table, write
from spaces.effects import bits_by_layer
from spaces.recipe import Codebook, Quantize, Recipe

WIDTHS, CODEBOOKS = (16, 8, 6, 4), (256, 64, 16)
CORRECTED_BITS = 8
"""See `evaluators.bias`: layers of fewer bits are never corrected."""
RANGES: tuple[str, ...] = get_args(QuantizationPlan.model_fields["ranges"].annotation)


@dataclass(frozen=True)
class Variant:
    """All layers of the base at one width, or with codebooks of one size.

    Attributes:
        name: such as `8 bits`.
        recipe: the choices at all layer sites.
        plan: how ranges are found; None where there are no integers.
        trained: fine-tuned as the configuration says, with integer layers that round meanwhile.
    """

    name: str
    recipe: Recipe
    plan: QuantizationPlan | None = None
    trained: bool = False


@dataclass(frozen=True)
class Cost:
    """What a variant keeps and takes.

    Attributes:
        variant: what was done.
        map: AP in 0..100.
        difference: to the base's, with a 95 % interval over images: (value, low, high).
        size_mb: of the file.
        kernels: number of layers by the precision that ran them, by the engine's profile.
        stored: number of layers by what a weight takes in the file, and what ran it.
        fell_back: layers that ran in another type than asked for.
        ratio: latency over the base's, (value, low, high); None where it was not timed.
    """

    variant: Variant
    map: float
    difference: tuple[float, float, float]
    size_mb: float
    kernels: Mapping[str, int]
    stored: Mapping[str, int]
    fell_back: Mapping[str, str]
    ratio: tuple[float, float, float] | None = None


def variants(bench: Bench, trained: bool = False) -> list[Variant]:
    """The base; widths that the target has kernels for; narrower ones where it has int8; codebooks.

    With `trained`, integers after fine-tuning as well.
    """
    sites, native = bench.sites.layer, bench.capabilities.bit_widths
    found = [Variant("32 bits", bench.identity)]
    for bits in WIDTHS:
        if bits not in native and (bits > 8 or min(native) > 8):
            continue
        read = max(bits, 8)  # narrower activations would buy nothing, see `spaces.methods.quantize`
        choices = [Quantize(site=site, weight_bits=bits, activation_bits=read) for site in sites]
        recipe = Recipe(detector=bench.detector.name, choices=tuple(choices))
        found += [
            Variant(f"{bits} bits", recipe, plan) for plan in (_plans(bench, bits) if bits <= 8 else [None])
        ]
        if trained and bits <= 8:
            found.append(Variant(f"{bits} bits", recipe, bench.config.quantization, trained=True))
    for entries in CODEBOOKS:
        books = tuple(Codebook(site=site, entries=entries) for site in sites)  # type: ignore[arg-type]
        found.append(Variant(f"codebooks of {entries}", Recipe(detector=bench.detector.name, choices=books)))
    return found


def _plans(bench: Bench, bits: int) -> Iterator[QuantizationPlan]:
    """The configuration's own way of finding ranges first, then the others."""
    own = bench.config.quantization
    if bits != CORRECTED_BITS:
        own = own.model_copy(update={"bias_correction": False})
    yield own
    for ranges in RANGES:
        for correct in (True, False) if bits == CORRECTED_BITS else (False,):
            plan = own.model_copy(update={"ranges": ranges, "bias_correction": correct})
            if plan != own:
                yield plan


def costs(
    bench: Bench,
    chosen: Sequence[Variant],
    split: DetectionSplit,
    folder: Path,
    timed: bool,
    say: Callable[[str], None],
) -> list[Cost]:
    """Export each variant, score it, and look into the engine's profile.

    Args:
        bench: its target runs the files.
        chosen: the base first.
        split: that mAP is taken on.
        folder: for the files.
        timed: measure latencies as well, paired with the base's.
        say: takes a line at a time.
    """
    found = []
    base = exported(bench, chosen[0].recipe, folder / "base")
    reference: dict[int, Detections] = {}
    for count, variant in enumerate(chosen, start=1):
        made = exported(with_plan(bench, variant.plan), variant.recipe, folder / "variant", variant.trained)
        figures, detections = bench.scored(made.session, split)
        with bench.slot.computing():
            reference = reference or detections
            difference = map_difference_interval(split, detections, reference)
            kernels = made.session.kernels()
        bits = bits_by_layer(variant.recipe, bench.sites)
        latency = bench.timed(made.session, base.session) if timed else None
        found.append(
            Cost(
                variant,
                figures["map"],
                difference,
                made.file.stat().st_size / 1e6,
                by_kind(kernels),
                stored_and_run(bits, made.packed, kernels),
                fell_back(bits, kernels, bench.capabilities.bit_widths),
                None if latency is None else (latency.ratio, latency.low, latency.high),
            )
        )
        say(f"  {count}/{len(chosen)}: {variant.name}{described(variant)}: {figures['map']:.2f} AP")
    return found


def with_plan(bench: Bench, plan: QuantizationPlan | None) -> Bench:
    """The same bench, what it has loaded included, with another way of finding ranges."""
    if plan is None:
        return bench
    other = copy.copy(bench)
    other.config = bench.config.model_copy(update={"quantization": plan})
    return other


def described(variant: Variant) -> str:
    """How its integers came about in a few words, for a line of progress."""
    plan = variant.plan
    if plan is None:
        return ""
    trained = ", fine-tuned" if variant.trained else ""
    return f", {plan.ranges}, {'biases corrected' if plan.bias_correction else 'biases left'}{trained}"


def write_costs(file: Path, title: str, found: Sequence[Cost], split: str, facts: Mapping[str, Any]) -> None:
    """Write the report; the first row is the base, the first one of a width has the configuration's plan."""
    eight = next((cost for cost in found if cost.variant.name == "8 bits"), None)
    lines = [
        f"Every convolution and linear layer of the base at one width, or with one size of codebook, on "
        f"{split}. Integers are weights; activations have 8 bits. Without training, unless "
        "a row says so: then the layers round meanwhile, and scales are learned.",
        "",
    ]
    if eight is not None:
        lines += [
            f"All layers in int8, ranges and biases as configured: {eight.map:.2f} AP of "
            f"{found[0].map:.2f}, {_interval(eight.difference, '+.2f')}.",
            "",
        ]
    head = [
        "layers at",
        "ranges",
        "biases",
        "trained",
        "AP",
        "difference, 95 %",
        "MB",
        "kernels",
        "weights in the file",
    ]
    rows = []
    for cost in found:
        plan = cost.variant.plan
        row = [
            cost.variant.name,
            plan.ranges if plan else "",
            ("corrected" if plan.bias_correction else "left") if plan else "",
            "yes" if cost.variant.trained else "",
            f"{cost.map:.2f}",
            _interval(cost.difference, "+.2f"),
            f"{cost.size_mb:.2f}",
            ", ".join(f"{count} {kind}" for kind, count in cost.kernels.items()),
            "; ".join(f"{count} at {line}" for line, count in cost.stored.items()),
        ]
        rows.append(row if cost.ratio is None else [*row, _interval(cost.ratio, ".3f")])
    lines += table(head if found[0].ratio is None else [*head, "latency / base"], rows)
    fallen = {cost.variant.name: len(cost.fell_back) for cost in found if cost.fell_back}
    lines += ["", f"Layers that ran in another type than asked for: {fallen or 'none'}."]
    content = {"split": split, "rows": [_plain(cost) for cost in found]}
    write(file, title, lines, content, facts)


def _interval(of: tuple[float, float, float], form: str) -> str:
    value, low, high = (format(number, form) for number in of)
    return f"{value} [{low}, {high}]"


def _plain(cost: Cost) -> dict[str, Any]:
    plan = cost.variant.plan
    return {
        "layers": cost.variant.name,
        "ranges": plan.ranges if plan else None,
        "bias_correction": plan.bias_correction if plan else None,
        "trained": cost.variant.trained,
    } | {key: value for key, value in asdict(cost).items() if key != "variant"}
