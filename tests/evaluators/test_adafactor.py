"""The stacked Adafactor takes the steps of torch's."""

import copy

import pytest
import torch
from torch import nn

from evaluators.adafactor import StackedAdafactor


def network() -> nn.Sequential:
    """In evaluation mode: biases in front of a norm in training have gradients of rounding errors alone."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 5, 1),
        nn.Flatten(),
        nn.Linear(5 * 4, 6),
    )
    return layers.eval()


def trained(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module:
    images = torch.randn(steps, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step, batch in enumerate(images):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        network(batch).square().sum().backward()
        optimizer.step()
    return network


def test_its_steps_are_those_of_torch() -> None:
    ours, torchs = network(), network()
    trained(ours, StackedAdafactor(ours.parameters(), lr=0.1), 6)
    trained(torchs, torch.optim.Adafactor(torchs.parameters(), lr=0.1, weight_decay=0.0), 6)
    start = network()
    for (name, a), b, before in zip(
        ours.named_parameters(), torchs.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(a, before), name


def test_one_step_of_a_vector_by_hand() -> None:
    """After the first step the average is the squared gradient, so that the update is its sign."""
    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    weight.grad = torch.tensor([0.5, 20.0])
    StackedAdafactor([weight], lr=0.01).step()
    size = 0.01 * (12.5**0.5)  # of the rate times the root mean square of 3 and -4
    assert weight.detach().tolist() == pytest.approx([3.0 - size, -4.0 - size])


def test_it_goes_on_from_its_state() -> None:
    whole, halves = network(), network()
    trained(whole, StackedAdafactor(whole.parameters(), lr=0.1), 3)
    first = StackedAdafactor(halves.parameters(), lr=0.1)
    images = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = first
    for step, batch in enumerate(images):
        if step == 2:
            optimizer = StackedAdafactor(halves.parameters(), lr=0.1)
            optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        halves(batch).square().sum().backward()
        optimizer.step()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_has_no_gradient_stays() -> None:
    moving, resting = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    moving.grad = torch.ones(3)
    StackedAdafactor([moving, resting], lr=0.1).step()
    assert resting.detach().tolist() == [1.0, 1.0, 1.0]
    assert moving.detach().tolist() == pytest.approx([0.9, 0.9, 0.9])


def test_long_gradients_are_shortened_as_torch_does() -> None:
    """In the second step, for the first one does not depend on how long a gradient is."""
    networks = [network() for _ in range(3)]
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    longest = 1e9
    optimizers = [StackedAdafactor(n.parameters(), 0.1, longest) for n in networks]
    for step, factor in enumerate((1.0, 5.0)):
        for one, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            (factor * one(images).square().sum()).backward()
        if step == 1:
            longest = 0.3 * float(nn.utils.get_total_norm(p.grad for p in networks[0].parameters()))
            nn.utils.clip_grad_norm_(networks[0].parameters(), longest)
            optimizers[1]._gradient_norm = longest
        for optimizer in optimizers:
            optimizer.step()
    torchs, ours, unclipped = ([*one.parameters()] for one in networks)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(unclipped, torchs, strict=True))
