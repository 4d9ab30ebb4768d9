"""Rungs: decisions by hand, from the study alone, and a study on real workers in which one is stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_workers
import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState, create_trial
from toy_problem import STEPS, to_recipe, toy_parts, toy_study

from evaluators.evaluation import Evaluation, Measurement
from evaluators.jobs import Rung
from evaluators.ranking import Problem
from search.chosen import front_numbers
from search.experience import ExperienceReader
from search.judge import NEW_REFERENCE
from search.loop import run_search
from search.owners import driver_of
from search.rungs import HalvingRule, PredictedRatios, at_rung, order
from search.study import SearchStudy
from search.trials import DUPLICATE_OF, EVALUATION, RECIPE, TrialWriter, is_stopped, rung_figures
from search.workers import Pool
from tests.search.test_sampler import MadeUp
from tests.search.toy_space import toy_table


def test_the_order_by_hand() -> None:
    # Points 4, 3, 2, 1 are one front. Scaled: (0, 1), (1, 0), (.5, .5), (.52, .4875). After 4, which is the
    # lowest in the first coordinate, 3 is the farthest; then 2 (.707 away) before 1 (.684). 0 is dominated.
    points = [(6.0, 0.9), (5.2, 0.59), (5.0, 0.6), (10.0, 0.2), (0.0, 1.0)]
    assert order(points) == [4, 3, 2, 1, 0]


def test_of_equal_candidates_the_later_one_comes_last() -> None:
    assert order([(1.0, 1.0), (0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]) == [1, 3, 0, 2]
    assert order([(1.0, 1.0)]) == [0]
    assert order([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


# -- verdicts


def known(ratio: dict[int, float]) -> Any:
    """Latency ratios by trial number."""

    def ratios(_: Sequence[FrozenTrial], asked: Sequence[FrozenTrial]) -> NDArray[np.float64]:
        return np.array([ratio[trial.number] for trial in asked])

    return ratios


def evaluation(map_: float, ratio: float = 1.0) -> dict[str, str]:
    metrics = {
        "map": Measurement(value=map_, unit="AP"),
        "latency_ratio": Measurement(value=ratio, unit="x"),
        "latency_ms": Measurement(value=10 * ratio, unit="ms"),
    }
    return {EVALUATION: Evaluation(recipe_key="k", status="ok", metrics=metrics).model_dump_json()}


def add(
    study: SearchStudy,
    rungs: dict[int, float],
    state: TrialState = TrialState.RUNNING,
    map_: float | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """A trial of the recipe a = number / 100 with mAP at rungs."""
    number = len(study.optuna.get_trials())
    study.optuna.add_trial(
        create_trial(
            state=state,
            values=[map_, 10.0] if map_ is not None else None,
            user_attrs={
                RECIPE: to_recipe({"a": number / 100}).to_json(),
                **({} if map_ is None else evaluation(map_)),
                **{f"rung/{epochs}": {"map": value} for epochs, value in rungs.items()},
                **attributes,
            },
        )
    )
    return study.optuna.get_trials()[number]


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """The base: 60 AP, 10 ms."""
    study = toy_study(tmp_path)
    add(study, {}, TrialState.COMPLETE, 60.0)
    return study


def rule(study: SearchStudy, ratios: Any = None, limits: Any = None, **changes: Any) -> HalvingRule:
    problem = Problem.read({"limits": limits or {}})
    given = {"epochs": (0, 1), "company": 4, **changes}
    return HalvingRule(study, problem, ratios=ratios or known(dict.fromkeys(range(99), 0.5)), **given)


def one_shot(map_: float, **facts: float) -> Rung:
    return Rung(epochs=0, figures={"map": map_, **facts})


def test_the_worse_half_is_stopped_once_there_is_company(study: SearchStudy) -> None:
    for value in (40.0, 30.0):  # 1, 2
        add(study, {0: value})
    for state in (TrialState.FAIL, TrialState.RUNNING):  # not counted: failed, and a copy
        add(study, {0: 59.0}, state, **({DUPLICATE_OF: 1} if state == TrialState.RUNNING else {}))
    add(study, {1: 59.0})  # 5: at another rung
    me = add(study, {})  # 6
    same_speed = rule(study)
    trials = study.optuna.get_trials()
    assert not same_speed.verdict(trials, me, one_shot(10.0)).stop, "three are too few"

    add(study, {0: 20.0}, TrialState.PRUNED)  # 7
    trials = study.optuna.get_trials()
    worst = same_speed.verdict(trials, me, one_shot(10.0))
    assert worst.stop
    assert worst.reason == "before training: place 4 of 4, the first 2 go on"
    assert worst.figures == {"latency_ratio": 0.5, "place": 4.0, "of": 4.0}
    assert not same_speed.verdict(trials, me, one_shot(35.0)).stop, "the second of four"
    assert same_speed.verdict(trials, me, one_shot(30.0)).stop, "as good as the second, but later"
    assert not rule(study, keep=0.75).verdict(trials, me, one_shot(25.0)).stop, "the third of four"
    fastest = rule(study, known({**dict.fromkeys(range(9), 0.5), 6: 0.4}))
    assert not fastest.verdict(trials, me, one_shot(10.0)).stop, "nobody is as fast"
    assert not rule(study, lambda *_: None).verdict(trials, me, one_shot(10.0)).stop, "speed is unknown"


def test_a_candidate_is_judged_by_the_best_that_it_was_so_far(study: SearchStudy) -> None:
    """Large steps of training shake mild candidates, which are better again in the end."""
    for before, after in ((58.0, 50.0), (20.0, 53.0), (10.0, 52.0)):  # 1, 2, 3
        add(study, {0: before, 1: after})
    me = add(study, {0: 57.0})  # 4
    trials = study.optuna.get_trials()
    shaken = Rung(epochs=1, figures={"map": 49.0})
    assert not rule(study).verdict(trials, me, shaken).stop, "57 is the second of four after 58"
    me = add(study, {0: 52.5})  # 5
    verdict = rule(study).verdict(study.optuna.get_trials(), me, shaken)
    assert verdict.reason == "after epoch 1: place 3 of 4, the first 2 go on", "52.5 after 58 and 53"


def test_facts_that_training_does_not_change_are_held_against_the_limits(study: SearchStudy) -> None:
    me = add(study, {})
    trials = study.optuna.get_trials()

    def reason(limits: dict[str, float], ratio: float = 0.5, **facts: float) -> str:
        verdict = rule(study, known({1: ratio}), limits).verdict(trials, me, one_shot(20.0, **facts))
        assert verdict.stop == bool(verdict.reason)
        return verdict.reason

    assert reason({"max_size_mb": 2.0}, size_mb=2.5) == "before training: size_mb 2.5, the limit is 2"
    assert reason({"max_size_mb": 2.0}, size_mb=2.01) == "", "a file may still change by a few bytes"
    assert reason({"max_size_mb": 2.0}) == "", "not known"
    assert reason({"max_latency_ms": 6.0}, 0.73) == (
        "before training: predicted latency_ms 7.3, the limit is 6"
    )
    assert reason({"max_latency_ms": 6.0}, 0.71) == "", "within what a prediction may err"
    assert reason({"max_latency_ratio": 0.5}, 0.61).startswith("before training: predicted latency_ratio")
    study.optuna.set_user_attr(NEW_REFERENCE, {"scale": 2.0})  # the base takes 20 ms now
    assert reason({"max_latency_ms": 12.0}, 0.73) == (
        "before training: predicted latency_ms 14.6, the limit is 12"
    )
    assert reason({"max_latency_ms": 12.0}, 0.71) == ""


def test_keeping_all_stops_nobody(study: SearchStudy) -> None:
    for value in (40.0, 30.0, 20.0):
        add(study, {0: value})
    me = add(study, {})
    watching = rule(study, limits={"max_size_mb": 1.0}, keep=1.0)
    verdict = watching.verdict(study.optuna.get_trials(), me, one_shot(1.0, size_mb=9.0))
    assert (verdict.stop, verdict.figures["place"]) == (False, 4.0)


def test_a_loss_that_training_never_repaired_so_far(study: SearchStudy) -> None:
    # Lost at the rung 20, 30, 40, 25, 50; left at the end 5, 6, 12, 10, 30: shares .25, .2, .3, .4, .6.
    for at_rung_, final in ((40.0, 55.0), (30.0, 54.0), (20.0, 48.0), (35.0, 50.0), (10.0, 30.0)):
        add(study, {0: at_rung_}, TrialState.COMPLETE, final)
    add(study, {0: 58.0}, TrialState.COMPLETE, 60.0)  # a small loss, repaired whole, says nothing
    me = add(study, {})
    limited = rule(study, limits={"max_map_drop": 5.0}, company=99)
    trials = study.optuna.get_trials()
    verdict = limited.verdict(trials, me, one_shot(30.0))  # .2 x 30 = 6
    assert verdict.reason == "before training: loses 6.0 AP even at the best recovery seen, the limit is 5"
    assert not limited.verdict(trials, me, one_shot(36.0)).stop  # .2 x 24 = 4.8
    # Of those that lost at least half of 50 the fifth, which lost 20, is none: four are too few.
    assert not limited.verdict(trials, me, one_shot(10.0)).stop
    assert not rule(study, company=99).verdict(trials, me, one_shot(30.0)).stop, "no limit"
    least = rule(study, limits={"min_map": 55.0}, company=99)
    verdict = least.verdict(trials, me, one_shot(30.0))
    assert verdict.reason == "before training: has 54.0 AP even at the best recovery seen, the limit is 55"
    assert not least.verdict(trials, me, one_shot(36.0)).stop


def test_a_limit_is_said_as_it_was_written(tmp_path: Path) -> None:
    """The base has 58 AP and 60 with a candidate's training, of which a share of 0.2 of a loss is left."""
    study = toy_study(tmp_path)
    trained = {"map_trained_further": Measurement(value=60.0, unit="AP")}
    base = Evaluation.model_validate_json(evaluation(58.0)[EVALUATION])
    base = base.model_copy(update={"metrics": {**base.metrics, **trained}})
    add(study, {}, TrialState.COMPLETE, 58.0, **{EVALUATION: base.model_dump_json()})
    for at_rung_ in (40.0, 30.0, 20.0, 35.0, 10.0):
        add(study, {0: at_rung_}, TrialState.COMPLETE, 60.0 - 0.2 * (60.0 - at_rung_))
    me = add(study, {})
    trials = study.optuna.get_trials()
    problem = Problem.read({"limits": {"max_map_drop": 3.0}, "losses_from": "given"})
    given = replace(rule(study, company=99), problem=problem)
    assert not given.verdict(trials, me, one_shot(36.0)).stop, "55.2 of 58 AP"
    verdict = given.verdict(trials, me, one_shot(34.0))  # 54.8
    assert verdict.reason == "before training: loses 3.2 AP even at the best recovery seen, the limit is 3"


