"""Codebooks and narrow bit-widths: k-means by hand, what is offered, what is refused."""

from pathlib import Path

import pytest
import torch

from spaces.apply import apply, check, rebuild, save
from spaces.capabilities import Capabilities
from spaces.effects import codebooks_by_layer, integers_by_layer
from spaces.errors import InputError
from spaces.methods.codebook import Codebooks, clustered, powers_of_two
from spaces.methods.quantize import Quantization
from spaces.recipe import Choice, Codebook, Quantize, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from tests.spaces.toy import ToyDetector

ENGINE = Capabilities(bit_widths=(32, 8))


@pytest.fixture(scope="module")
def sites() -> Sites:
    detector = ToyDetector()
    return find_sites(detector, detector.build())  # type: ignore[arg-type]


def test_clear_clusters_become_their_means_in_every_channel() -> None:
    """Channels of the same values, but for a power of two: 14 clusters of three, and 1 for the largest."""
    levels = torch.cat((torch.linspace(-0.75, 0.75, 12), torch.tensor([1.25, 1.75])))
    row = (levels[:, None] + torch.tensor([-0.01, 0.0, 0.04])).flatten()
    means = (levels[:, None] + 0.01).expand(14, 3).flatten()
    powers = torch.tensor([1.0, 0.125, 64.0]).reshape(3, 1, 1, 1)
    found = clustered(row.reshape(1, 42, 1, 1) * powers, 16)
    torch.testing.assert_close(found, means.reshape(1, 42, 1, 1) * powers, rtol=0, atol=1e-5)
    assert torch.equal(powers_of_two(found), powers)


def test_the_largest_weight_of_a_channel_keeps_its_power_of_two() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 8, 1, 1) * torch.logspace(-3, 3, 64).reshape(64, 1, 1, 1)
    weight[5] = 0.0
    for entries in (16, 64):
        found = clustered(weight, entries)
        assert torch.equal(powers_of_two(found), powers_of_two(weight))
        assert torch.equal(powers_of_two(found.bfloat16().float()), powers_of_two(weight))
        assert len((found / powers_of_two(found)).unique()) <= entries
        worst = ((found - weight) ** 2).mean(dim=(1, 2, 3)) / (weight**2).mean(dim=(1, 2, 3)).clamp(min=1e-9)
        assert float(worst.max()) < (0.1 if entries == 16 else 0.01), "small channels count as much as large"


@pytest.mark.parametrize("entries", [16, 64, 256])
def test_more_entries_come_closer_and_the_same_weight_gives_the_same_codebook(entries: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3)
    found = clustered(weight, entries)
    assert len((found / powers_of_two(found)).unique()) <= entries
    assert torch.equal(found, clustered(weight.clone(), entries))
    error = float(((found - weight) ** 2).mean())
    grid = torch.linspace(float(weight.min()), float(weight.max()), entries)
    even = grid[(weight[..., None] - grid).abs().argmin(-1)]
    assert error < float(((even - weight) ** 2).mean()), "better than even steps"
    assert (error < 0.0015) == (entries >= 64)


def test_few_values_stay_as_they_are() -> None:
    weight = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    assert torch.equal(clustered(weight, 16), weight)


def test_narrow_bits_are_offered_when_asked_for_and_run_at_the_next_width(sites: Sites) -> None:
    detector = ToyDetector()

    def widths(asked: tuple[int, ...], capabilities: Capabilities = ENGINE) -> set[tuple[int, int]]:
        space = build_space(detector, sites, capabilities, ("quantize",), bit_widths=asked)  # type: ignore[arg-type]
        choices = [c for p in space.parameters.values() for cs in p.choices for c in cs]
        return {(c.weight_bits, c.activation_bits) for c in choices if isinstance(c, Quantize)}

    assert widths(()) == {(32, 32), (8, 8)}
    assert widths((4, 2, 8)) == {(32, 32), (8, 8), (4, 8), (2, 8)}
    assert widths((3,), Capabilities(bit_widths=(32, 8, 4))) == {(32, 32), (3, 4)}
    space = build_space(detector, sites, ENGINE, ("quantize",), bit_widths=(8, 4))  # type: ignore[arg-type]
    table = SpaceTable(space)
    row = table.options([dict.fromkeys(space.parameters, 4.0)])
    assert set(table.shapes(row).bits[0].tolist()) == {8}, "predicted latencies are those of int8"
    with pytest.raises(InputError, match="5: choose from 2, 3, 4"):
        widths((5,))
    with pytest.raises(InputError, match="no integer"):
        widths((4,), Capabilities(bit_widths=(32, 16)))


def test_a_layer_takes_narrow_bits_or_a_codebook(sites: Sites) -> None:
    name = next(iter(sites.layer))
    book = Codebook(site=name, entries=64)

    def refused(*choices: Choice) -> str:
        with pytest.raises(InputError) as caught:
            check(Recipe(detector="toy", choices=choices), sites)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "codebook and weights of 4 bits" in refused(
        book, Quantize(site=name, weight_bits=4, activation_bits=8)
    )
    assert "both have 8 bits or less" in refused(Quantize(site=name, weight_bits=4, activation_bits=16))
    assert "no layer site" in refused(Codebook(site="nowhere", entries=16))
    half = Quantize(site=name, weight_bits=16, activation_bits=16)
    check(Recipe(detector="toy", choices=(book, half)), sites)
    with pytest.raises(InputError, match="leave one out"):
        build_space(ToyDetector(), sites, ENGINE, ("quantize", "codebook"))  # type: ignore[arg-type]
    assert Recipe(detector="toy", choices=(Codebook(site=name, entries=0),)).is_identity


def test_choices_come_back_from_disk(sites: Sites, tmp_path: Path) -> None:
    first, second = list(sites.layer)[:2]
    choices = (
        Codebook(site=first, entries=16),
        Quantize(site=second, weight_bits=4, activation_bits=8),
    )
    recipe = Recipe(detector="toy", choices=choices)
    draft = apply(ToyDetector().build(), recipe, sites)
    assert set(draft.codebooks.values()) == {16}
    assert not draft.changed
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(ToyDetector().build(), tmp_path)
    assert (again, rebuilt.codebooks, rebuilt.bits) == (recipe, draft.codebooks, draft.bits)
    assert codebooks_by_layer(recipe, sites) == draft.codebooks
    assert integers_by_layer(recipe, sites) == draft.bits


def test_options_of_both_methods_begin_with_the_identity(sites: Sites) -> None:
    for method in (Codebooks(), Quantization()):
        for options in method.options(sites, ENGINE).values():
            assert Recipe(detector="toy", choices=options[:1]).is_identity
            assert len(options) > 1
