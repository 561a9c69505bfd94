"""Activations to E4M3 with a scale for each token, and z of low-rank compensation, at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.multiply import inner_parts

THREADS = 1024  # of a block, at most
PIECE = 8  # features that a thread takes at a time
SLICE = 32  # features that a warp takes at a time for z
STEPS = layout.MOST_RANKS // layout.RANKS  # of 8 ranks, of all weights together, at most
BY_ROW, TILED, BY_UNIT = 0, 1, 2  # orders of codes
HELD = 32  # registers of a thread for activations, and as many for A


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


@dataclass(frozen=True)
class Cut:
    """How activations are shared out; the names are those of quantize.cu.

    Attributes:
        tokens: of a block.
        parts: blocks that have the same tokens, and parts of z.
        warps: of a block.
        held: pieces of a token that a thread keeps.
        ahead: slices of A that a warp keeps.
        blocks: on a multiprocessor.
    """

    tokens: int
    parts: int
    warps: int
    held: int
    ahead: int
    blocks: int

    def constants(self) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        return {key.upper(): value for key, value in asdict(self).items()}

    def shared(self, depth: int, steps: int) -> int:
        """Bytes of shared memory for `128 depth` columns."""
        if not steps:
            return 0
        slices = -(-depth * layout.COLUMNS // SLICE // self.parts)
        ranks = -(-steps // 2) * 16
        return self.tokens * (slices * SLICE + 16 + self.warps * ranks * 4)


@cache
def cut(tokens: int, depth: int, steps: int, processors: int) -> Cut:
    """For M tokens of `128 depth` columns, z of so many steps of 8 ranks, and a GPU.

    The more tokens a block has, the less often A is read; but every multiprocessor has to have
    something to do. Where there are few tokens, several blocks make z of the same ones.
    """
    pieces = depth * layout.COLUMNS // PIECE
    held = -(-pieces // THREADS)
    warps = -(-pieces // (32 * held))
    together, most, fewest = (1, 8, 128) if steps else (1, 4, 256)  # blocks at least
    while together < most and tokens >= 2 * together * fewest and 2 * together * held * 4 <= HELD:
        together *= 2
    parts = inner_parts(tokens) if steps else 1
    slices = -(-depth * layout.COLUMNS // SLICE // parts)
    each = -(-slices // warps)
    one_wave = -(-tokens // together) * parts <= 2 * processors
    ahead = each if one_wave and each * steps * 4 <= HELD else 0
    blocks = 1 if one_wave or warps > 16 else 2
    return Cut(together, parts, warps, held, ahead if steps else 0, blocks)


@cache
def _kernel(
    device: int, cut: Cut, depth: int, steps: int, half: bool, order: int, vectors: bool
) -> Kernel:
    constants = cut.constants() | {
        "STEPS": steps,
        "HALF": half,
        "ORDER": order,
        "VECTORS": vectors,
    }
    return Kernel("quantize", constants, cut.shared(depth, steps))


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
        codes: written: uint8 `[ceil(K / 128), M, 128]` in the order of `multiply`, of
            `decode.codes_shape` in that of `decode`, or `[M, K']` row by row, K' a multiple of 16
            (zeros beyond K).
        token_scale: written: float32 `[M]`.
        inner: written: z of all matrices, to be added up, bfloat16 `[parts, steps, M, 16]`, 8 high
            parts and 8 low parts; `inner_parts(M)` parts, at most 5 steps; None without factors.
        flags: set to 0: int32, for `multiply`; or None.
    """
    tokens, columns = x.shape
    depth = -(-columns // layout.COLUMNS)
    order = {2: BY_ROW, 3: TILED, 4: BY_UNIT}[codes.dim()]
    half = x.dtype == torch.float16
    vectors = columns % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    problem = _Problem(x.data_ptr(), None if offset is None else offset.data_ptr())
    steps = 0
    for factor, scale in zip(inner_factors, inner_scales, strict=True):
        for ranks in range(0, factor.shape[0], layout.RANKS):
            problem.inner_factor[steps] = factor[ranks:].data_ptr()
            problem.inner_scale[steps] = scale[ranks:].data_ptr()
            steps += 1
    problem.codes, problem.code_stride = codes.data_ptr(), codes.stride(0)
    problem.token_scale = token_scale.data_ptr()
    problem.inner = None if inner is None else inner.data_ptr()
    if flags is not None:
        problem.flags, problem.flag_count = flags.data_ptr(), flags.numel()
    problem.x_stride = x.stride(0)
    problem.tokens, problem.columns, problem.depth = tokens, columns, depth
    device = x.device.index or 0
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    way = cut(tokens, depth, steps, processors)
    kernel = _kernel(device, way, depth, steps, half, order, vectors)
    kernel.launch(problem, (-(-tokens // way.tokens) * way.parts, 1), way.warps * 32)
