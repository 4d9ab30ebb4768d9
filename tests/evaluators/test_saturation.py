"""Ends that activation functions flatten: by hand, and no output changes by more than rounding does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evaluators.calibration import Range
from evaluators.saturation import Flat, flat_ends

make = helper.make_node
NUMBERS = {"zero": 0.0, "six": 6.0}
FUNCTIONS = {
    "ReLU": ([make("Relu", ["x"], ["y"])], Flat(low=0.0)),
    "ReLU6": ([make("Clip", ["x", "zero", "six"], ["y"])], Flat(0.0, 6.0)),
    "from above": ([make("Clip", ["x", "", "six"], ["y"])], Flat(high=6.0)),
    "from below": ([make("Clip", ["x", "zero"], ["y"])], Flat(low=0.0)),
    "hard-swish": ([make("HardSwish", ["x"], ["y"])], Flat(low=-3.0)),
    "hard sigmoid": ([make("HardSigmoid", ["x"], ["y"], alpha=0.25, beta=0.5)], Flat(-2.0, 2.0)),
    "SiLU": ([make("Sigmoid", ["x"], ["s"]), make("Mul", ["x", "s"], ["y"])], Flat(silu=True)),
    "SiLU, turned round": ([make("Sigmoid", ["x"], ["s"]), make("Mul", ["s", "x"], ["y"])], Flat(silu=True)),
    "sigmoid": ([make("Sigmoid", ["x"], ["y"])], None),
    "gate elsewhere": ([make("Sigmoid", ["x"], ["s"]), make("Mul", ["s", "s"], ["y"])], None),
    "read twice": ([make("Relu", ["x"], ["r"]), make("Add", ["r", "x"], ["y"])], None),
    "gate read twice": (
        [make("Sigmoid", ["x"], ["s"]), make("Mul", ["x", "s"], ["m"]), make("Add", ["s", "m"], ["y"])],
        None,
    ),
}


def graph_of(nodes: list[onnx.NodeProto], in_nodes: bool) -> onnx.ModelProto:
    """x -> y, with the bounds as initializers or as Constant nodes."""
    tensors = [numpy_helper.from_array(np.array(v, np.float32), name) for name, v in NUMBERS.items()]
    made = [make("Constant", [], [tensor.name], value=tensor) for tensor in tensors] if in_nodes else []
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    body = helper.make_graph([*made, *nodes], "g", sides[:1], sides[1:], [] if in_nodes else tensors)
    return helper.make_model(body)


@pytest.mark.parametrize("in_nodes", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_flat(name: str, in_nodes: bool) -> None:
    nodes, wanted = FUNCTIONS[name]
    assert flat_ends(graph_of(nodes, in_nodes)).get("x") == wanted


def test_cuts_by_hand() -> None:
    wide = Range(-10.0, 20.0)
    assert Flat(low=0.0).cut(wide) == Range(0.0, 20.0)
    assert Flat(0.0, 6.0).cut(wide) == Range(0.0, 6.0)
    assert Flat(low=-3.0).cut(wide) == Range(-3.0, 20.0)
    assert Flat(low=-3.0).cut(Range(-1.0, 2.0)) == Range(-1.0, 2.0)
    assert Flat(low=1.0).cut(wide) == Range(0.0, 20.0), "0 stays inside"
    dead = Flat(low=0.0).cut(Range(-5.0, 0.0))
    assert dead.low == 0.0 < dead.high


@pytest.mark.parametrize(
    "span", [Range(-40.0, 10.0), Range(-8.0, 0.5), Range(-200.0, 0.0), Range(-3.0, 60.0)]
)
def test_silu_loses_half_a_step_at_most(span: Range) -> None:
    cut = Flat(silu=True).cut(span)
    x = np.linspace(span.low, span.high, 100001)
    lost = np.abs(silu(np.maximum(x, cut.low)) - silu(x)).max()
    assert cut.high == span.high
    assert lost <= (cut.high - cut.low) / 510 * 1.001
    assert cut.low > span.low
    further = Range(cut.low * 0.8, cut.high)
    costs = abs(silu(np.array(further.low))) - abs(silu(np.array(span.low)))
    assert cut.low > -1.3 or costs > (further.high - further.low) / 510, "more would cost more"


def test_silu_keeps_what_is_not_flat() -> None:
    for span in (Range(-1.2, 5.0), Range(0.0, 5.0)):
        assert Flat(silu=True).cut(span) == span


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
