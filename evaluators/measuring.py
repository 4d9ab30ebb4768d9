"""What a finished network is worth: exported, scored and timed as the file that will be served."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from evaluators.base_reference import BaseReference
from evaluators.bench import Bench
from evaluators.evaluation import Evaluation, Measurement
from evaluators.exported import ModelCard, model_in
from evaluators.jobs import StageReport
from evaluators.kernels import by_kind, fell_back, stored_and_run, unchosen, unseen
from evaluators.latency import PairedLatency
from evaluators.memory import peak_memory_mb
from evaluators.parity import ParityError, require_parity
from evaluators.postprocess import WholeDetector
from evaluators.stage_clock import StageClock
from evaluators.targets.base import Predicting, Session
from evaluators.tensor_time import tensor_share
from evaluators.torch_session import TorchSession
from spaces.apply import parameters, save
from spaces.detectors.folding import by_module
from spaces.effects import bits_by_layer, widths_by_layer
from spaces.layers import count_macs
from spaces.methods.base import Draft
from spaces.recipe import Recipe

BASE_FOLDER = "base"
FURTHER_FOLDER = "trained-further"
"""In it: the base trained by a candidate's budget."""
REFERENCE_FILE = "reference.json"
NOT_SIMPLIFIED = (
    "simplified() of the detector makes another network of the base, before it is exported (folded() takes a "
    "norm into the convolution registered right in front of it, which must be the one whose output it reads)"
)

Metrics = dict[str, Measurement]


