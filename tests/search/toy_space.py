"""A space small enough to enumerate."""

from __future__ import annotations

from spaces.capabilities import Capabilities
from spaces.detectors.base import Preprocess
from spaces.inputs import Size
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


class SizedToy(ToyDetector):
    """The toy at any size."""

    def __init__(self, size: Size) -> None:
        self.preprocess = Preprocess(size=size)


def resizing_table() -> SpaceTable:
    """The toy at 64 x 64, whose input may also be made 32 x 32."""
    detector = SizedToy((64, 64))
    sites = find_sites(detector, detector.build(), resized=SizedToy)
    capabilities = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)
    methods = ("prune", "quantize", "resize")
    return SpaceTable(build_space(detector, sites, capabilities, methods, granularity="block"))
