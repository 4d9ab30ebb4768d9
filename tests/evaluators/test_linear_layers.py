"""Linear layers over many positions, exported as products: their widths are in the file and are run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from evaluators.bias import correct_biases
from evaluators.calibration import LayerRanges, calibrate
from evaluators.export import export_whole
from evaluators.graph import layer_nodes, output_axis, scope_of, tensor_part
from evaluators.kernels import fell_back, unseen
from evaluators.packing import packed
from evaluators.parity import require_parity
from evaluators.postprocess import WholeDetector
from evaluators.qat import as_exported
from evaluators.rounding import round_layer, rounded_input
from evaluators.signature import int8_weight_levels
from evaluators.targets.analytic import few_levels
from evaluators.targets.base import Target
from evaluators.targets.onnx_target import OnnxTarget
from evaluators.targets.registry import target_named
from evaluators.testing import can_run
from evaluators.torch_session import TorchSession
from spaces.detectors.base import Category, Outputs, Postprocess
from spaces.layers import trace_layers
from spaces.methods.codebook import cluster_layers
from tests.spaces.toy import ToyDetector

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    """Channels last, the second layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Linear layers on `(N, L, C)`, `(N, H, W, C)` and `(N, C)`; equal weights, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.mlps = nn.ModuleDict({"a": Mlp(), "b": nn.Sequential(Mlp())})  # type: ignore[dict-item]
        self.gamma = nn.Parameter(torch.rand(32) + 0.5)
        self.first, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second = copy.deepcopy(self.first)
        self.gate, self.left, self.out = (
            nn.Linear(32, 32, bias=False),
            nn.Conv2d(32, 32, 1),
            nn.Conv2d(32, 4, 1),
        )
        self.right = copy.deepcopy(self.left)

    def forward(self, x: Tensor) -> Outputs:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.mlps["a"](self.norm(x)) * self.gamma
        gate = self.gate(x.mean((1, 2))).sigmoid()
        x = x.flatten(1, 2)
        x = x + self.mlps["b"](x)
        x = self.first(x) + self.second(x.tanh()) + self.shared(self.shared(x).relu())
        x = x * gate[:, None]
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        return (self.out(self.left(x) + self.right(x.relu())),)


class OfPositions(ToyDetector):
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Positions()

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        flat = outputs[0].flatten(2).transpose(1, 2)
        corner = flat[..., :2].sigmoid() * 8
        return torch.cat((corner, corner + 2), dim=2), flat[..., :1].sigmoid()

    def simplified(self, network: nn.Module) -> nn.Module:
        return copy.deepcopy(network).eval()


DETECTOR = OfPositions()


def whole_detector() -> WholeDetector:
    rules = Postprocess(score_threshold=0.0, nms_iou=1.0)
    return WholeDetector(DETECTOR.build().eval(), DETECTOR, rules, [Category(7, "thing")]).eval()


def layers() -> list[str]:
    return list(trace_layers(DETECTOR.build(), (16, 16)))


def on_target(name: str, width: int) -> OnnxTarget:
    target: Target = target_named(name)
    assert isinstance(target, OnnxTarget)
    if width not in target.capabilities.bit_widths or not can_run(width):
        pytest.skip(f"no kernels of {width} bits")
    return target


def calibrated(target: Target, network: nn.Module) -> dict[str, LayerRanges]:
    images = [image[None].numpy() for image in IMAGES]
    return calibrate(network, layers(), images, capabilities=target.capabilities)


def as_rounded(network: nn.Module, ranges: dict[str, LayerRanges], outputs_too: bool) -> NDArray[np.float32]:
    """Raw outputs of torch where every layer rounds, as training and bias correction have it."""
    rounded = copy.deepcopy(network)
    for name, spans in ranges.items():
        layer = rounded.get_submodule(name)
        round_layer(layer, spans, int8_weight_levels())
        if outputs_too:
            written = replace(spans, read=spans.written, by_channel=spans.written_by_channel)
            layer.register_forward_hook(lambda _, __, output, written=written: rounded_input(output, written))
    with torch.no_grad():
        return rounded(IMAGES[:1])[0].numpy()  # type: ignore[no-any-return]


