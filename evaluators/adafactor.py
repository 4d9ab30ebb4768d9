"""Adafactor on many parameters at once: what it costs a small network is calls."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLIP, LEAST_SCALE, DECAY = 1.0, 1e-3, -0.8
"""torch.optim.Adafactor's defaults: d, the second eps, and beta2_decay."""
FEW = 8
"""Up to so many slices are added one by one."""
STACK = 65536
"""Elements of a stack, unless one parameter has more: a core's cache holds them and what is made of them."""


class StackedAdafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) with the defaults of `torch.optim.Adafactor`.

    Steps are torch's up to rounding. Its averages run over the last two dimensions of a weight, so that all
    convolutions of one kernel size are updated by the same calls, and all vectors by others. A detector has
    hundreds of parameters, two thirds of them scales and biases of norms: a dozen calls each are a third of
    a training step of a small network.

    Args:
        parameters: those without a gradient are left alone.
        lr: step over the size of a tensor's weights.
        gradient_norm: a longer gradient, that of all parameters together, is shortened to it first, as
            `torch.nn.utils.clip_grad_norm_` does.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, gradient_norm: float = math.inf
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._gradient_norm = gradient_norm
        self._moving: list[nn.Parameter] = []
        self._stacks: list[_Stack] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters once; `closure` is not supported and must be None."""
        assert closure is None
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if len(moving) != len(self._moving) or any(map(operator.is_not, moving, self._moving)):
            self._note_steps()
            self._moving = moving
            self._stacks = self._arranged()
        lengths = [stack.take_gradients() for stack in self._stacks]
        length = float(torch.stack(lengths).norm()) if lengths else 0.0
        for stack in self._stacks:
            stack.update(min(1.0, self._gradient_norm / (length + 1e-6)))

    def state_dict(self) -> dict[str, Any]:
        """As that of any optimizer."""
        self._note_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of any optimizer."""
        super().load_state_dict(state_dict)
        self._moving, self._stacks = [], []

    def _note_steps(self) -> None:
        for stack in self._stacks:
            for parameter in stack.members:
                self.state[parameter]["step"] = stack.steps

    def _arranged(self) -> list[_Stack]:
        """Parameters that have made as many steps and whose averages are alike, together."""
        moving = {id(parameter) for parameter in self._moving}
        stacks = []
        for group in self.param_groups:
            alike: dict[Any, list[list[nn.Parameter]]] = defaultdict(list)
            for parameter in group["params"]:
                if id(parameter) not in moving:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, **_nothing_yet(parameter))
                parts = alike[_kernel(parameter), parameter.dtype, state["step"]]
                if not parts or sum(map(torch.numel, [*parts[-1], parameter])) > STACK:
                    parts.append([])
                parts[-1].append(parameter)
            stacks += [_Stack(part, self.state, group) for parts in alike.values() for part in parts]
        return stacks


class _Stack:
    """Parameters that are updated by the same calls; their averages are parts of the same tensors.

    Args:
        members: the parameters.
        state: the optimizer's; it holds views of the common averages from now on.
        group: of these parameters; has their learning rate.
    """

    def __init__(
        self, members: list[nn.Parameter], state: Mapping[Tensor, dict[str, Any]], group: Mapping[str, Any]
    ) -> None:
        self.members: list[Tensor] = list(members)
        self._group = group
        own = [state[parameter] for parameter in members]
        self.steps: int = own[0]["step"]
        """Made so far."""
        kernel = _kernel(members[0])
        self._kernel = kernel if kernel.numel() > 1 else ()
        self._vectors = not kernel
        rows = [parameter.numel() // kernel.numel() for parameter in members]
        self._roots = torch.tensor([parameter.numel() for parameter in members]).sqrt()
        self._gradient, self._factor = (members[0].new_empty(sum(rows), *self._kernel) for _ in range(2))
        parts = torch.split(self._factor, rows)
        self._updates = [part.view(p.shape) for part, p in zip(parts, members, strict=True)]
        self._averages: dict[str, Tensor] = {}
        for name in own[0].keys() - {"step"}:
            shape = own[0][name].shape[-2:] if self._kernel else ()
            self._averages[name] = whole = torch.cat([one[name].reshape(-1, *shape) for one in own])
            for one, part in zip(own, torch.split(whole, rows), strict=True):
                one[name] = part.view(one[name].shape)

    def take_gradients(self) -> Tensor:
        """Copy those of all members; their length."""
        gradients = [gradient_of(parameter).reshape(-1, *self._kernel) for parameter in self.members]
        torch.cat(gradients, out=self._gradient)
        length: Tensor = torch.linalg.vector_norm(self._gradient)
        return length

    def update(self, shortened: float) -> None:
        """One step of all members, along their gradients times `shortened`."""
        self.steps += 1
        if shortened < 1.0:
            self._gradient *= shortened
        torch.mul(self._gradient, self._gradient, out=self._factor)
        self._turn_to_factors(self._factor, self.steps**DECAY)
        self._factor *= self._gradient
        sizes = self._root_mean_squares(self.members).clamp_(min=LEAST_SCALE)
        sizes /= (self._root_mean_squares(self._updates) / CLIP).clamp_(min=1.0)
        rate = min(self._group["lr"], self.steps**-0.5)
        torch._foreach_mul_(self._updates, sizes.mul_(-rate).tolist())
        torch._foreach_add_(self.members, self._updates)

    def _turn_to_factors(self, squares: Tensor, share: float) -> None:
        """Squares of gradients to what these are multiplied by: one over the root of their averages."""
        tiny = torch.finfo(squares.dtype).eps
        if self._kernel:
            rows = self._averages["row_var"].lerp_(_means(squares, -1), share)
            columns = self._averages["col_var"].lerp_(_means(squares, -2), share)
            torch.mul(rows / _means(rows, -2).clamp_(min=tiny), columns, out=squares)
        elif self._vectors:
            squares.copy_(self._averages["variance"].lerp_(squares, share))
        else:  # a row and a column of one element are the same, v * v / max(v, tiny)
            variance = self._averages["variance"].lerp_(squares, share)
            torch.mul(variance, 1 / tiny, out=squares).clamp_(max=1.0).mul_(variance)
        squares.clamp_(min=tiny * tiny).rsqrt_()

    def _root_mean_squares(self, tensors: list[Any]) -> Tensor:
        """`(members,)`."""
        return torch.stack(torch._foreach_norm(tensors)).div_(self._roots)


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


def _means(values: Tensor, dim: int) -> Tensor:
    """Over one of the last two dimensions, which stays; by slices, for `mean` over a few is slow."""
    size = values.shape[dim]
    if size > FEW:
        return values.mean(dim=dim, keepdim=True)
    first, *others = torch.split(values, 1, dim)
    total = first.clone()
    for other in others:
        total += other
    return total.div_(size)


def gradient_of(parameter: Tensor) -> Tensor:
    """What a backward pass left there."""
    assert parameter.grad is not None
    return parameter.grad
