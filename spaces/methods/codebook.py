"""Discrete levels: a layer's weight stored as indices into a short list of values (k-means)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Codebook
from spaces.sites import Sites

ENTRIES = (0, 256, 64, 16)
BELOW_TWO = 1.9921875
"""The largest bfloat16 below 2."""
SAMPLES = 16384
"""K-means looks at so many of the sorted weights at most, evenly spaced."""


class Codebooks:
    """The size of a layer's codebook, from none to 16 entries; a storage format.

    The layer runs in the width that it would run in without: it buys size on disk, never latency. The
    network itself stays as it is, for BatchNorm is folded into the weights before they are clustered:
    `evaluators` does that at export.
    """

    kind = "codebook"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """No codebook, 256, 64 and 16 entries."""
        return {name: tuple(Codebook(site=name, entries=e) for e in ENTRIES) for name in sites.layer}  # type: ignore[arg-type]

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a site that is no layer site."""
        if choice.site not in sites.layer:
            raise InputError("recipe.codebook.site", choice.site, "is no layer site of this detector")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Note the entries of the layers of each site."""
        for choice in choices:
            assert isinstance(choice, Codebook)
            if choice.entries:
                draft.codebooks.update(dict.fromkeys(sites.layer[choice.site].layers, choice.entries))


def cluster_layers(network: nn.Module, entries: Mapping[str, int]) -> None:
    """Replace the weights of layers, in place and by name, by clustered ones of so many values."""
    for name, count in entries.items():
        weight = network.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.data = clustered(weight.data, count)


def clustered(weight: Tensor, entries: int) -> Tensor:
    """A weight whose every value is one of at most `entries`, times the power of two of its output channel.

    K-means in one dimension from an even grid (Han et al. 2016, arXiv 1510.00149, found that start the best:
    it keeps entries for the few large weights), so that the same weight always gives the same codebook. With
    norms folded in, channels differ by orders of magnitude; each is therefore divided first by the largest
    power of two that its largest weight reaches, and that weight stays in [1, 2): so the file's packing can
    read the power off the values, and times a power of two they are exact.

    Args:
        weight: `(O, ...)`, output channels first.
        entries: at least 16; two of them are 1 and -1, one is 0 where a channel is dead.
    """
    from sklearn.cluster import KMeans  # here, because every worker would wait for it

    powers = powers_of_two(weight)
    normal = (weight.detach() / powers).double()
    values = np.sort(normal.flatten().numpy())
    if len(np.unique(values)) <= entries:
        return weight.clone()
    sample = values[np.linspace(0, len(values) - 1, min(len(values), SAMPLES)).astype(int)]
    dead = (normal == 0).all(dim=tuple(range(1, weight.dim())), keepdim=True)
    free = entries - 2 - int(dead.any())
    starts = np.linspace(values[0], values[-1], free)
    means = KMeans(free, init=starts[:, None], n_init=1, max_iter=50).fit(sample[:, None])
    centres = np.sort(means.cluster_centers_[:, 0]).clip(-BELOW_TWO, BELOW_TWO)
    borders = torch.from_numpy((centres[1:] + centres[:-1]) / 2)
    found = torch.from_numpy(centres)[torch.bucketize(normal, borders)]
    largest = normal.abs() >= 1.0
    found = torch.where(dead | (largest & (found.abs() < 1.0)), normal.sign(), found)
    return found.to(weight.dtype) * powers


def powers_of_two(weight: Tensor) -> Tensor:
    """Of each output channel, the largest power of two up to its largest absolute weight, `(O, 1, ...)`."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    mantissas, exponents = torch.frexp(largest)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(mantissas), exponents - 1), 1.0)
