"""Studies in real databases: fingerprints, passwords, owners, orphans."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import toy_problem
from optuna.trial import FrozenTrial, TrialState
from toy_problem import FINGERPRINT, OBJECTIVES, toy_study

from evaluators.evaluation import Evaluation
from search.owners import Driver, Owner, driver_of, recover_orphans
from search.processes import process_started
from search.storage import mask_url, open_storage
from search.study import SearchStudy, differences_of, load_study, open_study
from search.trials import TrialWriter, counts, evaluation_of, give_back, owner_of, recipe_of
from spaces.errors import InputError


@pytest.fixture(params=["sqlite", "postgres"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> SearchStudy:
    url = request.getfixturevalue("postgres") if request.param == "postgres" else None
    return toy_study(tmp_path, f"study-{tmp_path.name}", url)


def ask(study: SearchStudy) -> optuna.Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return study.optuna.ask(dict(toy_problem.toy_parts().distributions))


def states(study: SearchStudy) -> list[str]:
    return [trial.state.name for trial in study.optuna.get_trials()]


# -- opening


def test_everything_needed_to_resume_is_in_the_study(study: SearchStudy, tmp_path: Path) -> None:
    again = toy_study(tmp_path, study.name, url_of(study))
    assert again.fingerprint == FINGERPRINT
    assert again.objectives == {"map": "maximize", "latency_ms": "minimize"}
    assert again.optuna.metric_names == ["map", "latency_ms"]
    assert again.optuna.user_attrs["artifact_store"] == study.artifacts.as_uri()
    assert study.artifacts.is_dir()
    assert load_study(study.name, url=url_of(study)).artifacts == study.artifacts


def url_of(study: SearchStudy) -> str:
    backend: Any = study.optuna._storage
    return str(backend._backend.url)


def test_a_study_made_for_something_else_is_refused_with_what_differs(study: SearchStudy) -> None:
    changed = {**FINGERPRINT, "base": "11ee", "budget": 3}
    with pytest.raises(InputError) as refused:
        open_study(study.name, changed, OBJECTIVES, url=url_of(study))
    assert "base: '00ff' -> '11ee'; budget: None -> 3" in str(refused.value)
    assert "--study" in str(refused.value)
    assert "detector" not in str(refused.value)
    with pytest.raises(InputError, match="objectives"):
        open_study(study.name, FINGERPRINT, {**OBJECTIVES, "params": "minimize"}, url=url_of(study))
    assert toy_study(study.artifacts.parents[1], study.name, url_of(study)).fingerprint == FINGERPRINT


def test_of_objects_only_the_fields_that_differ_are_named() -> None:
    before, now = (
        {"plan": '{"epochs": 0, "rate": 1}', "b": "{"},
        {"plan": '{"epochs": 1, "rate": 1}', "b": "}"},
    )
    assert differences_of(before, now) == ["b: '{' -> '}'", "plan epochs: 0 -> 1"]


def test_somebody_elses_study_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(study_name="mine", storage=url, directions=["maximize", "minimize"]).ask()
    with pytest.raises(InputError, match="not made by paredown"):
        open_study("mine", FINGERPRINT, OBJECTIVES, url=url)


def test_a_study_of_other_objectives_without_trials_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/theirs.db"
    optuna.create_study(study_name="toy", storage=url, directions=["minimize", "maximize"])
    with pytest.raises(InputError, match="has other objectives"):
        toy_study(tmp_path, "toy", url)


def test_reading_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_study("toy", url=f"sqlite:///{tmp_path}/none.db")
    toy_study(tmp_path, "there")
    with pytest.raises(InputError, match="there: there"):
        load_study("absent", url=f"sqlite:///{tmp_path}/paredown.db")
    assert not (tmp_path / "none.db").exists()


def test_a_moved_project_finds_its_models_beside_the_database(tmp_path: Path) -> None:
    before = tmp_path / "before"
    study = open_study("s", FINGERPRINT, OBJECTIVES, url=f"sqlite:///{before}/paredown.db")
    assert study.artifacts == before / "artifacts" / "s"
    before.rename(tmp_path / "after")
    moved = open_study("s", FINGERPRINT, OBJECTIVES, url=f"sqlite:///{tmp_path}/after/paredown.db")
    assert moved.artifacts == tmp_path / "after" / "artifacts" / "s"


def with_a_model(folder: Path, **options: Any) -> SearchStudy:
    """A study in a database of that folder, and a file of its trial 0."""
    study = open_study("s", FINGERPRINT, OBJECTIVES, url=f"sqlite:///{folder}/paredown.db", **options)
    study.trial_folder(0).mkdir(parents=True)
    return study


def opened_in(folder: Path | str) -> Path:
    return open_study("s", FINGERPRINT, OBJECTIVES, url=f"sqlite:///{folder}/paredown.db").artifacts


def test_a_copied_project_works_in_its_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = with_a_model(tmp_path / "a")
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    assert opened_in(tmp_path / "b") == tmp_path / "b" / "artifacts" / "s"
    assert load_study("s", url=f"sqlite:///{tmp_path}/b/paredown.db").artifacts.parents[1] == tmp_path / "b"
    assert opened_in(tmp_path / "a") == original.artifacts
    monkeypatch.chdir(tmp_path / "c")
    assert opened_in(".") == tmp_path / "c" / "artifacts" / "s"
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert opened_in(tmp_path / "link") == tmp_path / "c" / "artifacts" / "s", "the same folder"


def test_a_project_that_was_copied_before_it_had_models_keeps_its_own(tmp_path: Path) -> None:
    opened_in(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert opened_in(tmp_path / "b") == tmp_path / "b" / "artifacts" / "s"


def test_models_stay_where_a_database_was_moved_from_alone(tmp_path: Path) -> None:
    """What lies beside it now is of a study that is gone."""
    study = with_a_model(tmp_path / "a")
    (tmp_path / "b" / "artifacts" / "s" / "old").mkdir(parents=True)
    for file in (tmp_path / "a").glob("paredown.db*"):
        file.rename(tmp_path / "b" / file.name)
    assert opened_in(tmp_path / "b") == study.artifacts


def test_a_folder_that_was_asked_for_is_no_copy(tmp_path: Path) -> None:
    study = with_a_model(tmp_path / "a", artifacts=tmp_path / "models")
    (tmp_path / "a" / "artifacts" / "models" / "old").mkdir(parents=True)
    assert opened_in(tmp_path / "a") == study.artifacts


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "not a database URL"),
        ("sqlite://", "in memory"),
        ("sqlite:////proc/none/x.db", "cannot be made"),
        ("postgresql://me:hunter2@127.0.0.1:1/db", "cannot be used"),
    ],
)
def test_an_unusable_storage_is_one_clear_line_without_password(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        open_storage(url)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.__context__ is None or refused.value.__suppress_context__


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, but long enough to be looked at" * 50)
    with pytest.raises(InputError, match="cannot be used"):
        open_storage(f"sqlite:///{tmp_path}/x.db")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://me:p@ss/w:rd@host/db", "mysql+pymysql://me:***@host/db"),
        ("postgresql:///db?host=/s&user=me&password=secret", "postgresql:///db?host=/s&user=me&password=***"),
        (
            "cannot open 'postgresql://me:s@h/d', try again",
            "cannot open 'postgresql://me:***@h/d', try again",
        ),
        ("sqlite:///runs/paredown.db", "sqlite:///runs/paredown.db"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert mask_url(text) == shown


def test_models_of_a_removed_database_are_not_taken_for_a_new_studys(tmp_path: Path) -> None:
    database, elsewhere = tmp_path / "paredown.db", tmp_path / "elsewhere"
    url = f"sqlite:///{database}"
    first = open_study("s", FINGERPRINT, OBJECTIVES, url=url)
    (first.artifacts / "base").mkdir()
    database.unlink()
    second = open_study("s", FINGERPRINT, OBJECTIVES, url=url)
    assert second.artifacts == first.artifacts.with_name("s-2")
    assert open_study("s", FINGERPRINT, OBJECTIVES, url=url).artifacts == second.artifacts
    with pytest.raises(InputError, match="models of another study"):
        open_study("t", FINGERPRINT, OBJECTIVES, url=url, artifacts=first.artifacts)
    assert open_study("u", FINGERPRINT, OBJECTIVES, url=url, artifacts=elsewhere).artifacts == elsewhere


def test_the_password_is_nowhere_in_an_open_study(tmp_path: Path, postgres: str) -> None:
    # Local connections are trusted by this server, so any password opens it.
    with_password = postgres.replace("postgres:@", "postgres:hunter2@")
    assert with_password != postgres
    study = toy_study(tmp_path, f"secret-{tmp_path.name}", with_password)
    with driver_of(study.optuna):
        storage: Any = study.optuna._storage
        attributes = storage.get_study_system_attrs(study.optuna._study_id)
        assert attributes
        assert "hunter2" not in repr((study, study.optuna.user_attrs, attributes))
    assert "***" in study.shown_url


# -- claiming


def claim_some(url: str, name: str, barrier: Any, claimed: Any) -> None:
    study = load_study(name, url=url)
    barrier.wait()
    claimed.put([ask(study).number for _ in range(10)])


def test_no_waiting_trial_is_claimed_twice(study: SearchStudy) -> None:
    for i in range(20):
        study.optuna.enqueue_trial({"a": toy_problem.STEPS[i % 4]})
    spawn = multiprocessing.get_context("spawn")
    barrier, claimed = spawn.Barrier(2), spawn.Queue()
    arguments = (url_of(study), study.name, barrier, claimed)
    drivers = [spawn.Process(target=claim_some, args=arguments) for _ in range(2)]
    for driver in drivers:
        driver.start()
    numbers = [number for _ in drivers for number in claimed.get(timeout=60)]
    for driver in drivers:
        driver.join()
    assert sorted(numbers) == list(range(20))


# -- orphans


def held(study: SearchStudy, driver: Driver) -> TrialWriter:
    trial = ask(study)
    writer = TrialWriter(study.optuna, trial)
    writer.claim(driver.signature, toy_problem.to_recipe(trial.params))
    driver.hold(writer.id)
    return writer


DEAD_DRIVER = """
import os, sys
from search.owners import driver_of
from search.study import load_study
import test_study
study = load_study(sys.argv[2], url=sys.argv[1])
with driver_of(study.optuna) as driver:
    test_study.held(study, driver).set_doing("finetune 2/4")
    test_study.ask(study)  # claimed, not signed yet
    os.kill(os.getpid(), 9)
