"""A Ray cluster of two unlike machines on this one, and jobs on it. Prints what became of them as JSON.

Run as a program: a process has one Ray, and that of the tests may be running already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MACHINE = "PAREDOWN_TEST_MACHINE"


def machine() -> dict[str, str]:
    """A target signature."""
    return {"cpu": os.environ.get(MACHINE, "driver")}


class Measured:
    """Trains everywhere, measures on machine `a` alone."""

    def run(self, job: Any) -> Iterator[Any]:
        from evaluators.jobs import HANDED_ON, StageReport

        here = machine()["cpu"]
        if job.kind == "trial":
            time.sleep(1.0)  # long enough for the other worker to be up
        yield StageReport(stage="train", next_stage="measure")
        if job.kind == "measure":
            if job.payload.get("trouble"):
                yield StageReport(stage="take over", next_stage="export")
                raise ValueError("no such layer")
            result = {"trained": job.payload[HANDED_ON]["trained"], "measured": here}
        elif here == "a":
            result = {"trained": here, "measured": here}
        else:
            result = {HANDED_ON: {"trained": here}}
        yield StageReport(stage="measure", result=result)


class Jobs:
    """A source over a list of jobs."""

    def __init__(self, jobs: list[Any]) -> None:
        self.waiting, self.live = deque(jobs), 0
        self.ended: dict[str, Any] = {}

    def next_job(self) -> Any:
        from search.workers import FINISHED

        if not self.waiting:
            return None if self.live else FINISHED
        self.live += 1
        return self.waiting.popleft()

    def started(self, job: Any, worker: int) -> None:
        pass

    def progress(self, job: Any, report: Any) -> None:
        pass

    def done(self, job: Any, result: Any) -> None:
        self.live -= 1
        self.ended[job.name] = result

    def failed(self, job: Any, stage: str, reason: str, traceback: str) -> None:
        self.live -= 1
        self.ended[job.name] = [stage, reason]

    def interrupted(self, job: Any, stage: str) -> None:
        raise AssertionError(job.name)

    def tick(self) -> None:
        pass


def main(wanted: str) -> None:
    """Six jobs where latencies count under the signature of machine `wanted`; the last one is in trouble."""
    import fake_cluster
    from ray.cluster_utils import Cluster

    from evaluators.jobs import Job
    from search.workers import Pool, run_jobs
    from spaces.errors import InputError

    cluster = Cluster()
    for name in "ab":
        cluster.add_node(num_cpus=1, env_vars={MACHINE: name}, include_dashboard=False)
    cluster.wait_for_nodes()
    jobs = [Job(kind="trial", name=f"trial {k}", number=k) for k in range(6)]
    jobs.append(Job(kind="trial", name="trouble", number=6, payload={"trouble": True}))
    source = Jobs(jobs)
    pool = Pool(
        workers=2,
        address=cluster.address,
        signature={"cpu": wanted},
        signature_here=fake_cluster.machine,
        environment={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        run_jobs(source, fake_cluster.Measured, pool)
        print(json.dumps(source.ended))
    except InputError as error:
        print(json.dumps({"refused": str(error)}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
    main(sys.argv[1])
