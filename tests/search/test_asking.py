from __future__ import annotations

from pathlib import Path

from optuna.samplers import RandomSampler

from search.asking import Asker
from search.owners import driver_of
from tests.search.toy_problem import toy_parts, toy_study


def test_the_sampler_is_made_after_the_base(tmp_path: Path) -> None:
    """What is prepared beside the base must be there when the sampler is made, and is not before."""
    made: list[int] = []

    def sampler(seed: int) -> RandomSampler:
        made.append(seed)
        return RandomSampler(seed=seed)

    study = toy_study(tmp_path)
    with driver_of(study.optuna) as driver:
        asker = Asker(study, toy_parts(sampler=sampler), driver)
        asker.enqueue_base()
        base = asker.ask_base()
        assert base is not None
        assert base.recipe.is_identity
        assert made == []
        candidate, _ = asker.ask({base.recipe.key})
        assert candidate is not None
        assert len(made) == 1
        asker.ask(set())
        assert len(made) == 1
