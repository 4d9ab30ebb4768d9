"""Fronts of replays in a study of their own: which recipes, and what they come to when evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.benchmarks.real_fronts import (
    ReplayedFront,
    confirmed,
    enqueue,
    replayed_fronts,
    stored_fronts,
    thinned,
    write_confirmed,
)
from search.benchmarks.recorded import Recorded, decoded, encoded
from search.benchmarks.replay import normalised_volume
from search.study import SearchStudy, open_study
from search.trials import RECIPE
from spaces.errors import InputError
from tests.search.test_replay import recorded_from
from tests.search.test_rungs import evaluation
from tests.search.test_sampler import MadeUp


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return recorded_from(MadeUp())


def opened(folder: Path, **fingerprint: str) -> SearchStudy:
    url = f"sqlite:///{folder / 'fronts.db'}"
    return open_study("fronts", fingerprint, {"map": "maximize", "latency_ms": "minimize"}, url=url)


def run(study: SearchStudy, recorded: Recorded, made_up: MadeUp, failing: int) -> None:
    """Evaluate all trials that wait by the made-up detector; one fails."""
    space = recorded.table()
    for number in range(len(study.optuna.get_trials())):
        trial = study.optuna.ask(space.space.distributions())
        if number == failing:
            study.optuna.tell(trial, state=_failed())
            continue
        quality, ratio = made_up.evaluate(space.options([trial.params])[0])
        attributes = {RECIPE: space.space.recipe(trial.params).to_json(), **evaluation(quality, ratio)}
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        study.optuna.tell(trial, [quality, 10 * ratio])


def _failed() -> object:
    from optuna.trial import TrialState

    return TrialState.FAIL


def test_a_front_is_thinned_to_what_keeps_the_most_volume() -> None:
    points = [(0.0, 1.0), (0.0, 0.9), (3.0, 0.5), (3.1, 0.5), (6.0, 0.4), (20.0, 0.1)]
    # Alone: 15 x .1, 12 x .5 (the most), 9 x .6; after it 3 x .1 by the second and 9 x .1 by the fifth.
    assert thinned(points, 3) == [2, 4, 1]
    assert thinned(points, 9) == [2, 4, 1], "others add nothing"


def test_recipes_of_fronts_are_evaluated_once_and_told_apart(recorded: Recorded, tmp_path: Path) -> None:
    lines: list[str] = []
    fronts = replayed_fronts(recorded, ["tpe", "front"], seeds=2, trials=15, say=lines.append)
    assert [(f.sampler, f.seed) for f in fronts] == [("tpe", 0), ("tpe", 1), ("front", 0), ("front", 1)]
    assert all(0 < f.predicted <= f.whole + 1e-9 for f in fronts)
    assert len(lines) == 4
    study, made_up, space = opened(tmp_path, detector="toy"), MadeUp(), recorded.table()
    count = enqueue(study, recorded, fronts)
    base = encoded(space.options([space.space.identity_params()]))[0]
    codes = {code for front in fronts for code in front.recipes} | {base}
    assert count == len(codes)
    assert stored_fronts(study) == fronts
    run(study, recorded, made_up, failing=count - 1)
    rows = confirmed(study, space, recorded.base_map)
    assert [row.front for row in rows] == fronts
    assert sum(row.found for row in rows) < sum(len(f.recipes) for f in fronts), "one failed"
    first = rows[0]
    assert first.found == len(fronts[0].recipes)
    figures = [made_up.evaluate(row) for row in decoded(fronts[0].recipes)]
    points = [(recorded.base_map - quality, ratio) for quality, ratio in figures]
    assert first.real == pytest.approx(normalised_volume(points))
    write_confirmed(tmp_path / "fronts.md", recorded, rows, {"cpu": "x"})
    assert (
        f"| tpe | 0 | {fronts[0].whole:.4f} | {fronts[0].predicted:.4f} | {first.real:.4f} |"
        in (tmp_path / "fronts.md").read_text()
    )


def test_a_study_of_another_problem_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    study = opened(tmp_path, detector="another")
    with pytest.raises(InputError, match="differs from the recipes in detector"):
        enqueue(study, recorded, [ReplayedFront("tpe", 0, (), 0.0, 0.0)])
    assert not study.optuna.get_trials()
