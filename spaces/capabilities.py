"""What a target can run, as data, so that `spaces` never imports targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What a target runs natively.

    Attributes:
        bit_widths: bit-widths with kernels of their own, widest first; 16 means bfloat16.
        channel_granule: channel counts that are no multiple of it waste the kernel's vector lanes.
        asked: bit-widths that the space offers, widest first; those that are native where it is empty.
        depthwise_by_channel: int8 depthwise convolutions read activations with a scale for each channel.
        one_zero_point: those channels must have the same zero point.
        writes_integers: int8 layers round what they produce, before any activation function.
        written_by_channel: they do so with a scale for each channel.
        fuses_elementwise: a chain of elementwise operations runs as one. Where each is a kernel of its own, a
            polynomial in SiLU's place takes longer (ONNX Runtime: 2.7 times YOLOX-nano's time).
    """

    bit_widths: tuple[int, ...] = (32,)
    channel_granule: int = 8
    depthwise_by_channel: bool = False
    one_zero_point: bool = False
    writes_integers: bool = False
    written_by_channel: bool = False
    fuses_elementwise: bool = False
    asked: tuple[int, ...] = ()

    @property
    def offered(self) -> tuple[int, ...]:
        """Bit-widths that a space offers."""
        return self.asked or self.bit_widths

    def runs_at(self, bits: int) -> int:
        """The width that a bit-width runs at: the narrowest native one that holds it, or else the widest."""
        return min((width for width in self.bit_widths if width >= bits), default=self.bit_widths[0])
