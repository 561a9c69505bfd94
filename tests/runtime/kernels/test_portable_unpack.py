"""NVIDIA's instructions that unpack four bytes, followed one by one for every code and shift."""

from __future__ import annotations

import re

import pytest

from zqfp_convert.numerics import codebook
from zqfp_convert.runtime import expanded
from zqfp_convert.runtime.kernels.portable import unpack

WORD = 0xFFFFFFFF


def run(program: str, packed: int, low_shift: int, high_shift: int) -> tuple[int, int]:
    """The values of $0 and $1 after a program of PTX on 32-bit words."""
    registers = {"$2": packed, "$3": low_shift, "$4": high_shift}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in program.split(";"):
        words = re.findall(r"[$\w.]+", line)
        if not words or not words[0].endswith("32") or words[0] == ".reg":
            continue
        operation, target, *sources = words
        a, b, c = (*map(value, sources), 0, 0)[:3]
        match operation:
            case "mov.b32":
                result = a
            case "and.b32":
                result = a & b
            case "or.b32":
                result = a | b
            case "shl.b32":
                result = a << b
            case "shr.u32":
                result = a >> b
            case "sub.u32":
                result = a - b
            case "prmt.b32":
                both = (b << 32 | a).to_bytes(8, "little")
                picks = [c >> 4 * i & 15 for i in range(4)]
                assert max(picks) < 8  # 8 and up would repeat a sign
                result = int.from_bytes(bytes(both[pick] for pick in picks), "little")
            case _:
                raise AssertionError(line)
        registers[target] = result & WORD
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("low_shift", range(12))
def test_every_byte_at_every_shift(low_shift: int) -> None:
    table = expanded.shift_table().tolist()
    for high_shift in range(12):
        for byte in range(256):
            packed = [byte, byte ^ 0xFF, byte * 7 % 256, byte ^ 0x08]
            low, high = run(
                unpack._PTX.value,
                int.from_bytes(bytes(packed), "little"),
                low_shift * 0x01010101,
                high_shift * 0x01010101,
            )
            assert list(low.to_bytes(4, "little")) == [table[low_shift][b & 15] for b in packed]
            assert list(high.to_bytes(4, "little")) == [table[high_shift][b >> 4] for b in packed]


def test_the_interpreter_does_without_them() -> None:
    assert not (unpack.fast((codebook.E2M1,)) and unpack.INTERPRETED.value)


def test_they_know_but_one_codebook() -> None:
    assert not unpack.fast(codebook.PAIR)
    assert not unpack.fast(codebook.PAIR[:1])
