"""Weights files: what is read, what is refused, and that nothing in them runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spaces.detectors.registry import make_detector
from spaces.detectors.weights import MixedFileError, load_weights, read_weights, save_weights
from spaces.errors import InputError


def network(classes: int = 3) -> nn.Module:
    return make_detector("yolox_digits", classes, (64, 64)).build()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("wrapper", [None, "model", "ema", "state_dict", "model_state_dict"])
def test_pytorch_files_load(tmp_path: Path, wrapper: str | None) -> None:
    source, target = network(), network()
    state = source.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert_equal(source, target)


def test_names_of_several_devices_and_nested_files_load(tmp_path: Path) -> None:
    source, target = network(), network()
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"ema": {"module": state, "updates": 7}, "epoch": 3}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert_equal(source, target)


def test_a_network_in_a_module_called_module_loads_its_own(tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({"module": nn.Conv2d(3, 4, 1)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert_equal(source, target)


def test_safetensors_make_the_round_trip(tmp_path: Path) -> None:
    source, target = network(), network()
    save_weights(source, tmp_path / "new" / "w.safetensors")
    load_weights(target, tmp_path / "new" / "w.safetensors")
    assert_equal(source, target)
    assert os.listdir(tmp_path / "new") == ["w.safetensors"]


def test_half_precision_files_give_single_precision_networks(tmp_path: Path) -> None:
    source, target = network(), network()
    save_weights(source, tmp_path / "w.safetensors", torch.float16)
    load_weights(target, tmp_path / "w.safetensors")
    for parameter in source.parameters():
        parameter.data = parameter.data.half().float()
    assert_equal(source, target)
    assert {p.dtype for p in target.parameters()} == {torch.float32}


class Buffers(nn.Module):
    """What half precision cannot hold: middles of cells, an area, a large parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.tensor([1e5, 1.0 + 2**-20]))
        self.register_buffer("centres", torch.arange(4, 2564, 8).float() + 0.5)
        self.register_buffer("area", torch.tensor(640.0 * 640.0))
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


def test_half_precision_is_for_parameters_that_fit_into_it(tmp_path: Path) -> None:
    source, target = Buffers(), Buffers()
    source.centres += 0.25
    save_weights(source, tmp_path / "w.safetensors", torch.float16)
    load_weights(target, tmp_path / "w.safetensors")
    for name in ("centres", "area", "mask", "scale"):
        assert torch.equal(getattr(source, name), getattr(target, name)), name
    assert load_file(tmp_path / "w.safetensors")["layer.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", ["mask", "layer.weight"])
def test_only_a_buffer_may_be_infinite_and_only_where_the_networks_own_is(tmp_path: Path, name: str) -> None:
    source = Buffers()
    source.state_dict()[name].view(-1)[0] = float("-inf")  # of the mask a place that is 0
    save_weights(source, tmp_path / "w.safetensors")
    target = Buffers()
    target.layer.weight.data.fill_(float("nan"))  # a training that diverged must not excuse its own file
    with pytest.raises(InputError, match=f"not finite, in {name} first"):
        load_weights(target, tmp_path / "w.safetensors")


class _Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "was-here"
    torch.save({"model": _Malice(victim)}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Malice(victim)))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(InputError, match="was not run"):
            load_weights(network(), tmp_path / name)
    assert not victim.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert victim.exists(), "the test's pickle is harmless, so it shows nothing"


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    target = network(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = network(3).state_dict()

    def refusal(content: object, name: str = "w.pth") -> str:
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError) as caught:
            load_weights(target, tmp_path / name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has 80 classes, the data set has 3" in refusal(network(80).state_dict())
    assert "1 weights are missing, head.stems.0.bn.bias" in refusal(
        {k: v for k, v in state.items() if k != "head.stems.0.bn.bias"}
    )
    assert "1 are unknown, extra" in refusal({**state, "extra": torch.zeros(1)})
    with torch.device("cpu"):
        assert "is needed" in refusal(make_detector("yolox_s", 3).build().state_dict())
    assert "no state_dict" in refusal([1, 2])
    assert "no state_dict" in refusal({"model": {"a": 1}})
    broken = {**state, "head.cls_preds.0.bias": torch.tensor([0.0, float("nan"), 0.0])}
    assert "not finite, in head.cls_preds.0.bias" in refusal(broken)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by a file that was refused"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short", bytes(64)])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        load_weights(network(), tmp_path / name)


def test_a_text_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("model: yolox_nano\n")
    with pytest.raises(InputError, match="is no weights file") as caught:
        read_weights(tmp_path / "w.pth")
    assert not isinstance(caught.value, MixedFileError)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_weights(network(), tmp_path / "nowhere.pth")


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = self.first


@pytest.mark.parametrize("kept", [("first", "second"), ("first",), ("second",)])
def test_a_layer_under_two_names_is_saved_and_loads_from_either(
    tmp_path: Path, kept: tuple[str, ...]
) -> None:
    one, other = Tied(), Tied()
    save_weights(one, tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    assert set(tensors) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    save_file({k: v for k, v in tensors.items() if k.startswith(kept)}, tmp_path / "part.safetensors")
    load_weights(other, tmp_path / "part.safetensors")
    assert_equal(one, other)
    assert other.second is other.first