def test_what_was_decided_holds_for_any_driver(study: SearchStudy, tmp_path: Path) -> None:
    for value in (40.0, 30.0, 20.0):
        add(study, {0: value})
    with driver_of(study.optuna) as driver:
        me = study.optuna.ask(dict(toy_parts().distributions))
        writer = TrialWriter(study.optuna, me)
        writer.claim(driver.signature, to_recipe(me.params))
        assert not at_rung(study.optuna, rule(study), writer, one_shot(35.0)).stop
        stored = rung_figures(study.optuna.get_trials()[me.number])[0]
        assert stored == {"map": 35.0, "latency_ratio": 0.5, "place": 2.0, "of": 4.0, "stopped": 0.0}
        for value in (50.0, 51.0, 52.0, 53.0):  # company that would stop it now
            add(study, {0: value})
        reopened = toy_study(tmp_path)
        assert not at_rung(reopened.optuna, rule(reopened), writer, one_shot(35.0)).stop

        later = study.optuna.ask(dict(toy_parts().distributions))
        other = TrialWriter(study.optuna, later)
        other.claim(driver.signature, to_recipe(later.params))
        trials = study.optuna.get_trials()
        decided = [
            rule(one).verdict(trials, trials[later.number], one_shot(45.0)) for one in (study, reopened)
        ]
        assert decided[0] == decided[1]
        stopped = at_rung(study.optuna, rule(study), other, one_shot(31.0))
        assert stopped.stop
        again = at_rung(reopened.optuna, rule(reopened), other, one_shot(31.0))  # killed before it was told
        assert again == replace(stopped, figures={})


