"""The kernels compile for a Hopper GPU: the interpreter lets pass what the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from zqfp_convert.numerics import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no Triton")

COMPILE = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.kernels.books import bounds
from zqfp_convert.numerics.kernels.search import _costs
from zqfp_convert.numerics.kernels.simulate import _simulate
from zqfp_convert.quantize.kernels.columns import EARLIER, ROWS, STEPS, _settle
from zqfp_convert.quantize.eigen import WIDEST
from zqfp_convert.quantize.kernels.eigen import DONE, SWEEPS, WARPS, _leading

def assembly(function, pointers, constants, warps):
    names = [name for name in function.arg_names if name not in constants]
    types = {name: pointers.get(name, "fp32" if "clipped" in name else "i32") for name in names}
    places = {name: function.arg_names.index(name) for name in function.arg_names}
    whole = [name for name in names if types[name] != "fp32"]
    aligned = {(places[name],): [["tt.divisibility", 16]] for name in whole}
    values = {(places[name],): value for name, value in constants.items()}
    source = ASTSource(function, types | dict.fromkeys(constants, "constexpr"), values, aligned)
    return compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps}).asm["ttgir"]

above, rises = bounds(codebook.PAIR)
books = {"ABOVE": above, "RISES": rises, "PAIR": True}
floats = dict.fromkeys(["block", "moves", "coupling", "step", "marks"], "*fp32")
found = {}
for warps, whole in ((1, False), (1, True), (4, False), (4, True)):
    constants = {"ROWS": ROWS, "STEPS": STEPS, "EARLIER": EARLIER[warps > 1], "WHOLE": whole}
    found[f"settle {warps} {whole}"] = assembly(_settle, floats, constants | books, warps)
pointers = dict.fromkeys(["groups", "importance", "mantissas", "costs"], "*fp32")
pointers |= {"exponents": "*i32", "seconds": "*u8"}
found["costs"] = assembly(_costs, pointers, {"GROUPS": 16, "WIDTH": 128, **books}, 4)
pointers = {"x": "*bf16", "out": "*bf16"}
found["simulate"] = assembly(_simulate, pointers, {"TILE": 4096}, 8)
pointers = dict.fromkeys(["matrices", "found"], "*fp32")
for size in (16, WIDEST):
    constants = {"SIZE": size, "SWEEPS": SWEEPS, "DONE": DONE}
    found[f"leading {size}"] = assembly(_leading, pointers, constants, WARPS)
print(json.dumps(found))
"""


def test_kernels_compile_and_settling_moves_nothing_between_registers() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in (kind for kind in found if kind.startswith("settle")):
        first, last = found[kind].index("arith.cmpf ogt"), found[kind].rindex("arith.cmpf ogt")
        steps = found[kind][first:last]  # all roundings of a tile and what is between them
        assert steps.count("arith.cmpf ogt") > 100
        assert "convert_layout" not in steps
        assert "tt.reduce" not in steps
