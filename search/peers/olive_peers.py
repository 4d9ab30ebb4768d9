"""Microsoft's Olive, where it is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from evaluators.bench import Bench
from evaluators.graph import INPUT, SCOPE
from search.peers.models import PeerModel, installed
from search.peers.onnxruntime_peers import CALIBRATION_IMAGES
from search.peers.reduced import Reduced, with_smallest

_IMAGES, _NOTHING = "paredown_images", "paredown_nothing"


def olive_peers(bench: Bench, base: Path, directory: Path, reduced: Reduced) -> list[PeerModel]:
    """The base through Olive's `OnnxStaticQuantization`, around all of the network and convolutions alone.

    It is ONNX Runtime's quantisation with Olive's own preparation of the graph. At the smallest input, too.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where the files go.
        reduced: of `reduced_inputs`.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    installed("olive", "olive-ai")
    return with_smallest(_quantised, bench, base, directory, reduced)


def _quantised(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    peers = []
    for name, kinds in (("Olive QDQ", None), ("Olive QDQ, conv only", ["Conv"])):
        file = directory / f"{name.replace(' ', '_').replace(',', '')}.onnx"
        if not file.exists():
            _quantise(bench, base, file, kinds)
        peers.append(PeerModel(name, file, "onnxruntime"))
    return peers


def _quantise(bench: Bench, base: Path, file: Path, kinds: list[str] | None) -> None:
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    inputs = bench.inputs(bench.fit, CALIBRATION_IMAGES)

    def images(dataset: Any, **_: Any) -> list[Any]:
        return [({INPUT: image}, 0) for image in inputs]

    def nothing(**_: Any) -> list[Any]:
        return []

    Registry.register_dataloader(_IMAGES)(images)
    Registry.register_dataset(_NOTHING)(nothing)
    data = DataConfig(
        name="fit",
        load_dataset_config=DataComponentConfig(type=_NOTHING),
        dataloader_config=DataComponentConfig(type=_IMAGES),
    )
    settings = {
        "data_config": data,
        "per_channel": True,
        "activation_type": "uint8",
        "op_types_to_quantize": kinds,
        "nodes_to_exclude": [n.name for n in onnx.load(base).graph.node if not n.name.startswith(SCOPE)],
    }
    chosen = create_pass_from_dict(OnnxStaticQuantization, settings, disable_search=True)
    made = chosen.run(ONNXModelHandler(str(base)), str(file.with_suffix("")))
    Path(made.model_path).rename(file)
