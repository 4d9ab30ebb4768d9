"""Hardware that is not at hand: rooflines by hand, rounding to a few levels, the contract."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.calibration import LayerRanges, Range
from evaluators.latency import measure_pair
from evaluators.rounding import rounded_weight
from evaluators.targets.analytic import Analytic, AnalyticSession, few_levels
from evaluators.targets.base import Predicting, Target
from evaluators.targets.registry import target_named
from evaluators.targets.roofline import Description, Work, roofline, work_of
from evaluators.testing import TargetContract, images, layers, loaded
from spaces.errors import InputError

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "targets" / "edge_npu.yaml"


class TestAnalytic(TargetContract):
    @pytest.fixture
    def target(self) -> Target:
        return target_named(f"analytic:{EXAMPLE}")

    def test_every_bit_width_finds_what_float32_finds(self, target: Target, tmp_path: Path) -> None:
        """Down to 6 bits; below, an untrained network finds other things."""
        reference = loaded(target, 32, tmp_path / "32")
        for width, drift in ((16, 0.03), (8, 0.06), (6, 0.11)):
            session = loaded(target, width, tmp_path / str(width))
            off = [
                np.abs(session.run(i).scores[:20] - reference.run(i).scores[:20]).mean() for i in images(4)
            ]
            assert float(np.mean(off)) < drift


def test_fewer_bits_take_less_time_and_nobody_times_them(tmp_path: Path) -> None:
    target = target_named(f"analytic:{EXAMPLE}")
    sessions = {width: loaded(target, width, tmp_path / str(width)) for width in (32, 8, 2)}
    ms = {}
    for width, session in sessions.items():
        assert isinstance(session, Predicting)
        ms[width] = session.predicted_ms
    assert ms[32] > ms[8] > ms[2] > 1.0, "the fixed millisecond stays"
    paired = measure_pair(sessions[8], sessions[32], images(1), threads=1)
    assert paired.predicted
    assert paired.ratio == paired.low == paired.high == ms[8] / ms[32]
    assert loaded(target, 8, tmp_path / "again").predicted_ms == ms[8]  # type: ignore[attr-defined]


def test_a_roofline_by_hand() -> None:
    chip = Description(
        name="chip",
        peak_gmacs={32: 1, 8: 4},
        bandwidth_gbs=2,
        depthwise_share=0.5,
        elementwise_gops=1,
        layer_us=100,
        fixed_ms=1,
    )
    computing = Work(macs=2e6, elements=1e5, arithmetic=0, bits=8)  # 0.5 ms, against 0.05 of moving
    moving = Work(macs=1e5, elements=4e5, arithmetic=0, bits=32)  # 0.1 ms, against 0.8
    thin = Work(macs=2e6, elements=1e5, arithmetic=0, bits=4, depthwise=True)  # in 8 bits: 1 ms
    silu = Work(macs=0, elements=0, arithmetic=1e5, bits=8)  # 0.1 ms, and no start of its own
    found = roofline(chip, [computing, moving, thin, silu])
    assert found.ms == pytest.approx(1 + 0.5 + 0.8 + 1 + 0.1 + 0.3)
    assert found.ideal_ms == pytest.approx(0.5 + 0.1 + 0.5)
    assert found.share == pytest.approx(1.1 / 3.7)
    assert found.bound_by_memory == pytest.approx(1 / 3)
    assert found.described()["attained_gmacs"] == pytest.approx(4.1e6 / 3.7e6)


def test_shares_of_a_peak_may_differ_by_bit_width() -> None:
    chip = Description(
        name="chip",
        peak_gmacs={32: 1, 16: 2, 8: 4},
        bandwidth_gbs=1e6,
        dense_share={32: 0.5, 8: 0.25},
        depthwise_share={16: 0.1},
    )
    works = [Work(1e6, 0, 0, bits, depthwise) for bits in (32, 16, 8) for depthwise in (False, True)]
    reached = [0.5, 1.0, 2.0, 0.2, 1.0, 4.0]
    for work, rate in zip(works, reached, strict=True):
        found = roofline(chip, [work])
        assert found.ms == pytest.approx(1 / rate)
        assert found.share == pytest.approx(rate / chip.peak_gmacs[work.bits])


def convolutions() -> onnx.ModelProto:
    """`(1, 4, 6, 6)` -> 3x3 with 10 channels, stride 2 -> depthwise -> concat with itself -> a decoder."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.normal(size=(10, 4, 3, 3)).astype(np.float32), "network.a.weight"),
        numpy_helper.from_array(random.normal(size=(10, 1, 3, 3)).astype(np.float32), "network.b.weight"),
    ]
    nodes = [
        helper.make_node(
            "Conv", ["images", "network.a.weight"], ["a"], "/network/a/Conv",
            kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
        ),
        helper.make_node("Sigmoid", ["a"], ["s"], "/network/Sigmoid"),
        helper.make_node(
            "Conv", ["s", "network.b.weight"], ["b"], "/network/b/Conv",
            kernel_shape=[3, 3], group=10, pads=[1, 1, 1, 1],
        ),
        helper.make_node("Concat", ["b", "s"], ["c"], "/network/Concat", axis=1),
        helper.make_node("Exp", ["c"], ["boxes"], "/Exp"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 20, 3, 3])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])


