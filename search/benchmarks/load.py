"""Processes that train as workers of a study do, to measure beside."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig
from evaluators.finetune import fine_tune
from evaluators.quiet import QuietSlot
from spaces.apply import apply
from spaces.errors import InputError
from spaces.layers import learning

READY_WITHIN_S = 600.0


@contextmanager
def training(config: BenchConfig, workers: int, slot: Path) -> Iterator[None]:
    """Inside, `workers` processes fine-tune the base again and again.

    Args:
        config: of the bench; the base's outputs on fit should be in its cache already.
        workers: number of processes, each with the bench's number of threads.
        slot: directory of the quiet slot that the training steps heed.

    Raises:
        InputError: a process ended before it trained.
    """
    context = multiprocessing.get_context("spawn")
    ready = [context.Event() for _ in range(workers)]
    processes = [
        context.Process(target=_train, args=(config, slot, event, seed), daemon=True)
        for seed, event in enumerate(ready)
    ]
    try:
        for process in processes:
            process.start()
        for process, event in zip(processes, ready, strict=True):
            _await(process, event)
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _await(process: multiprocessing.process.BaseProcess, event: Event) -> None:
    waited = 0.0
    while not event.wait(1.0):
        waited += 1.0
        if not process.is_alive() or waited > READY_WITHIN_S:
            raise InputError("workers", process.exitcode, "a training process did not start; see above")


def _train(config: BenchConfig, slot: Path, ready: Event, seed: int) -> None:
    bench = Bench(config, QuietSlot(slot))
    draft = apply(bench.base, bench.identity, bench.sites)
    learning(draft.network, bench.frozen)
    teacher, images = bench.teacher, bench.fit
    ready.set()
    while True:
        plan = config.finetune.model_copy(update={"epochs": max(config.finetune.epochs, 1)})
        for _ in fine_tune(draft.network, bench.detector, images, teacher, plan, bench.slot, seed):
            pass
