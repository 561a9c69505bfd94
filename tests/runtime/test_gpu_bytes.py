"""Bytes that Hopper's kernels write, against their twins in plain torch. Needs a Hopper GPU."""

from __future__ import annotations

import json
from pathlib import Path

import hopper_twins
import pytest
import torch
from packed_layers import random_layer
from torch import Tensor

from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.scales import Kind
from zqfp_convert.runtime import paths
from zqfp_convert.runtime.kernels.hopper import decode, expand, layout, quantize
from zqfp_convert.runtime.kernels.hopper.fused import room_for_z

CUDA = torch.device("cuda", 0)
VECTORS = Path(__file__).parents[2] / "formats" / "vectors" / "activations.json"
NOBODY_WROTE = 0x7F

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or paths.kernels_for(CUDA, "m2", 128, 4096, 8) != "hopper",
    reason="needs a Hopper GPU",
)


def rows_of_all_sizes(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal rows of all magnitudes, zeros, NaN, infinity, and bits at random."""
    generator = torch.Generator().manual_seed(tokens * columns)
    low, high = (-130, 120) if dtype == torch.bfloat16 else (-24, 12)
    size = torch.exp2(torch.linspace(low, high, tokens))[:, None]
    x = (torch.randn(tokens, columns, generator=generator) * size).to(dtype)
    bits = torch.randint(-(1 << 15), 1 << 15, (columns,), generator=generator).to(torch.int16)
    for row, values in enumerate((bits.view(dtype), torch.zeros(columns, dtype=dtype))):
        x[(row * 3 + 1) % tokens] = values
    if tokens > 8:
        x[5, columns // 2] = float("nan")
        x[6, 0] = float("inf")
    return x


def places(tokens: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shapes of codes in each order."""
    depth = -(-columns // 128)
    shapes: dict[str, tuple[int, ...]] = {
        "by row": (tokens, depth * 128),
        "tiled": (depth, tokens, 128),
    }
    if tokens <= decode.MOST_TOKENS:
        shapes["by unit"] = decode.codes_shape(tokens, depth)
    return shapes


def assert_same(x: Tensor, offset: Tensor | None, shape: tuple[int, ...], rank: int) -> None:
    """Codes and scales to the bit; z, which is added up in another order, nearly."""
    tokens, columns = x.shape
    factors: tuple[list[Tensor], list[Tensor]] = [], []
    if rank:
        A = torch.randn(rank, columns).to(torch.float8_e4m3fn)
        factors = [layout.inner_factor(A)], [torch.rand(rank)]
    steps = rank // layout.RANKS
    written = []
    for run, device in ((quantize.quantize, CUDA), (hopper_twins.quantize, torch.device("cpu"))):
        codes = torch.full(shape, NOBODY_WROTE, dtype=torch.uint8, device=device)
        scale = torch.full((tokens,), torch.nan, device=device)
        z = room_for_z(tokens, steps, device)
        there = None if offset is None else offset.to(device)
        moved = [[one.to(device) for one in some] for some in factors]
        run(x.to(device), there, moved[0], moved[1], codes, scale, z, None)
        whole = None if z is None else z.cpu().float().view(*z.shape[:3], 2, 8).sum((0, 3))
        codes[codes & 0x7F == 0x7F] = 0x7F  # NaN of either sign
        written.append((codes.cpu(), scale.cpu(), whole))
    (codes, scale, z), (want_codes, want_scale, want_z) = written
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, want_codes)
    if z is not None and want_z is not None:
        torch.testing.assert_close(z, want_z, rtol=1e-3, atol=1e-3 * float(want_z.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 100, 128, 1000, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 300])
def test_codes_and_scales(tokens: int, columns: int, dtype: torch.dtype) -> None:
    x = rows_of_all_sizes(tokens, columns, dtype)
    for shape in places(tokens, columns).values():
        assert_same(x, None, shape, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [100, 4096])
@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_with_an_offset_and_factors(tokens: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, columns).to(dtype)
    offset = torch.randn(columns).bfloat16()
    for shape in places(tokens, columns).values():
        assert_same(x, offset, shape, 0)
        assert_same(x, None, shape, 16)


def test_the_formats_vectors() -> None:
    """Those whose activations are bfloat16, and finite: of NaN the sign is free."""
    tried = 0
    for row in json.loads(VECTORS.read_text())["rows"]:
        wide = torch.frombuffer(bytearray.fromhex(row["x"]), dtype=torch.float32)
        x = wide.bfloat16()
        same = torch.equal(x.float().view(torch.int32), wide.view(torch.int32))
        if not same or not x.isfinite().all():
            continue
        codes = torch.zeros(1, 128 * -(-len(x) // 128), dtype=torch.uint8, device=CUDA)
        scale = torch.zeros(1, device=CUDA)
        quantize.quantize(x[None].to(CUDA), None, [], [], codes, scale, None, None)
        assert bytes(codes[0, : len(x)].tolist()).hex() == row["codes"], row["name"]
        assert bytes(scale.cpu().view(torch.uint8).tolist()).hex() == row["scale"], row["name"]
        tried += 1
    assert tried > 5


@pytest.mark.parametrize("books", [(codebook.E2M1,), codebook.PAIR], ids=["e2m1", "pair"])
@pytest.mark.parametrize("kind", ["m1", "m2"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_expanded_matrix(
    group_size: int, kind: Kind, books: tuple[codebook.Codebook, ...]
) -> None:
    layer = random_layer(kind, 200, 1100, group_size, books=books)
    about = group_size, layer.columns, layer.books, layer.choice
    chunks = layout.arrange(layer.packed, layer.scale, *about)
    want = torch.zeros(208, 1104, dtype=torch.uint8)
    hopper_twins.expand(chunks, want)
    have = torch.full(want.shape, NOBODY_WROTE, dtype=torch.uint8, device=CUDA)
    expand.expand(layout.Chunks(chunks.data.to(CUDA), chunks.groups, books), have)
    assert torch.equal(have.cpu() & 0x7F, want & 0x7F)
    signed = (want & 0x7F) > 0  # -0 may come out as either
    assert torch.equal(have.cpu()[signed], want[signed])
