"""The front measured again, while another driver removes files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import create_trial

import search.final
from search.final import is_measured, measure_front
from search.front import FINAL
from search.study import SearchStudy
from search.trials import RECIPE
from spaces.errors import InputError
from tests.search.toy_problem import to_recipe, toy_study


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """Base and two more, all on the front, with their files."""
    study = toy_study(tmp_path)
    for n in range(3):
        recipe = to_recipe({"a": n / 4})
        study.optuna.add_trial(
            create_trial(values=[80.0 - n, 10.0 - n], user_attrs={RECIPE: recipe.to_json()})
        )
        folder = study.trial_folder(n)
        folder.mkdir(parents=True)
        (folder / "model.onnx").touch()
        (folder / "model.json").write_text(json.dumps({"figures": {}}))
    return study


def remove(study: SearchStudy, number: int) -> None:
    for file in study.trial_folder(number).iterdir():
        file.unlink()


class FakeBench:
    """Scores everything alike; `while_loading` and `while_scoring` are called with the number of a trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slot = SimpleNamespace(computing=contextlib.nullcontext)
        self.config, self.target = SimpleNamespace(threads=1), self
        self.timing_inputs: list[Any] = []
        self.while_loading = self.while_scoring = lambda _number: None
        paired = SimpleNamespace(ratio=1.0, low=0.9, high=1.1, base_ms=SimpleNamespace(p50=10.0), stable=True)
        card = SimpleNamespace(recipe=None, runtime=SimpleNamespace(hint="f32"))
        fakes: dict[str, Any] = {
            "ModelCard": SimpleNamespace(beside=lambda _model: card),
            "time_together": lambda _bench, named, *_, **__: dict.fromkeys(named, paired),
            "map_difference_interval": lambda *_, **__: (0.0, -1.0, 1.0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(search.final, name, fake)

    def at(self, _recipe: Any) -> FakeBench:
        return self

    def prepare(self, model: Path, _threads: int, _hint: str) -> int:
        number = int(model.parent.name.removeprefix("trial-"))
        self.while_loading(number)
        if not model.is_file():
            raise InputError("model", str(model), "is missing")
        return number

    def split(self, _role: str) -> Any:
        return SimpleNamespace(images=[], origin="digits", source="report.json")

    def scored(self, session: int, _split: Any) -> tuple[dict[str, float], dict[int, Any]]:
        self.while_scoring(session)
        return {"map": 50.0, "map_50": 70.0}, {}


def measured(bench: Any, study: SearchStudy) -> set[str]:
    measure_front(bench, study, lambda _line: None)
    return set(study.optuna.user_attrs[FINAL]["models"])


def test_a_model_that_goes_while_it_is_loaded_is_left_out(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = FakeBench(monkeypatch)
    bench.while_loading = lambda number: remove(study, number) if number == 1 else None
    assert measured(bench, study) == {"0", "2"}
    assert is_measured(study), "there is nothing to measure of trial 1"


def test_what_was_measured_is_stored_though_a_card_is_gone(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = FakeBench(monkeypatch)
    bench.while_scoring = lambda number: remove(study, number) if number == 1 else None
    assert measured(bench, study) == {"0", "1", "2"}
    card = json.loads((study.trial_folder(2) / "model.json").read_text())
    assert card["figures"]["measured_again"]["split"] == "report.json"


def test_a_model_that_cannot_be_read_is_an_error(study: SearchStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench(monkeypatch)

    def broken(number: int) -> None:
        raise InputError("model", number, "is no model")

    bench.while_loading = broken
    with pytest.raises(InputError, match="is no model"):
        measured(bench, study)


def test_without_the_base_nothing_is_measured(study: SearchStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(study, 0)
    with pytest.raises(InputError, match="is gone"):
        measured(FakeBench(monkeypatch), study)
