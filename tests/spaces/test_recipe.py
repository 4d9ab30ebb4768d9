from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from spaces.errors import InputError
from spaces.recipe import Factorize, Prune, Quantize, Recipe, identity, merged

PRUNE = Prune(site="a", sparsity=0.5)
INT8 = Quantize(site="a", weight_bits=8, activation_bits=8)


def test_order_and_choices_that_change_nothing_do_not_matter() -> None:
    one = Recipe(detector="d", choices=(PRUNE, INT8))
    other = Recipe(detector="d", choices=(Prune(site="b", sparsity=0.0), INT8, PRUNE))
    assert one == other
    assert one.key == other.key
    assert one.to_json() == other.to_json()


def test_key_is_the_same_on_every_machine() -> None:
    # sha256 of the canonical JSON, computed by hand once; another value would orphan every stored study.
    assert Recipe(detector="a", choices=(Prune(site="x", sparsity=0.5),)).key == "a743c69c3fd6"


@pytest.mark.parametrize("choice", [PRUNE, INT8, Factorize(site="c", rank_ratio=0.25)])
def test_json_gives_the_recipe_back(choice: Prune | Quantize | Factorize) -> None:
    recipe = Recipe(detector="d", choices=(choice,))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_one_choice_a_kind_and_site() -> None:
    with pytest.raises(ValidationError, match="prune is chosen twice at site a"):
        Recipe(detector="d", choices=(PRUNE, Prune(site="a", sparsity=0.25)))
    assert len(Recipe(detector="d", choices=(PRUNE, INT8)).choices) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": "much"}, "valid number"),
        ({"kind": "squeeze"}, "squeeze"),
        ({"extra": 1}, "extra: no such field"),
    ],
)
def test_bad_json_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    data = {"detector": "d", "choices": [{"kind": "prune", "site": "a", "sparsity": 0.5} | change]}
    with pytest.raises(InputError, match=message) as caught:
        Recipe.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


def test_illegal_bits_are_refused() -> None:
    with pytest.raises(ValidationError, match="5 bits at a: choose one of"):
        Quantize(site="a", weight_bits=5, activation_bits=8)


def test_merged_replaces_at_the_same_site() -> None:
    recipe = merged(Recipe(detector="d", choices=(PRUNE, INT8)), [Prune(site="a", sparsity=0.25)])
    assert recipe.of_kind(Prune) == {"a": Prune(site="a", sparsity=0.25)}
    assert recipe.of_kind(Quantize) == {"a": INT8}
    assert identity("d").is_identity