"""


def die_with_two_trials(study: SearchStudy) -> None:
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    command = [sys.executable, "-c", DEAD_DRIVER, url_of(study), study.name]
    assert subprocess.run(command, env=environment).returncode == -9


def test_trials_of_a_killed_driver_go_on_under_their_numbers_once(study: SearchStudy) -> None:
    die_with_two_trials(study)
    assert states(study) == ["RUNNING", "RUNNING"]
    before = [trial.params for trial in study.optuna.get_trials()]
    with driver_of(study.optuna) as me:
        mine = held(study, me)
        assert recover_orphans(study.optuna, me) == [(0, "finetune 2/4"), (1, "start")]
        assert recover_orphans(study.optuna, me) == []
        assert states(study) == ["WAITING", "WAITING", "RUNNING"]
        first, second, _ = study.optuna.get_trials()
        assert [t.user_attrs["interrupted"] for t in (first, second)] == [["finetune 2/4"], ["start"]]
        assert [owner_of(first), owner_of(second)] == [None, None]
        assert not counts(first)

        # Its second crash is the last one: it may be what kills the drivers.
        mine.fail("export", "its own failure")
        die_with_two_trials(study)  # takes the two that wait
        assert [trial.params for trial in study.optuna.get_trials()][:2] == before
        recover_orphans(study.optuna, me)
    assert states(study) == ["FAIL", "FAIL", "FAIL"]
    first = study.optuna.get_trials()[0]
    assert first.user_attrs["interrupted"] == ["finetune 2/4", "finetune 2/4"]
    assert first.user_attrs["reason"] == "interrupted in stage finetune 2/4, with its driver again"
    assert first.datetime_complete is not None
    assert [t.number for t in study.optuna.get_trials() if counts(t)] == [2]


def test_a_clean_stop_never_uses_up_the_retry(study: SearchStudy) -> None:
    params = {}
    with driver_of(study.optuna) as driver:
        for _ in range(3):
            writer = held(study, driver)
            frozen = study.optuna.get_trials()[writer.number]
            assert writer.number == 0
            assert not params or frozen.params == params
            params = frozen.params
            assert writer.give_back()
    assert states(study) == ["WAITING"]


def test_only_one_of_several_drivers_puts_an_orphan_back(study: SearchStudy) -> None:
    """The second one has read the trial before the first acted, and a third one runs it by then."""
    die_with_two_trials(study)
    stale = study.optuna.get_trials()[0]
    with driver_of(study.optuna) as me:
        assert give_back(study.optuna, stale, crashed=True)
        assert not give_back(study.optuna, stale, crashed=True), "it waits already"
        again = held(study, me)
        assert again.number == 0
        assert not give_back(study.optuna, stale, crashed=True)
        assert recover_orphans(study.optuna, me) == [(1, "start")], "its heartbeat is not the old one's"
        assert states(study)[0] == "RUNNING"
        again.set_doing("export")
        assert not again.lost


def test_who_had_a_trial_before_does_not_write_to_it(study: SearchStudy) -> None:
    with driver_of(study.optuna) as driver:
        before = held(study, driver)
        assert give_back(study.optuna, study.optuna.get_trials()[0], crashed=True)
        now = held(study, driver)  # the same driver has come by it again
        assert now.number == before.number
        before.set_doing("export")
        assert before.lost
        assert not before.give_back()
        before.complete([1.0, 2.0], Evaluation(recipe_key="0", status="ok"))
        assert states(study) == ["RUNNING"]
        now.complete([3.0, 4.0], Evaluation(recipe_key="1", status="ok"))
    assert [t.values for t in study.optuna.get_trials()] == [[3.0, 4.0]]


def test_who_is_alive() -> None:
    with driver_of(optuna.create_study(storage=open_memory())) as driver:
        owner = driver.owner
        assert owner.is_alive() is True
        assert changed(owner, host="elsewhere").is_alive() is None
        assert changed(owner, pid_namespace="pid:[1]").is_alive() is None
        assert changed(owner, boot="before").is_alive() is False
        assert changed(owner, started="1").is_alive() is False, "the process id was given to another one"
        assert changed(owner, driver="ended earlier, in this process").is_alive() is False
    assert owner.is_alive() is False
    child = subprocess.Popen(["sleep", "60"])
    started = process_started(child.pid)
    assert started is not None
    sleeping = changed(owner, pid=child.pid, started=started)
    assert sleeping.is_alive() is True
    child.kill()
    child.wait()
    assert sleeping.is_alive() is False


def open_memory() -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage()


def changed(owner: Owner, **values: Any) -> Owner:
    return owner.model_copy(update=values)


def test_another_hosts_trial_is_an_orphan_when_its_heartbeat_is_old(study: SearchStudy) -> None:
    with driver_of(study.optuna) as driver:
        elsewhere = Driver(study.optuna, changed(driver.owner, host="elsewhere", driver="other"))
        held(study, elsewhere)
        assert recover_orphans(study.optuna, driver) == []
        age_heartbeats(study, seconds=100)
        assert recover_orphans(study.optuna, driver) == []
        age_heartbeats(study, seconds=100)
        assert recover_orphans(study.optuna, driver) == [(0, "start")]


def age_heartbeats(study: SearchStudy, seconds: int) -> None:
    import datetime

    import sqlalchemy

    backend: Any = study.optuna._storage
    with backend._backend.engine.begin() as connection:
        table = sqlalchemy.Table("trial_heartbeats", sqlalchemy.MetaData(), autoload_with=connection)
        for row in connection.execute(sqlalchemy.select(table)).all():
            older = row.heartbeat - datetime.timedelta(seconds=seconds)
            connection.execute(table.update().where(table.c.trial_id == row.trial_id).values(heartbeat=older))


def test_a_trial_that_was_taken_over_is_not_written_to(study: SearchStudy) -> None:
    with driver_of(study.optuna) as driver:
        writer = held(study, driver)
        study.optuna.tell(writer.number, state=TrialState.FAIL)
        evaluation = Evaluation(recipe_key="0", status="ok")
        writer.set_doing("score")
        writer.complete([1.0, 2.0], evaluation)
        assert writer.lost
    assert states(study) == ["FAIL"]


# -- what is written


def test_constraints_are_written_once_where_the_dashboard_reads_them(study: SearchStudy) -> None:
    with driver_of(study.optuna) as driver:
        writer = held(study, driver)
        writer.complete([50.0, 5.0], Evaluation(recipe_key="k", status="ok"), [0.25, -1.0])
    trial: FrozenTrial = study.optuna.get_trials()[0]
    assert trial.values == [50.0, 5.0]
    assert trial.system_attrs["constraints"] == [0.25, -1.0]
    assert [name for name in trial.system_attrs if "constraint" in name] == ["constraints"]
    assert study.optuna.best_trials == []  # Optuna reads them, too: the trial is not feasible
    assert set(trial.user_attrs) == {"recipe", "evaluation"}
    recipe, evaluation = recipe_of(trial), evaluation_of(trial)
    assert recipe == toy_problem.to_recipe(trial.params)
    assert evaluation == Evaluation(recipe_key="k", status="ok")
    assert owner_of(trial) is not None
