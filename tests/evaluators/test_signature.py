from __future__ import annotations

import json
import os

import pytest

from evaluators import signature
from evaluators.signature import machine_signature, parse_cpuinfo, signature_difference

X86 = """processor : 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni

processor : 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor : 0
Features\t: fp asimd asimddp bf16 i8mm
"""


def test_cpuinfo_of_both_architectures() -> None:
    assert parse_cpuinfo(X86) == ("AMD EPYC 9R14", ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"])
    assert parse_cpuinfo(ARM) == ("", ["asimd", "asimddp", "i8mm", "bf16"])
    assert parse_cpuinfo("") == ("", [])


def test_this_machine() -> None:
    signature = machine_signature()
    assert signature["cpu"]
    assert signature["cores"] == os.cpu_count()
    assert signature_difference(signature, json.loads(json.dumps(signature))) == []


def test_differences_are_lines() -> None:
    a = {"cpu": "EPYC 7", "isa": ["avx2", "avx512f"], "engine": {"name": "openvino", "hint": "f32"}, "old": 1}
    b = {"cpu": "EPYC 9", "isa": ["avx2", "amx_int8"], "engine": {"name": "openvino", "hint": "bf16"}}
    assert signature_difference(a, b) == [
        "cpu: EPYC 7 before, EPYC 9 now",
        "engine.hint: f32 before, bf16 now",
        "isa: lacks avx512f and adds amx_int8",
        "old: only before: 1",
    ]
    assert signature_difference(b, a)[-1] == "old: only now: 1"
    assert signature_difference({"isa": ["a", "b"]}, {"isa": ("b", "a")}) == []


@pytest.mark.parametrize(
    ("isa", "system", "levels"),
    [
        (["avx2"], "Linux x86_64", 63),
        (["avx2", "avx512f"], "Linux x86_64", 63),
        (["avx2", "avx512f", "avx512_vnni"], "Linux x86_64", 127),
        (["avx2", "avx_vnni"], "Linux x86_64", 127),
        (["asimd"], "Linux aarch64", 127),
    ],
)
def test_weights_keep_sums_inside_16_bits_where_the_cpu_adds_them_there(
    isa: list[str], system: str, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "machine_signature", lambda: {"isa": isa, "os": system})
    assert signature.int8_weight_levels() == levels
