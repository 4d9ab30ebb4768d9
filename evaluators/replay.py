"""Following tensors through the calls of a forward pass, and running it with kept ones in their place.

A network makes the same calls in the same order on every batch. Those whose results depend on the images,
but on nothing that is trained, are frozen: what others read of their results is kept, and they need not run
again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Place = tuple[int, int]
"""A tensor by the number of the call that made it, and its position among what that call returned."""


class NotReplayableError(Exception):
    """The network does something that kept features cannot take the place of."""


@dataclass(frozen=True)
class Made:
    """A tensor that a frozen call returned: one of its own, or (`alias`) the argument at that position."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    alias: int | None = None


@dataclass(frozen=True)
class Call:
    """What a frozen call returned: one tensor, or (not `single`) a list of them."""

    made: tuple[Made, ...]
    single: bool


@dataclass
class Script:
    """What the calls of a forward pass do.

    Attributes:
        calls: for each call, what it returned if it is frozen, None if it has to run.
        kept: the tensors that calls which run read, with their places in the store.
        written: the last call that wrote into a tensor, where that is not the one that made it.
        reads_images: a call that has to run reads the images themselves.
    """

    calls: list[Call | None] = field(default_factory=list)
    kept: dict[Place, int] = field(default_factory=dict)
    written: dict[Place, int] = field(default_factory=dict)
    reads_images: bool = False


class Recording(TorchFunctionMode):
    """Follows the images and the changed modules' parameters through the calls of one forward pass."""

    def __init__(self, images: Tensor, parameters: Mapping[int, str], changed: Collection[int]) -> None:
        super().__init__()
        self.script = Script()
        self.trained = set(changed)
        self.behind: set[str] = set()  # parameters that meet what was trained before them
        self._of: dict[int, set[str]] = {number: {name} for number, name in parameters.items()}
        self._made: dict[int, Place] = {id(images): (-1, 0)}
        self._alive: list[Any] = [images]  # while a tensor lives no other one has its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(returned))
        self._alive += [*given, *made]
        number = len(self.script.calls)
        self.script.calls.append(None)
        if any(id(tensor) in self.trained for tensor in given):
            self.behind |= self._behind(given)
            self.read(given)
            self.trained |= {id(tensor) for tensor in made}
        elif made and any(id(tensor) in self._made for tensor in given):
            self.script.calls[number] = self._call(returned, given, number)
        else:  # of parameters alone, such as a scaled weight
            self._of |= {id(tensor): self._behind(given) for tensor in made if id(tensor) not in self._of}
        return returned

    def read(self, tensors: list[Tensor]) -> None:
        """Note frozen tensors that have to be there."""
        for tensor in tensors:
            place = self._made.get(id(tensor))
            if place is not None and place[0] < 0:
                self.script.reads_images = True
            elif place is not None:
                self.script.kept.setdefault(place, len(self.script.kept))

    def _behind(self, given: list[Tensor]) -> set[str]:
        """Parameters that tensors were computed from."""
        return {name for tensor in given for name in self._of.get(id(tensor), ())}

    def _call(self, returned: Any, given: list[Tensor], number: int) -> Call:
        single = isinstance(returned, Tensor)
        made = [returned] if single else list(returned)
        if not all(isinstance(one, Tensor) for one in made):
            raise NotReplayableError(f"a call returns a {type(returned).__name__} of other things")
        return Call(tuple(self._noted(t, given, (number, k)) for k, t in enumerate(made)), single)

    def _noted(self, tensor: Tensor, given: list[Tensor], place: Place) -> Made:
        alias = next((position for position, one in enumerate(given) if one is tensor), None)
        if alias is None:
            self._made[id(tensor)] = place
        else:
            first = self._made.get(id(tensor), (-1, 0))
            if first in self.script.kept or first[0] < 0:
                raise NotReplayableError("what others read is overwritten")
            self.script.written[first] = place[0]
        return Made(tuple(tensor.shape), tensor.dtype, alias)


class Capturing(TorchFunctionMode):
    """Runs the calls up to the last kept feature and takes the features."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.features: dict[int, Tensor] = {}
        self._number, self._pending = 0, dict[Place, Tensor]()
        self._ready: dict[int, list[Place]] = {}
        self._making: dict[int, list[Place]] = {}
        for place in script.kept:
            self._making.setdefault(place[0], []).append(place)
            self._ready.setdefault(script.written.get(place, place[0]), []).append(place)
        self._kept = script.kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        number, self._number = self._number, self._number + 1
        if number in self._making:
            made = list(tensors_in(returned))
            self._pending.update({place: made[place[1]] for place in self._making[number]})
        for place in self._ready.get(number, ()):
            self.features[self._kept[place]] = self._pending.pop(place).clone()
        if len(self.features) == len(self._kept):
            raise AllCapturedError
        return returned


class AllCapturedError(Exception):
    """Nothing more of the forward pass is needed."""


class Replaying(TorchFunctionMode):
    """Runs a forward pass with kept features in the place of the calls that made them."""

    def __init__(self, script: Script, features: list[Tensor]) -> None:
        super().__init__()
        self._script, self._features, self._number = script, features, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self._number = self._number, self._number + 1
        if number >= len(self._script.calls):
            raise NotReplayableError("the network does not always do the same")
        call = self._script.calls[number]
        if call is None:
            return func(*args, **(kwargs or {}))
        given = list(tensors_in((args, kwargs)))
        made = tuple(self._put(one, given, (number, k)) for k, one in enumerate(call.made))
        return made[0] if call.single else made

    def _put(self, noted: Made, given: list[Tensor], place: Place) -> Tensor:
        if noted.alias is not None:
            return given[noted.alias]
        slot = self._script.kept.get(place)
        if slot is not None:
            return self._features[slot]
        return torch.empty(noted.shape, dtype=noted.dtype, device="meta")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments or returned values, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
