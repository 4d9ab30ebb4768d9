"""Recipes: what is done to a detector, as plain data."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spaces.documents import refused

BITS = (2, 3, 4, 6, 8, 16, 32)


Function = Literal["own", "polynomial", "hardswish", "relu"]
"""What a stage computes: its own activation function, or another one."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prune(_Frozen):
    """Remove the least important channels of a channel site."""

    kind: Literal["prune"] = "prune"
    site: str
    sparsity: float = Field(ge=0.0, lt=1.0, description="share of the channels that is gone, 0.5 = half")


class Quantize(_Frozen):
    """Run (and store) a layer at a bit-width: 32 is float32, 16 is bfloat16, 8 and below are integers."""

    kind: Literal["quantize"] = "quantize"
    site: str
    weight_bits: int
    activation_bits: int

    @model_validator(mode="after")
    def _known_bits(self) -> Quantize:
        for bits in (self.weight_bits, self.activation_bits):
            if bits not in BITS:
                raise ValueError(f"{bits} bits at {self.site}: choose one of {BITS}")
        return self


class Factorize(_Frozen):
    """Replace a layer by two or three thinner ones."""

    kind: Literal["factorize"] = "factorize"
    site: str
    rank_ratio: float = Field(gt=0.0, le=1.0, description="rank / full rank of the pruned layer")
    multiple: int = Field(default=8, ge=1, description="ranks are rounded to multiples of it")


class Activate(_Frozen):
    """Replace the costly activation functions of a stage; `own` leaves them."""

    kind: Literal["activate"] = "activate"
    site: str
    function: Function


class Drop(_Frozen):
    """Leave a residual block out."""

    kind: Literal["drop"] = "drop"
    site: str
    dropped: bool = True


class Codebook(_Frozen):
    """Store a layer's weight as indices into a list of so many values; 0 leaves it."""

    kind: Literal["codebook"] = "codebook"
    site: str
    entries: Literal[0, 16, 32, 64, 128, 256]


class Resize(_Frozen):
    """Run the whole detector on images of another size, in pixels; 0 x 0 leaves the study's."""

    kind: Literal["resize"] = "resize"
    site: str = "input"
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


class Proposals(_Frozen):
    """Let a second stage look at the best regions only."""

    kind: Literal["proposals"] = "proposals"
    site: str
    share: float = Field(gt=0.0, le=1.0, description="share of the base's number of proposals that is left")


class TopK(_Frozen):
    """Let only the best so many boxes of an image into suppression; 0 leaves the study's number."""

    kind: Literal["topk"] = "topk"
    site: str = "suppression"
    count: int = Field(default=0, ge=0)


class Gate(_Frozen):
    """Give a squeeze-and-excitation block gates that are the same for every image."""

    kind: Literal["gate"] = "gate"
    site: str
    constant: bool = True


AnyChoice = Prune | Quantize | Factorize | Activate | Drop | Codebook | Resize | Proposals | TopK | Gate
T = TypeVar("T", Prune, Quantize, Factorize, Activate, Drop, Codebook, Resize, Proposals, TopK, Gate)
Choice = Annotated[AnyChoice, Field(discriminator="kind")]


class Recipe(_Frozen):
    """A detector's name and the choices made on it; no choice at a site means that the site stays as it is.

    Two recipes with the same choices are equal, serialise to the same JSON and have the same key, in
    whatever order the choices were given.
    """

    detector: str
    choices: tuple[Choice, ...] = ()

    @model_validator(mode="after")
    def _canonical(self) -> Recipe:
        kept = sorted((c for c in self.choices if not is_identity(c)), key=lambda c: (c.kind, c.site))
        for first, second in itertools.pairwise(kept):
            if (first.kind, first.site) == (second.kind, second.site):
                raise ValueError(f"{first.kind} is chosen twice at site {first.site}")
        object.__setattr__(self, "choices", tuple(kept))
        return self

    @property
    def is_identity(self) -> bool:
        """True for the base model."""
        return not self.choices

    @property
    def key(self) -> str:
        """12 hex digits, the same on every machine for the same recipe."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def of_kind(self, kind: type[T]) -> dict[str, T]:
        """The choices of one kind by site."""
        return {c.site: c for c in self.choices if isinstance(c, kind)}

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            InputError: the text is no recipe; the message says what is wrong with it.
        """
        try:
            return Recipe.model_validate_json(text)
        except ValidationError as error:
            raise refused(error, "recipe") from None


def is_identity(choice: AnyChoice) -> bool:
    """True where a choice changes nothing."""
    match choice:
        case Prune():
            return choice.sparsity == 0.0
        case Quantize():
            return choice.weight_bits == choice.activation_bits == 32
        case Factorize():
            return choice.rank_ratio == 1.0
        case Activate():
            return choice.function == "own"
        case Codebook():
            return choice.entries == 0
        case Proposals():
            return choice.share == 1.0
        case Drop():
            return not choice.dropped
        case Resize():
            return choice.size == (0, 0)
        case TopK():
            return choice.count == 0
        case Gate():
            return not choice.constant


def identity(detector: str) -> Recipe:
    """The recipe of the base model."""
    return Recipe(detector=detector)


def told_by_ap(choice: AnyChoice) -> bool:
    """True where raw outputs do not show what a choice costs: only the AP does."""
    return isinstance(choice, Resize | TopK)


def merged(recipe: Recipe, choices: Iterable[AnyChoice]) -> Recipe:
    """`recipe` with `choices` put in the place of its own at the same sites."""
    by_place = {(c.kind, c.site): c for c in recipe.choices}
    by_place.update({(c.kind, c.site): c for c in choices})
    return Recipe(detector=recipe.detector, choices=tuple(by_place.values()))
