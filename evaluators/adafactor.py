"""Adafactor on many parameters at once: what it costs a small network is calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CLIP, LEAST_SCALE, DECAY = 1.0, 1e-3, -0.8
"""torch.optim.Adafactor's defaults: d, the second eps, and beta2_decay."""


class StackedAdafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) with the defaults of `torch.optim.Adafactor`.

    Steps are torch's up to rounding. Its averages run over the last two dimensions of a weight, so that all
    convolutions of one kernel size are updated by the same calls, and all vectors by others. A detector has
    hundreds of parameters, two thirds of them scales and biases of norms: a dozen calls each are a third of
    a training step of a small network.

    Args:
        parameters: those without a gradient are left alone.
        lr: step over the size of a tensor's weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self._moving: list[nn.Parameter] = []
        self._stacks: list[_Stack] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters once; `closure` is not supported and must be None."""
        assert closure is None
        rates = {
            parameter: group["lr"]
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        if not _same(self._moving, rates):
            self._moving = list(rates)
            self._stacks = self._arranged(self._moving)
        for stack in self._stacks:
            stack.update([rates[parameter] for parameter in stack.members])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of any optimizer."""
        super().load_state_dict(state_dict)
        self._moving, self._stacks = [], []

    def _arranged(self, moving: list[nn.Parameter]) -> list[_Stack]:
        """Parameters that have made as many steps and whose averages are alike, together."""
        alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in moving:
            state = self.state[parameter]
            if not state:
                state.update(step=0, **_nothing_yet(parameter))
            alike[_kernel(parameter), parameter.dtype, state["step"]].append(parameter)
        return [_Stack(members, [self.state[p] for p in members]) for members in alike.values()]


class _Stack:
    """Parameters that are updated by the same calls; their averages are parts of the same tensors.

    Args:
        members: the parameters.
        states: theirs, in the same order; they hold views of the common averages from now on.
    """

    def __init__(self, members: list[nn.Parameter], states: list[dict[str, Any]]) -> None:
        self.members, self._states = members, states
        self._kernel = _kernel(members[0])
        self._sizes = [parameter.numel() // self._kernel.numel() for parameter in members]
        self._averages: dict[str, Tensor] = {}
        for name in states[0].keys() - {"step"}:
            shape = _nothing_yet(members[0])[name].shape[-2:] if len(self._kernel) else ()
            parts = [state[name].reshape(-1, *shape) for state in states]
            self._averages[name] = whole = torch.cat(parts)
            for state, part in zip(states, torch.split(whole, [len(part) for part in parts]), strict=True):
                state[name] = part.view(state[name].shape)

    def update(self, rates: list[float]) -> None:
        """One step of all members, at their learning rates."""
        for state in self._states:
            state["step"] += 1
        steps = self._states[0]["step"]
        share = steps**DECAY
        gradient = torch.cat([_gradient(parameter).reshape(-1, *self._kernel) for parameter in self.members])
        tiny = torch.finfo(gradient.dtype).eps
        if "variance" in self._averages:
            variance = self._averages["variance"].lerp_(gradient.square(), share)
            if self._kernel:  # a row and a column of one element are the same
                variance = variance / variance.clamp(min=tiny) * variance
        else:
            squares = gradient.square()
            rows = self._averages["row_var"].lerp_(squares.mean(dim=-1, keepdim=True), share)
            columns = self._averages["col_var"].lerp_(squares.mean(dim=-2, keepdim=True), share)
            variance = rows / rows.mean(dim=-2, keepdim=True).clamp_(min=tiny) * columns
        updates = torch.split(variance.clamp(min=tiny * tiny).rsqrt_().mul_(gradient), self._sizes)
        sizes = _root_mean_squares(self.members).clamp_(min=LEAST_SCALE)
        sizes /= (_root_mean_squares(updates) / CLIP).clamp_(min=1.0)
        for parameter, update, size, rate in zip(self.members, updates, sizes.tolist(), rates, strict=True):
            parameter.add_(update.view(parameter.shape), alpha=-size * min(rate, steps**-0.5))


def _same(some: list[nn.Parameter], others: Iterable[nn.Parameter]) -> bool:
    return [id(parameter) for parameter in some] == [id(parameter) for parameter in others]


def _kernel(parameter: nn.Parameter) -> torch.Size:
    """The dimensions that averages are taken over: none of a vector."""
    return parameter.shape[-2:] if parameter.dim() > 1 else torch.Size()


def _nothing_yet(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The averages of a parameter before its first step; of single elements there is nothing to average."""
    if _kernel(parameter).numel() == 1:
        return {"variance": parameter.new_zeros(parameter.shape)}
    *others, height, width = parameter.shape
    return {
        "row_var": parameter.new_zeros(*others, height, 1),
        "col_var": parameter.new_zeros(*others, 1, width),
    }


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _root_mean_squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(one) / one.numel() ** 0.5 for one in tensors])
