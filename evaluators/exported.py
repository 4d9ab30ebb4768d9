"""The deployable pair: a model file and `model.json` beside it, which needs nothing of Paredown."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evaluators.graph import MODEL_FILE
from evaluators.targets.torch_engine import TORCH_FILE
from spaces.detectors.base import Category, Postprocess, Preprocess
from spaces.documents import refused
from spaces.errors import InputError
from spaces.recipe import Recipe

CARD_FILE = "model.json"
MODEL_FILES = (MODEL_FILE, TORCH_FILE)
"""Names of deployable files: those of ONNX engines, and of torch."""


class CardCategory(BaseModel):
    """A category of the data set; `id` is what the model's `labels` hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    name: str


class Runtime(BaseModel):
    """The engine that the file was made for and measured in, and the settings that it needs there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    version: str
    threads: int
    config: dict[str, Any] = Field(default_factory=dict)

    @property
    def hint(self) -> str:
        """The precision hint; f32 where none is needed."""
        return str(self.config.get("INFERENCE_PRECISION_HINT", "f32"))


class ModelCard(BaseModel):
    """The contents of `model.json`; `packed` are the bits that a weight takes in the file, by layer.

    `licence` says what must be known about that of a detector that is not Paredown's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: str
    preprocess: Preprocess
    postprocess: Postprocess
    categories: tuple[CardCategory, ...]
    runtime: Runtime
    recipe: Recipe
    packed: dict[str, int] = Field(default_factory=dict)
    figures: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None

    def write(self, directory: Path) -> None:
        """Write `model.json` whole or not at all."""
        temporary = directory / (CARD_FILE + ".tmp")
        temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1))
        os.replace(temporary, directory / CARD_FILE)

    @staticmethod
    def beside(model: Path) -> ModelCard:
        """Read the card of a model file.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        file = model.with_name(CARD_FILE)
        try:
            return ModelCard.model_validate_json(file.read_text())
        except OSError as error:
            raise InputError("model", str(file), f"cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError("model", str(file), "is no JSON file") from None
        except ValidationError as error:
            raise refused(error, str(file)) from None


def model_in(directory: Path) -> Path:
    """The model file in a folder; where there is none, where `model.onnx` would be."""
    there = [directory / name for name in MODEL_FILES if (directory / name).is_file()]
    return there[0] if there else directory / MODEL_FILE


def card_categories(categories: Sequence[Category]) -> tuple[CardCategory, ...]:
    """The data set's categories as the card holds them."""
    return tuple(CardCategory(id=c.id, name=c.name) for c in categories)


def write_graph(graph: onnx.ModelProto, directory: Path) -> Path:
    """Write `model.onnx` whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (MODEL_FILE + ".tmp")
    temporary.write_bytes(graph.SerializeToString())
    os.replace(temporary, directory / MODEL_FILE)
    return directory / MODEL_FILE
