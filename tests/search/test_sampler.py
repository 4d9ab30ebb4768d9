"""The sampler on a made-up detector whose damage is known, told as the search tells it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray

from evaluators.evaluation import Evaluation, Measurement
from evaluators.latency_model import fit_latency
from evaluators.ranking import Problem, hypervolume
from search.experience import Experience, ExperienceReader, believed_loss
from search.knowledge import Finished, LatencyLearner, finished_trials
from search.sampler import SMALLEST_LOSS, FrontSampler
from search.seeds import uniform_starts
from search.strategy import probe_recipes, sampler_named
from search.trials import TrialWriter
from spaces.errors import InputError
from spaces.recipe import Recipe, TopK
from spaces.sites import find_sites
from spaces.space import CPU, SearchSpace, build_space
from spaces.table import SpaceTable
from tests.search.test_solver import random_damage, toy_model
from tests.search.toy_space import toy_table
from tests.spaces.toy import ToyDetector


class MadeUp:
    """mAP falls from 60 with the square root of the damage; latency is that of the toy model."""

    def __init__(self, seed: int = 0) -> None:
        self.table = toy_table()
        self.damage = random_damage(self.table, seed)
        self.model = toy_model(self.table)

    def evaluate(self, options: NDArray[np.int64]) -> tuple[float, float]:
        damage = self.damage[np.arange(len(options)), options].sum()
        return 60.0 - 4.0 * float(np.sqrt(damage)), float(self.model.predict(options[None])[0])

    def run(
        self,
        sampler: optuna.samplers.BaseSampler,
        trials: int,
        fails: Callable[[NDArray[np.int64]], bool] = lambda options: False,
    ) -> optuna.Study:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.enqueue_trial(self.table.space.identity_params())
        for _ in range(trials):
            trial = study.ask(self.table.space.distributions())
            recipe = self.table.space.recipe(trial.params)
            writer = TrialWriter(study, trial)
            writer.claim({"host": "here", "pid": 1}, recipe)
            options = self.table.options([trial.params])[0]
            if fails(options):
                writer.fail("export", "no such operator")
                continue
            quality, latency = self.evaluate(options)
            metrics = {
                "map": Measurement(value=quality, unit="AP"),
                "latency_ratio": Measurement(value=latency, unit="ratio"),
                "latency_ms": Measurement(value=20.0 * latency, unit="ms"),
            }
            evaluation = Evaluation(recipe_key=recipe.key, status="ok", metrics=metrics)
            writer.complete([quality, latency], evaluation, [])
        return study

    def sampler(self, seed: int, limits: Mapping[str, float] | None = None) -> FrontSampler:
        problem = Problem.read({"limits": {"max_map_drop": 20.0} if limits is None else limits})
        return FrontSampler(
            self.table, self.damage, lambda f: fit_latency(self.table, f.options, f.ratio), problem, seed
        )


def volume(study: optuna.Study) -> float:
    points = [(-t.values[0], t.values[1]) for t in study.get_trials() if t.values]
    return hypervolume(points, (-40.0, 1.0))


def test_beats_random_search_on_a_problem_that_it_has_the_sensitivities_of() -> None:
    ours, random = [], []
    for seed in range(5):
        problem = MadeUp(seed)
        ours.append(volume(problem.run(problem.sampler(seed), 12)))
        random.append(volume(problem.run(optuna.samplers.RandomSampler(seed=seed), 12)))
    assert np.median(ours) > 1.05 * np.median(random)


def test_proposals_keep_within_the_largest_loss() -> None:
    """221 of the 5832 recipes lose 8 points or less."""
    problem = MadeUp()
    studies = [problem.run(problem.sampler(seed, {"max_map_drop": 8.0}), 20) for seed in range(3)]
    learnt = [60.0 - t.values[0] for study in studies for t in study.get_trials()[8:]]
    assert np.mean(np.array(learnt) <= 8.0) >= 0.8


def test_a_least_map_bounds_proposals_as_a_largest_loss_does() -> None:
    """The base has 60 AP."""
    problem = MadeUp()
    by_loss, by_map, unbound = (
        [trial.params for trial in problem.run(problem.sampler(0, limits), 12).get_trials()]
        for limits in ({"max_map_drop": 3.0}, {"min_map": 57.0}, {})
    )
    assert by_map == by_loss
    assert by_map != unbound


@pytest.mark.parametrize("limits", [{"max_map_drop": 0.0}, {"min_map": 60.0}, {"min_map": 61.0}])
def test_a_limit_that_allows_no_loss_does_not_blind_it(limits: Mapping[str, float]) -> None:
    """Losses of up to half an AP point are looked at, and what is much faster is found there."""
    problem = MadeUp()
    problem.damage = problem.damage * 0.01  # of losses, a tenth
    study = problem.run(problem.sampler(0, limits), 12)
    same = problem.run(problem.sampler(0, {"max_map_drop": SMALLEST_LOSS}), 12)
    assert [t.params for t in study.get_trials()] == [t.params for t in same.get_trials()]
    assert min(t.values[1] for t in study.get_trials()[2:]) < 0.7 * 20.0


def test_same_seed_same_proposals_and_no_repeats() -> None:
    problem = MadeUp()
    studies = [problem.run(problem.sampler(3), 10) for _ in range(2)]
    first, second = ([t.params for t in study.get_trials()] for study in studies)
    assert first == second
    assert len({tuple(params.values()) for params in first}) == 10


def test_state_is_the_study_alone() -> None:
    """A fresh sampler on an old study learns from its trials: it keeps away from what was done."""
    problem = MadeUp()
    study = problem.run(problem.sampler(0), 8)
    fresh = problem.sampler(1)
    done = {tuple(t.params.values()) for t in study.get_trials()}
    proposal = fresh.sample_relative(study, study.get_trials()[-1], {})
    assert set(proposal) == set(problem.table.names)
    assert tuple(proposal.values()) not in done


def test_trials_of_another_space_are_passed_over() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(trial, [1.0, 1.0])
    assert len(finished_trials(toy_table(), study.get_trials()).map) == 0


def test_uniform_starts_set_every_layer_to_one_width() -> None:
    table = toy_table()
    widths = [set(table.shapes(row[None]).bits[0]) for row in uniform_starts(table)]
    assert widths == [{32}, {16}, {8}]


def test_probes_are_deterministic_recipes_of_the_space() -> None:
    table: SpaceTable = toy_table()
    recipes: list[Recipe] = probe_recipes(table, 12, seed=4)
    assert recipes == probe_recipes(table, 12, seed=4)
    assert all(table.space.contains(recipe) for recipe in recipes)
    assert len({recipe.key for recipe in recipes}) > 8


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("sparsity right", "sparsity wide"), 12),
        (("sparsity wide",), 4),
        (("bits stem", "bits wide"), 9),
        (("sparsity right", "sparsity wide", "bits wide"), 16),
    ],
)
def test_no_probe_comes_twice_and_a_small_space_is_used_up(names: Sequence[str], count: int) -> None:
    whole = toy_table().space
    parameters = [whole.parameters[name] for name in names]
    space = SearchSpace(whole.detector, whole.sites, parameters, capabilities=whole.capabilities)
    recipes = probe_recipes(SpaceTable(space), 16, seed=0)
    assert len(recipes) == len({recipe.key for recipe in recipes}) == count


def test_two_probes_differ_only_in_the_boxes_that_go_into_suppression() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build(), topk=400)
    for capabilities in (CPU, replace(CPU, bit_widths=(32, 8))):
        table = SpaceTable(build_space(detector, sites, capabilities, ("quantize", "topk")))
        probes = [recipe.choices for recipe in probe_recipes(table, 8, seed=0)]
        probes.append(())  # the base, which is timed as well
        few = [choices for choices in probes if TopK(count=50) in choices]
        rest = [tuple(choice for choice in choices if choice != TopK(count=50)) for choices in few]
        assert any(one in probes for one in rest)


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", "gp", "random", "optuna.samplers:QMCSampler"])
def test_any_optuna_sampler_can_take_its_place(name: str) -> None:
    assert isinstance(sampler_named(name)(0), optuna.samplers.BaseSampler)


@pytest.mark.parametrize(
    "name",
    ["simulated-annealing", "nowhere:Class", "optuna.samplers:Nothing", "optuna.samplers:GridSampler"],
)
def test_unknown_samplers_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="sampler"):
        sampler_named(name)


def test_asking_stays_fast_with_many_trials() -> None:
    """2,000 trials: a generous bound of CPU time; what was read and computed of finished trials is kept."""
    problem = MadeUp()
    study = problem.run(problem.sampler(0), 4)
    table, random = problem.table, np.random.default_rng(0)
    for options in random.integers(0, table.sizes, size=(2000, len(table.sizes))):
        quality, ratio = problem.evaluate(options)
        metrics = {
            "map": Measurement(value=quality, unit="AP"),
            "latency_ratio": Measurement(value=ratio, unit="ratio"),
        }
        evaluation = Evaluation(recipe_key="x", status="ok", metrics=metrics)
        study.add_trial(
            optuna.trial.create_trial(
                values=[quality, ratio],
                params=table.params(options),
                distributions=table.space.distributions(),
                user_attrs={"evaluation": evaluation.model_dump_json()},
            )
        )
    learner = LatencyLearner(table, np.zeros((0, len(table.sizes)), int), np.zeros(0))
    sampler = FrontSampler(table, problem.damage, learner, Problem(), 0)
    trial = study.get_trials()[-1]
    sampler.sample_relative(study, trial, {})  # reads the trials
    started = time.process_time()
    for _ in range(5):
        sampler.sample_relative(study, trial, {})
    assert (time.process_time() - started) / 5 < 0.5


def test_what_a_sampler_keeps_changes_nothing() -> None:
    """A sampler that has seen the study grow proposes what a fresh one proposes."""
    problem = MadeUp()
    study = problem.run(problem.sampler(0), 8)
    trials = study.get_trials()
    reader = ExperienceReader(problem.table)
    for count in range(1, len(trials) + 1):
        grown = reader.read(trials[:count])
    fresh = ExperienceReader(problem.table).read(trials)
    assert (grown.finished.options == fresh.finished.options).all()
    assert (grown.finished.map == fresh.finished.map).all()
    assert (grown.taken, grown.passed) == (fresh.taken, fresh.passed)
    learner = LatencyLearner(problem.table, fresh.finished.options[:3], fresh.finished.ratio[:3])
    some = grown.finished
    learner(Finished(some.options[:5], some.map[:5], some.ratio[:5]))
    expected = fit_latency(
        problem.table,
        np.concatenate([fresh.finished.options[:3], fresh.finished.options]),
        np.concatenate([fresh.finished.ratio[:3], fresh.finished.ratio]),
    )
    assert learner(fresh.finished).weights == pytest.approx(expected.weights)


def test_stopped_trials_are_censored_by_what_training_repaired_elsewhere() -> None:
    table = toy_table()
    rows = np.zeros((5, len(table.names)), np.int64)
    finished = Finished(rows, np.array([60.0, 58.0, 56.0, 59.0, 55.0]), np.ones(5))
    passed = [{}, {1: 52.0}, {1: 44.0}, {1: 56.0}, {}]  # 2 of 8, 4 of 16, 1 of 4 AP lost: a quarter is left
    stopped_at = [{0: 10.0, 1: 40.0}, {1: 61.0}, {0: 50.0}]
    experience = Experience(finished, passed, rows[:3], stopped_at, rows[:0], frozenset())
    # 20 AP lost at rung 1; nothing lost; 10 AP lost at a rung that no other trial passed.
    assert experience.expected_maps(60.0) == pytest.approx([55.0, 60.0, 55.0])


def test_running_trials_are_not_proposed_again() -> None:
    problem = MadeUp()
    study = problem.run(problem.sampler(0), 6)
    study.sampler = problem.sampler(1)
    running = [study.ask(problem.table.space.distributions()) for _ in range(4)]
    assert len({tuple(trial.params.values()) for trial in running}) == 4
    study._storage.set_trial_state_values(
        running[0]._trial_id, optuna.trial.TrialState.WAITING
    )  # interrupted
    experience = ExperienceReader(problem.table).read(study.get_trials())
    assert (experience.pending == problem.table.options([t.params for t in running])).all()


def test_what_failed_is_not_proposed_again_and_its_option_is_left_alone() -> None:
    """Pruning 'right' by two thirds pays on this detector, and cannot be exported."""
    problem = MadeUp()
    right = problem.table.names.index("sparsity right")
    study = problem.run(problem.sampler(0), 30, lambda options: options[right] == 2)
    failed = [k for k, t in enumerate(study.get_trials()) if t.state == optuna.trial.TrialState.FAIL]
    assert 1 <= len(failed) <= 6
    rows = problem.table.options([t.params for t in study.get_trials()])
    assert len(np.unique(rows, axis=0)) == 30


def test_proposals_of_studies_without_failures_are_those_of_old() -> None:
    """As they were before failures were looked at: positions of three proposals in a row."""
    problem = MadeUp(1)
    study = problem.run(problem.sampler(1, {"max_map_drop": 8.0}), 8)
    rows = problem.table.options([t.params for t in study.get_trials()])
    assert rows[5:].tolist() == [
        [0, 1, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 1, 0, 0, 1],
    ]


def test_losses_count_from_the_base_and_not_from_the_luckiest_trial() -> None:
    table = toy_table()
    damage, identity = random_damage(table, 0), np.zeros(len(table.sizes), np.int64)

    def add(
        study: optuna.Study, options: NDArray[np.int64], quality: float, further: float | None = None
    ) -> float:
        metrics = {
            "map": Measurement(value=quality, unit="AP"),
            "latency_ratio": Measurement(value=0.9, unit="ratio"),
        }
        if further is not None:
            metrics["map_trained_further"] = Measurement(value=further, unit="AP")
        evaluation = Evaluation(recipe_key="x", status="ok", metrics=metrics)
        study.add_trial(
            optuna.trial.create_trial(
                values=[quality, 0.9],
                params=table.params(options),
                distributions=table.space.distributions(),
                user_attrs={"evaluation": evaluation.model_dump_json()},
            )
        )
        return believed_loss(table, damage, ExperienceReader(table).read(study.get_trials()))[1]

    study = optuna.create_study(directions=["maximize", "minimize"])
    assert add(study, identity + 1, 33.0) == 33.0, "there is no base yet"
    assert add(study, identity, 30.0) == 30.0
    gaining = optuna.create_study(directions=["maximize", "minimize"])
    assert add(gaining, identity, 30.0, further=31.0) == 31.0
