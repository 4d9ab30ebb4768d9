"""Adafactor on all parameters of one shape at once: what it costs a small network is calls."""

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

    Steps are torch's up to rounding. All parameters of one shape are stacked and updated by the same calls.
    A detector has hundreds of parameters, two thirds of them scales and biases of norms: a call each and a
    dozen calls a parameter are a third of a training step of a small network.

    Args:
        parameters: those without a gradient are left alone.
        lr: step over the size of a tensor's weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters once; `closure` is not supported and must be None."""
        assert closure is None
        for group in self.param_groups:
            together: dict[Any, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    steps = self._state(parameter)["step"]
                    steps += 1
                    together[parameter.shape, parameter.dtype, int(steps)].append(parameter)
            for (_, _, steps), members in together.items():
                self._update(members, steps, group["lr"])

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            shape = list(parameter.shape)
            if len(shape) > 1:
                state["row_var"] = parameter.new_zeros([*shape[:-1], 1])
                state["col_var"] = parameter.new_zeros([*shape[:-2], 1, shape[-1]])
            else:
                state["variance"] = parameter.new_zeros(shape)
        return state

    def _update(self, members: list[nn.Parameter], steps: int, lr: float) -> None:
        gradient = torch.stack([_gradient(parameter) for parameter in members])
        share = steps**DECAY
        tiny = torch.finfo(gradient.dtype).eps
        if members[0].dim() > 1:
            rows = self._moved(members, "row_var", _mean_square(gradient, -1), share)
            columns = self._moved(members, "col_var", _mean_square(gradient, -2), share)
            variance = rows * columns  # of a column and a row: their outer product
            variance /= rows.mean(dim=-2, keepdim=True).clamp_(min=tiny)
        else:
            variance = self._moved(members, "variance", gradient.square(), share)
        update = variance.clamp_(min=tiny * tiny).rsqrt_().mul_(gradient)
        scale = _root_mean_square(torch.stack(list(members))).clamp_(min=LEAST_SCALE)
        scale *= -min(lr, steps**-0.5)
        scale /= (_root_mean_square(update) / CLIP).clamp_(min=1.0)
        update *= scale.reshape(-1, *[1] * members[0].dim())
        for parameter, change in zip(members, update.unbind(), strict=True):
            parameter.add_(change)

    def _moved(self, members: list[nn.Parameter], name: str, mean: Tensor, share: float) -> Tensor:
        """A moving average of all members, `(members, ...)`, moved towards `mean` and stored again."""
        averages = [self.state[parameter][name] for parameter in members]
        moved = torch.stack(averages).lerp_(mean, share)
        for average, now in zip(averages, moved.unbind(), strict=True):
            average.copy_(now)
        return moved


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _mean_square(values: Tensor, dim: int) -> Tensor:
    return values.square().mean(dim=dim, keepdim=True)


def _root_mean_square(values: Tensor) -> Tensor:
    """`(members,)`."""
    return values.flatten(1).square().mean(dim=1).sqrt()
