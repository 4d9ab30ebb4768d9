"""What handover does itself, beside Optuna, on a database that is busy for too long."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

import search.storage
from search.handover import hand_over, owner_in, replace_claim
from tests.search.toy_problem import toy_study

CALLS: dict[str, Callable[[optuna.Study], Any]] = {
    "owner": lambda study: owner_in(study._storage, 1),
    "trial": lambda study: hand_over(study._storage, 1, None, TrialState.WAITING, {}, {}),
    "claim": lambda study: replace_claim(study._storage, study._study_id, "key", {}, lambda _: True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_database_that_does_not_answer_raises_what_optuna_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(search.storage, "_LOCK_SECONDS", 0.1)
    study = toy_study(tmp_path).optuna
    study.ask()
    other = sqlite3.connect(tmp_path / "paredown.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageInternalError) as raised:
        CALLS[name](study)
    assert "locked" in str(raised.value.__cause__)
    other.execute("ROLLBACK")
    CALLS[name](study)
