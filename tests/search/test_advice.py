"""What `paredown search` says of data that could serve better."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluators.datasets.base import DataConfig
from search.commands.search import advise


@pytest.mark.parametrize(
    ("epochs", "select", "source", "share", "said"),
    [
        (0, 82, "select.json", 0.0, True),
        (1, 82, "select.json", 0.0, False),
        (0, 82, "select.json", 0.4, False),
        (0, 82, "train.json", 0.0, False),
        (0, 337, "select.json", 0.0, False),
    ],
)
def test_a_search_that_trains_nothing_is_told_that_fit_may_judge(
    capsys: pytest.CaptureFixture[str], epochs: int, select: int, source: str, share: float, said: bool
) -> None:
    settings: Any = SimpleNamespace(
        finetune=SimpleNamespace(epochs=epochs), data=DataConfig(fit_to_select=share)
    )
    splits = {
        "fit": SimpleNamespace(images=range(337), source=Path("train.json")),
        "select": SimpleNamespace(images=range(select), source=Path(source)),
    }
    advise(settings, SimpleNamespace(splits=splits))  # type: ignore[arg-type]
    assert ("data.fit_to_select" in capsys.readouterr().out) == said
