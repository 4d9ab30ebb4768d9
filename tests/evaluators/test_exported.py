"""What is beside a model file but is no card of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluators.exported import ModelCard
from spaces.errors import InputError


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "is no JSON file"),
        (b'{"detector": "yolox_nano",', r"Invalid JSON: EOF while parsing"),
        (b"{}", "is missing"),
        (b"[]", r"\[\]: must be an object"),
    ],
)
def test_what_is_no_card_is_refused_in_one_line(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        ModelCard.beside(tmp_path / "model.onnx")
    line = str(caught.value)
    assert "model.json" in line
    assert "\n" not in line
    assert "yolox_nano" not in line, "the content is not repeated"
