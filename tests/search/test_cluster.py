"""Two unlike machines in one cluster: both train, one measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parent / "fake_cluster.py"


def outcome(wanted: str) -> dict[str, Any]:
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), wanted], capture_output=True, text=True, check=True, env=quiet
    )
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def test_who_does_not_measure_hands_on() -> None:
    ended = outcome("a")
    trouble = ended.pop("trouble")
    assert {name: one["measured"] for name, one in ended.items()} == {f"trial {k}": "a" for k in range(6)}
    assert {one["trained"] for one in ended.values()} == {"a", "b"}, "both machines trained"
    # On machine `a` nothing is handed on, so that there is no second half to go wrong.
    handed_on = [
        "measure on a machine of the study's kind",
        "RuntimeError: export: ValueError: no such layer",
    ]
    assert trouble in ({"trained": "a", "measured": "a"}, handed_on)


def test_a_cluster_without_a_machine_that_measures_is_refused() -> None:
    (message,) = outcome("c").values()
    assert "no machine of the cluster has the study's target signature" in message
    assert "cpu: 'c' -> 'a'" in message
    assert "\n" not in message
