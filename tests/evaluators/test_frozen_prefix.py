"""A frozen prefix by hand, and beside the same training without it, in each family."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.finetune import FineTunePlan, fine_tune
from evaluators.frozen_prefix import FrozenPrefix
from evaluators.quiet import QuietSlot
from evaluators.replay import NotReplayableError
from evaluators.teacher import TeacherOutputs
from spaces.apply import apply
from spaces.detectors.base import Detector
from spaces.detectors.registry import make_detector
from spaces.recipe import Prune, Recipe
from spaces.sites import Sites, find_sites
from spaces.testing import lively_network

COUNT = 6


class Batches:
    """Noise for images, mirrored on the second view; counts how often it was asked."""

    def __init__(self, height: int, width: int) -> None:
        self.images = torch.rand(COUNT, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
        self.asked = 0

    def __call__(self, indices: NDArray[np.int64], mirrored: bool) -> Tensor:
        self.asked += 1
        images = self.images[torch.from_numpy(indices)]
        return images.flip(3) if mirrored else images


def prefix_of(network: nn.Module, changed: set[str], batch: Batches, size: int = 3) -> FrozenPrefix:
    return FrozenPrefix(network, changed, batch, COUNT, size, 2, nullcontext)


class Small(nn.Module):
    """Doubles the images, then a trained sum of them with weight w, beside what skips it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 1, 1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(1, 1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(2.0)
            self.last.weight.fill_(3.0)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        feature = self.act(self.first(images))
        return (self.last(feature) + feature,)


def test_gradients_by_hand() -> None:
    network, batch = Small(), Batches(2, 2)
    prefix = prefix_of(network, {"last"}, batch)
    assert prefix.parameters == {"first.weight"}
    assert not network.first.weight.requires_grad
    indices = np.array([4, 1, 5])
    prefix(indices, False)
    asked = batch.asked
    (output,) = prefix(indices, False)
    assert batch.asked == asked, "the images are not looked at again"
    feature = 2 * batch.images[indices].sum(dim=1, keepdim=True)
    torch.testing.assert_close(output, 3 * feature + feature)
    output.square().sum().backward()
    # d/dw of (w f + f)^2 is 2 (w f + f) f, which is 8 f^2 at w = 3.
    assert network.last.weight.grad is not None
    torch.testing.assert_close(network.last.weight.grad.squeeze(), (8 * feature.square()).sum())
    (mirrored,) = prefix(indices, True)
    torch.testing.assert_close(mirrored, output.flip(3))


FAMILIES: dict[str, tuple[tuple[int, int], Callable[[str], bool]]] = {
    "yolox_digits": ((96, 96), lambda site: "dark5" in site or "C3_n4" in site),
    "ssdlite_digits": ((96, 96), lambda site: "extra" in site or "features.1" in site),
    "fasterrcnn_digits": ((96, 96), lambda site: "fpn" in site or "box_head" in site or "roi" in site),
}


@pytest.fixture(params=FAMILIES, scope="module")
def pruned(request: pytest.FixtureRequest) -> tuple[Detector, nn.Module, frozenset[str], Sites]:
    """A detector, a network pruned in its back part, and the modules that changed."""
    size, late = FAMILIES[request.param]
    detector = make_detector(request.param, 10, size=size)
    base = lively_network(detector)
    sites = find_sites(detector, base)
    choices = tuple(Prune(site=name, sparsity=0.5) for name in sites.channel if late(name))
    assert choices
    draft = apply(base, Recipe(detector=detector.name, choices=choices), sites)
    network = draft.network.eval().requires_grad_(True)
    return detector, network, draft.changed_modules, sites


def test_outputs_and_gradients_are_those_without(
    pruned: tuple[Detector, nn.Module, frozenset[str], Sites],
) -> None:
    detector, network, changed, _ = pruned
    plain, network = copy.deepcopy(network), copy.deepcopy(network)
    batch = Batches(*detector.preprocess.size)
    prefix = prefix_of(network, set(changed), batch)
    own = dict(network.named_parameters())
    assert 0 < len(prefix.parameters) < len(own)
    assert not any(name.startswith(tuple(f"{c}." for c in changed)) for name in prefix.parameters)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name not in prefix.parameters)
    indices = np.array([5, 0, 3])
    for mirrored in (False, True):
        asked = batch.asked
        ours, wanted = prefix(indices, mirrored), plain(batch(indices, mirrored))
        assert batch.asked <= asked + 2
        for a, b in zip(ours, wanted, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(b.norm())
        for outputs, some in ((ours, network), (wanted, plain)):
            some.zero_grad()
            sum(output.square().mean() for output in outputs).backward()
        for name, parameter in plain.named_parameters():
            if name in prefix.parameters:
                assert own[name].grad is None
            elif parameter.grad is not None:
                found = own[name].grad
                assert found is not None, name
                size = float(parameter.grad.norm())
                assert float((found - parameter.grad).norm()) <= 2e-3 * size + 1e-6, name


def test_what_changed_at_the_front_leaves_nothing_to_keep() -> None:
    network = Small()
    with pytest.raises(NotReplayableError, match="in front of"):
        prefix_of(network, {"first", "last"}, Batches(2, 2))
    assert all(parameter.requires_grad for parameter in network.parameters())


class Moody(Small):
    """Looks at what the features are."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        feature = self.act(self.first(images))
        return (self.last(feature) * (2.0 if feature.max().item() > 1 else 1.0),)


def test_what_depends_on_values_is_not_replayed() -> None:
    with pytest.raises(NotReplayableError):
        prefix_of(Moody(), {"last"}, Batches(2, 2))


def test_fine_tuning_keeps_the_prefix_and_trains_the_rest(
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    slot: QuietSlot,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sites = find_sites(digits_detector, digits_base)
    names = [name for name in sites.channel if name.startswith("backbone.backbone.dark5")]
    choices = tuple(Prune(site=name, sparsity=0.5) for name in names)
    draft = apply(digits_base, Recipe(detector=digits_detector.name, choices=choices), sites)
    network = draft.network.requires_grad_(True)
    teacher = TeacherOutputs(
        digits_base, digits_detector, fit_images, tmp_path_factory.mktemp("teacher"), "base", mirrored=False
    )
    plan = FineTunePlan(epochs=2, batch_size=5, mirror=False, frozen_prefix=True, precision="float32")
    run = fine_tune(
        network, digits_detector, fit_images, teacher, plan, slot, 0, changed=draft.changed_modules
    )
    losses = [epoch.loss for epoch in run]
    assert losses[1] < losses[0]
    before, after = digits_base.state_dict(), network.state_dict()
    for part, stays in (("dark2", True), ("dark3", True), ("dark4", True), ("dark5", False)):
        inside = [k for k in before if f".{part}." in k and not k.endswith("num_batches_tracked")]
        same = [before[k].shape == after[k].shape and torch.equal(before[k], after[k]) for k in inside]
        assert all(same) if stays else not any(same), part


def test_every_family_runs_in_bfloat16(pruned: tuple[Detector, nn.Module, frozenset[str], Sites]) -> None:
    """Forward and backward, on kept features as without."""
    detector, network, changed, _ = pruned
    network = copy.deepcopy(network)
    batch = Batches(*detector.preprocess.size)
    indices = np.array([2, 4, 1])

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    prefix = FrozenPrefix(network, changed, batch, COUNT, 3, 1, context)
    with context():
        plain = network(batch(indices, False))
    for ours, theirs in zip(prefix(indices, False), plain, strict=True):
        assert float((ours.float() - theirs.float()).norm()) <= 0.02 * float(theirs.float().norm())
    sum(output.float().square().mean() for output in prefix(indices, False)).backward()
    trained = [p for name, p in network.named_parameters() if name not in prefix.parameters]
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in trained)
    assert sum(p.grad is not None for p in trained) > len(trained) / 2


class Scaled(Small):
    """Behind the trained layer stands a parameter that is used through a product."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.last(self.act(self.first(images))) * (self.after * 2),)


def test_a_parameter_behind_is_trained_whatever_it_is_computed_into() -> None:
    network = Scaled()
    prefix = prefix_of(network, {"last"}, Batches(2, 2))
    assert prefix.parameters == {"first.weight"}
    prefix(np.array([0, 1, 2]), False)[0].sum().backward()
    assert network.after.grad is not None
