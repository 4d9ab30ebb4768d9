"""The front of a study, put together from trials with known figures."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from evaluators.evaluation import Evaluation, Measurement
from evaluators.ranking import Problem
from search.chosen import chosen_numbers
from search.commands.finish import _stored_map
from search.commands.search import _finale
from search.front import FINAL, best_within, front_of, write_pictures
from search.judge import NEW_REFERENCE, ProblemJudge, allowed_loss, gain_of_training_further, reference_of
from search.owners import driver_of
from search.progress import Progress
from search.report import front_caption, front_cells
from search.source import StudySource
from search.study import SearchStudy
from search.trials import EVALUATION, RECIPE
from spaces.errors import InputError
from spaces.recipe import Recipe
from tests.search.toy_problem import toy_parts, toy_study

PARTS = toy_parts()


def measured(**values: float) -> Evaluation:
    metrics = {name: Measurement(value=value, unit="") for name, value in values.items()}
    ratio = values["latency_ratio"]
    metrics["latency_ratio"] = Measurement(value=ratio, unit="", low=ratio - 0.01, high=ratio + 0.01)
    return Evaluation(recipe_key="k", status="ok", metrics=metrics, split="/data/select.json")


def add(
    study: SearchStudy,
    params: dict[str, float],
    ap: float,
    ratio: float,
    excess: float | None = None,
    **more: float,
) -> None:
    """A finished trial, by how much it exceeded its limit; the reference base takes 10 ms."""
    figures = {"map": ap, "latency_ratio": ratio, "latency_ms": 10 * ratio, "size_mb": 4.0, "params": 1000.0}
    evaluation = measured(**figures, **more)
    recipe: Recipe = PARTS.to_recipe(params)
    study.optuna.add_trial(
        create_trial(
            params=params,
            distributions=dict(PARTS.distributions),
            values=[ap, 10 * ratio],
            user_attrs={RECIPE: recipe.to_json(), EVALUATION: json.dumps(evaluation.model_dump())},
            system_attrs={} if excess is None else {"constraints": [excess]},
        )
    )


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """Base 60 AP; 1: 59.5 at 0.8; 2: 58 at 0.9, dominated; 3: 55 at 0.5; 4: 54.5 at 0.495."""
    study = toy_study(tmp_path)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0, map_trained_further=60.3)
    add(study, {"a": 0.25, "b": 0.0}, 59.5, 0.8)
    add(study, {"a": 0.0, "b": 0.25}, 58.0, 0.9)
    add(study, {"a": 0.5, "b": 0.0}, 55.0, 0.5)
    add(study, {"a": 0.5, "b": 0.25}, 54.5, 0.495)
    return study


def test_the_front_is_what_nothing_dominates(study: SearchStudy) -> None:
    front = front_of(study)
    assert [row.number for row in front.rows] == [0, 1, 3, 4]
    assert front.base.number == 0
    assert front.base.is_base
    assert len(front.trials) == 5
    assert front.remarks == []
    listed = front.to_json()
    assert [item["map_drop"] for item in listed] == pytest.approx([0.0, 0.5, 5.0, 5.5])
    assert listed[1]["latency_ms"] == pytest.approx(8.0)
    assert (listed[1]["ratio_low"], listed[1]["ratio_high"]) == pytest.approx((0.79, 0.81))
    assert listed[1]["split"] == "/data/select.json"
    assert listed[1]["artifact"] is None  # nothing was written for these trials
    assert Recipe.model_validate(listed[1]["recipe"]).choices[0].site == "a"


def test_stopped_trials_are_counted_and_left_out(study: SearchStudy) -> None:
    for copied in ({}, {"duplicate_of": 5}):
        study.optuna.add_trial(
            create_trial(
                state=TrialState.PRUNED,
                params={"a": 0.75, "b": 0.0},
                distributions=dict(PARTS.distributions),
                user_attrs={"rung/0": {"map": 70.0}, **copied},
                system_attrs={"paredown:uncounted": "repeat"} if copied else {},
            )
        )
    front = front_of(study)
    assert [row.number for row in front.rows] == [0, 1, 3, 4]
    assert front.remarks == ["1 of 6 trials were stopped early at a rung and are not compared here"]
    with pytest.raises(InputError, match="5: was stopped early and has no model"):
        _stored_map(study, 5)


def test_a_model_file_is_named_where_it_is_there(study: SearchStudy) -> None:
    file = study.trial_folder(1) / "model.onnx"
    file.parent.mkdir(parents=True)
    file.touch()
    assert {row.number: row.artifact for row in front_of(study).rows}[1] == str(file)


def test_limits_filter_what_is_there(study: SearchStudy) -> None:
    problem = Problem.read({"limits": {"max_map_drop": 1.0}})
    assert [row.number for row in front_of(study, problem).rows] == [0, 1]


def test_the_fastest_within_a_drop(study: SearchStudy) -> None:
    front = front_of(study)
    assert best_within(front, None).number == 1
    assert best_within(front, 5.0).number == 3
    assert best_within(front, 0.0).number == 0


def test_what_is_likely_to_lose_more_is_not_chosen(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 1 loses 0.5, trial 3 loses 5; the worse of measured and likely counts."""
    monkeypatch.setattr("search.front.expected_differences", lambda *_: {1: -1.4, 3: -4.0})
    front = front_of(study)
    assert {row.number: row.likely for row in front.rows} == {0: None, 1: -1.4, 3: -4.0, 4: None}
    assert best_within(front, 1.0).number == 0
    assert best_within(front, 1.5).number == 1
    assert best_within(front, 4.5).number == 1
    assert best_within(front, 5.0).number == 3
    cells = {line["trial"]: line["likely"] for line in front_cells(front.rows, front.base)}
    assert cells == {"0": "", "1": "-1.4", "3": "-4.0", "4": ""}
    assert "Likely: to base on other images" in front_caption(front.base, front.rows)
    assert front.to_json()[1]["likely_map_difference"] == -1.4


