"""Norms folded into convolutions in training: the same outputs and gradients as without."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.folded_norms import FoldedNorms
from evaluators.teacher import batch_of
from spaces.detectors.base import Detector
from spaces.detectors.registry import make_detector

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Blocks(nn.Module):
    """Convolutions whose norms may and may not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.depthwise, self.depthwise_norm = nn.Conv2d(4, 4, 3, groups=4, bias=False), FrozenBatchNorm2d(4)
        self.shared, self.shared_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.forked, self.forked_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.behind_norm, self.behind = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.plain, self.plain_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.several, self.one, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = torch.relu_(self.first_norm(self.first(images)))
        x = torch.relu_(self.depthwise_norm(self.depthwise(x)))
        x = self.shared_norm(self.shared(self.shared_norm(self.shared(x)).sigmoid()))
        forked = self.forked(x)
        x = self.forked_norm(forked) + forked
        x = self.behind(self.behind_norm(x))
        x = self.plain_norm(self.plain(x))
        return self.one(self.several(x)), self.other(self.several(x.tanh()))


@pytest.fixture
def blocks() -> Blocks:
    """In evaluation mode, with statistics and scales that change something."""
    torch.manual_seed(0)
    network = Blocks().eval()
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.3, 3.0)
                if norm.weight is not None:
                    norm.weight.normal_()
                    norm.bias.normal_()
    return network


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_only_norms_that_alone_read_a_convolution_are_folded(blocks: Blocks) -> None:
    assert FoldedNorms(blocks, IMAGE).names == {
        "first": "first_norm",
        "depthwise": "depthwise_norm",
        "shared": "shared_norm",
        "plain": "plain_norm",
    }
    blocks.plain_norm.train()
    parametrize.register_parametrization(blocks.first, "weight", nn.Identity())
    assert FoldedNorms(blocks, IMAGE).names == {"depthwise": "depthwise_norm", "shared": "shared_norm"}


def test_outputs_and_gradients_are_those_of_the_plain_network(blocks: Blocks) -> None:
    plain = copy.deepcopy(blocks)
    folded = FoldedNorms(blocks, IMAGE)
    for ours, theirs in zip(folded(IMAGE), plain(IMAGE), strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(output.square().sum() for output in folded(IMAGE)).backward()
    sum(output.square().sum() for output in plain(IMAGE)).backward()
    folded.hand_on()
    same(gradients(blocks), gradients(plain))
    assert blocks.first.bias is not None
    assert torch.equal(blocks(IMAGE)[0], plain(IMAGE)[0]), "in between it is an ordinary network"
    assert blocks.depthwise.bias is None


def test_frozen_parameters_get_no_gradient_and_weights_may_change_in_between(blocks: Blocks) -> None:
    blocks.first.requires_grad_(False)
    blocks.shared_norm.weight.requires_grad_(False)
    plain, folded = copy.deepcopy(blocks), FoldedNorms(blocks, IMAGE)
    folded(IMAGE)
    for network in (plain, blocks):
        with torch.no_grad():
            network.shared.weight += 0.5
            network.first_norm.bias += 1.0
    plain(IMAGE)[0].square().sum().backward()
    folded(IMAGE)[0].square().sum().backward()
    folded.hand_on()
    found = gradients(blocks)
    assert "first.weight" not in found
    assert "shared_norm.weight" not in found
    same(found, gradients(plain))


def test_parameters_that_serve_elsewhere_get_both_gradients(blocks: Blocks) -> None:
    plain, folded = copy.deepcopy(blocks), FoldedNorms(blocks, IMAGE)
    (plain(IMAGE)[0].square().sum() + plain.first.weight.sum() + plain.first_norm.bias.sum()).backward()
    (folded(IMAGE)[0].square().sum() + blocks.first.weight.sum() + blocks.first_norm.bias.sum()).backward()
    folded.hand_on()
    same(gradients(blocks), gradients(plain))


class Checkpointed(Blocks):
    """Runs its layers again in the backward pass instead of keeping what they put out."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = checkpoint(super().forward, images, use_reentrant=False)
        return outputs


def test_a_network_that_checkpoints_its_activations(blocks: Blocks) -> None:
    network = Checkpointed().eval()
    network.load_state_dict(blocks.state_dict())
    folded = FoldedNorms(network, IMAGE)
    assert folded.names == FoldedNorms(blocks, IMAGE).names
    for _ in range(2):
        for one in (network, blocks):
            one.zero_grad()
        folded(IMAGE)[0].square().sum().backward()
        folded.hand_on()
        blocks(IMAGE)[0].square().sum().backward()
        same(gradients(network), gradients(blocks))
    assert torch.equal(network(IMAGE)[0], blocks(IMAGE)[0])


def test_what_changes_in_place_before_its_norm_is_not_folded() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            x = self.layer(images)
            x[:, :2] = 0.0
            return (self.norm(x),)

    assert FoldedNorms(Masked().eval(), IMAGE).names == {}


def test_without_a_norm_it_is_the_network() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 1))
    folded = FoldedNorms(layer, IMAGE)
    assert torch.equal(folded(IMAGE), layer(IMAGE))  # type: ignore[arg-type]
    folded(IMAGE).sum().backward()  # type: ignore[attr-defined]
    folded.hand_on()
    assert layer[0].weight.grad is not None


def test_all_norms_of_the_digits_detector(
    digits_base: nn.Module, digits_detector: Detector, fit_images: LetterboxedImages
) -> None:
    network, plain = (copy.deepcopy(digits_base).requires_grad_(True) for _ in range(2))
    images = batch_of(fit_images, digits_detector, np.arange(3), False)
    folded = FoldedNorms(network, images[:1])
    assert len(folded.names) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) > 30
    labels = [fit_images.labels(k) for k in range(3)]
    digits_detector.loss(folded(images), labels).backward()
    folded.hand_on()
    digits_detector.loss(plain(images), labels).backward()
    ours, theirs = gradients(network), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6, name


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_digits", "fcos_resnet50_fpn"])
def test_all_norms_of_every_family(name: str) -> None:
    torch.manual_seed(0)
    network = make_detector(name, 5, (128, 128)).build().train()
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
    norms = [(n, module) for n, module in network.named_modules() if isinstance(module, kinds)]
    for _, norm in norms:
        norm.eval()
    images = torch.randn(2, 3, 128, 128)
    folded = FoldedNorms(network, images[:1])
    assert sorted(folded.names.values()) == sorted(n for n, _ in norms)
    with torch.no_grad():
        for ours, plain in zip(folded(images), network(images), strict=True):
            assert float((ours - plain).norm()) <= 1e-4 * float(plain.norm())
