"""Rungs of a trial on a worker, without Ray: figures on the way, and going on after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluators.evaluation import Evaluation
from evaluators.finetune import FineTunePlan
from evaluators.jobs import Job, StageReport
from evaluators.pipeline import CandidateWorker
from evaluators.rungs import CHECKPOINT
from spaces.apply import rebuild, same_state
from spaces.recipe import Prune, Quantize, Recipe

PLAN = FineTunePlan(epochs=3, batch_size=5, mirror=True)


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker(finetune=PLAN)


@pytest.fixture(scope="module")
def recipe(worker: CandidateWorker) -> Recipe:
    sites = worker.bench.sites
    pruned = [name for name in sites.channel if "dark5" in name or name.startswith("head")]
    choices = [Prune(site=name, sparsity=0.5) for name in pruned]
    choices += [Quantize(site=name, weight_bits=8, activation_bits=8) for name in list(sites.layer)[::3]]
    return Recipe(detector="yolox_digits", choices=tuple(choices))


def job(recipe: Recipe, number: int, rungs: list[int]) -> Job:
    return Job(
        kind="trial", name=f"trial {number}", number=number, recipe=recipe, seed=5, payload={"rungs": rungs}
    )


@pytest.fixture(scope="module")
def straight(worker: CandidateWorker, recipe: Recipe) -> Evaluation:
    """Trial 1, which has no rungs."""
    *_, last = worker.run(job(recipe, 1, []))
    return Evaluation.model_validate(last.result)


def state_of(worker: CandidateWorker, number: int) -> dict[str, object]:
    folder = worker.artifacts / f"trial-{number:05d}"
    return rebuild(worker.bench.detector.build(), folder)[1].network.state_dict()  # type: ignore[return-value]


def names(reports: list[StageReport]) -> list[str]:
    return [report.stage for report in reports]


def test_rungs_are_reported_and_change_nothing(
    worker: CandidateWorker, recipe: Recipe, straight: Evaluation
) -> None:
    reports = list(worker.run(job(recipe, 2, [0, 2, 3, 9])))  # the last epoch is no rung, there is no ninth
    assert names(reports) == [
        "compress",
        "rung 0",
        "teacher",
        "fine-tune 1/3",
        "fine-tune 2/3",
        "rung 2",
        "fine-tune 3/3",
        "export",
        "score",
        "latency",
        "done",
    ]
    one_shot, short = (report.rung for report in reports if report.rung)
    assert (one_shot.epochs, short.epochs) == (0, 2)
    evaluation = Evaluation.model_validate(reports[-1].result)
    for rung in (one_shot, short):
        for name in ("params", "macs"):
            assert rung.figures[name] == evaluation.metrics[name].value
        assert rung.figures["size_mb"] == pytest.approx(evaluation.metrics["size_mb"].value, rel=0.01)
    assert one_shot.figures["map"] < short.figures["map"], "training repairs"
    assert evaluation.metrics["map"].value == straight.metrics["map"].value
    assert same_state(state_of(worker, 1), state_of(worker, 2))  # type: ignore[arg-type]
    folder = worker.artifacts / "trial-00002"
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.json",
        "model.onnx",
        "recipe.json",
        "state.safetensors",
    ]


def interrupted(worker: CandidateWorker, asked: Job, stage: str) -> StageReport:
    """Run a job up to the report of a stage, and drop it there."""
    steps = worker.run(asked)
    report = next(report for report in steps if report.stage == stage)
    steps.close()  # type: ignore[attr-defined]
    return report


@pytest.mark.parametrize(("stage", "left"), [("rung 0", 0), ("fine-tune 2/3", 1), ("rung 1", 1)])
def test_an_interrupted_trial_goes_on_after_its_last_rung(
    stage: str, left: int, worker: CandidateWorker, recipe: Recipe, straight: Evaluation
) -> None:
    asked = job(recipe, 3, [0, 1])
    before = interrupted(worker, asked, stage)
    again = list(worker.run(asked))
    assert names(again)[:3] == ["compress", f"go on after rung {left}", "teacher"]
    assert names(again)[3] == f"fine-tune {left + 1}/3"
    assert again[1].rung is not None
    assert again[1].rung.epochs == left
    assert before.rung in (None, again[1].rung), "the rung says what it said before"
    assert Evaluation.model_validate(again[-1].result).metrics["map"].value == straight.metrics["map"].value
    assert same_state(state_of(worker, 1), state_of(worker, 3))  # type: ignore[arg-type]


def test_a_checkpoint_of_something_else_is_not_used(worker: CandidateWorker, recipe: Recipe) -> None:
    interrupted(worker, job(recipe, 4, [1]), "rung 1")
    assert interrupted(worker, job(recipe, 4, []), "teacher").next_stage == "fine-tune 2/3", "rungs or not"
    other = job(recipe, 4, [1]).model_copy(update={"seed": 6})
    assert interrupted(worker, other, "teacher").next_stage == "fine-tune 1/3"
    file: Path = worker.artifacts / "trial-00004" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    assert interrupted(worker, job(recipe, 4, [1]), "teacher").next_stage == "fine-tune 1/3"


def test_what_is_not_trained_has_no_rungs(worker: CandidateWorker) -> None:
    sites = worker.bench.sites
    choices = tuple(Quantize(site=name, weight_bits=8, activation_bits=8) for name in list(sites.layer)[:4])
    recipe = Recipe(detector="yolox_digits", choices=choices)
    assert all(report.rung is None for report in worker.run(job(recipe, 5, [0, 1])))
