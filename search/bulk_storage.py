"""Optuna's database storage with trials read and parameters written many rows at a time.

Optuna reads a trial as objects, one for each parameter, and writes each parameter in a transaction of its
own. With a hundred parameters that is most of what a study costs. Tables and their meaning are Optuna's own;
`tests/search/test_bulk_storage.py` compares what both read.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

_AT_ONCE = 500
"""Ids in one statement; databases bound their number."""

Params = tuple[dict[str, Any], dict[str, BaseDistribution]]
_distribution = lru_cache(maxsize=4096)(json_to_distribution)


class BulkStorage(RDBStorage):
    """See the module. Used through Optuna's cache, which asks for unfinished and new trials only."""

    def __init__(self, url: str, **options: Any) -> None:
        self._gathered, self._readings = threading.local(), threading.local()
        self._running: dict[int, Params] = {}  # complete parameters of trials that run
        self._known: dict[tuple[int, str], BaseDistribution] = {}
        self._most: dict[int, int] = defaultdict(int)  # parameters of a trial, by study
        super().__init__(url, **options)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_gathered", "_readings")  # of threads, which do not travel
        return {key: value for key, value in super().__getstate__().items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._gathered, self._readings = threading.local(), threading.local()
        super().__setstate__(state)

    # -- writing

    @contextmanager
    def params_gathered(self) -> Iterator[None]:
        """Parameters that this thread sets inside are written in one transaction at the end."""
        rows: list[tuple[int, str, float, BaseDistribution, BaseDistribution | None]] = []
        self._gathered.rows = rows
        try:
            yield
        finally:
            self._gathered.rows = None
        for trial_id in dict.fromkeys(row[0] for row in rows):
            self._write(trial_id, [row[1:] for row in rows if row[0] == trial_id])

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        row = (trial_id, param_name, param_value_internal, distribution, previous_distribution)
        rows = getattr(self._gathered, "rows", None)
        if rows is None:
            super()._set_trial_param(*row)
        else:
            rows.append(row)

    def _write(
        self,
        trial_id: int,
        rows: Iterable[tuple[str, float, BaseDistribution, BaseDistribution | None]],
    ) -> None:
        with _create_scoped_session(self.scoped_session) as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, trial.state)
            together = []
            for name, value, distribution, previous in rows:
                before = previous or self._known.get((trial.study_id, name))
                if before is None:  # nobody has seen this parameter here: Optuna looks it up
                    self._set_trial_param_without_commit(session, trial_id, name, value, distribution)
                    continue
                check_distribution_compatibility(before, distribution)
                text = _as_json(distribution)
                together.append(
                    {
                        "trial_id": trial_id,
                        "param_name": name,
                        "param_value": value,
                        "distribution_json": text,
                    }
                )
            if together:
                session.execute(sqlalchemy.insert(models.TrialParamModel), together)

    def record_heartbeats(self, trial_ids: list[int]) -> None:
        """`record_heartbeat` of several trials that have had their first one."""
        model = models.TrialHeartbeatModel
        with _create_scoped_session(self.scoped_session) as session:
            now = session.execute(sqlalchemy.func.now()).scalar()
            for ids in _parts(trial_ids):
                session.execute(sqlalchemy.update(model).where(model.trial_id.in_(ids)).values(heartbeat=now))

    # -- reading

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Inside, this thread reads the trials of a study once; what is written meanwhile comes later.

        Optuna looks into the database whenever trials are asked for, and reads those again that are not over.
        """
        outer = getattr(self._readings, "studies", None)
        self._readings.studies = set() if outer is None else outer
        try:
            yield
        finally:
            self._readings.studies = outer

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's."""
        with _create_scoped_session(self.scoped_session) as session:
            return self._built(session, [models.TrialModel.find_or_raise_by_id(trial_id, session)])[0]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        done: set[int] | None = getattr(self._readings, "studies", None)
        if done is not None:
            if study_id in done:
                return []
            done.add(study_id)
        trial = models.TrialModel
        with _create_scoped_session(self.scoped_session) as session:
            models.StudyModel.find_or_raise_by_id(study_id, session)
            wanted = session.query(trial).filter(trial.study_id == study_id)
            rows = wanted.filter(trial.trial_id > trial_id_greater_than).all()
            for ids in _parts(sorted(i for i in included_trial_ids if i <= trial_id_greater_than)):
                rows += wanted.filter(trial.trial_id.in_(ids)).all()
            kept = [row for row in rows if states is None or row.state in states]
            return self._built(session, sorted(kept, key=lambda row: row.trial_id))

    def _built(self, session: Session, rows: list[Any]) -> list[FrozenTrial]:
        """Frozen trials of Optuna's rows of trials."""
        ids = [row.trial_id for row in rows]
        params = self._params(session, rows)
        user = _attributes(session, models.TrialUserAttributeModel, ids)
        system = _attributes(session, models.TrialSystemAttributeModel, ids)
        values: dict[int, dict[int, float]] = defaultdict(dict)
        model = models.TrialValueModel
        for i, objective, value, kind in _of_trials(
            session, ids, model, model.objective, model.value, model.value_type
        ):
            values[i][objective] = model.stored_repr_to_value(value, kind)
        steps: dict[int, dict[int, float]] = defaultdict(dict)
        between = models.TrialIntermediateValueModel
        for i, step, value, kind in _of_trials(
            session, ids, between, between.step, between.intermediate_value, between.intermediate_value_type
        ):
            steps[i][step] = between.stored_repr_to_intermediate_value(value, kind)
        return [
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=[values[i][k] for k in sorted(values[i])] if i in values else None,
                datetime_start=row.datetime_start,
                datetime_complete=row.datetime_complete,
                params=dict(params[i][0]),
                distributions=dict(params[i][1]),
                user_attrs=user.get(i, {}),
                system_attrs=system.get(i, {}),
                intermediate_values=steps.get(i, {}),
                trial_id=i,
            )
            for i, row in zip(ids, rows, strict=True)
        ]

    def _params(self, session: Session, rows: list[Any]) -> dict[int, Params]:
        """Parameters by trial. Those of a running trial are read once they are all there.

        Parameters are only ever added. A trial is taken to have all of them where it has as many as any
        other one of its study; a finished one is read again, whatever is known of it.
        """
        studies = {row.trial_id: row.study_id for row in rows}
        over = {row.trial_id for row in rows if row.state.is_finished()}
        found: dict[int, Params] = {
            i: self._running[i]
            for i, study in studies.items()
            if i in self._running and i not in over and len(self._running[i][0]) >= self._most[study]
        }
        unknown = [i for i in studies if i not in found]
        found |= {i: ({}, {}) for i in unknown}
        model = models.TrialParamModel
        listed = _of_trials(
            session,
            unknown,
            model,
            model.param_id,
            model.param_name,
            model.param_value,
            model.distribution_json,
        )
        for i, _, name, value, text in sorted(listed, key=lambda row: row[1]):
            distribution = _distribution(text)
            found[i][0][name] = distribution.to_external_repr(value)
            found[i][1][name] = distribution
        for i in unknown:
            study, (own, distributions) = studies[i], found[i]
            self._known.update({(study, name): d for name, d in distributions.items()})
            self._most[study] = max(self._most[study], len(own))
            if i in over:
                self._running.pop(i, None)
            elif own:
                self._running[i] = found[i]
        return found


@lru_cache(maxsize=4096)
def _as_json(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)


def _attributes(session: Session, model: Any, ids: list[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for i, key, text in _of_trials(session, ids, model, model.key, model.value_json):
        found[i][key] = json.loads(text)
    return found


def _of_trials(session: Session, ids: list[int], model: Any, *columns: Any) -> Iterator[Any]:
    """Rows (trial id, *columns) of some trials, in any order."""
    for part in _parts(ids):
        yield from session.execute(
            sqlalchemy.select(model.trial_id, *columns).where(model.trial_id.in_(part))
        )


def _parts(ids: list[int]) -> Iterator[list[int]]:
    for k in range(0, len(ids), _AT_ONCE):
        yield ids[k : k + _AT_ONCE]
