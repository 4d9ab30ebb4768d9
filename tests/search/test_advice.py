"""What `paredown search` says of data that could serve better."""

from types import SimpleNamespace
from typing import Any

import pytest

from search.commands.search import advise


@pytest.mark.parametrize(
    ("epochs", "select", "whole", "said"),
    [
        (0, 82, "", True),
        (1, 82, "", False),
        (0, 82, "train", False),
        (0, 337, "", False),
    ],
)
def test_a_search_that_trains_nothing_is_told_that_fit_may_judge(
    capsys: pytest.CaptureFixture[str], epochs: int, select: int, whole: str, said: bool
) -> None:
    settings: Any = SimpleNamespace(finetune=SimpleNamespace(epochs=epochs))
    splits = {
        "fit": SimpleNamespace(images=range(337), whole=whole),
        "select": SimpleNamespace(images=range(select)),
    }
    advise(settings, SimpleNamespace(splits=splits))  # type: ignore[arg-type]
    assert ("data.fit_to_select" in capsys.readouterr().out) == said
