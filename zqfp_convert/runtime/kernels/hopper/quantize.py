"""Activations to E4M3 with a scale for each token, and z of low-rank compensation, at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.driver import Kernel

TOKENS = 8  # of a block
SLICE = 32  # features that a warp takes at a time
PIECE = 8  # features that a thread takes at a time
MOST_HELD = 8  # pieces that a lane keeps in registers
MOST_WARPS = 16
LARGEST_CLUSTER = 8
MULTIPROCESSORS = 132  # of an H100 or H200
STEPS = 5  # of 8 ranks, whose sums quantize.cu has room for
# A block for each token:
FEW_TOKENS = 4 * MULTIPROCESSORS  # at most
THREADS = 1024  # at most
FEW_HELD = 4  # pieces of a thread, at most


class _Problem(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("inner_factor", ctypes.c_void_p * STEPS),
        ("inner_scale", ctypes.c_void_p * STEPS),
        ("codes", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("code_stride", ctypes.c_longlong),
        ("tokens", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("flag_count", ctypes.c_int),
    )


class _TokenProblem(ctypes.Structure):
    _fields_ = tuple(field for field in _Problem._fields_ if not field[0].startswith("inner"))


@cache
def _kernel(
    device: int,
    warps: int,
    held: int,
    ahead: bool,
    steps: int,
    half: bool,
    tiled: bool,
    vectors: bool,
) -> Kernel:
    constants = {
        "WARPS": warps,
        "HELD": held,
        "AHEAD": ahead,
        "BLOCKS": 1 if ahead or held > 8 else 1024 // (warps * 32),
        "RANK_STEPS": steps,
        "HALF": half,
        "TILED": tiled,
        "VECTORS": vectors,
    }
    return Kernel("quantize", constants)


@cache
def _token_kernel(
    device: int, warps: int, held: int, half: bool, tiled: bool, vectors: bool
) -> Kernel:
    constants = {"WARPS": warps, "HELD": held, "HALF": half, "TILED": tiled, "VECTORS": vectors}
    return Kernel("quantize_token", constants)


def blocks_for(tokens: int, slices: int) -> int:
    """Blocks of a cluster, which share out the features of 8 tokens.

    Few tokens: more blocks for each. Many: as few as can hold their part of K in registers.
    """
    blocks, cluster = -(-tokens // TOKENS), 1
    while cluster < LARGEST_CLUSTER and (
        (blocks * cluster < MULTIPROCESSORS and slices >= 16 * cluster)
        or slices > cluster * MOST_WARPS * MOST_HELD
    ):
        cluster *= 2
    return cluster


def quantize(
    x: Tensor,
    offset: Tensor | None,
    inner_factors: Sequence[Tensor],
    inner_scales: Sequence[Tensor],
    codes: Tensor,
    token_scale: Tensor,
    inner: Tensor | None,
    flags: Tensor | None,
) -> None:
    """Quantize activations; the bytes are those of `numerics.fp8.quantize`.

    Args:
        x: `[M, K]`, bfloat16 or float16, features contiguous.
        offset: bfloat16 `[K]`, subtracted from x first, or None.
        inner_factors: A of each matrix, bfloat16 `[steps * 8, ceil(K / 128) * 128]`; may be none.
        inner_scales: s, float32 `[steps * 8]`, with each A.
        codes: written: uint8 `[ceil(K / 128), M, 128]` in the order of the fused product, or
            `[M, K']` row by row, K' a multiple of 16 (zeros beyond K).
        token_scale: written: float32 `[M]`.
        inner: written: z of all matrices, bfloat16 `[steps, M, 16]`, 8 high parts and 8 low parts,
            at most 5 steps; None without factors.
        flags: set to 0: int32, for `multiply`; or None.
    """
    tokens, columns = x.shape
    depth = -(-columns // layout.COLUMNS)
    tiled = codes.dim() == 3
    half = x.dtype == torch.float16
    vectors = columns % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    pieces = depth * layout.COLUMNS // PIECE
    alone = inner is None and tokens <= FEW_TOKENS and pieces <= THREADS * FEW_HELD
    problem = _TokenProblem() if alone else _Problem()
    problem.x, problem.x_stride = x.data_ptr(), x.stride(0)
    problem.offset = None if offset is None else offset.data_ptr()
    problem.codes, problem.code_stride = codes.data_ptr(), 0 if tiled else codes.stride(0)
    problem.token_scale = token_scale.data_ptr()
    if flags is not None:
        problem.flags, problem.flag_count = flags.data_ptr(), flags.numel()
    problem.tokens, problem.columns, problem.depth = tokens, columns, depth
    device = x.device.index or 0
    if alone:
        held = -(-pieces // THREADS)
        warps = -(-pieces // (32 * held))
        _token_kernel(device, warps, held, half, tiled, vectors).launch(
            problem, (tokens, 1), warps * 32
        )
        return
    steps = 0
    for factor, scale in zip(inner_factors, inner_scales, strict=True):
        for ranks in range(0, factor.shape[0], layout.RANKS):
            problem.inner_factor[steps] = factor[ranks:].data_ptr()
            problem.inner_scale[steps] = scale[ranks:].data_ptr()
            steps += 1
    problem.inner = None if inner is None else inner.data_ptr()
    blocks = -(-tokens // TOKENS)
    slices = depth * layout.COLUMNS // SLICE
    cluster = blocks_for(tokens, slices)
    share = -(-slices // cluster)  # slices of a block
    warps = MOST_WARPS if share >= 64 else 8
    pieces = -(-share // warps)
    held = next((n for n in (1, 2, 4, 8, 16) if MOST_HELD >= n >= pieces), 0)
    ahead = 0 < held <= 8 and steps == 1 and tokens <= 64
    kernel = _kernel(device, warps, held, ahead, steps, half, tiled, vectors)
    kernel.launch(problem, (blocks * cluster, 1), warps * 32, cluster)
