"""Reading and writing many rows at a time: the same trials as Optuna's own storage sees."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event

from search.bulk_storage import BulkStorage
from search.storage import ask, open_storage, params_at_once, read_once, record_heartbeats

SPACE: dict[str, BaseDistribution] = {
    "sparsity": FloatDistribution(0.0, 0.75, step=0.25),
    "bits": CategoricalDistribution((32.0, 16.0, 8.0)),
    "activation": CategoricalDistribution(("silu", "relu")),
    "count": IntDistribution(1, 5),
}


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/bulk.db"
        return
    found = request.getfixturevalue("postgres")
    yield found
    storage = open_storage(found)
    for study in storage.get_all_studies():
        if study.study_name.startswith("bulk"):
            storage.delete_study(study._study_id)


def facts(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    return [dict(vars(trial)) for trial in trials]


def filled(url: str) -> optuna.Study:
    """Trials in every state, with attributes of every kind."""
    study = optuna.create_study(
        study_name="bulk",
        storage=open_storage(url),
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for k in range(3):
        trial = ask(study, SPACE)
        trial.set_user_attr("recipe", {"k": k})
        study._storage.set_trial_system_attr(trial._trial_id, "constraints", [0.5 * k])
        study.tell(trial, [float(k), float("inf") if k == 1 else -k])
    study.tell(ask(study, SPACE), state=TrialState.FAIL)
    study.enqueue_trial({"sparsity": 0.25, "bits": 8.0})
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            params={"sparsity": 0.5},
            distributions={"sparsity": SPACE["sparsity"]},
            intermediate_values={1: 2.0, 3: float("nan")},
        )
    )
    ask(study, SPACE)
    return study


def test_trials_are_read_as_optuna_reads_them(url: str) -> None:
    ours = filled(url).get_trials()
    plain = RDBStorage(open_storage(url).url)
    theirs = plain.get_all_trials(plain.get_study_id_from_name("bulk"))
    assert [trial.state.name for trial in ours] == ["COMPLETE"] * 3 + ["FAIL", "RUNNING", "PRUNED"]
    assert len(theirs) == len(ours)
    for own, other in zip(facts(ours), facts(theirs), strict=True):
        assert repr(own) == repr(other)  # NaN is not equal to itself
    one = open_storage(url).get_trial(ours[5]._trial_id)
    assert repr(vars(one)) == repr(vars(theirs[5]))


def test_an_enqueued_trial_keeps_what_was_fixed(url: str) -> None:
    study = filled(url)
    taken = study.get_trials()[4]
    assert {name: taken.params[name] for name in ("sparsity", "bits")} == {"sparsity": 0.25, "bits": 8.0}
    assert taken.params.keys() == SPACE.keys()


def test_what_another_process_writes_is_seen(url: str) -> None:
    study = filled(url)
    here = optuna.load_study(study_name="bulk", storage=open_storage(url))
    assert [t.state.name for t in here.get_trials()].count("RUNNING") == 1
    trial = ask(study, SPACE)
    seen = here.get_trials()[-1]
    assert (seen.state, seen.params) == (TrialState.RUNNING, trial.params)
    trial.set_user_attr("stage", "training")
    assert here.get_trials()[-1].user_attrs == {"stage": "training"}
    study.tell(trial, [1.0, 2.0])
    seen = here.get_trials()[-1]
    assert (seen.state, seen.values, seen.params) == (TrialState.COMPLETE, [1.0, 2.0], trial.params)


def test_parameters_written_one_by_one_are_seen_as_they_come(url: str) -> None:
    filled(url)
    plain = optuna.load_study(study_name="bulk", storage=RDBStorage(open_storage(url).url))
    here = optuna.load_study(study_name="bulk", storage=open_storage(url))
    trial = plain.ask()
    for count, (name, distribution) in enumerate(SPACE.items(), start=1):
        trial._suggest(name, distribution)
        assert len(here.get_trials()[-1].params) == count
    assert here.get_trials()[-1].params == trial.params


def test_inside_a_reading_the_database_is_asked_once(url: str) -> None:
    study = filled(url)
    here = optuna.load_study(study_name="bulk", storage=open_storage(url))
    trial = study.get_trials()[4]
    with read_once(here):
        assert here.get_trials()[4].state == TrialState.RUNNING
        study.tell(trial.number, [1.0, 2.0])
        with read_once(here):
            assert here.get_trials()[4].state == TrialState.RUNNING
        assert here.get_trials()[4].state == TrialState.RUNNING
    assert here.get_trials()[4].state == TrialState.COMPLETE


def test_an_ask_writes_its_parameters_in_one_transaction(url: str) -> None:
    study = filled(url)
    backend = study._storage._backend  # type: ignore[attr-defined]
    assert isinstance(backend, BulkStorage)
    inserts: list[str] = []

    def before(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO trial_params"):
            inserts.append(statement)

    event.listen(backend.engine, "before_cursor_execute", before)
    trial = ask(study, SPACE)
    assert len(inserts) == 1
    assert study.get_trials()[-1].params == trial.params


def test_parameters_of_a_trial_that_is_over_or_of_another_kind_are_refused(url: str) -> None:
    study = filled(url)
    backend = study._storage._backend  # type: ignore[attr-defined]
    over = study.get_trials()[0]._trial_id
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError), params_at_once(study):
        backend._set_trial_param(over, "count", 1.0, SPACE["count"], SPACE["count"])
    trial = study.ask()
    with pytest.raises(ValueError, match="distribution"), params_at_once(study):
        trial._suggest("bits", IntDistribution(1, 5))
    assert study.get_trials()[-1].params == {}


def test_heartbeats_are_recorded_together(url: str) -> None:
    study = filled(url)
    backend: Any = study._storage._backend  # type: ignore[attr-defined]
    first, second = ask(study, SPACE), ask(study, SPACE)
    for trial in (first, second):
        backend.record_heartbeat(trial._trial_id)
    long_ago = sqlalchemy.update(TrialHeartbeatModel).values(heartbeat=datetime.datetime(2000, 1, 1))
    with backend.engine.begin() as connection:
        connection.execute(long_ago)
    assert set(backend._get_stale_trial_ids(study._study_id)) == {first._trial_id, second._trial_id}
    record_heartbeats(study, [first._trial_id])
    assert backend._get_stale_trial_ids(study._study_id) == [second._trial_id]


def test_a_study_can_travel_to_another_process(url: str) -> None:
    study = filled(url)
    there = pickle.loads(pickle.dumps(study))
    assert ask(there, SPACE).number == len(study.get_trials()) - 1


def test_studies_outside_databases_are_left_alone() -> None:
    study = optuna.create_study()
    trial = ask(study, SPACE)
    assert study.get_trials()[0].params == trial.params
