from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spaces.apply import apply, rebuild, same_state, save
from spaces.errors import InputError
from spaces.recipe import Factorize, Prune, Quantize, Recipe, identity
from spaces.sites import find_sites
from tests.spaces.toy import ToyDetector

MIXED = Recipe(
    detector="toy",
    choices=(
        Prune(site="stem.0", sparsity=0.5),
        Prune(site="wide.0", sparsity=0.25),
        Quantize(site="wide.0", weight_bits=8, activation_bits=8),
    ),
)


def test_identity_changes_nothing_and_the_base_is_left_alone() -> None:
    detector = ToyDetector()
    network = detector.build().eval()
    sites = find_sites(detector, network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(1, 3, 16, 16)
    same = apply(network, identity("toy"), sites)
    assert torch.equal(same.network(images)[0], network(images)[0])
    apply(network, MIXED, sites)
    assert same_state(network.state_dict(), before)


def test_rebuilt_from_disk_bit_for_bit(tmp_path: Path) -> None:
    detector = ToyDetector()
    network = detector.build().eval()
    draft = apply(network, MIXED, find_sites(detector, network))
    with torch.no_grad():  # as fine-tuning would
        for parameter in draft.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save(draft, MIXED, tmp_path)
    recipe, again = rebuild(ToyDetector().build().eval(), tmp_path)
    assert recipe == MIXED
    assert again.channels == draft.channels
    assert again.bits == draft.bits == {"thin.0": (8, 8), "wide.0": (8, 8)}
    assert same_state(again.network.state_dict(), draft.network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.network(images)[0], draft.network(images)[0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Prune(site="nowhere", sparsity=0.5), "'nowhere': is no channel site"),
        (Prune(site="stem.0", sparsity=0.99), "leaves no channel"),
        (Quantize(site="stem.1", weight_bits=8, activation_bits=8), "'stem.1': is no layer site"),
        (Factorize(site="nowhere", rank_ratio=0.5), "'nowhere': is no layer site"),
        (Factorize(site="stem.0", rank_ratio=0.5), "stem.0.rank_ratio: 0.5: makes no layer there cheaper"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(choice: Prune | Quantize | Factorize, message: str) -> None:
    detector = ToyDetector()
    network = detector.build()
    with pytest.raises(InputError, match=message) as caught:
        apply(network, Recipe(detector="toy", choices=(choice,)), find_sites(detector, network))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no plan for this detector .AttributeError: Sequential has no attribute .left"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"{}", "is no plan for this detector .KeyError: 'recipe'"),
        (b"[]", "is no plan for this detector .TypeError"),
    ],
)
def test_rebuild_says_what_is_wrong_in_one_line(content: bytes | None, said: str, tmp_path: Path) -> None:
    detector = ToyDetector()
    network = detector.build().eval()
    save(apply(network, MIXED, find_sites(detector, network)), MIXED, tmp_path)
    if content is not None:
        (tmp_path / "recipe.json").write_bytes(content)
    other = nn.Sequential(nn.Conv2d(3, 4, 1)) if content is None else network
    with pytest.raises(InputError, match=f"plan: '.*recipe.json': {said}") as caught:
        rebuild(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_rebuild_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        rebuild(ToyDetector().build(), tmp_path)
