"""torch as a target: bit-widths layer by layer, what the dispatcher shows, the tensor part."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.kernels import fell_back
from evaluators.targets.registry import TARGETS
from evaluators.testing import (
    DETECTOR,
    check_detections,
    images,
    layers,
    loaded,
    lowered,
    network,
    torch_session,
    whole,
)
from evaluators.torch_session import executed_types
from spaces.detectors.base import Postprocess
from spaces.errors import InputError


def test_layers_of_both_types_share_a_file(tmp_path: Path) -> None:
    """Also on CPUs without bfloat16 instructions, where torch widens and rounds instead."""
    bits = {layer: 16 if k % 3 else 32 for k, layer in enumerate(layers())}
    session = lowered(TARGETS["torch"], bits, tmp_path)
    assert session.kernels().keys() == bits.keys()
    assert fell_back(bits, session.kernels(), (32, 16)) == {}
    (image,) = images(1)
    found, expected = session.run(image), torch_session().run(image)
    check_detections(found)
    off = np.abs(found.scores[:20] - expected.scores[:20]).mean()
    assert 0 < off < 0.03


def test_layers_that_share_a_weight_have_types_of_their_own(tmp_path: Path) -> None:
    detector = whole(Postprocess())
    tied = {name: detector.network.get_submodule(name) for name in layers()}
    shape = tied[layers()[-1]].weight.shape
    first, second = [name for name in layers() if tied[name].weight.shape == shape][:2]
    tied[second].weight = tied[first].weight
    bits = dict.fromkeys(layers(), 32) | {first: 16}
    written = TARGETS["torch"].write(detector, bits, {}, tmp_path)
    kernels = TARGETS["torch"].prepare(written.model, 1).kernels()
    assert fell_back(bits, kernels, (32, 16)) == {}
    assert tied[second].weight is tied[first].weight, "the detector is left alone"


def test_a_bfloat16_file_is_half_as_large(tmp_path: Path) -> None:
    sizes = []
    for width in (32, 16):
        loaded(TARGETS["torch-compiled"], width, tmp_path / str(width))
        sizes.append((tmp_path / str(width) / "model.pt").stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]  # the program itself is half of so small a detector


@pytest.mark.parametrize("name", ["torch-compiled"])
def test_the_tensor_part_returns_the_raw_outputs(name: str, tmp_path: Path) -> None:
    loaded(TARGETS[name], 32, tmp_path)
    (image,) = images(1)
    found = TARGETS[name].prepare_tensor_part(tmp_path / "model.pt", 1).run(image)
    assert isinstance(found, tuple)
    with torch.no_grad():
        expected = DETECTOR.simplified(network())(torch.from_numpy(image))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_cuda_one_line_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA device here"):
        assert TARGETS["torch-cuda"].capabilities


def test_types_are_seen_where_they_are_computed() -> None:
    linear = torch.nn.Linear(4, 4).to(torch.bfloat16)
    addresses = {p.data_ptr(): f"linear.{name}" for name, p in linear.named_parameters()}

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return linear(torch.zeros(2, 4, dtype=torch.bfloat16)).float() @ torch.ones(4, 1)

    kinds = executed_types(run, addresses)
    assert kinds.pop("linear.weight") == "bf16"
    assert list(kinds.values()) == ["f32"]
