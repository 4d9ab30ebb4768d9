"""What is wrong with a document that pydantic refused, in one line."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from spaces.errors import InputError

_MISSHAPEN = ("missing", "tuple_type", "too_long", "too_short")


def refused(
    error: ValidationError,
    source: str = "",
    model: type[BaseModel] | None = None,
    remedies: Mapping[str, str] | None = None,
) -> InputError:
    """The first wrong field of a document, its value and what to do about it.

    Args:
        error: as pydantic raised it. An `InputError` of a validator is passed on under its full name.
        source: where the document came from, such as its file; stands before the field.
        model: of the whole document; its fields are listed where one is misspelt.
        remedies: by name of a field, what to say where it is missing, or is no list of the right length.
    """
    # A misspelt field explains one that is missing.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = tuple(str(part) for part in first["loc"])
    whole = isinstance(first["input"], Mapping) or first["type"] == "json_invalid"  # too long for a line
    value = None if whole else first["input"]
    remedies = remedies or {}
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        above = ".".join(location[:-1])
        named = cause.field if cause.field.startswith(above) or not above else f"{above}.{cause.field}"
        return InputError(_joined(source, named), cause.value, cause.remedy)
    field = _joined(source, ".".join(location))
    if first["type"] == "extra_forbidden":
        known = ", ".join(_fields(model, location[:-1]))
        return InputError(field, None, f"no such field; there are: {known}" if known else "no such field")
    if first["type"] in _MISSHAPEN and location[-1] in remedies:
        return InputError(field, value, remedies[location[-1]])
    if first["type"] == "tuple_type":
        return InputError(field, value, f"write a list, such as [{value}]")
    if first["type"] == "missing":
        return InputError(field, None, "is missing")
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return InputError(field, value, said)


def _joined(source: str, field: str) -> str:
    return ": ".join(part for part in (source, field) if part) or "document"


def _fields(model: type[BaseModel] | None, location: tuple[str, ...]) -> list[str]:
    for name in location:
        inner = None if model is None else model.model_fields.get(name)
        of = None if inner is None else inner.annotation
        model = of if isinstance(of, type) and issubclass(of, BaseModel) else None
    return [] if model is None else list(model.model_fields)