def test_a_trial_that_another_driver_has_is_stopped_and_not_written_to(study: SearchStudy) -> None:
    me = study.optuna.ask(dict(toy_parts().distributions))
    first, second = (TrialWriter(study.optuna, me) for _ in range(2))
    first.claim({"driver": "a"})
    second.claim({"driver": "b"})
    verdict = at_rung(study.optuna, rule(study), first, one_shot(35.0))
    assert (verdict.stop, verdict.reason) == (True, "another driver has it now")
    assert rung_figures(study.optuna.get_trials()[me.number]) == {}


def test_predictions_are_those_of_the_latency_model() -> None:
    problem = MadeUp()
    table = toy_table()
    optuna_study = problem.run(problem.sampler(0), 12)
    trials = optuna_study.get_trials()
    holder = SearchStudy(optuna_study, Path(), "")
    ratios = PredictedRatios(table, holder)
    assert ratios(trials[:7], trials[:2]) is None, "too little was measured"
    options = table.options([t.params for t in trials[8:11]])
    assert ratios(trials, trials[8:11]) == pytest.approx(problem.model.predict(options), rel=0.05)


# -- on workers


def test_a_study_in_which_one_is_stopped(tmp_path: Path, pool: Pool) -> None:
    """Company of 4, the better half goes on; by hand with mAP 80 - 30a - 10b^2 (less 20a before training)
    and latency 10 - 5a - 2b:

    trial          (a, b)        at rung 0: mAP, ratio
    1..3           (.75, 0), (0, .75), (.25, .25): 42.5 .625, 74.4 .85, 66.9 .825
    4              (.5, 0): 55 .75       none dominates; 2, 1, 4, 3 is the order: the third of 4 is stopped
    5              (.75, .75): 36.9 .475   2, 5, ...: the second of 5 goes on; at rung 1 the second of 4
    6              (.5, 0) again         is answered with what came of 4, and does not count
    7              (.5, .25): 54.4 .7      2, 5, 7, ...: the third of 6 goes on; at rung 1 2, 5, 7, ... of 5
    """
    study = toy_study(tmp_path)
    points = [(0.75, 0.0), (0.0, 0.75), (0.25, 0.25), (0.5, 0.0), (0.75, 0.75), (0.5, 0.0), (0.5, 0.25)]

    def enqueue(prepared: SearchStudy) -> None:
        for a, b in points:
            prepared.optuna.enqueue_trial({"a": a, "b": b})

    def ratios(_: Sequence[FrozenTrial], asked: Sequence[FrozenTrial]) -> NDArray[np.float64]:
        return np.array([fake_workers.score(trial.params)[1] / 10 for trial in asked])

    told: list[int] = []
    parts = toy_parts(
        on_prepared=enqueue,
        rungs=rule(study, ratios),
        after_trial=lambda _, number: told.append(number),
    )
    alone = replace(pool, workers=1)
    outcome = run_search(study, parts, fake_workers.RungWorker, trials=7, pool=alone)
    assert (outcome.finished, outcome.stopped_early, outcome.failed) == (7, 1, 0)
    trials = study.optuna.get_trials()
    assert [t.number for t in trials if is_stopped(t)] == [4, 6]
    assert [t.state for t in trials if not is_stopped(t)] == [TrialState.COMPLETE] * 6
    fourth = rung_figures(trials[4])
    assert list(fourth) == [0]
    assert fourth[0] == {
        "map": 55.0, "size_mb": 1.0, "latency_ratio": 0.75, "place": 3.0, "of": 4.0, "stopped": 1.0,
    }  # fmt: skip
    assert trials[4].user_attrs["reason"] == "before training: place 3 of 4, the first 2 go on"
    assert trials[4].values is None
    assert EVALUATION not in trials[4].user_attrs
    assert trials[6].user_attrs["duplicate_of"] == 4
    assert [(f["place"], f["of"]) for f in rung_figures(trials[5]).values()] == [(2.0, 5.0), (2.0, 4.0)]
    assert [(f["place"], f["of"]) for f in rung_figures(trials[7]).values()] == [(3.0, 6.0), (3.0, 5.0)]
    assert not {4, 6} & front_numbers(study)
    assert told == [0, 1, 2, 3, 4, 5, 7]
    assert rung_figures(trials[0]) == {}, "the base is not trained"


