"""The CUDA C++ sources compile for Hopper; this needs NVRTC, and no GPU.

The launching functions run up to the launch, so that what is compiled is what they ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.runtime.kernels import hopper
from zqfp_convert.runtime.kernels.hopper import (
    compiler,
    decode,
    expand,
    layout,
    multiply,
    quantize,
    schedules,
)
from zqfp_convert.runtime.kernels.hopper.layout import Chunks
from zqfp_convert.runtime.kernels.hopper.multiply import (
    SHARED_LIMIT,
    Inputs,
    Matrix,
    Schedule,
    flag_count,
)

TOKENS = (8, 16, 64, 512, 4096)
CANDIDATES = {
    schedule for tokens in TOKENS for schedule in schedules.candidates(tokens, 4096, 4096)[::3]
}


class Kernel:
    """Compiled, and not launched."""

    made: list[Kernel]

    def __init__(self, name: str, constants: Mapping[str, int], shared: int = 0) -> None:
        self.image, self.shared = compiler.compile_kernel(name, constants), shared
        self.made.append(self)

    def launch(self, *about: object, **more: object) -> None:
        assert self.image.startswith(b"\x7fELF")
        assert self.shared <= SHARED_LIMIT


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cache folder, a new one."""
    if not hopper.available():
        pytest.skip("there is no NVRTC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    Kernel.made = []
    for module in (decode, expand, multiply, quantize):
        monkeypatch.setattr(module, "Kernel", Kernel)
        module._kernel.cache_clear()
    yield tmp_path / "zqfp-convert" / "kernels"
    for module in (decode, expand, multiply, quantize):
        module._kernel.cache_clear()


def chunks(groups: int, books: tuple[Codebook, ...] = (codebook.E2M1,)) -> Chunks:
    """Weights `[128, 256]`."""
    data = torch.zeros(2, 2, layout.chunk_bytes(groups), dtype=torch.uint8)
    return Chunks(data, groups, books)


def run_multiply(
    schedule: Schedule,
    groups: int,
    dtype: torch.dtype,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
) -> None:
    tokens = schedule.tokens
    inputs = Inputs(torch.empty(2, tokens, 128, dtype=torch.uint8), torch.ones(tokens))
    fitting = schedule.fit(groups)
    matrices = []
    for _ in range(2):
        y = torch.empty(tokens, 128, dtype=dtype)
        matrices.append(Matrix(chunks(groups, books), torch.ones(128), None, y))
    flags = torch.zeros(flag_count(fitting, tokens, (128, 128), 2, 0), dtype=torch.int32)
    multiply.multiply(inputs, matrices, fitting, flags)


@pytest.mark.parametrize("schedule", sorted(CANDIDATES, key=str), ids=str)
def test_multiply(schedule: Schedule) -> None:
    run_multiply(schedule, 1, torch.bfloat16)
    if schedule.tokens == 8:
        run_multiply(schedule, 2, torch.float16)
        run_multiply(schedule, 4, torch.float16)
        run_multiply(schedule, 1, torch.bfloat16, codebook.PAIR)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_decode(tokens: int, groups: int) -> None:
    codes = torch.empty(decode.codes_shape(tokens, 2), dtype=torch.uint8)
    inputs = Inputs(codes, torch.ones(decode.scales(tokens)))
    for dtype in (torch.bfloat16, torch.float16):
        y = torch.empty(tokens, 128, dtype=dtype)
        decode.decode(inputs, [Matrix(chunks(groups), torch.ones(128), None, y)] * 2)
    others = chunks(groups, codebook.PAIR)
    decode.decode(inputs, [Matrix(others, torch.ones(128), None, y)] * 2)
    assert len(Kernel.made) == 3


def test_what_a_decoding_product_has_room_for() -> None:
    assert decode.fits(4, (28672,), 32, (4,), 0)
    assert decode.fits(8, (4096,), 112, (1,), 0)
    assert not decode.fits(9, (4096,), 32, (1,), 0)
    assert not decode.fits(8, (4096,), 400, (1,), 0)  # the codes alone are more than there is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 1001, 4096, 14336, 140000])
@pytest.mark.parametrize("rank", [0, 8, layout.MOST_RANKS])
def test_quantize(rank: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.ones(3, columns, dtype=dtype)
    depth, steps = -(-columns // 128), rank // layout.RANKS
    tiled = torch.empty(depth, 3, 128, dtype=torch.uint8)
    by_row = torch.empty(16, depth * 128, dtype=torch.uint8)
    by_unit = torch.empty(decode.codes_shape(3, depth), dtype=torch.uint8)
    A, s = [torch.ones(rank, depth * 128).bfloat16()], [torch.ones(rank)]
    factors = (A, s) if rank else ([], [])
    inner = torch.empty(4, steps, 3, 16).bfloat16() if rank else None
    flags = torch.empty(5, dtype=torch.int32)
    moved = torch.ones(columns).bfloat16()
    for codes, offset in ((tiled, None), (by_row, moved), (by_unit, None)):
        quantize.quantize(x, offset, *factors, codes, torch.empty(16), inner, flags)
    assert len(Kernel.made) == 3


@pytest.mark.parametrize("columns", [64, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 64, 300, 1024, 8192])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cuts_of_the_activations(steps: int, tokens: int, columns: int) -> None:
    """Every way to share out the work compiles, and fits."""
    depth = -(-columns // 128)
    cut = quantize.cut(tokens, depth, steps, 132)
    assert cut.tokens * cut.warps * 32 * cut.held * 8 >= cut.tokens * columns
    assert cut.parts == (multiply.inner_parts(tokens) if steps else 1)
    constants = cut.constants() | {"STEPS": steps, "HALF": 0, "ORDER": 1, "VECTORS": 1}
    kernel = Kernel("quantize", constants, cut.shared(depth, steps))
    kernel.launch()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expand(groups: int) -> None:
    for books in ((codebook.E2M1,), codebook.PAIR[:1], codebook.PAIR):
        expand.expand(chunks(groups, books), torch.empty(128, 256, dtype=torch.uint8))
    assert len(Kernel.made) == 2


def test_what_is_compiled_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expand.expand(chunks(1), torch.empty(128, 256, dtype=torch.uint8))
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == Kernel.made[0].image
    expand._kernel.cache_clear()
    monkeypatch.setattr(compiler, "_compile", None)  # not again
    expand.expand(chunks(1), torch.empty(128, 256, dtype=torch.uint8))
    assert Kernel.made[1].image == Kernel.made[0].image


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.write_text("no folder")
    test_expand(1)


def test_source_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in compiler.SOURCES.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "expand.cu").write_text("a mistake")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    with pytest.raises(compiler.CompilerError, match=r"expand\.cu") as raised:
        test_expand(1)
    assert "error" in raised.value.found


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise compiler.CompilerError("NVRTC", "none", needed="one", do="Install it.")

    monkeypatch.setattr(compiler, "library", missing)
    assert not hopper.available.__wrapped__()
