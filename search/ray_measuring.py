"""A cluster of unlike machines: which of them measure, and how the others have it done there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evaluators.jobs import HANDED_ON, Job, StageReport, Worker
from search.workers import Pool, one_line
from spaces.errors import InputError

MEASURING = "measure on a machine of the study's kind"


class MeasuringWorker:
    """An actor on a machine that measures, for the jobs of machines that don't.

    It reserves no CPU: what it times it times in the quiet slot of its machine, as the workers there do.
    """

    def __init__(self, pickled_factory: bytes, path: list[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        self._worker: Worker = cloudpickle.loads(pickled_factory)()

    def run(self, job: str) -> str:
        """Do a job (JSON): its last report, or `{"failed": stage, "reason": ...}`."""
        doing = "take over"
        try:
            for report in self._worker.run(Job.model_validate_json(job)):
                if report.result is not None:
                    return report.model_dump_json()
                doing = report.doing
        except Exception as error:
            return json.dumps({"failed": doing, "reason": one_line(error)})
        return json.dumps({"failed": doing, "reason": "the worker ended without a result"})


def measuring_workers(pool: Pool, pickled_factory: bytes, path: list[str]) -> list[Any]:
    """Actors on every node that has the study's target signature; none where all nodes have it.

    Raises:
        InputError: no node has it.
    """
    if pool.signature is None or pool.signature_here is None:
        return []
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    asked = {node: _on(node, ray.remote(pool.signature_here)).remote() for node in nodes}
    found = {node: dict(ray.get(reply)) for node, reply in asked.items()}
    measuring = [node for node, signature in found.items() if signature == dict(pool.signature)]
    if not measuring:
        from search.study import differences_of  # brings Optuna, which workers do without

        differing = sorted(
            {line for signature in found.values() for line in differences_of(pool.signature, signature)}
        )
        remedy = f"no machine of the cluster has the study's target signature ({'; '.join(differing)})"
        raise InputError("address", pool.address, remedy)
    if len(measuring) == len(nodes):
        return []
    return [_on(node, ray.remote(MeasuringWorker)).remote(pickled_factory, path) for node in measuring]


def end_measuring(workers: list[Any]) -> None:
    """Let the actors go; where they measure, they are killed in it."""
    for worker in workers:
        ray.kill(worker, no_restart=True)


def measured_elsewhere(job: Job, handed: Mapping[str, Any], worker: Any) -> Iterator[StageReport]:
    """The rest of a job that was handed on, as the reports of whoever has it.

    Args:
        job: as it was given out.
        handed: what its first half leaves to the second.
        worker: a `MeasuringWorker`.

    Raises:
        RuntimeError: it failed there; the message begins with the stage.
    """
    kind = "measure" if job.kind == "trial" else job.kind
    rest = job.model_copy(update={"kind": kind, "payload": {**job.payload, HANDED_ON: dict(handed)}})
    yield StageReport(stage="handed on", next_stage=MEASURING)
    reply = json.loads(ray.get(worker.run.remote(rest.model_dump_json())))
    if "failed" in reply:
        raise RuntimeError(f"{reply['failed']}: {reply['reason']}")
    yield StageReport.model_validate(reply)


def _on(node: str, remote: Any) -> Any:
    """A remote function or class bound to a node, without reserving anything of it."""
    return remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
