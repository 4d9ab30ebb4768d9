"""A space small enough to enumerate."""

from __future__ import annotations

from spaces.capabilities import Capabilities
from spaces.sites import find_sites
from spaces.space import SearchSpace, build_space
from spaces.table import SpaceTable
from tests.spaces.toy import ToyDetector


def toy_space() -> SearchSpace:
    """Three channel sites and the bit-widths of two blocks."""
    detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    capabilities = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)
    return build_space(detector, sites, capabilities, granularity="block")


def toy_table() -> SpaceTable:
    """The same as arrays."""
    return SpaceTable(toy_space())
