"""What a target can run, as data, so that `spaces` never imports targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What a target runs natively.

    Attributes:
        bit_widths: bit-widths with kernels of their own, widest first; 16 means bfloat16.
        channel_granule: channel counts that are no multiple of it waste the kernel's vector lanes.
    """

    bit_widths: tuple[int, ...] = (32,)
    channel_granule: int = 8
