"""A bench: everything that candidates of one study share, loaded once in each worker process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.accuracy import score_session
from evaluators.bench_config import BenchConfig
from evaluators.bias import BIAS_IMAGES, correct_biases
from evaluators.calibration import LayerRanges, calibrate
from evaluators.datasets.base import DetectionSplit, load_split, load_splits
from evaluators.datasets.letterbox import LetterboxedImages, network_input, spread
from evaluators.evaluation import RESULT_VERSION
from evaluators.exported import ModelCard, Runtime, card_categories
from evaluators.gates import mean_gates
from evaluators.importance import batchnorm_scores, taylor_scores
from evaluators.latency import PairedLatency, measure_pair
from evaluators.postprocess import WholeDetector
from evaluators.quiet import QuietSlot
from evaluators.signature import int8_weight_levels
from evaluators.targets.base import Detections, Session
from evaluators.targets.registry import target_named
from evaluators.teacher import TeacherOutputs
from spaces.detectors.base import Detector, postprocess_of
from spaces.detectors.folding import by_module
from spaces.detectors.own import built
from spaces.detectors.registry import licence_of, make_detector
from spaces.detectors.weights import load_weights
from spaces.effects import codebooks_by_layer, integers_by_layer
from spaces.inputs import Size
from spaces.layers import frozen_parameters
from spaces.methods.codebook import cluster_layers
from spaces.methods.resize import Resizing
from spaces.methods.topk import PreNmsTopK
from spaces.recipe import Gate, Prune, Recipe, Resize, TopK, identity
from spaces.sites import Sites, find_sites
from spaces.space import MAX_PARAMETERS, SearchSpace, build_space


class Bench:
    """Detector, base network, data, space and target of a study.

    Raises:
        InputError: anything of the configuration that cannot be used.
    """

    def __init__(self, config: BenchConfig, slot: QuietSlot | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.slot = slot or QuietSlot()
        self.target = target_named(config.target)
        self.capabilities = self.target.capabilities  # asked first: the machine may lack the engine
        self.splits = load_splits(config.data)
        self.categories = self.splits["fit"].categories
        self.detector: Detector = self.detector_at(config.size)
        self.postprocess = postprocess_of(self.detector, config.postprocess)
        self.base: nn.Module = built(config.model, self.detector)
        load_weights(self.base, config.checkpoint, self.detector, self.categories)
        self.frozen = frozen_parameters(self.base)
        self.base.eval().requires_grad_(False)
        self._resized: dict[Size, Bench] = {}

    def detector_at(self, size: Size | None) -> Detector:
        """The detector at another size of its input."""
        return make_detector(self.config.model, len(self.categories), size)

    def at(self, recipe: Recipe) -> Bench:
        """The bench at the input size of a recipe, made on first use; this one where it keeps the study's.

        Raises:
            InputError: a size that is not on offer.
        """
        for choice in recipe.of_kind(Resize).values():
            Resizing().check(choice, self.sites)
            if choice.size not in self._resized:
                from evaluators.resized import ResizedBench  # derives from this class

                self._resized[choice.size] = ResizedBench(self, choice.size)
            return self._resized[choice.size]
        return self

    @cached_property
    def sites(self) -> Sites:
        """Sites on the base graph; layers share bit-widths where the space would grow too large."""
        methods = self.config.space.methods
        resized = self.detector_at if Resizing.kind in methods else None
        topk = self.postprocess.pre_nms_topk if PreNmsTopK.kind in methods else None
        return find_sites(self.detector, self.base, MAX_PARAMETERS, resized, topk)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space under the target's capabilities."""
        space = self.config.space
        wanted = (space.methods, space.granularity, space.bit_widths)
        return build_space(self.detector, self.sites, self.capabilities, *wanted)

    @property
    def identity(self) -> Recipe:
        """The recipe of the base model."""
        return identity(self.detector.name)

    def split(self, name: str) -> DetectionSplit:
        """A split by role, or by the name of an annotations file."""
        return self.splits[name] if name in self.splits else load_split(self.config.data, name)

    def images(self, split: DetectionSplit) -> LetterboxedImages:
        """The letterboxed images of a split, memory-mapped; made on first use."""
        look, cache = self.detector.preprocess, self.config.cache
        return LetterboxedImages.build(split, look.size, look.pad_value, cache, fit=look.fit)

    @cached_property
    def fit(self) -> LetterboxedImages:
        """Images that train and calibrate."""
        return self.images(self.splits["fit"])

    @cached_property
    def select(self) -> LetterboxedImages:
        """Images that the search looks at."""
        return self.images(self.splits["select"])

    def inputs(self, images: LetterboxedImages, count: int) -> list[NDArray[np.float32]]:
        """`count` network inputs `(1, 3, H, W)`, evenly spread over the images."""
        picked = spread(len(images), count)
        return [network_input(images.pixels[k : k + 1], self.detector.preprocess) for k in picked]

    def batch(self, images: LetterboxedImages, count: int) -> Tensor:
        """The same as one batch `(count, 3, H, W)`."""
        return torch.cat([torch.from_numpy(image) for image in self.inputs(images, count)])

    @cached_property
    def timing_inputs(self) -> list[NDArray[np.float32]]:
        """Images to time on: a blank one, the most crowded one, one with a single object, and others.

        Non-maximum suppression takes longer the more boxes there are, so their number must vary.
        """
        count = self.config.latency.images
        boxes = np.array([len(self.select.labels(k).boxes) for k in range(len(self.select))])
        special = [int(boxes.argmax()), int(np.abs(boxes - 1).argmin())]
        inputs = self.inputs(self.select, max(count - 3, 1))
        inputs += [network_input(self.select.pixels[k : k + 1], self.detector.preprocess) for k in special]
        blank = np.full_like(self.select.pixels[:1], self.detector.preprocess.pad_value)
        return [*inputs, network_input(blank, self.detector.preprocess)][-count:]

    @property
    def base_timing_inputs(self) -> list[NDArray[np.float32]]:
        """The same images as the base takes them."""
        return self.timing_inputs

    def timed(self, session: Session, base: Session) -> PairedLatency:
        """Time a session against the base while no other worker of this machine computes."""
        settings = self.config.latency
        with self.slot.computing():
            inputs, base_inputs = self.timing_inputs, self.base_timing_inputs
        with self.slot.quiet():
            return measure_pair(
                session,
                base,
                base_inputs,
                candidate_images=inputs,
                threads=self.config.threads,
                min_rounds=settings.min_rounds,
                max_rounds=settings.max_rounds,
                target_spread=settings.target_spread,
                time_limit_s=settings.time_limit_s,
            )

    def scored(
        self, session: Session, split: DetectionSplit | None = None
    ) -> tuple[dict[str, float], dict[int, Detections]]:
        """COCO figures and detections of a session on a split, by default on select; see `score_session`."""
        with self.slot.computing():
            images = self.select if split is None else self.images(split)
            return score_session(session, split or self.splits["select"], images, self.detector.preprocess)

    @cached_property
    def teacher(self) -> TeacherOutputs:
        """The base's outputs on fit."""
        return TeacherOutputs(
            self.base,
            self.detector,
            self.fit,
            self.config.cache,
            f"{self.weights_hash}-{self.splits['fit'].fingerprint()[:12]}-{self._sides}",
            self.config.finetune.mirror,
            self.slot,
        )

    @property
    def _sides(self) -> str:
        """Of the input: one of a square, else height and width."""
        look = self.detector.preprocess
        return "x".join(map(str, dict.fromkeys(look.size))) + ("-stretch" if look.fit == "stretch" else "")

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """Importance of channels; empty for magnitude."""
        match self.config.importance:
            case "magnitude":
                return {}
            case "batchnorm":
                return batchnorm_scores(self.base)
            case "taylor":
                return taylor_scores(self.base, self.detector, self.fit, self.slot)

    def statistics_for(self, recipe: Recipe) -> dict[str, Tensor]:
        """`statistics` where the recipe prunes, mean gates where it fixes some; each costs a pass."""
        importance = self.statistics if recipe.of_kind(Prune) else {}
        return importance | (self._gates if recipe.of_kind(Gate) else {})

    @cached_property
    def _gates(self) -> dict[str, Tensor]:
        return mean_gates(self.base, self.detector, self.fit, self.slot, list(self.sites.gate))

    @cached_property
    def weights_hash(self) -> str:
        """12 hex digits of the base's weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.base.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def ranges(
        self, network: nn.Module, layers: Sequence[str] | Mapping[str, tuple[int, int]]
    ) -> dict[str, LayerRanges]:
        """Calibrated ranges of the layers of a network that is ready for export."""
        if not layers:
            return {}
        return self._calibrated(self.detector.simplified(network), layers)

    def _calibrated(
        self, simplified: nn.Module, layers: Sequence[str] | Mapping[str, tuple[int, int]]
    ) -> dict[str, LayerRanges]:
        config, inputs = self.config, self.inputs(self.fit, self.config.calibration_images)
        return calibrate(simplified, layers, inputs, config.seed, config.quantization, self.capabilities)

    def export(
        self,
        network: nn.Module,
        bits: dict[str, int],
        recipe: Recipe,
        directory: Path,
        learned: Mapping[str, Any] | None = None,
    ) -> tuple[Path, ModelCard]:
        """Write the deployable pair of a network.

        Args:
            network: trained, not yet simplified.
            bits: by layer of the base, for all factors of it; layers that are missing are float32.
            recipe: for the card.
            directory: where the pair goes.
            learned: of a draft that rounded in training: ranges and scales of the layers that did.
        """
        whole, ranges = self.whole(network, recipe), dict[str, LayerRanges]()
        widths = by_module(network, whole.network, dict.fromkeys(self.sites.facts, 32) | bits)
        asked = by_module(network, whole.network, integers_by_layer(recipe, self.sites))
        books = by_module(network, whole.network, codebooks_by_layer(recipe, self.sites))
        narrow = {layer: asked.get(layer, (8, 8)) for layer, width in widths.items() if width <= 8}
        widths |= {layer: self.capabilities.runs_at(widths[layer]) for layer in narrow}
        cluster_layers(whole.network, books)
        if narrow:
            known = learned or {}
            others = {layer: asked_for for layer, asked_for in narrow.items() if layer not in known}
            ranges = self._calibrated(whole.network, others) if others else {}
            ranges |= {layer: LayerRanges.from_plain(known[layer]) for layer in narrow if layer in known}
            if not known and self.config.quantization.bias_correction:
                images = self.batch(self.fit, min(self.config.calibration_images, BIAS_IMAGES))
                correct_biases(whole.network, ranges, images, int8_weight_levels())
        written = self.target.write(whole, widths, ranges, directory)
        card = ModelCard(
            detector=self.detector.name,
            preprocess=self.detector.preprocess,
            postprocess=whole.postprocess,
            categories=card_categories(self.categories),
            runtime=self.runtime(written.hint),
            recipe=recipe,
            packed=dict(written.packed),
            licence=licence_of(self.detector.name),
        )
        card.write(directory)
        return written.model, card

    def whole(self, network: nn.Module, recipe: Recipe | None = None) -> WholeDetector:
        """A network made ready for inference, with its decoding and a recipe's suppression."""
        simplified, rules = self.detector.simplified(network), self.postprocess
        for choice in recipe.of_kind(TopK).values() if recipe else ():
            rules = rules.model_copy(update={"pre_nms_topk": min(choice.count, rules.pre_nms_topk)})
        return WholeDetector(simplified, self.detector, rules, self.categories).eval()

    def runtime(self, hint: str) -> Runtime:
        """This study's engine, threads and settings, as a card says them."""
        version = str(self.target.signature(self.config.threads)["engine"]).rsplit(" ", 1)[1]
        config = {"INFERENCE_PRECISION_HINT": hint} if self.target.name == "openvino" else {}
        return Runtime(engine=self.target.name, version=version, threads=self.config.threads, config=config)

    def base_model(self, directory: Path) -> Path:
        """The base in float32, exported once a study: what everything is timed against."""
        model = directory / self.target.model_file
        if not model.exists():
            self.export(self.base, {}, self.identity, directory)
        return model

    def fingerprint(self) -> dict[str, Any]:
        """What figures of this bench depend on; results under another one are not comparable."""
        config, look = self.config, self.detector.preprocess
        widths = config.space.bit_widths or self.capabilities.bit_widths
        return {
            "detector": self.detector.name,
            "input size": "x".join(map(str, look.size)) + (" stretched" if look.fit == "stretch" else ""),
            "base weights": self.weights_hash,
            **({"preprocess": look.model_dump_json()} if ":" in config.model else {}),
            **{f"data {role}": split.fingerprint()[:12] for role, split in self.splits.items()},
            "space": ", ".join(config.space.methods)
            + f" by {config.space.granularity} {self.space.summary()}"
            + (f" of {config.space.bit_widths} bits" if config.space.bit_widths else ""),
            "target": Path(config.target).name,  # a description may move; it is in the signature
            **{f"target {key}": str(v) for key, v in self.target.signature(config.threads).items()},
            "postprocess": self.postprocess.model_dump_json(),
            "fine-tuning": config.finetune.model_dump_json(exclude=config.finetune.without_effect(widths)),
            "fine-tuning runs in": config.finetune.runs_in,
            "quantisation": config.quantization.model_dump_json(),
            "importance": config.importance,
            "calibration images": config.calibration_images,
            "seed": config.seed,
            "result version": RESULT_VERSION,
        }
