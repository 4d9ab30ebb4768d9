"""The machine's signature: what a latency depends on besides the engine and its settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ISA_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets that choose kernels in inference engines, x86 and Arm."""


def machine_signature() -> dict[str, Any]:
    """CPU model, instruction sets, number of CPUs, operating system and Python, as plain data."""
    cpu, isa = _cpu()
    return {
        "cpu": cpu,
        "isa": list(isa),
        "cores": os.cpu_count() or 0,
        "os": f"{platform.system()} {platform.machine()}",
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def int8_weight_levels() -> int:
    """Levels to either side of 0 that 8-bit weights may use on this CPU: 127, or 63 on x86 without VNNI.

    Its kernels add two products of an unsigned and a signed byte in 16 bits, where they saturate (Intel's
    `vpmaddubsw`; oneDNN's developer guide, "Nuances of int8 computations"); half the weights' range keeps
    them inside.
    """
    signature = machine_signature()
    x86 = signature["os"].rpartition(" ")[2].lower() in ("x86_64", "amd64")
    return 63 if x86 and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(signature["isa"]) else 127


def signature_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs from `a` to `b`, a readable line each; empty where latencies may be compared.

    Lists compare as sets; a key that only one side has counts as a difference.
    """
    lines = []
    for key in sorted({*a, *b}):
        if key not in a or key not in b:
            side, value = ("only before", a[key]) if key in a else ("only now", b[key])
            lines.append(f"{key}: {side}: {_plain(value)}")
        elif isinstance(a[key], Mapping) and isinstance(b[key], Mapping):
            lines += [f"{key}.{line}" for line in signature_difference(a[key], b[key])]
        elif isinstance(a[key], list | tuple) and isinstance(b[key], list | tuple):
            gone, new = [x for x in a[key] if x not in b[key]], [x for x in b[key] if x not in a[key]]
            if gone or new:
                parts = [f"lacks {_plain(gone)}"] * bool(gone) + [f"adds {_plain(new)}"] * bool(new)
                lines.append(f"{key}: {' and '.join(parts)}")
        elif a[key] != b[key]:
            lines.append(f"{key}: {_plain(a[key])} before, {_plain(b[key])} now")
    return lines


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Model and known instruction sets of the first CPU in the text of `/proc/cpuinfo`."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", ""), [flag for flag in ISA_FLAGS if flag in flags]


@cache
def _cpu() -> tuple[str, list[str]]:
    """Asked for every layer that is rounded, and the same as long as the process lives."""
    file = Path("/proc/cpuinfo")
    model, isa = parse_cpuinfo(file.read_text()) if file.exists() else ("", [])
    return model or platform.processor() or platform.machine(), isa


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
