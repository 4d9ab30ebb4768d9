"""Beginning with what another study of the same detector knows: `--warm-start STUDY`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from search.chosen import front_numbers
from search.experience import ExperienceReader, believed_loss
from search.knowledge import PROBE, WARM
from search.preparation import PREPARED
from search.sensitivity import CHUNKS, JOB, Sensitivity, sensitivity_jobs, stored_sensitivity
from search.study import SearchStudy, differences_of
from search.trials import JOB_PREFIX, recipe_of
from spaces.errors import InputError
from spaces.recipe import Recipe, told_by_ap
from spaces.space import SearchSpace
from spaces.table import SpaceTable

FIT = ("detector", "input size")
"""What two studies must have in common for one to begin with the other."""
DAMAGE = (
    *FIT,
    "base weights",
    "data fit",
    "importance",
    "calibration images",
    "seed",
    "result version",
)
"""What the damage of single options depends on, in the words of a study's fingerprint."""
FRONT_SEEDS = 6
"""Members of the other front that a study begins with, at most."""
NOT_OF_PROBES = ("data fit", "data report", "fine-tuning", "importance", "space")
"""What latencies do not depend on; all else must agree for a probe to be taken over."""


def refuse_unfit(source: SearchStudy, fingerprint: Mapping[str, Any], space: SearchSpace) -> None:
    """Say in one line why a study with this fingerprint cannot begin with `source`.

    Raises:
        InputError: another detector or input size, no parameter in common, or no sensitivity yet.
    """
    different = differences_of(*({k: said.get(k) for k in FIT} for said in (source.fingerprint, fingerprint)))
    if different:
        raise InputError("--warm-start", source.name, f"does not fit this search ({'; '.join(different)})")
    known = stored_sensitivity(source)
    if known is None:
        raise InputError(
            "--warm-start", source.name, "has no sensitivities; let it search beyond its base first"
        )
    if not set(known.names) & set(space.parameters):
        raise InputError("--warm-start", source.name, "has no parameter in common with this search")


def take_over(study: SearchStudy, source: SearchStudy, table: SpaceTable) -> str:
    """Let a new study begin with another one; returns one line that says what was taken over.

    Damage of single options and latencies of probes are taken over as results where everything that they
    depend on agrees; else they are measured again. What a unit of damage costs after training, as the
    other study's trials say, is where the fit of losses begins, and its damage stands in for options whose
    own could not be measured. Its front becomes seeds, beside those of the solver. Trials are never taken
    over: under a fingerprint that agrees in all, one goes on with the study itself.

    Args:
        study: that begins. Once it has its preparations, or has begun with a study, nothing is changed.
        source: that fits, see `refuse_unfit`.
        table: of the space of `study`.
    """
    if study.optuna.user_attrs.get(WARM):
        return f"warm start: {study.name} has begun with {study.optuna.user_attrs[WARM]['study']} already"
    if study.optuna.user_attrs.get(PREPARED):
        return f"warm start: {study.name} is under way, nothing is taken over"
    jobs, probes = _same_damage(study, source, table), _same_probes(study, source)
    known = stored_sensitivity(source)
    assert known is not None, "refuse_unfit looks for it"
    front = _front(source, table.space)
    study.optuna.set_user_attr(
        WARM,
        {
            "study": source.name,
            "weights": _weights(source, known),
            "damage": _as_measured(source, known).to_json(),
            "seeds": front,
        },
    )
    return (
        f"warm start from {source.name}: {jobs} of {len(sensitivity_jobs(table.space, CHUNKS))} "
        f"sensitivity jobs, {probes} latency probes, {len(front)} seeds of its front; "
        "all else is measured anew"
    )


def warm_seeds(study: SearchStudy) -> list[dict[str, Any]]:
    """Parameters of the seeds that the other study's front gives."""
    warm = study.optuna.user_attrs.get(WARM) or {}
    return list(warm.get("seeds", []))


def _same_damage(study: SearchStudy, source: SearchStudy, table: SpaceTable) -> int:
    if any(study.fingerprint.get(key) != source.fingerprint.get(key) for key in DAMAGE):
        return 0
    known: dict[str, float] = {}
    for name, result in source.job_results().items():
        if name.startswith(JOB):
            known |= result.get("damage", {})
    taken, select = 0, "data select"
    same_select = study.fingerprint.get(select) == source.fingerprint.get(select)
    for job in sensitivity_jobs(table.space, CHUNKS):
        recipes = [Recipe.from_json(text) for text in job.payload["recipes"]]
        if not same_select and any(told_by_ap(choice) for recipe in recipes for choice in recipe.choices):
            continue  # by that on select
        keys = [recipe.key for recipe in recipes]
        if all(key in known for key in keys):
            result = {"damage": {key: known[key] for key in keys}, "taken from": source.name}
            study.optuna.set_user_attr(JOB_PREFIX + job.name, {"result": result})
            taken += 1
    return taken


def _same_probes(study: SearchStudy, source: SearchStudy) -> int:
    ours, theirs = study.fingerprint, source.fingerprint
    if any(ours.get(k) != theirs.get(k) for k in {*ours, *theirs} - set(NOT_OF_PROBES)):
        return 0
    if ours.get("space") != theirs.get("space"):
        return 0  # probes are drawn from the space
    probes = {name: r for name, r in source.job_results().items() if name.startswith(PROBE)}
    for name, result in probes.items():
        taken = {**result, "taken from": source.name}
        study.optuna.set_user_attr(JOB_PREFIX + name, {"result": taken})
    return len(probes)


def _weights(source: SearchStudy, known: Sensitivity) -> dict[str, float]:
    """AP points for one unit of measured damage by parameter, as the trials of `source` say."""
    before = _weights_before(source)
    experience = ExperienceReader(known).read(source.optuna.get_trials(deepcopy=False))
    if not experience.finished.options.any():
        return before
    weights = believed_loss(known, known.damage, experience)[0].weights
    pairs = zip(known.names, weights, strict=True)
    return {name: float(f"{weight * before.get(name, 1.0):.5g}") for name, weight in pairs}


def _weights_before(source: SearchStudy) -> dict[str, float]:
    """Those that `source` itself began with: its stored damage counts by them already."""
    before: dict[str, float] = (source.optuna.user_attrs.get(WARM) or {}).get("weights", {})
    return before


def _as_measured(source: SearchStudy, known: Sensitivity) -> Sensitivity:
    """The damage of `source` in the units that it was measured in."""
    before = _weights_before(source)
    weights = np.array([before.get(name) or 1.0 for name in known.names])
    return replace(known, damage=known.damage / weights[:, None])


def _front(source: SearchStudy, space: SearchSpace) -> list[dict[str, Any]]:
    """Parameters of the source's front in this space, fewer where there are many, spread evenly."""
    trials = source.optuna.get_trials(deepcopy=False)
    found = sorted(((trials[n].values, n) for n in front_numbers(source)), key=lambda pair: pair[0])
    recipes = [recipe_of(trials[number]) for _, number in found]
    kept = [r for r in recipes if r is not None and not r.is_identity and space.contains(r)]
    picked = sorted({round(k) for k in np.linspace(0, len(kept) - 1, min(FRONT_SEEDS, len(kept)))})
    return [dict(space.params(kept[k])) for k in picked]
