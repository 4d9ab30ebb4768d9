"""Files of a real study, before and after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import toy_problem
from optuna.trial import TrialState, create_trial

from evaluators.evaluation import Evaluation, Measurement
from search.chosen import chosen_numbers, front_numbers
from search.judge import base_number
from search.retention import retain
from search.study import CONFIG, SearchStudy
from search.trials import EVALUATION, RECIPE

MODEL, STATE = 3000, 1000  # bytes


def filled_study(tmp_path: Path) -> SearchStudy:
    """Base 80 AP / 10 ms; 1 and 3 on the front, 2 dominated by 1, 4 infeasible, 5 failed, 6 running."""
    study = toy_problem.toy_study(tmp_path)
    points = {0: (80.0, 10.0), 1: (75.0, 8.0), 2: (70.0, 9.0), 3: (65.0, 6.0), 4: (50.0, 5.0)}
    for number in range(7):
        recipe = toy_problem.to_recipe({"a": number / 10})
        values = points.get(number)
        figures = {"map": Measurement(value=values[0], unit="")} if values else {}
        study.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE if values else (TrialState.FAIL, TrialState.RUNNING)[number - 5],
                values=list(values) if values else None,
                user_attrs={
                    RECIPE: recipe.to_json(),
                    EVALUATION: Evaluation(
                        recipe_key=recipe.key, status="ok", metrics=figures
                    ).model_dump_json(),
                },
                system_attrs={"constraints": [60.0 - values[0]]} if values else {},
            )
        )
        folder = study.trial_folder(number)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"m" * MODEL)
        (folder / "state.safetensors").write_bytes(b"s" * (STATE - 10))
        (folder / "recipe.json").write_bytes(b"r" * 10)
    return study


def files(study: SearchStudy) -> dict[int, list[str]]:
    return {n: sorted(p.name for p in study.trial_folder(n).glob("*")) for n in range(7)}


ALL, KEPT = ["model.onnx", "recipe.json", "state.safetensors"], ["recipe.json", "state.safetensors"]


def test_the_front_and_the_base(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    assert front_numbers(study) == {0, 1, 3}
    assert base_number(study) == 0


def test_models_of_the_front_and_states_of_the_rest_stay(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    kept = retain(study, keep_mb=1.0)
    assert files(study) == {0: ALL, 1: ALL, 2: KEPT, 3: ALL, 4: KEPT, 5: [], 6: ALL}
    assert kept.megabytes == (4 * (MODEL + STATE) + 2 * STATE) / 1e6  # 0, 1, 3 and the running 6; 2 and 4
    assert (kept.models, kept.states, kept.over_limit) == ((0, 1, 3), (2, 4), False)
    assert retain(study, keep_mb=1.0) == kept


def test_the_oldest_states_go_when_the_limit_is_reached(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    kept = retain(study, keep_mb=0.0175)  # 18 kB would stay
    assert kept.states == (4,)
    assert kept.megabytes == 0.017
    assert files(study)[2] == []


def test_the_front_is_never_given_up(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    kept = retain(study, keep_mb=0.001)
    assert kept.over_limit
    assert files(study) == {0: ALL, 1: ALL, 2: [], 3: ALL, 4: [], 5: [], 6: ALL}


def test_what_the_caller_wants_stays_and_so_does_the_base(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    retain(study, keep_mb=1.0, keep=[4])
    assert files(study) == {0: ALL, 1: KEPT, 2: KEPT, 3: KEPT, 4: ALL, 5: [], 6: ALL}


def test_what_is_no_trials_does_not_count(tmp_path: Path) -> None:
    study = filled_study(tmp_path)
    (study.artifacts / "peers").mkdir()
    (study.artifacts / "peers" / "model.onnx").write_bytes(b"p" * 30000)
    kept = retain(study, keep_mb=0.03)
    assert (kept.states, kept.over_limit) == ((2, 4), False)


def test_a_file_that_a_worker_renames_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = filled_study(tmp_path)
    draft, stat = study.trial_folder(6) / "model.json.tmp", os.stat
    draft.write_bytes(b"d")

    def renaming(path: Any, **options: Any) -> os.stat_result:
        if path == str(draft) and draft.exists():
            draft.rename(draft.with_name("model.json"))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", renaming)
    assert retain(study, keep_mb=1.0).models == (0, 1, 3)


def test_models_within_the_limits_of_now_stay_beside_those_of_before(tmp_path: Path) -> None:
    """Trial 4 was told that its loss is too large, and is on the front since the limit was loosened."""
    study = filled_study(tmp_path)
    study.optuna.set_user_attr(CONFIG, {"problem": {"limits": {"max_map_drop": 30.0}}})
    assert chosen_numbers(study) == {0, 1, 3, 4}
    retain(study, keep_mb=1.0)
    assert files(study)[4] == ALL
    study.optuna.set_user_attr(CONFIG, {"problem": {"limits": {"max_map_drop": 10.0}}})
    assert chosen_numbers(study) == {0, 1}
    retain(study, keep_mb=1.0)
    assert files(study) == {0: ALL, 1: ALL, 2: KEPT, 3: ALL, 4: KEPT, 5: [], 6: ALL}
