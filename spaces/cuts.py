"""Channel sites put to the test: a cut network computes what it did with the same channels silent.

Shapes alone would not tell: channels may be reordered on their way (shuffles, flattened maps, flips), and
sites that only fit together, as where a view or a product expects equal numbers, pass while all shrink alike.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from spaces.layers import is_layer
from spaces.norms import NORMS
from spaces.slicing import LayerChannels, channels_left, part_named, slice_layers, widths_of

if TYPE_CHECKING:  # finding sites needs this module itself
    from spaces.sites import ChannelSite

T = TypeVar("T")

Record = dict[str, list[Tensor]]
"""The mean of every channel that a layer computed, one tensor `(channels,)` a call, and the raw outputs."""

OUTPUTS = ""
"""Where a record holds the network's own outputs; no layer has this name."""
LARGE, STRIDE = 512, 32
"""Pixels of a side that is large, and what sides are multiples of."""
ROUNDS = 2
QUICK, EXACT, COARSE = 1e-5, 1e-8, 1e-3
"""Differences that are rounding, as shares of a layer's largest value: of float32 if all goes well, of
float64, and of float32 where a network takes nothing else."""


def that_hold(
    network: nn.Module, sites: Mapping[str, ChannelSite], size: tuple[int, int], seed: int = 0
) -> dict[str, ChannelSite]:
    """The sites that can lose channels, each as many as it likes, without a change to what is left.

    Two rounds take another share of every site: any two of up to `ROUNDS`-digit numbers differ in a digit, so
    no two sites shrink alike both times (where they have channels enough). Which channels go is random.

    Args:
        network: the base.
        sites: as traced, perhaps wrongly.
        size: height and width of the input in pixels.
        seed: of images, weights, shares and channels.
    """
    sites = {name: site for name, site in sites.items() if _fits(network, site)}
    rounds = [unequal(sites, digit, seed) for digit in range(ROUNDS)]
    generator = torch.Generator().manual_seed(seed)
    draft = _lively(network, generator)
    images = _images(draft, size, generator)

    def holds(some: Mapping[str, ChannelSite], precision: torch.dtype, tolerance: float) -> bool:
        own, seen = draft.to(precision), images.to(precision)
        cuts = ({name: kept[name] for name in some} for kept in rounds)
        return all(_same(own, some, kept, seen, tolerance) for kept in cuts)

    # A quick look at all. Rounding alone may reorder proposals, which does not happen to float64.
    if not sites or holds(sites, torch.float32, QUICK):
        return sites
    exact = _runs(draft.double(), images.double())
    precision, tolerance = (torch.float64, EXACT) if exact else (torch.float32, COARSE)
    return as_many_as_hold(sites, lambda some: holds(some, precision, tolerance))