class Measuring:
    """Exports, scores and times the networks of one bench.

    Args:
        bench: at the size of the recipe's input.
        artifacts: folder of the study's model files.
        base: the study's, which all are timed against and compared with.
    """

    def __init__(self, bench: Bench, artifacts: Path, base: BaseReference) -> None:
        self.bench, self.artifacts, self._base = bench, artifacts, base

    def stages(
        self,
        draft: Draft,
        recipe: Recipe,
        folder: Path,
        clock: StageClock,
        step_ms: Sequence[float],
        further: Callable[[Metrics], Iterator[StageReport]],
    ) -> Iterator[StageReport]:
        """From a network whose weights are final to its evaluation, which the last report carries.

        Args:
            draft: trained.
            recipe: that made it.
            folder: of the trial.
            clock: of the job.
            step_ms: times of its training steps; empty where it was not trained.
            further: what to do with the base's metrics before they are reported.
        """
        bench = self.bench
        card, session = self.exported(draft, recipe, folder)
        if recipe.is_identity:
            yield clock.ended("export", "compare with torch")
            with bench.slot.computing():
                self._compare_with_torch(session, draft, recipe)
            yield clock.ended("compare with torch", "score")
        else:
            yield clock.ended("export", "score")
        figures, found = bench.scored(session)
        difference = None if recipe.is_identity else self._base.difference(found)
        yield clock.ended("score", "wait for a quiet moment to time it")
        paired = bench.timed(session, self._base.session)
        share = tensor_share(bench, session, model_in(folder), card.runtime.hint)
        yield clock.ended("latency", "")
        metrics = self._metrics(draft, recipe, folder, figures, paired, share, step_ms, card.runtime.hint)
        if difference is not None and all(map(math.isfinite, difference)):
            value, low, high = difference
            metrics["map_difference"] = Measurement(
                value=value, unit="AP, candidate - base", low=low, high=high
            )
        with bench.slot.computing():  # the profile loads and runs the model once more
            kernels = session.kernels()
        simplified = bench.detector.simplified(draft.network)
        bits = by_module(draft.network, simplified, bits_by_layer(recipe, bench.sites))
        details = {
            "latency": paired.model_dump(mode="json"),
            **_kernels(kernels, bits, bench.capabilities.bit_widths),
            "unchosen": unchosen(bits, kernels, draft.network),
            "stored": stored_and_run(bits, card.packed, kernels),
            "layers": self._layers(recipe),
            "factors": {name: [plan.kind, *plan.ranks] for name, plan in draft.factors.items()},
        }
        if isinstance(session, Predicting):
            details["roofline"] = session.roofline.described()
        if recipe.is_identity:
            yield from further(metrics)
        evaluation = Evaluation(
            recipe_key=recipe.key,
            status="ok",
            metrics=metrics,
            split=bench.splits["select"].origin,
            artifact=str(model_in(folder)),
            environment=bench.target.signature(bench.config.threads) | {"hint": card.runtime.hint},
            details=details,
            seconds=clock.seconds,
        )
        shown = {name: m.value for name, m in metrics.items()} | {"split": bench.splits["select"].name}
        card.model_copy(update={"figures": shown}).write(folder)
        yield StageReport(stage="done", result=evaluation.model_dump(mode="json"))

    def exported(self, draft: Draft, recipe: Recipe, folder: Path) -> tuple[ModelCard, Session]:
        """The deployable pair in `folder`, with what rebuilds the network, loaded into the engine."""
        bench = self.bench
        with bench.slot.computing():
            bits = bits_by_layer(recipe, bench.sites)
            model, card = bench.export(draft.network, bits, recipe, folder, draft.learned)
            save(draft, recipe, folder)
            session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
        return card, session

    def _compare_with_torch(self, session: Session, draft: Draft, recipe: Recipe) -> None:
        """The file beside the network as it was trained: both the export and `Detector.simplified` are tried.

        Raises:
            ParityError: one of them does not compute what the network does; says which.
        """
        bench, images = self.bench, self.bench.timing_inputs
        # A copy, for the network itself is trained on later, in whatever mode it is now.
        whole = WholeDetector(deepcopy(draft.network), bench.detector, bench.postprocess, bench.categories)
        trained = TorchSession(whole)
        try:
            require_parity(session, trained, images)
        except ParityError:
            simple = TorchSession(bench.whole(draft.network, recipe))
            require_parity(simple, trained, images, NOT_SIMPLIFIED)
            raise

    def _metrics(
        self,
        draft: Draft,
        recipe: Recipe,
        folder: Path,
        figures: dict[str, float],
        paired: PairedLatency,
        share: float | None,
        step_ms: Sequence[float],
        hint: str,
    ) -> dict[str, Measurement]:
        reference = self._reference(paired, recipe)
        metrics = {
            name: Measurement(value=value, unit="AP, 0..100")
            for name, value in figures.items()
            if value == value
        }
        metrics |= {
            "latency_ratio": Measurement(
                value=paired.ratio, unit="candidate / base", low=paired.low, high=paired.high
            ),
            "latency_ms": Measurement(
                value=paired.ratio * reference,
                unit="ms",
                low=paired.low * reference,
                high=paired.high * reference,
            ),
            "size_mb": Measurement(value=model_in(folder).stat().st_size / 1e6, unit="MB"),
            "params": Measurement(value=parameters(draft.network), unit="parameters"),
            "macs": Measurement(value=self._macs(draft.network), unit="MACs"),
            "peak_memory_mb": Measurement(value=self._memory(model_in(folder), hint), unit="MB"),
        }
        if share is not None:
            tensor_ms = share * paired.ratio * reference
            metrics["tensor_ms"] = Measurement(value=tensor_ms, unit="ms, without decoding and suppression")
        if step_ms:
            metrics["train_step_ms"] = Measurement(value=sum(step_ms) / len(step_ms), unit="ms")
        return metrics

    def _macs(self, network: nn.Module) -> int:
        """Counted, for a spatial split takes fewer than the space says of a factorised layer."""
        with self.bench.slot.computing():
            return count_macs(network, self.bench.detector.preprocess.size)

    def _memory(self, model: Path, hint: str) -> float:
        bench = self.bench
        with bench.slot.computing():
            return peak_memory_mb(
                model, bench.target.name, bench.config.threads, hint, bench.detector.preprocess.size
            )

    def _layers(self, recipe: Recipe) -> dict[str, list[int]]:
        """Of each layer that lost channels: inputs and outputs kept, inputs and outputs removed."""
        sites = self.bench.sites
        widths = widths_by_layer(recipe, sites)
        found = {}
        for name, facts in sites.facts.items():
            inputs, outputs = widths[name]
            if (inputs, outputs) != (facts.inputs, facts.outputs):
                found[name] = [inputs, outputs, facts.inputs - inputs, facts.outputs - outputs]
        return found

    def _reference(self, paired: PairedLatency, recipe: Recipe) -> float:
        """The study's latency of the base, ms: what the base took when it was measured first."""
        file = self.artifacts / BASE_FOLDER / REFERENCE_FILE
        if not file.exists():
            if not recipe.is_identity:
                return paired.base_ms.p50
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"base_ms": paired.base_ms.p50}))
            temporary.replace(file)
        return float(json.loads(file.read_text())["base_ms"])


def _kernels(kernels: dict[str, str], bits: dict[str, int], native: Sequence[int]) -> dict[str, Any]:
    """Number of executed kernels by precision, and the layers that do not run as the recipe says."""
    return {
        "kernels": by_kind(kernels),
        "fell_back": fell_back(bits, kernels, native),
        "unseen": unseen(bits, kernels),
    }
