from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search.asking import Asker
from search.owners import Driver, driver_of, recover_orphans
from search.trials import counts
from tests.search.toy_problem import toy_parts, toy_study


def test_the_sampler_is_made_after_the_base(tmp_path: Path) -> None:
    """What is prepared beside the base must be there when the sampler is made, and is not before."""
    made: list[int] = []

    def sampler(seed: int) -> RandomSampler:
        made.append(seed)
        return RandomSampler(seed=seed)

    study = toy_study(tmp_path)
    with driver_of(study.optuna) as driver:
        asker = Asker(study, toy_parts(sampler=sampler), driver)
        asker.enqueue_base()
        base = asker.ask_base()
        assert base is not None
        assert base.recipe.is_identity
        assert made == []
        candidate, _ = asker.ask({base.recipe.key})
        assert candidate is not None
        assert len(made) == 1
        asker.ask(set())
        assert len(made) == 1


def test_a_recipe_is_trained_again_after_one_failure_and_not_after_two(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    with driver_of(study.optuna) as driver:
        asker = Asker(study, toy_parts(), driver)
        for _ in range(3):
            study.optuna.enqueue_trial({"a": 0.5, "b": 0.5})
        for number in range(2):
            candidate, _ = asker.ask(set())
            assert candidate is not None
            assert candidate.number == number
            candidate.writer.fail("export", "no such operator")
        other, answered = asker.ask(set())
    assert answered == [(2, 1)]
    assert other is not None
    repeat = study.optuna.get_trials()[2]
    assert repeat.state == TrialState.FAIL
    assert (repeat.user_attrs["stage"], repeat.user_attrs["reason"]) == ("export", "no such operator")
    assert not counts(repeat)


def test_a_trial_whose_driver_is_killed_on_the_way_to_its_heartbeat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is of another host, so that only time tells."""
    study = toy_study(tmp_path)
    with driver_of(study.optuna) as driver:
        owner = driver.owner.model_copy(update={"host": "elsewhere", "driver": "other"})
        study.optuna._storage.set_study_system_attr(
            study.optuna._study_id, "paredown:driver/other", owner.model_dump()
        )
        asker = Asker(study, toy_parts(), Driver(study.optuna, owner))
        asker.enqueue_base()
        with patch.object(Driver, "hold", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            asker.ask_base()
        assert recover_orphans(study.optuna, driver) == []
        monkeypatch.setattr("search.owners.GRACE_SECONDS", 0)
        assert recover_orphans(study.optuna, driver) == [(0, "start")]
