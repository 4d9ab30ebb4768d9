"""Going on with a study on another machine or engine: a new reference for the base's latency.

Ratios to the base are what trials keep. What Optuna was told in milliseconds cannot be told again, so values
keep the scale of the study's first reference; what is shown takes that of the newest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluators.bench import Bench
from evaluators.exported import model_in
from evaluators.measuring import BASE_FOLDER, REFERENCE_FILE
from search.front import FINAL
from search.judge import NEW_REFERENCE, base_number
from search.study import FINGERPRINT, SearchStudy, target_differences
from spaces.errors import InputError


def renew_reference(bench: Bench, study: SearchStudy, say: Callable[[str], None]) -> bool:
    """Measure the base here where the study's target signature is another one; False where it is not.

    The file that is timed is the study's own base, as everything that follows is timed against it. The
    front is due to be measured again: ratios of two machines do not compare closely.

    Args:
        bench: of this machine; it differs from the study in its target's signature alone.
        study: opened with `new_reference`.
        say: takes one line at a time.

    Raises:
        InputError: the study has no base yet, or its file or its first reference is gone.
    """
    now = bench.fingerprint()
    differences = target_differences(study.fingerprint, now)
    if not differences:
        say("the target is the one that the study was measured on; its reference stays")
        return False
    first_ms = _first_reference(study)
    number = base_number(study)
    model = model_in(study.artifacts / BASE_FOLDER)
    if number is not None and not model.is_file():
        model = model_in(study.trial_folder(number))
    if not model.is_file():
        raise InputError("base model", str(model), "is gone; start another study with --study NEWNAME")
    say(f"measuring a new reference: {'; '.join(differences)}")
    base_ms = _measured(bench, model)
    record: dict[str, Any] = {
        "base_ms": base_ms,
        "scale": base_ms / first_ms,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "before": study.fingerprint,
    }
    study.optuna.set_user_attr(NEW_REFERENCE, record)
    study.optuna.set_user_attr(FINAL, {})
    study.optuna.set_user_attr(FINGERPRINT, dict(now))  # last: a study that was killed before asks again
    say(f"the base takes {base_ms:.2f} ms here; {first_ms:.2f} ms when the study began")
    return True


def _first_reference(study: SearchStudy) -> float:
    file = study.artifacts / BASE_FOLDER / REFERENCE_FILE
    try:
        content: Mapping[str, float] = json.loads(file.read_text())
        return float(content["base_ms"])
    except (OSError, ValueError, KeyError):
        raise InputError(
            "reference", str(file), "is not there; let the study finish its base first"
        ) from None


def _measured(bench: Bench, model: Path) -> float:
    """Median milliseconds of the base, timed in pairs with itself as a candidate is."""
    with bench.slot.computing():
        base, again = (bench.target.prepare(model, bench.config.threads) for _ in range(2))
    return bench.timed(again, base).base_ms.p50
