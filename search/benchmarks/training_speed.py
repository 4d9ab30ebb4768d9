"""Fine-tuning beside a plain loop: images a second and core, and the accuracy that comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.finetune import Epoch, FineTunePlan, fine_tune
from evaluators.targets.base import Detections
from search.benchmarks.method_recipes import SPARSITY, recipe_of
from search.benchmarks.plain_loop import plain_fine_tune
from search.benchmarks.reports import signed, table, write
from spaces.apply import apply
from spaces.layers import learning
from spaces.methods.base import Draft
from spaces.recipe import Prune, Recipe

PLAIN = "plain loop"
EVERYWHERE, BEHIND = "everywhere", "behind"


@dataclass(frozen=True)
class Trained:
    """A recipe trained in one way.

    Attributes:
        recipe: `everywhere` or `behind`.
        way: how it was trained.
        seed: of the order of the images.
        images: trained on, all epochs together.
        seconds: from the pruned network to the trained one, norms and first features included.
        map: AP on report.
        difference: of AP to the plain loop's of the same recipe and seed, with a 95 % interval over images.
    """

    recipe: str
    way: str
    seed: int
    images: int
    seconds: float
    map: float
    difference: tuple[float, float, float]


def recipes_of(bench: Bench) -> dict[str, Recipe]:
    """A quarter of the channels gone everywhere, and only behind half of the multiplications."""
    whole = recipe_of("prune", bench)
    assert whole is not None, "every detector has channels"
    macs = {name: layer.macs(layer.inputs, layer.outputs) for name, layer in bench.sites.facts.items()}
    done, reached = 0, dict[str, float]()
    for name, count in macs.items():
        reached[name] = done / sum(macs.values())
        done += count

    def begins(site: str) -> float:
        members = bench.sites.channel[site].members
        return min(reached[member.layer] for member in members if member.layer in reached)

    late = [choice for site, choice in whole.of_kind(Prune).items() if begins(site) >= 0.5]
    found = {EVERYWHERE: whole}
    if late:
        found[BEHIND] = Recipe(detector=whole.detector, choices=tuple(late))
    return found


def ways_of(plan: FineTunePlan) -> dict[str, FineTunePlan]:
    """Plans of our loop by name; bfloat16 only where the CPU has it."""
    float32 = plan.model_copy(update={"precision": "float32", "frozen_prefix": False})
    found = {"ours, float32": float32}
    quick = FineTunePlan().runs_in
    if quick == "bfloat16":
        found["ours, bfloat16"] = float32.model_copy(update={"precision": quick})
    frozen = {"precision": quick, "frozen_prefix": True}
    return found | {f"ours, {quick}, frozen prefix": float32.model_copy(update=frozen)}


def compare_training(
    bench: Bench, seeds: Sequence[int], folder: Path, say: Callable[[str], None]
) -> list[Trained]:
    """Train each recipe in every way, epoch by epoch in turn, so that all meet the same machine.

    The base's outputs and the letterboxed images are there before: a study computes them once.

    Args:
        seeds: of the order of the images; each is a run of its own.
        folder: for the exported models, which are scored on report.
    """
    plan = bench.config.finetune
    with bench.slot.computing():
        assert bench.teacher is not None
    rows = []
    for name, recipe in recipes_of(bench).items():
        with bench.slot.computing():
            draft = apply(bench.base, recipe, bench.sites, bench.statistics_for(recipe))
        for seed in seeds:
            say(f"pruned {name}, seed {seed}: training {plan.epochs} epoch(s) in every way")
            rows += _compared(bench, name, recipe, draft, seed, folder, say)
    return rows


def _compared(
    bench: Bench, name: str, recipe: Recipe, draft: Draft, seed: int, folder: Path, say: Callable[[str], None]
) -> list[Trained]:
    plan = bench.config.finetune
    networks: dict[str, nn.Module] = {PLAIN: learning(deepcopy(draft.network), bench.frozen)}
    runs: dict[str, Iterator[Epoch]] = {PLAIN: plain_fine_tune(networks[PLAIN], bench, plan, seed)}
    for way, own in ways_of(plan).items():
        if own.frozen_prefix and name == EVERYWHERE:
            continue  # nothing is left as it was
        networks[way] = network = learning(deepcopy(draft.network), bench.frozen)
        loop = (network, bench.detector, bench.fit, bench.teacher, own, bench.slot, seed)
        runs[way] = fine_tune(*loop, changed=draft.changed_modules)
    seconds = dict.fromkeys(runs, 0.0)
    for _ in range(plan.epochs + 1):  # the last turn ends what is behind the last epoch
        for way, run in runs.items():
            started = time.perf_counter()
            epoch = next(run, None)
            seconds[way] += time.perf_counter() - started
            if epoch is not None:
                say(f"  {way}, epoch {epoch.number}: loss {epoch.loss:.4f}, step {epoch.step_s * 1e3:.1f} ms")
    size = min(plan.batch_size, len(bench.fit))
    images = plan.epochs * (len(bench.fit) // size) * size
    figures, found = {}, dict[str, dict[int, Detections]]()
    for way, network in networks.items():
        figures[way], found[way] = _scored(bench, network, recipe, folder)
    split = bench.split("report")
    return [
        Trained(
            recipe=name,
            way=way,
            seed=seed,
            images=images,
            seconds=seconds[way],
            map=figures[way],
            difference=map_difference_interval(split, found[way], found[PLAIN]),
        )
        for way in runs
    ]


def _scored(
    bench: Bench, network: nn.Module, recipe: Recipe, folder: Path
) -> tuple[float, dict[int, Detections]]:
    with bench.slot.computing():
        file, card = bench.export(network.eval(), {}, recipe, folder)
        session = bench.target.prepare(file, bench.config.threads, card.runtime.hint)
    figures, found = bench.scored(session, bench.split("report"))
    return figures["map"], found


def write_training(
    file: Path, title: str, base_map: float, epochs: int, rows: Sequence[Trained], facts: Mapping[str, Any]
) -> None:
    """Write the report."""
    threads = int(facts["threads"])
    plain = {(row.recipe, row.seed): row.seconds for row in rows if row.way == PLAIN}
    lines = [
        f"The base pruned by {SPARSITY:.0%}, everywhere or only behind half of its multiplications, and "
        f"trained for {epochs} epoch(s) with the base as its teacher. The *plain loop* reads image files "
        "through a DataLoader, runs the teacher beside the student and uses torch's Adafactor in float32. "
        "*Ours* reads letterboxed images and the teacher's outputs, computed once a study and not counted, "
        "in channels last, with norms folded into convolutions and parameters updated together; *frozen "
        "prefix* keeps what lies in front of everything changed, and counts the features that it computes. "
        "Same batches, steps and rates; epochs in turn. Figures are whole runs. The base has "
        f"{base_map:.2f} AP.",
        "",
        *table(
            [
                "pruned",
                "way",
                "seed",
                "images / s and core",
                "over the plain loop",
                "AP",
                "AP to the plain loop",
            ],
            [
                [
                    row.recipe,
                    row.way,
                    row.seed,
                    f"{row.images / row.seconds / threads:.1f}",
                    f"{plain[row.recipe, row.seed] / row.seconds:.2f}x",
                    f"{row.map:.2f}",
                    "" if row.way == PLAIN else signed(row.difference),
                ]
                for row in rows
            ],
        ),
    ]
    write(file, title, lines, {"base_map": base_map, "runs": [asdict(row) for row in rows]}, facts)