def _images(network: nn.Module, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise `(1, 3, H, W)`: of half a large size where the network takes that, for time's sake."""
    images = torch.randn(1, 3, *size, generator=generator)
    half = images[..., : size[0] // 2 // STRIDE * STRIDE, : size[1] // 2 // STRIDE * STRIDE]
    return half if min(size) >= LARGE and _runs(network, half) else images


def as_many_as_hold(parts: Mapping[str, T], holds: Callable[[Mapping[str, T]], bool]) -> dict[str, T]:
    """As many parts as hold together: all at once, then in halves, down to single ones."""
    good: dict[str, T] = {}
    waiting = [list(parts)]
    while waiting:
        names = waiting.pop()
        tried = good | {name: parts[name] for name in names}
        if holds(tried):
            good = tried
        elif len(names) > 1:
            middle = len(names) // 2
            waiting += [names[middle:], names[:middle]]
    return good


def unequal(sites: Mapping[str, ChannelSite], digit: int, seed: int) -> dict[str, Tensor]:
    """Channels that stay, of each site another share: that of a digit of the number that chance gives it."""
    generator = torch.Generator().manual_seed(seed)
    base = math.ceil(len(sites) ** (1 / ROUNDS))
    numbers = torch.randperm(len(sites), generator=generator).tolist()
    kept = {}
    for number, (name, site) in zip(numbers, sites.items(), strict=True):
        share = (number // base**digit % base + 1) / (base + 1)
        count = min(max(round(site.channels * share), 1), site.channels - 1)
        generator.manual_seed(seed + ROUNDS * number + digit)
        kept[name] = torch.randperm(site.channels, generator=generator)[:count].sort().values
    return kept


def _fits(network: nn.Module, site: ChannelSite) -> bool:
    """True where there is something to take, and all of it is there."""
    if site.channels < 2:
        return False
    for member in site.members:
        inputs, outputs = widths_of(part_named(network, member.layer))
        width = inputs if member.side == "in" else outputs
        if min(member.channels) < 0 or max(member.channels) >= width:
            return False
    return True


def _runs(network: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            network(images)
    except Exception:  # whatever the user's code raises where it makes float32 of its own
        return False
    return True


def _same(
    network: nn.Module,
    sites: Mapping[str, ChannelSite],
    kept: Mapping[str, Tensor],
    images: Tensor,
    limit: float,
) -> bool:
    """True where the network, cut, runs and agrees with itself, silenced."""
    left = channels_left(network, sites, kept)
    silenced = _recorded(network, images, left, _silence)
    try:  # parametrizations of weights may not take fewer
        cut = _recorded(network, images, left, slice_layers)
    except Exception:  # whatever the user's code raises where channels are not as many as it is used to
        return False
    for name, calls in silenced.items():
        whole = left.get(name, LayerChannels()).out
        wanted = calls if whole is None else [means[list(whole)] for means in calls]
        if len(cut[name]) != len(wanted) or not all(map(_close, cut[name], wanted, [limit] * len(wanted))):
            return False
    return cut.keys() == silenced.keys()


def _close(found: Tensor, wanted: Tensor, limit: float) -> bool:
    if found.shape != wanted.shape:
        return False
    largest = float(wanted[wanted.isfinite()].abs().max()) if bool(wanted.isfinite().any()) else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=limit * largest, equal_nan=True)


def _recorded(
    network: nn.Module,
    images: Tensor,
    left: Mapping[str, LayerChannels],
    change: Callable[[nn.Module, Mapping[str, LayerChannels]], None],
) -> Record:
    """What a copy of the network computes after a change.

    Layer by layer, since a mistake deep inside may have faded when it comes to the outputs.
    """
    draft = copy.deepcopy(network)
    record: Record = defaultdict(list)
    _free_of_other_channels(draft)
    change(draft, left)
    for name, module in draft.named_modules():
        if is_layer(module):
            module.register_forward_hook(
                lambda layer, _, written, kept=record[name]: kept.append(_means(layer, written))
            )
    with torch.no_grad():
        record[OUTPUTS] = list(draft(images))
    return record


def _means(layer: nn.Module, written: Tensor) -> Tensor:
    return written.movedim(_axis(layer), 0).flatten(1).mean(dim=1)


def _axis(module: nn.Module) -> int:
    """Where the channels of what a module reads and writes are."""
    if isinstance(module, nn.Linear):
        return -1
    return -3 if is_layer(module) else 1


def _free_of_other_channels(network: nn.Module) -> None:
    """Let norms over all channels at once only scale: of fewer channels they have other means, in place."""

    def scaled(norm: nn.Module, read: tuple[Any, ...], _: Tensor) -> Any:
        return _times(read[0], norm.weight, 1) if isinstance(norm.weight, Tensor) else read[0]

    for module in network.modules():
        if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
            module.register_forward_hook(scaled)


def _silence(network: nn.Module, left: Mapping[str, LayerChannels]) -> None:
    """Have all channels that are not left written and read as 0, in place, behind the layers and before them.

    Behind them alone would not do: activations make something of 0.
    """
    for name, channels in left.items():
        part = part_named(network, name)
        inputs, outputs = widths_of(part)
        if isinstance(part, nn.Parameter):
            part.data = _times(part.data, _mask(channels.out, outputs), part.shape.index(max(part.shape)))
            continue
        written, read = _mask(channels.out, outputs), _mask(channels.into, inputs)
        part.register_forward_hook(lambda one, _, found, mask=written: _times(found, mask, _axis(one)))
        part.register_forward_pre_hook(
            lambda one, given, mask=read: (_times(given[0], mask, _axis(one)), *given[1:])
        )


def _mask(left: tuple[int, ...] | None, width: int) -> Tensor:
    """1 for channels that are left, 0 for others, `(width,)`."""
    if left is None:
        return torch.ones(width)
    return torch.zeros(width).index_fill(0, torch.tensor(left), 1.0)


def _times(maps: Tensor, factors: Tensor, axis: int) -> Tensor:
    shape = [1] * maps.dim()
    shape[axis] = -1
    return maps * factors.to(maps).view(shape)


def _lively(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode with weights that all differ: zeros and ones would hide mistakes."""
    draft = copy.deepcopy(network).eval()
    norms = (module for module in draft.modules() if isinstance(module, NORMS))
    tensors = [*draft.parameters(), *(buffer for norm in norms for buffer in norm.buffers())]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(_stirred(tensor.float(), generator))
    return draft


def _stirred(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights with noise of a third of their size; what is positive of scales and variances stays so."""
    if tensor.numel() == max(tensor.shape, default=1):
        one, other = (torch.rand(tensor.shape, generator=generator).to(tensor) for _ in range(2))
        return tensor * (0.8 + 0.4 * one) + 0.1 * other
    usual = float(tensor.square().mean().sqrt()) or 1 / math.sqrt(tensor[0].numel())
    return tensor + usual / 3 * torch.randn(tensor.shape, generator=generator).to(tensor)