def test_with_two_workers_all_decisions_keep_the_rule(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)

    def ratios(_: Sequence[FrozenTrial], asked: Sequence[FrozenTrial]) -> NDArray[np.float64]:
        return np.array([fake_workers.score(trial.params)[1] / 10 for trial in asked])

    parts = toy_parts(rungs=rule(study, ratios))
    outcome = run_search(study, parts, fake_workers.RungWorker, trials=14, pool=pool)
    assert outcome.finished == 14
    assert outcome.stopped_early > 0
    for trial in study.optuna.get_trials():
        for figures in rung_figures(trial).values():
            if "place" in figures:
                assert bool(figures["stopped"]) == (figures["place"] > math.ceil(figures["of"] / 2))
        last = list(rung_figures(trial).values())[-1:]
        assert is_stopped(trial) == any(figures["stopped"] for figures in last)
        assert trial.params["a"] in STEPS


def test_a_sampler_reads_stopped_trials_as_stopped() -> None:
    table = toy_table()
    study = MadeUp().run(MadeUp().sampler(0), 2)
    trial = study.ask(table.space.distributions())
    writer = TrialWriter(study, trial)
    writer.claim({"driver": "a"})
    writer.reach(0, {"map": 31.0, "stopped": 1.0}, "before training")
    writer.stop()
    experience = ExperienceReader(table).read(study.get_trials())
    assert list(experience.stopped_at) == [{0: 31.0}]
    assert (experience.stopped == table.options([trial.params])).all()
