"""The front measured again: all its models in one batch, and scored on report, which nothing else touches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.exported import CARD_FILE, ModelCard, model_in
from evaluators.targets.base import Detections, Session
from evaluators.together import time_together
from search.files import whole_file
from search.front import FINAL, chosen_numbers
from search.retention import base_number
from search.study import SearchStudy
from spaces.errors import InputError

_SECONDS_A_MODEL = 3.0
_SECONDS_AT_MOST = 60.0


def is_measured(study: SearchStudy) -> bool:
    """True where the front as it is now was measured again already."""
    models = study.optuna.user_attrs.get(FINAL, {}).get("models", {})
    return {str(number) for number in chosen_numbers(study)} <= set(models)


def measure_front(bench: Bench, study: SearchStudy, say: Callable[[str], None], seed: int = 0) -> None:
    """Time the models of the front together and score them on report; the study keeps the results.

    Ratios of different trials were taken minutes or days apart; these are of one batch, in which every
    round runs every model. The intervals of the differences in mAP are paired bootstraps over the images.

    Args:
        bench: of the study.
        study: with a complete base; models whose files are gone are left out.
        say: takes one line at a time.
        seed: of the bootstrap.

    Raises:
        InputError: the study has no base yet.
    """
    base = base_number(study)
    if base is None:
        raise InputError("study", study.name, "has no base yet; let the search run until its first trial")
    wanted = sorted({base, *chosen_numbers(study)})
    there = [n for n in wanted if model_in(study.trial_folder(n)).is_file()]
    if base not in there:
        raise InputError("base model", str(model_in(study.trial_folder(base))), "is gone")
    say(f"measuring the {len(there)} models of the front again, together")
    with bench.slot.computing():
        sessions = {n: _session(bench, study, n) for n in there}
        benches = {n: bench.at(_card(study, n).recipe) for n in there}
        inputs = {str(n): benches[n].timing_inputs for n in there}
        reference = _session(bench, study, base)
    seconds = min(_SECONDS_A_MODEL * (len(there) + 1), _SECONDS_AT_MOST)
    named = {str(n): session for n, session in sessions.items()}
    paired = time_together(bench, named, reference, seconds, images_of=inputs)
    split = bench.split("report")
    say(f"scoring them on report ({len(split.images)} images of {split.origin})")
    figures: dict[int, dict[str, float]] = {}
    detections: dict[int, dict[int, Detections]] = {}
    for n, session in sessions.items():
        figures[n], detections[n] = benches[n].scored(session, split)
    models: dict[str, dict[str, Any]] = {}
    for n in there:
        difference = map_difference_interval(split, detections[n], detections[base], seed=seed)
        models[str(n)] = {
            "map": figures[n]["map"],
            "map_50": figures[n]["map_50"],
            "map_difference": [round(value, 3) for value in difference],
            "ratio": paired[str(n)].ratio,
            "low": paired[str(n)].low,
            "high": paired[str(n)].high,
            "base_ms": paired[str(n)].base_ms.p50,
            "stable": paired[str(n)].stable,
        }
        _write_into_card(study, n, models[str(n)], str(split.source))
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    study.optuna.set_user_attr(FINAL, {"date": date, "split": str(split.source), "models": models})


def _session(bench: Bench, study: SearchStudy, number: int) -> Session:
    model = model_in(study.trial_folder(number))
    return bench.target.prepare(model, bench.config.threads, _card(study, number).runtime.hint)


def _card(study: SearchStudy, number: int) -> ModelCard:
    return ModelCard.beside(model_in(study.trial_folder(number)))


def _write_into_card(study: SearchStudy, number: int, figures: dict[str, Any], split: str) -> None:
    """Put the figures beside those of the trial into `model.json`."""
    file = study.trial_folder(number) / CARD_FILE
    card = json.loads(file.read_text())
    card["figures"]["measured_again"] = {**figures, "split": split}
    with whole_file(file) as draft:
        draft.write_text(json.dumps(card, indent=1))
