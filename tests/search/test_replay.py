"""Recorded recipes and replays, on the toy space with made-up figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluators.latency_model import fit_latency
from search.benchmarks.contenders import CONTENDERS, Known
from search.benchmarks.curves import apart
from search.benchmarks.recorded import Recorded, decoded, encoded, read_recorded
from search.benchmarks.replay import Outcome, compare, replay
from search.benchmarks.replay_report import _curves, _verdicts, write_comparison
from search.benchmarks.surrogate import MEAN, Surrogate
from search.knowledge import LatencyLearner
from spaces.errors import InputError
from spaces.table import SpaceTable
from tests.search.test_sampler import MadeUp
from tests.spaces.toy import ToyDetector


class RecordedToy(ToyDetector):
    """The toy detector as `make_detector` calls it."""

    def __init__(self, name: str, num_classes: int, size: tuple[int, int]) -> None:
        assert (num_classes, size) == (1, (16, 16))


def recorded_from(made_up: MadeUp, count: int = 60) -> Recorded:
    """Random recipes of the toy space, "evaluated" by the made-up detector."""
    table = made_up.table
    random = np.random.default_rng(1)
    options = random.integers(0, table.sizes, size=(count, len(table.names)))
    options[0] = 0
    options = np.unique(options, axis=0)
    figures = [made_up.evaluate(row) for row in options]
    return Recorded(
        detector=f"{__name__}:RecordedToy",
        classes=1,
        size=(16, 16),
        methods=("prune", "quantize"),
        granularity="block",
        bit_widths=(32, 16, 8),
        channel_granule=8,
        values={name: p.values for name, p in table.space.parameters.items()},
        conditions={"detector": "toy"},
        base_map=60.0,
        source=("random",) * len(options),
        recipes=tuple(encoded(options)),
        map=tuple(quality for quality, _ in figures),
        ratio=tuple(ratio for _, ratio in figures),
        damage=tuple(tuple(d if np.isfinite(d) else None for d in row) for row in made_up.damage.tolist()),
        probes=tuple(encoded(options[:12])),
        probe_ratio=tuple(ratio for _, ratio in figures[:12]),
    )


@pytest.fixture(scope="module")
def made_up() -> MadeUp:
    return MadeUp()


@pytest.fixture(scope="module")
def recorded(made_up: MadeUp) -> Recorded:
    return recorded_from(made_up)


@pytest.fixture(scope="module")
def surrogate(recorded: Recorded, made_up: MadeUp) -> Surrogate:
    return Surrogate(recorded, made_up.table)


def test_codes_are_one_character_a_parameter() -> None:
    options = np.array([[0, 7, 10], [35, 1, 0]])
    assert encoded(options) == ["07a", "z10"]
    assert (decoded(["07a", "z10"]) == options).all()


def test_a_file_keeps_everything(recorded: Recorded, tmp_path: Path) -> None:
    recorded.write(tmp_path / "recipes.json")
    again = read_recorded(tmp_path / "recipes.json")
    assert again == recorded
    assert np.isinf(again.damages).sum() == sum(d is None for row in recorded.damage for d in row)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recorded(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="detector"):
        read_recorded(tmp_path / "other.json")


def test_the_surrogate_knows_the_base_and_ranks_unseen_recipes(surrogate: Surrogate, made_up: MadeUp) -> None:
    base = np.zeros((1, len(made_up.table.names)), np.int64)
    assert [float(v[0]) for v in surrogate(base)] == [60.0, 1.0]
    assert surrogate.checks["loss"][MEAN].rank > 0.6
    assert surrogate.checks["ratio"][MEAN].rank > 0.9


def test_hypervolume_never_falls_and_seeds_come_first(surrogate: Surrogate, made_up: MadeUp) -> None:
    table = made_up.table
    random = np.random.default_rng(2)
    probes = random.integers(0, table.sizes, size=(12, len(table.names)))
    ratios = np.array([made_up.evaluate(row)[1] for row in probes])
    known = Known(table, made_up.damage, LatencyLearner(table, probes, ratios))
    asked, volumes = replay(CONTENDERS["front"], known, surrogate, 20, seed=0)
    assert (np.diff(volumes) >= -1e-12).all()
    assert volumes[0] == 0.0  # the base alone dominates nothing
    assert not asked[0].any()
    seeds = known.seeds()
    assert [row.tolist() for row in asked[1 : 1 + len(seeds)]] == [row.tolist() for row in seeds]
    again, _ = replay(CONTENDERS["front"], known, surrogate, 20, seed=0)
    assert [row.tolist() for row in again] == [row.tolist() for row in asked]


def test_trials_to_a_volume() -> None:
    outcome = Outcome(np.array([[0.1, 0.2, 0.3], [0.0, 0.3, 0.3], [0.0, 0.0, 0.1]]))
    assert outcome.trials_to(0.2) == 2  # 2, 2, never
    assert outcome.trials_to(0.5) == np.inf
    assert outcome.at(3) is not None
    assert outcome.at(3)[0] == 0.3  # type: ignore[index]
    assert outcome.at(4) is None


def test_another_space_is_refused(recorded: Recorded, made_up: MadeUp) -> None:
    with pytest.raises(InputError, match="another space"):
        recorded.model_copy(update={"values": {"bits x": (32.0, 8.0)}}).table()


def test_a_comparison_is_reported(recorded: Recorded, tmp_path: Path) -> None:
    surrogate, outcomes = compare(
        recorded, ["random", "random, our seeds", "front"], 2, 12, lambda line: None
    )
    write_comparison(tmp_path / "replay.md", recorded, surrogate, outcomes, {"command": "here"})
    text = (tmp_path / "replay.md").read_text()
    assert "| front |" in text
    assert "of its trials" in text
    assert "above the best seeded plain sampler" in text
    assert (tmp_path / "replay.json").exists()
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_samplers_are_judged_by_the_last_of_the_trials_they_can_afford() -> None:
    outcomes = {
        "tpe": Outcome(np.array([[0.0, 0.05, 0.06, 0.08]])),
        "gp": Outcome(np.array([[0.1, 0.2]])),
        "tpe, our seeds": Outcome(np.array([[0.2, 0.3, 0.4, 0.4]])),
        "gp, our seeds": Outcome(np.array([[0.2, 0.5]])),
        "front": Outcome(np.array([[0.1, 0.3, 0.5, 0.6]])),
    }
    cold, seeded = _verdicts(outcomes, 4)
    assert "gp, ends at 0.2000 after 2 trials; ours is there after 2 (median), 1.00 of its trials" in cold
    assert "At 4 trials ours is +20.00 %" in seeded
    assert "gp, our seeds after its 2 (paired" in seeded


def test_samplers_that_do_the_same_share_a_curve() -> None:
    same = np.array([[0.1, 0.2]])
    found = _curves({"tpe": Outcome(same), "gp": Outcome(2 * same), "ray OptunaSearch": Outcome(same.copy())})
    assert [curve.name for curve in found] == ["tpe = ray OptunaSearch", "gp"]


def test_names_at_the_ends_of_curves_do_not_overlap() -> None:
    assert apart([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1], "those that are apart stay"
    assert apart([0.5, 0.5, 0.45], 0.1) == pytest.approx([0.5, 0.4, 0.3])
    assert apart([0.05, 0.02, 0.0], 0.1) == pytest.approx([0.2, 0.1, 0.0]), "none below the axis"


def test_runs_side_by_side_come_to_the_same(recorded: Recorded) -> None:
    names = ["random, our seeds", "front"]
    _, alone = compare(recorded, names, 2, 10, lambda line: None)
    _, together = compare(recorded, names, 2, 10, lambda line: None, processes=2)
    for name in names:
        assert (alone[name].volumes == together[name].volumes).all()


def test_the_toy_table_is_made_anew(recorded: Recorded, made_up: MadeUp) -> None:
    table = recorded.table()
    assert isinstance(table, SpaceTable)
    options = recorded.options
    fitted = fit_latency(table, options, np.array(recorded.ratio))
    assert np.allclose(fitted.predict(options), recorded.ratio, rtol=0.05)


def test_rays_own_search_asks_in_the_same_space(surrogate: Surrogate, made_up: MadeUp) -> None:
    known = Known(made_up.table, made_up.damage, lambda _: None)  # type: ignore[arg-type]
    asked, volumes = replay(CONTENDERS["ray OptunaSearch"], known, surrogate, 10, seed=3)
    assert not asked[0].any(), "the base comes first"
    assert len({tuple(row) for row in asked}) > 5
    assert volumes[-1] > 0
    again, _ = replay(CONTENDERS["ray OptunaSearch"], known, surrogate, 10, seed=3)
    assert [row.tolist() for row in again] == [row.tolist() for row in asked]