def test_a_base_that_still_learns_flatters_nobody(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0, map_trained_further=62.0)
    add(study, {"a": 0.25, "b": 0.0}, 60.5, 0.8)
    front = front_of(study)
    assert front.losses_against == 62.0
    assert "+2.0 AP" in front.remarks[0]
    assert front.rows[0].note == "-1.5 to trained base"
    judge = ProblemJudge(study, Problem.read({"limits": {"max_map_drop": 1.0}}))
    # 62 - 60.5 = 1.5 of 1.0 allowed
    assert judge.constraints(measured(map=60.5, latency_ratio=0.8)) == pytest.approx([0.5])
    with pytest.raises(InputError, match="loses so little"):
        best_within(front, 1.0)


def test_losses_may_count_from_the_base_as_it_came(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    study.optuna.set_user_attr("config", {"problem": {"losses_from": "given"}})
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0, map_trained_further=62.0)
    add(study, {"a": 0.25, "b": 0.0}, 59.5, 0.8)
    front = front_of(study)
    assert front.losses_against == 60.0
    assert front.remarks[0].endswith("losses are against the base as it came")
    assert front.rows[0].note == ""
    assert best_within(front, 0.5).number == 1
    problem = Problem.read({"limits": {"max_map_drop": 1.0}, "losses_from": "given"})
    # 60 - 59.5 = 0.5 of 1.0 allowed
    assert ProblemJudge(study, problem).constraints(measured(map=59.5, latency_ratio=0.8)) == [-0.5]
    assert front_of(study, Problem.read({})).losses_against == 62.0


