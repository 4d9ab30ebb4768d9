"""Bias correction: the mean error of every channel goes to 0; rounding by hand."""

import copy

import pytest
import torch
from torch import nn

from evaluators.bias import correct_biases
from evaluators.calibration import LayerRanges, QuantizationPlan, Range, calibrate
from evaluators.rounding import round_layer, rounded_input, rounded_weight
from spaces.capabilities import Capabilities


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[0.3, -1.0], [7.0, 2.0]])
    # 7 levels to either side: steps of 1 for the second row, which they fit without error.
    assert rounded_weight(weight, 7)[1].tolist() == [7.0, 2.0]
    assert rounded_weight(weight, 127)[0].tolist() == pytest.approx([38 / 127, -1.0])
    read = LayerRanges(Range(-1.0, 2.0), Range(0.0, 1.0), levels=4)  # steps of 1, zero point 1
    assert rounded_input(torch.tensor([-3.0, -0.4, 0.6, 1.4, 9.0]), read).tolist() == [-1, 0, 1, 1, 2]
    channels = LayerRanges(Range(0.0, 255.0), Range(0.0, 1.0), (Range(0.0, 255.0), Range(0.0, 2.55)))
    both = torch.tensor([1.2, 1.234]).view(1, 2, 1, 1)
    assert rounded_input(both, channels).flatten().tolist() == pytest.approx([1.0, 1.23])


def test_channels_of_a_depthwise_convolution_keep_ranges_of_their_own() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 2, 1))
    grid = torch.linspace(0, 255, 256).view(1, 1, 16, 16)
    images = [torch.cat((grid, grid / 1000), dim=1).numpy()]
    able = Capabilities(depthwise_by_channel=True)
    found = calibrate(network, ["0", "1"], images, plan=QuantizationPlan(ranges="minmax"), capabilities=able)
    assert [r.high for r in found["0"].by_channel] == pytest.approx([255.0, 0.255])
    assert found["1"].by_channel == ()
    assert calibrate(network, ["0"], images)["0"].by_channel == ()
    few = calibrate(network, {"0": (4, 4)}, images, capabilities=able)["0"]
    assert (few.largest, few.levels, few.by_channel) == (7, 16, ())


def test_channels_that_are_written_keep_their_whole_range() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    nn.init.constant_(network[0].weight, 0.0)  # type: ignore[arg-type]
    with torch.no_grad():
        network[0].weight[:, :, 0, 0] = torch.tensor([[1.0, 0.0], [0.0, -0.1]])  # type: ignore[index]
    images = torch.randn(2, 1, 2, 16, 16)
    found = calibrate(
        network, ["0"], list(images.numpy()), capabilities=Capabilities(written_by_channel=True)
    )
    wanted = [(images[:, :, 0].min(), images[:, :, 0].max())]
    wanted.append((-0.1 * images[:, :, 1].max(), -0.1 * images[:, :, 1].min()))
    for span, (low, high) in zip(found["0"].written_by_channel, wanted, strict=True):
        assert (span.low, span.high) == pytest.approx((float(low), float(high)))
    assert calibrate(network, ["0"], list(images.numpy()))["0"].written_by_channel == ()


@pytest.mark.parametrize("biased", [True, False])
def test_the_mean_error_of_every_channel_goes_to_0(biased: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=biased),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=biased),
        nn.Flatten(),
        nn.Linear(8 * 16, 5, bias=biased),
    )
    images = torch.rand(6, 3, 8, 8)
    ranges = calibrate(network, ["0", "2", "4"], [i[None].numpy() for i in images])
    rough = 3  # levels to either side, as a CPU that bears few would have them

    def outputs(of: nn.Module) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        handles = [of[k].register_forward_hook(lambda _, __, o: found.append(o)) for k in (0, 2, 4)]  # type: ignore[index]
        with torch.no_grad():
            of(images)
        for handle in handles:
            handle.remove()
        return found

    def errors(of: nn.Module) -> list[float]:
        rounded = copy.deepcopy(of)
        for name, spans in ranges.items():
            round_layer(rounded.get_submodule(name), spans, rough)
        means = [[o.transpose(0, 1).flatten(1).mean(1) for o in outputs(n)] for n in (rounded, network)]
        return [float((a - b).abs().max()) for a, b in zip(*means, strict=True)]

    corrected = copy.deepcopy(network)
    correct_biases(corrected, ranges, images, rough)
    assert min(errors(network)) > 1e-3, "rounding must be felt, or this shows nothing"
    assert max(errors(corrected)) < 1e-5
    weights = zip(network.parameters(), corrected.parameters(), strict=False)
    assert not biased or all(torch.equal(a, b) for a, b in weights if a.dim() > 1)


def test_layers_of_fewer_than_8_bits_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    before = [copy.deepcopy(layer.bias) for layer in network]
    images = torch.rand(2, 3, 4, 4)
    correct_biases(network, calibrate(network, {"0": (4, 8), "1": (8, 8)}, [images.numpy()]), images)
    assert torch.equal(network[0].bias, before[0])
    assert not torch.equal(network[1].bias, before[1])


def test_a_layer_that_runs_twice_is_left_as_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.shared(self.shared(images)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network = Twice()
    bias = network.shared.bias
    assert bias is not None
    before, images = bias.clone(), torch.rand(2, 2, 4, 4)
    correct_biases(network, calibrate(network, ["shared", "last"], [images.numpy()]), images)
    assert network.shared.bias is not None
    assert torch.equal(network.shared.bias, before)
