"""Factorize end to end: options, joint recipes, rebuilt, priced, exported, refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.calibration import calibrate
from evaluators.kernels import fell_back
from evaluators.latency_model import features
from evaluators.postprocess import WholeDetector
from evaluators.targets.registry import target_named
from evaluators.testing import can_run
from evaluators.torch_session import TorchSession
from spaces.apply import apply, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Postprocess
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, total_macs
from spaces.errors import InputError
from spaces.layers import count_macs
from spaces.lowrank import Factors, by_part
from spaces.methods.base import Draft
from spaces.recipe import Factorize, Prune, Quantize, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import MAX_PARAMETERS, Granularity, SearchSpace, build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of

CPU = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)
CATEGORIES = [Category(k, str(k)) for k in range(3)]


@pytest.fixture(scope="module")
def yolox() -> YoloX:
    return YoloX("narrow", 3, (64, 64), depth=0.33, width=0.25)


@pytest.fixture(scope="module")
def base(yolox: YoloX) -> nn.Module:
    return lively_network(yolox)


@pytest.fixture(scope="module")
def sites(yolox: YoloX, base: nn.Module) -> Sites:
    return find_sites(yolox, base)


@pytest.fixture(scope="module")
def space(yolox: YoloX, sites: Sites) -> SearchSpace:
    return build_space(yolox, sites, CPU, ("prune", "factorize", "quantize"), "block")


@pytest.fixture(scope="module")
def recipe(space: SearchSpace) -> Recipe:
    """The mildest step of pruning everywhere, then every rank at its lowest, all at 8 bits."""
    params = space.identity_params()
    for name, parameter in space.parameters.items():
        params[name] = parameter.values[1 if parameter.kind == "prune" else -1]
    return space.recipe(params)


@pytest.fixture(scope="module")
def draft(base: nn.Module, recipe: Recipe, sites: Sites) -> Draft:
    return apply(base, recipe, sites)


def drawn(table: SpaceTable, count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, (count, len(table.sizes)))
    return np.where(random.random(options.shape) < 0.6, options, 0)


def test_ranks_follow_the_pruned_shape(draft: Draft, recipe: Recipe, sites: Sites) -> None:
    kinds = {plan.kind for plan in draft.factors.values()}
    assert {"svd"} < kinds
    for name, plan in draft.factors.items():
        factors = draft.network.get_submodule(name)
        assert isinstance(factors, Factors)
        assert all(
            rank % 8 == 0 or rank in (first_inputs(factors), last_outputs(factors)) for rank in plan.ranks
        )
        left = draft.channels.get(name)
        if left is not None and left.into is not None:
            assert first_inputs(factors) == len(left.into)
        if left is not None and left.out is not None:
            assert last_outputs(factors) == len(left.out)
    assert count_macs(draft.network, (64, 64)) <= total_macs(recipe, sites)


def first_inputs(factors: Factors) -> int:
    return int(factors[0].weight.shape[1])


def last_outputs(factors: Factors) -> int:
    return int(factors[-1].weight.shape[0])


def test_rebuilt_bit_for_bit_without_a_decomposition(
    yolox: YoloX, recipe: Recipe, draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():  # as fine-tuning would
        for parameter in draft.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    save(draft, recipe, tmp_path)
    for name in ("eigh", "eigvalsh", "svd"):
        monkeypatch.delattr(torch.linalg, name)
    again, rebuilt = rebuild(yolox.build().eval(), tmp_path)
    assert (again, rebuilt.factors, rebuilt.bits) == (recipe, draft.factors, draft.bits)
    assert same_state(rebuilt.network.state_dict(), draft.network.state_dict())
    images = noise(yolox, 2)
    pairs = zip(outputs_of(rebuilt.network, images), outputs_of(draft.network, images), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert rebuilt.changed


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_table_counts_what_networks_multiply(
    yolox: YoloX, base: nn.Module, sites: Sites, granularity: Granularity
) -> None:
    space = build_space(yolox, sites, CPU, ("prune", "factorize", "quantize"), granularity)
    table = SpaceTable(space)
    options = drawn(table, 4)
    shapes = table.shapes(options)
    for row, one in enumerate(options):
        recipe = space.recipe(table.params(one))
        assert table.options([space.params(recipe)])[0].tolist() == one.tolist()
        assert shapes.macs[row].sum() == total_macs(recipe, sites)
        made = apply(base, recipe, sites)
        assert {table.layers[k] for k in np.flatnonzero(shapes.rank_in[row])} == set(made.factors)
        counted = count_macs(made.network, (64, 64))
        split = any(plan.kind == "split" for plan in made.factors.values())
        assert counted < shapes.macs[row].sum() if split else counted == shapes.macs[row].sum()
    parameter = np.arange(len(table.names))
    for current in options:
        changed = np.repeat(current[None], len(parameter), axis=0)
        changed[parameter, parameter] = table.sizes - 1
        fast, slow = table.neighbours(current, parameter, table.sizes - 1), table.shapes(changed)
        for name in ("macs", "rank_in", "rank_out", "outputs"):
            np.testing.assert_allclose(getattr(fast, name), getattr(slow, name))


def test_features_of_factors_by_hand(yolox: YoloX, sites: Sites) -> None:
    name = "backbone.backbone.dark4.0.conv"  # 3x3 of stride 2, 64 to 128 channels, 8x8 to 4x4 positions
    site = next(site for site, layers in sites.layer.items() if layers.layers == (name,))
    space = build_space(yolox, sites, CPU, ("factorize",))
    table = SpaceTable(space)
    rows = [space.identity_params(), space.identity_params() | {f"rank {site}": 0.375}]
    shapes = table.shapes(table.options(rows))
    whole, thin = features(table, shapes)
    scale = table.base.macs.sum()
    parts = 64 * 24 * 64, 24 * 48 * 9 * 16, 48 * 128 * 16
    filled = parts[0] * 32 / 24 + parts[1] + parts[2]  # 24 channels take two blocks of 16
    assert (thin[0] - whole[0]) * scale == pytest.approx(filled - 64 * 128 * 9 * 16)
    elements = (table.base.outputs * table.base.positions).sum()
    assert (thin[2] - whole[2]) * elements == pytest.approx(24 * 64 + 48 * 16)
    assert thin[1] == whole[1]


def test_too_many_parameters_leave_the_smallest_savings_out(yolox: YoloX, base: nn.Module) -> None:
    sites = find_sites(yolox, base, MAX_PARAMETERS)
    alone = build_space(yolox, sites, CPU, ("factorize",))
    space = build_space(yolox, sites, CPU, ("prune", "quantize", "factorize"))
    kept = {name for name in space.parameters if name.startswith("rank ")}
    assert len(space.parameters) == MAX_PARAMETERS
    assert space.ranks_left_out == len(alone.parameters) - len(kept) > 0
    assert space.summary()["ranks left out"] == space.ranks_left_out
    macs = {
        name: total_macs(Recipe(detector="narrow", choices=p.choices[-1]), sites)
        for name, p in alone.parameters.items()
    }
    assert max(macs[name] for name in kept) <= min(macs[name] for name in macs.keys() - kept)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_both_engines_agree_with_torch(
    yolox: YoloX, base: nn.Module, sites: Sites, recipe: Recipe, draft: Draft, tmp_path: Path, name: str
) -> None:
    target = target_named(name)
    whole = WholeDetector(yolox.simplified(draft.network), yolox, Postprocess(), CATEGORIES).eval()
    reference, images = TorchSession(whole), [noise(yolox, 1, seed).numpy() for seed in range(4)]
    layers = by_part(draft.network, bits_by_layer(recipe, sites))
    assert set(layers) > {f"{layer}.0" for layer in draft.factors}
    ranges = calibrate(yolox.simplified(draft.network), list(layers), images)
    for width, tolerance in ((32, 1e-4), (8, 0.1)):
        bits = dict.fromkeys(layers, width)
        written = target.write(whole, bits, ranges, tmp_path / str(width))
        session = target.prepare(written.model, 1, written.hint)
        for image in images[:2]:
            ours, theirs = session.run(image), reference.run(image)
            assert len(theirs.scores) > 20
            assert np.abs(ours.scores[:20] - theirs.scores[:20]).mean() < tolerance
        if can_run(width):
            assert fell_back(bits, session.kernels(), target.capabilities.bit_widths) == {}
            seen = session.kernels().keys() & {f"{layer}.{k}" for layer in draft.factors for k in range(3)}
            assert len(seen) > len(draft.factors)  # under the names of the factors


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Factorize(site="nowhere", rank_ratio=0.5), r"factorize.site: 'nowhere': is no layer site"),
        (
            Factorize(site="head.cls_preds.0", rank_ratio=0.25),
            r"head.cls_preds.0.rank_ratio: 0.25: makes no layer there cheaper",
        ),
        (
            Factorize(site="backbone.C3_n4.conv3", rank_ratio=0.5).model_copy(update={"rank_ratio": 1.5}),
            r"rank_ratio: 1.5: choose above 0 and at most 1, which is full rank",
        ),
    ],
)
def test_refused_in_one_line(base: nn.Module, sites: Sites, choice: Factorize, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        apply(base, Recipe(detector="narrow", choices=(choice,)), sites)
    assert "\n" not in str(caught.value)


def test_rank_above_full_in_json_is_refused_in_one_line() -> None:
    good = Recipe(detector="narrow", choices=(Factorize(site="a", rank_ratio=0.5),)).to_json()
    with pytest.raises(InputError, match=r"rank_ratio: 1.5: must be less than or equal to 1") as caught:
        Recipe.from_json(good.replace("0.5", "1.5"))
    assert "\n" not in str(caught.value)


def test_kinds_of_choices_do_not_mind_their_order(recipe: Recipe) -> None:
    assert {Prune, Factorize, Quantize} == {type(choice) for choice in recipe.choices}
    assert Recipe(detector="narrow", choices=recipe.choices[::-1]).key == recipe.key
