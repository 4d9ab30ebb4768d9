"""Samplers of users: found beside the configuration and here, tried first, and held to the space."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from evaluators.bench import Bench
from evaluators.evaluation import Evaluation
from evaluators.ranking import Problem
from search.config import load_config
from search.own_sampler import OwnSampler
from search.storage import ask
from search.strategy import Strategy, sampler_named
from search.study import SearchStudy
from search.trials import TrialWriter
from spaces.errors import InputError
from spaces.space import SearchSpace
from tests.search.test_config import LEAST, write
from tests.search.toy_problem import toy_study
from tests.search.toy_space import toy_table

MINE = """
import optuna

class Mine(optuna.samplers.RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        if len(study.get_trials()) == {fails_at}:
            raise KeyError("who")
        return super().sample_independent(study, trial, name, distribution)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("builtins:dict", "is no sampler"),
        ("optuna.samplers:CmaEsSampler", r"fails \(ValueError: .*CmaEsSampler cannot be used\.\)$"),
        ("optuna.samplers:BruteForceSampler", r"fails \(RuntimeError: .*inside an objective function"),
        ("optuna.samplers:GridSampler", "cannot be made of seed= alone"),
    ],
)
def test_what_cannot_search_is_refused_before_anything_is_made(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        sampler_named(name)
    assert caught.value.field == "search.sampler"


def test_a_file_is_tried_and_the_place_of_its_failure_is_said(tmp_path: Path) -> None:
    file = tmp_path / "samplers.py"
    file.write_text(MINE.format(fails_at=99))
    assert isinstance(sampler_named(f"{file}:Mine")(3), RandomSampler)
    broken = tmp_path / "broken.py"
    broken.write_text(MINE.format(fails_at=3))
    with pytest.raises(InputError, match=r"fails \(KeyError: 'who'; .*broken.py, line 7, in sample_ind"):
        sampler_named(f"{broken}:Mine")


def test_files_are_found_beside_the_configuration_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "configs"
    beside.mkdir()
    monkeypatch.chdir(tmp_path)
    config = write(beside, {**LEAST, "search": {"sampler": "mine.py:Mine"}})
    for folder in (tmp_path, beside):
        (folder / "mine.py").touch()
        assert load_config(config).search.sampler == f"{folder / 'mine.py'}:Mine"
    assert load_config(config, {"search.sampler": "tpe"}).search.sampler == "tpe"


def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    """As `paredown` starts it, without the working directory on the path of modules."""
    (tmp_path / "my_sampler.py").write_text(MINE.format(fails_at=99))
    code = "from search.strategy import sampler_named; print(sampler_named('my_sampler:Mine')(0))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "Mine\n", done.stderr


class Proposing(BaseSampler):
    """Proposes one value for every parameter, together or each for itself."""

    def __init__(self, value: Any, relative: dict[str, BaseDistribution]) -> None:
        self._value, self._relative = value, relative

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return self._relative

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return dict.fromkeys(search_space, self._value)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: BaseDistribution) -> Any:
        return self._value


@pytest.fixture
def space() -> SearchSpace:
    return toy_table().space


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    return toy_study(tmp_path)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("value", [0.3, "eight", None, [1]])
def test_a_value_outside_of_the_space_ends_the_run_and_its_trial_waits(
    study: SearchStudy, space: SearchSpace, value: Any, together: bool
) -> None:
    relative = space.distributions() if together else {}
    study.optuna.sampler = OwnSampler("m:S", Proposing(value, relative), space)
    with pytest.raises(InputError, match=r"search\.sampler: 'm:S': proposes .* where there are (0|32)"):
        ask(study.optuna, space.distributions())
    assert [trial.state for trial in study.optuna.get_trials()] == [TrialState.WAITING]
    study.optuna.sampler = RandomSampler(seed=0)  # the next run
    assert ask(study.optuna, space.distributions()).number == 0


def test_a_space_that_is_not_the_studys_is_refused(study: SearchStudy, space: SearchSpace) -> None:
    other: dict[str, BaseDistribution] = {next(iter(space.parameters)): CategoricalDistribution(["a", "b"])}
    study.optuna.sampler = OwnSampler("m:S", Proposing("a", other), space)
    with pytest.raises(InputError, match=r"'m:S': fails \(ValueError"):
        ask(study.optuna, space.distributions())
    assert [trial.state for trial in study.optuna.get_trials()] == [TrialState.WAITING]


class Remembering(RandomSampler):
    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        raise RuntimeError("no room")


def test_what_a_sampler_raises_at_the_end_of_a_trial_loses_no_result(
    study: SearchStudy, space: SearchSpace
) -> None:
    study.optuna.sampler = OwnSampler("m:S", Remembering(seed=0), space)
    writer = TrialWriter(study.optuna, ask(study.optuna, space.distributions()))
    writer.claim({"driver": "a"})
    with pytest.raises(InputError, match=r"fails \(RuntimeError: no room; .*test_own_sampler"):
        writer.complete([50.0, 1.0], Evaluation(recipe_key="k", status="ok", metrics={}))
    assert not writer.lost
    (trial,) = study.optuna.get_trials()
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [50.0, 1.0])


def test_a_search_holds_users_samplers_to_the_contract_and_trusts_optunas(
    study: SearchStudy, space: SearchSpace
) -> None:
    bench = cast(Bench, SimpleNamespace(space=space, config=SimpleNamespace(seed=0)))
    for name, kind in (("optuna.samplers:QMCSampler", OwnSampler), ("random", RandomSampler)):
        strategy = Strategy(bench, study, Problem(), name, seeds=False)
        assert isinstance(strategy.sampler(0), kind)


def test_a_sampler_that_keeps_the_contract_proposes_as_it_would_alone(space: SearchSpace) -> None:
    proposed = []
    for sampler in (RandomSampler(seed=1), OwnSampler("m:S", RandomSampler(seed=1), space)):
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        proposed.append([study.ask(space.distributions()).params for _ in range(3)])
    assert proposed[0] == proposed[1]
