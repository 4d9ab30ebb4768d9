"""The front measured again: all its models in one batch, and scored on report, which nothing else touches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.exported import CARD_FILE, ModelCard, model_in
from evaluators.targets.base import Detections, Session
from evaluators.together import time_together
from search.chosen import chosen_numbers
from search.files import whole_file
from search.front import FINAL
from search.judge import base_number
from search.study import SearchStudy
from spaces.errors import InputError

_SECONDS_A_MODEL = 3.0
_SECONDS_AT_MOST = 60.0


def is_measured(study: SearchStudy) -> bool:
    """True where the models of the front as it is now, those that are there, were measured again already."""
    models = study.optuna.user_attrs.get(FINAL, {}).get("models", {})
    return {str(number) for number in chosen_numbers(study) if _is_there(study, number)} <= set(models)


def measure_front(bench: Bench, study: SearchStudy, say: Callable[[str], None], seed: int = 0) -> None:
    """Time the models of the front together and score them on report; the study keeps the results.

    Ratios of different trials were taken minutes or days apart; these are of one batch, in which every
    round runs every model. The intervals of the differences in mAP are paired bootstraps over the images.

    Args:
        bench: of the study.
        study: with a complete base; models whose files are gone, or go meanwhile, are left out.
        say: takes one line at a time.
        seed: of the bootstrap.

    Raises:
        InputError: the study has no base yet, or its model is gone.
    """
    base = base_number(study)
    if base is None:
        raise InputError("study", study.name, "has no base yet; let the search run until its first trial")
    wanted = sorted({base, *chosen_numbers(study)})
    there = [n for n in wanted if _is_there(study, n)]
    say(f"measuring the {len(there)} models of the front again, together")
    with bench.slot.computing():
        loaded = {n: found for n in there if (found := _loaded(bench, study, n)) is not None}
        benches = {n: bench.at(card.recipe) for n, (card, _) in loaded.items()}
        inputs = {str(n): benches[n].timing_inputs for n in loaded}
        again = _loaded(bench, study, base)
    if again is None or base not in loaded:
        raise InputError("base model", str(model_in(study.trial_folder(base))), "is gone")
    seconds = min(_SECONDS_A_MODEL * (len(loaded) + 1), _SECONDS_AT_MOST)
    named = {str(n): session for n, (_, session) in loaded.items()}
    paired = time_together(bench, named, again[1], seconds, images_of=inputs)
    split = bench.split("report")
    say(f"scoring them on report ({len(split.images)} images of {split.origin})")
    figures: dict[int, dict[str, float]] = {}
    detections: dict[int, dict[int, Detections]] = {}
    for n, (_, session) in loaded.items():
        figures[n], detections[n] = benches[n].scored(session, split)
    models: dict[str, dict[str, Any]] = {}
    for n in loaded:
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
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    study.optuna.set_user_attr(FINAL, {"date": date, "split": str(split.source), "models": models})
    for n in loaded:
        with suppress(FileNotFoundError):  # gone since it was loaded
            _write_into_card(study, n, models[str(n)], str(split.source))


def _is_there(study: SearchStudy, number: int) -> bool:
    model = model_in(study.trial_folder(number))
    return model.is_file() and model.with_name(CARD_FILE).is_file()


def _loaded(bench: Bench, study: SearchStudy, number: int) -> tuple[ModelCard, Session] | None:
    """A model and its card; None where another driver's `retain` has just removed them."""
    model = model_in(study.trial_folder(number))
    try:
        card = ModelCard.beside(model)
        return card, bench.target.prepare(model, bench.config.threads, card.runtime.hint)
    except InputError:
        if _is_there(study, number):
            raise
        return None


def _write_into_card(study: SearchStudy, number: int, figures: dict[str, Any], split: str) -> None:
    """Put the figures beside those of the trial into `model.json`."""
    file = study.trial_folder(number) / CARD_FILE
    card = json.loads(file.read_text())
    card["figures"]["measured_again"] = {**figures, "split": split}
    with whole_file(file) as draft:
        draft.write_text(json.dumps(card, indent=1))