def test_what_limits_allow_to_lose_counts_from_the_trained_base() -> None:
    """The base has 60 AP, and 62 with a candidate's training."""
    base = measured(map=60.0, latency_ratio=1.0, map_trained_further=62.0)
    drop = {"limits": {"max_map_drop": 1.0}}
    assert allowed_loss(Problem.read(drop), base) == 1.0
    assert allowed_loss(Problem.read(drop | {"losses_from": "given"}), base) == 3.0
    assert allowed_loss(Problem.read({"limits": {"min_map": 57.5}}), base) == 4.5
    assert allowed_loss(Problem.read({"limits": {"min_map": 57.5}, "losses_from": "given"}), base) == 4.5
    assert allowed_loss(Problem.read({"limits": {"max_map_drop": 9.0, "min_map": 57.5}}), base) == 4.5
    assert allowed_loss(Problem.read({"limits": {"max_size_mb": 3.0}}), base) == math.inf


def test_less_than_half_a_point_is_converged() -> None:
    base = measured(map=60.0, latency_ratio=1.0, map_trained_further=60.49)
    assert gain_of_training_further(base) == 0.0
    assert reference_of(base) is base
    learning = measured(map=60.0, latency_ratio=1.0, map_trained_further=60.5)
    assert gain_of_training_further(learning) == pytest.approx(0.5)
    assert reference_of(learning).metrics["map"].value == 60.5


def test_the_base_is_judged_against_itself(tmp_path: Path) -> None:
    judge = ProblemJudge(toy_study(tmp_path), Problem.read({"limits": {"max_map_drop": 1.0}}))
    assert judge.constraints(measured(map=60.0, latency_ratio=1.0, map_trained_further=63.0)) == [-1.0]


def again(ratio: float, ap: float) -> dict[str, Any]:
    return {
        "ratio": ratio,
        "low": ratio - 0.02,
        "high": ratio + 0.02,
        "map": ap,
        "map_difference": [0, -2, 1],
    }


def test_ratios_measured_together_take_the_place_of_the_others(study: SearchStudy) -> None:
    models = {"0": again(1.0, 50.0), "1": again(0.82, 49.0), "3": again(0.5, 44.0), "4": again(0.51, 45.0)}
    study.optuna.set_user_attr(FINAL, {"split": "/data/report.json", "models": models})
    front = front_of(study)
    assert [row.number for row in front.rows] == [0, 1, 3]  # 4 proved slower than 3 and is less accurate
    assert "trial 4" in front.remarks[0]
    assert front.rows[1].latency_ms == pytest.approx(8.2)
    assert front.rows[1].map == 59.5
    report = front_of(study, role="report")
    assert [(row.number, row.map) for row in report.rows] == [(0, 50.0), (1, 49.0), (4, 45.0), (3, 44.0)]
    assert {row.split for row in report.rows} == {"/data/report.json"}
    assert report.rows[1].note == "mAP to base -2.0 to +1.0 (95 %)"


def test_what_was_not_measured_again_is_said(study: SearchStudy) -> None:
    models = {"0": again(1.0, 50.0), "1": again(0.82, 49.0)}
    study.optuna.set_user_attr(FINAL, {"split": "/data/report.json", "models": models})
    assert "trial 3, 4; these show their own measurement" in front_of(study).remarks[0]
    assert [row.number for row in front_of(study, role="report").rows] == [0, 1]


def test_without_a_base_or_report_there_is_no_front(tmp_path: Path, study: SearchStudy) -> None:
    with pytest.raises(InputError, match="no base yet"):
        front_of(toy_study(tmp_path, "empty"))
    with pytest.raises(InputError, match="--remeasure"):
        front_of(study, role="report")


def test_pictures_are_written_whole(study: SearchStudy, tmp_path: Path) -> None:
    png, page = write_pictures(front_of(study), tmp_path / "new" / "folder", "Title", "subtitle")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Title" in page.read_text()
    assert sorted(file.name for file in png.parent.iterdir()) == ["front.html", "front.png"]


