"""The fused product: packed weights and E4M3 activations in, results out."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.layout import Chunks

SHARED_LIMIT = 227 * 1024  # bytes a block can have
ALIGNMENT = 1024  # of the stages in shared memory
LARGEST_EXCHANGE = 32 * 1024  # bytes of partial sums beside the stages, else in them


@dataclass(frozen=True)
class Schedule:
    """How a product is cut up; the names are those of multiply.cu.

    Attributes:
        tokens: M of a tile: 8, 16, 32, 64, 128 or 256.
        warpgroups, tiles: a block has `64 * warpgroups * tiles` output features.
        stages: of 128 columns each, on the way at the same time.
        shares: warpgroups of a block that share out K, for each of `warpgroups`.
        split: blocks that share out K.
        pair: blocks that share activations.
        blocks: on a multiprocessor at the same time.
        waves: 0 for one tile a cluster, else persistent blocks, this many on a multiprocessor.
    """

    tokens: int
    warpgroups: int = 1
    tiles: int = 1
    stages: int = 4
    shares: int = 1
    split: int = 1
    pair: int = 1
    blocks: int = 1
    waves: int = 0

    @property
    def rows(self) -> int:
        """Output features of a block."""
        return layout.ROWS * self.warpgroups * self.tiles

    @property
    def copiers(self) -> int:
        """Threads that copy: a warpgroup that gives its registers to large tiles, or a warp."""
        return 128 if self.tokens * self.tiles > 128 else 32

    def shared(self, groups: int) -> int:
        """Bytes of shared memory."""
        weights = self.warpgroups * self.tiles * layout.chunk_bytes(groups)
        stage = self.tokens * layout.COLUMNS + weights + 16
        parts, blocks = self.shares * self.split, self.tokens // 8
        slices = min(parts, blocks)
        piece = blocks // slices  # blocks of 8 tokens that a warpgroup writes
        staging = self.warpgroups * self.shares * min(piece * 8, 32) * layout.ROWS * 2
        exchange = -(-slices // self.split) * parts * self.rows // layout.ROWS * piece * 2048
        apart = exchange if 1 < parts and exchange <= LARGEST_EXCHANGE else 0
        return ALIGNMENT + self.stages * stage + staging + apart


class _Problem(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("outer", ctypes.c_void_p),
        ("row_factor", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("rank_steps", ctypes.c_int),
    )


@cache
def _kernel(device: int, schedule: Schedule, groups: int, half: bool) -> Kernel:
    constants = {key.upper(): value for key, value in asdict(schedule).items() if key != "waves"}
    constants |= {"GROUPS": groups, "HALF": half, "COPIERS": schedule.copiers}
    constants["LARGEST_EXCHANGE"] = LARGEST_EXCHANGE
    return Kernel("multiply", constants, schedule.shared(groups))


def multiply(
    codes: Tensor,
    token_scale: Tensor,
    inner: Tensor | None,
    chunks: Chunks,
    outer: Tensor | None,
    row_factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    schedule: Schedule,
) -> None:
    """`y = W^ x^ + B z + bias`.

    Args:
        codes: uint8 `[ceil(K / 128), M, 128]`, E4M3 as `quantize` writes them.
        token_scale: float32 `[M]`.
        inner: z, bfloat16 `[steps, M, 16]`, or None.
        chunks: the weights.
        outer: B, as `layout.outer_factor` makes it, or None.
        row_factor: float32 `[ceil(N / 64) * 64]`.
        bias: the same, or None.
        y: bfloat16 or float16 `[M, N]`, contiguous; written.
        schedule: see there.
    """
    tokens, rows = y.shape
    problem = _Problem(
        codes.data_ptr(),
        token_scale.data_ptr(),
        None if inner is None else inner.data_ptr(),
        chunks.data.data_ptr(),
        None if outer is None else outer.data_ptr(),
        row_factor.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        rows,
        codes.shape[0],
        0 if inner is None else inner.shape[0],
    )
    kernel = _kernel(y.device.index or 0, schedule, chunks.groups, y.dtype == torch.float16)
    cluster = schedule.split * schedule.pair
    tiles = -(-tokens // schedule.tokens) * -(-rows // (schedule.rows * schedule.pair))
    if schedule.waves:
        count = torch.cuda.get_device_properties(y.device).multi_processor_count
        tiles = min(tiles, count * schedule.waves // cluster)
    threads = schedule.warpgroups * schedule.shares * 128 + schedule.copiers
    kernel.launch(problem, (tiles * cluster, 1), threads, cluster)
