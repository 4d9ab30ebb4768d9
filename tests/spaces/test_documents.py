"""Messages about documents that pydantic refuses, word by word."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from spaces.documents import refused
from spaces.errors import InputError


class Wheel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    spokes: int = 8
    tyre: str = "slick"

    @field_validator("tyre")
    @classmethod
    def _known(cls, tyre: str) -> str:
        if tyre == "square":
            raise InputError("tyre", tyre, "round ones roll")
        if tyre == "flat":
            raise ValueError("has no air")
        return tyre


class Bicycle(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    wheel: Wheel = Wheel()
    size: tuple[int, int] = (1, 1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "bike.yaml: name: is missing"),
        ({"nam": "x"}, "bike.yaml: nam: no such field; there are: name, wheel, size"),
        (
            {"name": "x", "wheel": {"spoke": 3}},
            "bike.yaml: wheel.spoke: no such field; there are: spokes, tyre",
        ),
        ({"name": "x", "wheel": {"tyre": "square"}}, "bike.yaml: wheel.tyre: 'square': round ones roll"),
        ({"name": "x", "wheel": {"tyre": "flat"}}, "bike.yaml: wheel.tyre: 'flat': has no air"),
        ({"name": "x", "wheel": {"tyre": 3}}, "bike.yaml: wheel.tyre: 3: must be a valid string"),
        ({"name": "x", "size": 3}, "bike.yaml: size: 3: two numbers"),
        ([], "bike.yaml: []: must be a valid dictionary or instance of Bicycle"),
    ],
)
def test_the_first_wrong_field_is_named_with_its_value_and_a_remedy(document: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Bicycle.model_validate(document)
    assert str(refused(caught.value, "bike.yaml", Bicycle, {"size": "two numbers"})) == message


def test_without_a_source_or_a_model_less_is_said() -> None:
    with pytest.raises(ValidationError) as caught:
        Bicycle.model_validate({"nam": "x"})
    assert str(refused(caught.value)) == "nam: no such field"
    with pytest.raises(ValidationError) as caught:
        Bicycle.model_validate(3)
    assert str(refused(caught.value)).startswith("document: 3: must be")