def test_a_search_in_which_no_trial_keeps_the_limits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["paredown", "search", "c.yaml"])  # pytest's own may name anything
    study = toy_study(tmp_path)
    for params, quality, ratio in (({"a": 0.0, "b": 0.0}, 60.0, 1.0), ({"a": 0.25, "b": 0.0}, 59.0, 0.8)):
        add(study, params, quality, ratio, excess=0.5)
    problem = Problem.read({"limits": {"latency_ms": ("<=", 5.0)}})
    settings = SimpleNamespace(problem=problem, search=SimpleNamespace(trials=2), seed=0)
    assert _finale(settings, None, study, "sqlite:///other.db") == 0  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "No trial keeps the limits (latency_ms <= 5)." in said
    assert "dashboard --storage sqlite:///other.db" in said
    assert "finish" not in said
    assert "no trial keeps the limits" in front_of(study).remarks[0]
    assert front_of(study, problem).rows == []


def test_the_limits_count_that_the_study_was_last_opened_with(tmp_path: Path) -> None:
    """Trial 1 was told with a limit of 5 AP, 2 and 3 with one of 1; now it is 3."""
    study = toy_study(tmp_path)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0)
    add(study, {"a": 0.25, "b": 0.0}, 55.5, 0.5, excess=-0.1)
    add(study, {"a": 0.5, "b": 0.0}, 58.0, 0.7, excess=1.0)
    add(study, {"a": 0.75, "b": 0.0}, 59.5, 0.8, excess=-0.5)
    assert [row.number for row in front_of(study).rows] == [0, 3, 1]
    study.optuna.set_user_attr("config", {"problem": {"limits": {"map_drop": ["<=", 3.0]}}})
    assert [row.number for row in front_of(study).rows] == [0, 3, 2]
    assert chosen_numbers(study) == {0, 2, 3}
    said = io.StringIO()
    progress = Progress(10, said)
    with driver_of(study.optuna) as driver:
        StudySource(study, toy_parts(), driver, 10, progress)
    for number in (1, 2):
        progress.trial_line(number, "ended")
    assert "trial 1: ended\n" in said.getvalue()
    assert "trial 2: ended (on the front)\n" in said.getvalue()


def test_limits_in_ms_are_those_of_the_newest_reference(study: SearchStudy) -> None:
    """The base took 10 ms and takes 20 now, so trial 3 at 0.5 takes 10."""
    study.optuna.set_user_attr(NEW_REFERENCE, {"scale": 2.0})
    problem = Problem.read({"limits": {"max_latency_ms": 10.0}})
    assert [(row.number, row.latency_ms) for row in front_of(study, problem).rows] == [(3, 10.0), (4, 9.9)]
    assert ProblemJudge(study, problem).constraints(measured(latency_ms=6.0, latency_ratio=0.6)) == [0.2]


def test_who_kept_the_weights_trains_as_the_base_does(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0, train_step_ms=500.0)
    add(study, {"a": 0.25, "b": 0.0}, 59.5, 0.8)
    add(study, {"a": 0.5, "b": 0.0}, 58.0, 0.7, train_step_ms=300.0)
    problem = Problem.read({"limits": {"max_train_step_ms": 400.0}})
    assert [row.number for row in front_of(study, problem).rows] == [2]
    assert [row.number for row in front_of(study, Problem.read({})).rows] == [0, 1, 2]
    judge = ProblemJudge(study, Problem(objectives=("map", "train_step_ms")))
    assert judge.values(measured(map=59.5, latency_ratio=0.8)) == [59.5, 500.0]
    memory = Problem.read({"limits": {"max_peak_memory_mb": 400.0}})  # which nobody measured
    assert front_of(study, memory).rows == []


def test_on_report_losses_count_from_the_base_as_it_came(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0, map_trained_further=62.0)
    study.optuna.set_user_attr(FINAL, {"split": "/data/report.json", "models": {"0": again(1.0, 50.0)}})
    report = front_of(study, role="report")
    assert report.losses_against == 50.0
    assert "losses are against the base as it came" in report.remarks[0]
