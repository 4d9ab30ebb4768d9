"""What `paredown search` says of data that could serve better."""

from types import SimpleNamespace
from typing import Any

import pytest

from evaluators.datasets.base import DataConfig
from search.commands.search import advise


@pytest.mark.parametrize(
    ("epochs", "select", "share", "said"),
    [(0, 82, 0.0, True), (1, 82, 0.0, False), (0, 82, 0.4, False), (0, 337, 0.0, False)],
)
def test_a_search_that_trains_nothing_is_told_that_fit_may_judge(
    capsys: pytest.CaptureFixture[str], epochs: int, select: int, share: float, said: bool
) -> None:
    settings: Any = SimpleNamespace(
        finetune=SimpleNamespace(epochs=epochs), data=DataConfig(fit_to_select=share)
    )
    splits = {role: SimpleNamespace(images=range(n)) for role, n in (("fit", 337), ("select", select))}
    advise(settings, SimpleNamespace(splits=splits))  # type: ignore[arg-type]
    assert ("data.fit_to_select" in capsys.readouterr().out) == said