def test_the_work_of_a_graph_known_by_heart() -> None:
    dense, sigmoid, thin, concat = work_of(convolutions(), {"a": 8}, granule=8)
    assert dense == Work(16 * 36 * 9, 4 * 36 + 10 * 9 + 10 * 36, 0, 8)  # 16 of the 10 channels' place
    assert sigmoid == Work(0, 0, 90, 8)
    assert thin == Work(16 * 9 * 9, 90 + 90 + 10 * 9, 0, 32, depthwise=True)
    assert concat == Work(0, 90 + 90 + 180, 0, 32)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_layers_round_to_the_levels_of_their_bits(bits: int) -> None:
    graph = convolutions()
    before = graph.SerializeToString()
    span = LayerRanges(Range(-1.0, 3.0), Range(-1.0, 1.0))
    lowered = few_levels(graph, {"a": bits}, {"a": span})
    assert graph.SerializeToString() == before
    image = np.random.default_rng(1).uniform(-2, 4, (1, 4, 6, 6)).astype(np.float32)
    scale = 4 / (2**bits - 1)
    zero = round(1 / scale)
    read = (np.clip(np.round(image / scale) + zero, 0, 2**bits - 1) - zero) * scale
    weight = numpy_helper.to_array(graph.graph.initializer[0])
    most = 2 ** (bits - 1) - 1
    levels = rounded_weight(torch.from_numpy(weight.copy()), most).numpy()  # as damage and training have it
    few = convolutions()
    few.graph.initializer[0].CopyFrom(numpy_helper.from_array(levels, "network.a.weight"))
    np.testing.assert_allclose(run(lowered, image), run(few, read.astype(np.float32)), rtol=1e-3, atol=1e-5)
    assert len(lowered.SerializeToString()) < len(before) + 900


def run(graph: onnx.ModelProto, image: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": image})
    return found


def test_kernels_are_those_of_the_description(tmp_path: Path) -> None:
    chip = tmp_path / "chip.yaml"
    chip.write_text("{name: chip, peak_gmacs: {32: 1, 8: 2, 4: 3}, bandwidth_gbs: 1}")
    target = Analytic(chip)
    assert target.capabilities.bit_widths == (32, 8, 4)
    session = loaded(target, 4, tmp_path)
    assert isinstance(session, AnalyticSession)
    assert session.kernels() == dict.fromkeys(layers(), "i4")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{name: x, bandwidth_gbs: 1, peak_gmacs: {8: 1}}", "peak_gmacs.*32 bits"),
        ("{name: x, bandwidth_gbs: 1, peak_gmacs: {32: 1, 12: 1}}", "peak_gmacs.*8 to 2"),
        ("{name: x, bandwidth_gbs: 0, peak_gmacs: {32: 1}}", "bandwidth_gbs.*greater than 0"),
        ("{name: x, bandwidth_gbs: 1, peak_gmacs: {32: 1}, speed: 3}", "speed"),
        (
            "{name: x, bandwidth_gbs: 1, peak_gmacs: {32: 1}, depthwise_share: 2}",
            "depthwise_share: .*less than or equal to 1",
        ),
        ("{name: x, bandwidth_gbs: 1, peak_gmacs: {32: 1}, dense_share: {32: 0}}", "dense_share"),
        ("[", "is no YAML"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "chip.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        target_named(f"analytic:{file}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        target_named(f"analytic:{file}.not")
