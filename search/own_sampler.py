"""Samplers of users, found as their detectors are, and held to the contract of Optuna's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    check_distribution_compatibility,
)
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.trials import give_back
from spaces.detectors.own import imported
from spaces.errors import InputError, own_place
from spaces.space import SearchSpace

FIELD = "search.sampler"
TRIED = 6
"""Trials of the small study that a sampler is tried on: more than its space has points, since some samplers
end a study whose space is used up."""


def own_sampler(name: str) -> Callable[[int], BaseSampler]:
    """A maker of a user's samplers from a seed, tried once.

    Raises:
        InputError: the class cannot be imported or made of a seed alone, is no sampler, or fails on a small
            study of two objectives.
    """
    factory = imported(name, FIELD)
    try:
        sampler = factory(seed=0)
    except Exception as error:  # whatever the user's code raises
        raise InputError(FIELD, name, f"cannot be made of seed= alone ({error})") from error
    if not isinstance(sampler, BaseSampler):
        raise InputError(FIELD, name, "is no sampler of Optuna's; its class must extend BaseSampler")
    _try(name, sampler)
    return lambda seed: factory(seed=seed)


def _try(name: str, sampler: BaseSampler) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    try:
        for number in range(TRIED):
            trial = study.ask({site: CategoricalDistribution([0.0, 0.5]) for site in "ab"})
            study.tell(trial, [float(number), float(number)])
    except Exception as error:  # whatever the user's code raises
        raise _failed(name, error) from error


class OwnSampler(BaseSampler):
    """A user's sampler. What it raises, and what it proposes that is not in the space, is an `InputError`;
    the trial that it was asked for waits for the next run.

    Args:
        name: as the user wrote it.
        sampler: what is called.
        space: of the study.
    """

    def __init__(self, name: str, sampler: BaseSampler, space: SearchSpace) -> None:
        self._name, self._sampler, self._parameters = name, sampler, space.parameters

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with self._asked(study, trial):
            self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        with self._asked(study, trial):
            found = self._sampler.infer_relative_search_space(study, trial)
            for name, parameter in self._parameters.items():
                if name in found:
                    check_distribution_compatibility(parameter.distribution, found[name])
            return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with self._asked(study, trial):
            values = self._sampler.sample_relative(study, trial, search_space)
            unknown = values.keys() - search_space.keys()
            if unknown:
                raise ValueError(f"{', '.join(sorted(unknown))} is not in its relative search space")
            for name, value in values.items():
                self._require_inside(name, value)
            return values

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        with self._asked(study, trial):
            value = self._sampler.sample_independent(study, trial, param_name, param_distribution)
            self._require_inside(param_name, value)
            return value

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        try:
            self._sampler.after_trial(study, trial, state, values)
        except StorageInternalError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise _failed(self._name, error) from error

    @contextmanager
    def _asked(self, study: optuna.Study, trial: FrozenTrial) -> Iterator[None]:
        try:
            yield
        except StorageInternalError:  # no fault of the sampler's
            raise
        except Exception as error:  # whatever the user's code raises
            give_back(study, trial, crashed=False)
            raise _failed(self._name, error) from error

    def _require_inside(self, name: str, value: Any) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            return  # nobody asks for it
        try:
            parameter.distribution.to_internal_repr(value)
            parameter.option(value)
        except Exception as error:  # whatever it may have proposed
            there = ", ".join(map(str, parameter.values))
            remedy = f"proposes {value!r} for {name!r}, where there are {there}"
            raise InputError(FIELD, self._name, remedy) from error


def _failed(name: str, error: Exception) -> InputError:
    """What was raised, and where in the user's file."""
    if isinstance(error, InputError):
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = own_place("".join(traceback.format_list(frames)))
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return InputError(FIELD, name, f"fails ({said}; {place})" if place else f"fails ({said})")
