"""Which trials have a model to take, and where it is put."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState, create_trial

from search.commands import finish as finishing
from search.commands.evaluate import _model_of_trial
from search.commands.finish import _stored_map, finish
from search.study import SearchStudy
from search.trials import EVALUATION
from spaces.errors import InputError
from tests.search.test_front import add, measured
from tests.search.toy_problem import toy_study


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/paredown.db"


@pytest.fixture
def study(tmp_path: Path, storage: str) -> SearchStudy:
    """Trial 0 is the base, 1 has 59.5 AP, 2 failed after it was scored."""
    study = toy_study(tmp_path, url=storage)
    add(study, {"a": 0.0, "b": 0.0}, 60.0, 1.0)
    add(study, {"a": 0.25, "b": 0.0}, 59.5, 0.8)
    scored = {EVALUATION: measured(map=50.0, latency_ratio=0.7).model_dump_json()}
    study.optuna.add_trial(create_trial(state=TrialState.FAIL, user_attrs=scored))
    return study


def test_only_a_trial_that_came_to_its_end_has_a_model(study: SearchStudy) -> None:
    assert _stored_map(study, 1) == 59.5
    with pytest.raises(InputError, match="--trial: 2: has failed and has no model"):
        _stored_map(study, 2)
    study.optuna.enqueue_trial({"a": 0.5})
    with pytest.raises(InputError, match="3: has not begun"):
        _stored_map(study, 3)
    with pytest.raises(InputError, match="4: study toy has 4 trials, the first of them is 0"):
        _stored_map(study, 4)


def test_evaluate_recommends_only_what_works(study: SearchStudy, storage: str) -> None:
    for number, said in ((99, "has 3 trials"), (2, "has failed"), (1, r"files are gone .*keep_mb")):
        with pytest.raises(InputError, match=said) as refused:
            _model_of_trial("toy", number, storage)
        assert "finish" not in str(refused.value)
    folder = study.trial_folder(1)
    folder.mkdir(parents=True)
    for name in ("recipe.json", "state.safetensors"):
        (folder / name).touch()
    with pytest.raises(InputError, match=f"finish --study toy --storage {storage} --trial 1 --output DIR"):
        _model_of_trial("toy", 1, storage)
    (folder / "model.onnx").touch()
    assert _model_of_trial("toy", 1, storage) == folder / "model.onnx"


@pytest.mark.parametrize("output", [".", "new", "some/new", "empty"])
def test_a_model_is_put_into_a_new_folder_or_an_empty_one(
    study: SearchStudy, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """The working directory stays what it is."""
    here = tmp_path / "here"
    (here / "empty").mkdir(parents=True) if output == "empty" else here.mkdir()
    monkeypatch.chdir(here)
    bench = SimpleNamespace(detector=SimpleNamespace(name="toy"), target=SimpleNamespace(name="engine"))
    monkeypatch.setattr(finishing, "_bench", lambda *_: bench)
    monkeypatch.setattr(finishing, "_score", lambda *_: (59.5, 7))

    def put(_bench: object, _study: object, _number: int, folder: Path) -> str:
        for name in ("model.onnx", "model.json"):
            (folder / name).touch()
        return "copied"

    monkeypatch.setattr(finishing, "_put_model", put)
    assert finish("toy", Path(output), trial=1, storage=storage) == 0
    assert sorted(file.name for file in Path(output).iterdir()) == ["model.json", "model.onnx"]
    assert Path.cwd() == here
    if "new" in output:
        assert Path(output).stat().st_mode & 0o777 == 0o755
    with pytest.raises(InputError, match="is there already"):
        finish("toy", Path(output), trial=1, storage=storage)