def as_run(graph: onnx.ModelProto, engine: str) -> NDArray[np.float32]:
    """Raw outputs of a lowered graph: in an engine, or as typed."""
    cut = tensor_part(graph).SerializeToString()
    if engine == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = ov.Core().compile_model(ov.Core().read_model(cut), "CPU", settings)
        found: Sequence[NDArray[np.float32]] = list(compiled([IMAGES[:1].numpy()]).values())
    else:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if engine == "as typed":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(cut, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": IMAGES[:1].numpy()})
    return next(one for one in found if one.shape == (1, 4, 4, 4))


def stored(graph: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in graph.graph.initializer}


def test_every_layer_reads_a_weight_of_its_own() -> None:
    graph, network = export_whole(whole_detector()), DETECTOR.build()
    assert set(layer_nodes(graph).values()) == set(layers())
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for name in layers():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        turned = isinstance(network.get_submodule(name), nn.Linear)
        found = tensors[f"network.{name}.weight{'_t' if turned else ''}"]
        np.testing.assert_array_equal(found, (weight.T if turned else weight).detach().numpy())
    onnx.checker.check_model(graph, full_check=True)


def test_scopes_of_nodes() -> None:
    assert scope_of("/network/a/a.0/a.0.1/b/MatMul") == "a.0.1.b"
    assert scope_of("/network/Conv") == ""
    assert [output_axis(name) for name in ("network.a.weight_s8", "network.a.weight_t_s8")] == [0, 1]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_the_width_is_stored_and_run(engine: str, width: int, tmp_path: Path) -> None:
    target, whole = on_target(engine, width), whole_detector()
    ranges = calibrated(target, whole.network) if width == 8 else {}
    for wide in ([], ["stem"]):  # with a layer in float32 OpenVINO's types are in the file, else in the hint
        bits = dict.fromkeys(layers(), width) | dict.fromkeys(wide, 32)
        written = target.write(whole, bits, ranges, tmp_path)
        kinds = stored(onnx.load(written.model))
        for name in set(layers()) - {"stem"}:
            turned = "_t" if isinstance(whole.network.get_submodule(name), nn.Linear) else ""
            ending, kind = {32: ("", 1), 16: ("_bf16", TensorProto.BFLOAT16), 8: ("_s8", TensorProto.INT8)}[
                width
            ]
            assert kinds[f"network.{name}.weight{turned}{ending}"] == kind
            assert width == 32 or f"network.{name}.weight{turned}" not in kinds
        session = target.prepare(written.model, 1, written.hint)
        kernels = session.kernels()
        assert fell_back(bits, kernels, target.capabilities.bit_widths) == {}
        assert unseen(bits, kernels) == []
        if width == 32:
            require_parity(session, TorchSession(whole), [image[None].numpy() for image in IMAGES])


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_each_layer_runs_at_its_own_width(engine: str, tmp_path: Path) -> None:
    target, whole = on_target(engine, 8), whole_detector()
    widths = [width for width in target.capabilities.bit_widths if can_run(width)]
    for turn in range(len(widths)):
        bits = {name: widths[(k + turn) % len(widths)] for k, name in enumerate(layers())}
        written = target.write(whole, bits, calibrated(target, whole.network), tmp_path)
        kernels = target.prepare(written.model, 1, written.hint).kernels()
        assert fell_back(bits, kernels, target.capabilities.bit_widths) == {}
        assert unseen(bits, kernels) == []


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_int8_is_what_torch_makes_of_rounded_layers(engine: str) -> None:
    target, whole = on_target(engine, 8), whole_detector()
    outputs_too = target.capabilities.writes_integers
    ranges = calibrated(target, whole.network)
    correct_biases(whole.network, ranges, IMAGES, int8_weight_levels())
    ranges = as_exported(ranges, whole)
    graph = target.lower(export_whole(whole), dict.fromkeys(layers(), 8), ranges).graph
    with torch.no_grad():
        exact = whole.network(IMAGES[:1])[0].numpy()
    expected = as_rounded(whole.network, ranges, outputs_too)
    felt = np.abs(expected - exact).mean()
    assert felt > 1e-3, "rounding must be felt, or this shows nothing"
    assert np.abs(as_run(graph, "as typed") - expected).mean() < 0.01 * felt
    # A value at the border of two steps may fall on either side.
    assert np.abs(as_run(graph, engine) - expected).mean() < 0.25 * felt


def test_bfloat16_is_close_to_torch() -> None:
    target, whole = on_target("openvino", 16), whole_detector()
    graph = target.lower(export_whole(whole), dict.fromkeys(layers(), 16) | {"stem": 32}, {}).graph
    with torch.no_grad():
        exact = whole.network(IMAGES[:1])[0].numpy()
    off = np.abs(as_run(graph, "openvino") - exact).max()
    assert 2**-14 * np.abs(exact).max() < off < 2**-6 * np.abs(exact).max()


def test_few_levels_and_codebooks_go_by_output_channel() -> None:
    whole = whole_detector()
    linear = [name for name in layers() if isinstance(whole.network.get_submodule(name), nn.Linear)]
    ranges = calibrate(whole.network, dict.fromkeys(linear, (4, 8)), [IMAGES[:1].numpy()])
    four = {name: replace(spans, levels=16) for name, spans in ranges.items()}
    graph = few_levels(export_whole(whole), dict.fromkeys(linear, 4), four)
    scales = [node for node in graph.graph.node if node.op_type == "DequantizeLinear" and len(node.attribute)]
    assert {onnx.helper.get_attribute_value(node.attribute[0]) for node in scales} == {1}
    as_run(graph, "onnxruntime")
    with torch.no_grad():
        big = whole.network.get_submodule("shared")
        big.weight *= 2.0 ** torch.arange(-16, 16)[:, None]  # type: ignore[operator]
    cluster_layers(whole.network, dict.fromkeys(linear, 16))
    plain = export_whole(whole)
    small, bits = packed(plain)
    assert {bits[name] for name in linear} == {4}
    np.testing.assert_array_equal(as_run(small, "onnxruntime"), as_run(plain, "onnxruntime"))
