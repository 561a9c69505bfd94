"""The fused product: packed weights and E4M3 activations in, results out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import Tensor

from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.books import BookFields, fields, given
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.layout import Chunks

SHARED_LIMIT = 227 * 1024  # bytes a block can have
ALL_SHARED = 228 * 1024  # of a multiprocessor
RESERVED = 1024  # of that, by each block
ALIGNMENT = 1024  # of the stages in shared memory
MATRICES = 4  # that one launch multiplies, at most
FEW_TOKENS = 64
LARGEST_EXCHANGE = 32 * 1024  # bytes of partial sums beside the stages, else in them
# Registers of a thread, by the warpgroups that multiply. They come in quarters of a
# multiprocessor's, each for every fourth warp.
REGISTERS_BESIDE_WARP = {1: 255, 2: 168, 3: 128, 4: 96}
REGISTERS_BESIDE_WARPGROUP = {1: (232, 24), 2: (232, 40), 3: (160, 24), 4: (112, 24)}
BESIDE_SUMS = 72  # registers of a thread that multiplies


@dataclass(frozen=True)
class Schedule:
    """How a product is cut up; the names are those of multiply.cu.

    Attributes:
        tokens: M of a tile: 8, 16, 32, 64, 128 or 256.
        warpgroups, tiles: a block has `64 * warpgroups * tiles` output features.
        stages: of 128 columns each, on the way at the same time.
        shares: warpgroups of a block that share out K, for each of `warpgroups`.
        split: blocks that share out K: of a cluster, or with `stream` through the workspace.
        pair: blocks that share activations.
        blocks: on a multiprocessor at the same time.
        waves: 0 for one tile a cluster, else persistent blocks, this many on a multiprocessor.
        stream: the blocks take equal stretches of all columns of all tiles.
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
    stream: bool = False

    @property
    def rows(self) -> int:
        """Output features of a block."""
        return layout.ROWS * self.warpgroups * self.tiles

    @property
    def cluster_split(self) -> int:
        """Blocks of a cluster that share out K."""
        return 1 if self.stream else self.split

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.warpgroups * self.shares

    @property
    def copiers(self) -> int:
        """Threads that copy: a warpgroup that gives registers to others, or two warps, or one."""
        needed = self.tokens * self.tiles // 2 + BESIDE_SUMS
        if self.consumers > 1 and needed > REGISTERS_BESIDE_WARP[self.consumers]:
            return 128
        return 32 if self.blocks > 3 else 64  # a fourth block has no registers for more

    @property
    def slices(self) -> tuple[int, int, int]:
        """Partial sums of a tile, slices in which they are added up, blocks of 8 tokens in one."""
        parts, blocks = self.shares * self.cluster_split, self.tokens // 8
        slices = min(parts, blocks)
        return parts, slices, blocks // slices

    def constants(self) -> dict[str, int]:
        """What the kernel's source is compiled with."""
        values = {key.upper(): int(value) for key, value in asdict(self).items() if key != "waves"}
        consumer, copier = REGISTERS_BESIDE_WARPGROUP[self.consumers]
        return values | {
            "SPLIT": self.cluster_split,
            "PERSISTENT": int(self.waves > 0),
            "COPIERS": self.copiers,
            "CONSUMER_REGISTERS": consumer,
            "COPIER_REGISTERS": copier,
            "LARGEST_EXCHANGE": LARGEST_EXCHANGE,
        }

    def shared(self, groups: int) -> int:
        """Bytes of shared memory."""
        weights = self.warpgroups * self.tiles * layout.chunk_bytes(groups)
        stage = self.tokens * layout.COLUMNS + weights + 16
        parts, slices, piece = self.slices
        staging = self.consumers * min(piece, 4) * 8 * layout.ROWS * 4
        exchange = (
            -(-slices // self.cluster_split) * parts * self.rows // layout.ROWS * piece * 2048
        )
        apart = exchange if parts > 1 and exchange <= LARGEST_EXCHANGE else 0
        apart *= 2 if self.stream else 1
        return ALIGNMENT + self.stages * stage + staging + apart

    def fit(self, groups: int) -> Schedule:
        """The schedule with as many stages as the shared memory has room for.

        Schedules are measured with one scale for 128 columns. With more, `blocks` of a
        multiprocessor are still there at the same time, if they were then.
        """

        def fits(schedule: Schedule, groups: int, blocks: int) -> bool:
            room = SHARED_LIMIT if blocks == 1 else ALL_SHARED // blocks - RESERVED
            return schedule.shared(groups) <= room

        together = self.blocks if fits(self, 1, self.blocks) else 1
        fitting = self
        while not fits(fitting, groups, together):
            fitting = replace(fitting, stages=fitting.stages - 1)
        return fitting


class MatrixFields(ctypes.Structure):
    """A matrix as the sources of both products have it."""

    _fields_ = (
        ("chunks", ctypes.c_void_p),
        ("outer", ctypes.c_void_p),
        ("row_factor", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("first", ctypes.c_int),
        ("rank_steps", ctypes.c_int),
        ("rank_step", ctypes.c_int),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("stretches", ctypes.c_int),
        ("rank_steps", ctypes.c_int),
        ("books", BookFields),
        ("matrices", MatrixFields * MATRICES),
    )


@dataclass(frozen=True)
class Inputs:
    """Activations, quantized.

    Attributes:
        codes: uint8, E4M3 as `quantize` writes them, `[ceil(K / 128), M, 128]` for `multiply`.
        token_scale: float32 `[M]`; for `decode` filled up to 16 bytes.
        inner: z of all matrices in `inner_parts(M)` parts, bfloat16 `[parts, steps, M, 16]`; None
            without low-rank compensation.
    """

    codes: Tensor
    token_scale: Tensor
    inner: Tensor | None = None


@dataclass(frozen=True)
class Matrix:
    """A weight `[N, K]`, and what comes of it.

    Attributes:
        chunks: the weights.
        row_factor: float32 `[ceil(N / 64) * 64]`.
        bias: the same, or None.
        y: bfloat16 or float16 `[M, N]`, contiguous; written.
        outer: B, as `layout.outer_factor` makes it, or None.
    """

    chunks: Chunks
    row_factor: Tensor
    bias: Tensor | None
    y: Tensor
    outer: Tensor | None = None

    @property
    def steps(self) -> int:
        """Of 8 ranks."""
        return 0 if self.outer is None else self.outer.shape[1]


@cache
def _kernel(
    device: int, schedule: Schedule, groups: int, books: bool, half: bool, parts: int
) -> Kernel:
    about = {"GROUPS": groups, "BOOKS": books, "HALF": half, "INNER_PARTS": parts}
    return Kernel("multiply", schedule.constants() | about, schedule.shared(groups))


def stretches(schedule: Schedule, rows: int) -> int:
    """Of the rows of a matrix, as many as a block or a pair of blocks takes."""
    return -(-rows // (schedule.rows * schedule.pair))


@cache
def clusters(
    schedule: Schedule, tokens: int, rows: tuple[int, ...], depth: int, device: int
) -> int:
    """Clusters of blocks that a product is launched with; N of each matrix, `ceil(K / 128)`."""
    tiles = -(-tokens // schedule.tokens) * sum(stretches(schedule, count) for count in rows)
    if schedule.waves:
        most = torch.cuda.get_device_properties(device).multi_processor_count * schedule.waves
        most //= schedule.cluster_split * schedule.pair
        return min(tiles * depth if schedule.stream else tiles, most)
    return tiles * min(schedule.split, depth) if schedule.stream else tiles


def flag_count(
    schedule: Schedule, tokens: int, rows: tuple[int, ...], depth: int, device: int
) -> int:
    """Flags that the blocks of a stream need to wait for one another."""
    if not schedule.stream:
        return 0
    _, slices, _ = schedule.slices
    return clusters(schedule, tokens, rows, depth, device) * slices * schedule.warpgroups


def inner_parts(tokens: int) -> int:
    """Parts that z of M tokens comes in: made by as many blocks, where tokens are few."""
    return 4 if tokens <= FEW_TOKENS else 1


def multiply(inputs: Inputs, matrices: Sequence[Matrix], schedule: Schedule, flags: Tensor) -> None:
    """`y = W^ x^ + B z + bias` for weights that get the same activations.

    Args:
        inputs: the activations.
        matrices: 1 to 4 of them, all with as many scales for 128 columns and the same codebooks.
        schedule: see there.
        flags: int32, as many as `flag_count` says, which `quantize` has set to 0.
    """
    first = matrices[0]
    _, depth, _ = first.chunks.data.shape
    tokens, device = first.y.shape[0], first.y.device.index or 0
    rows = tuple(matrix.y.shape[1] for matrix in matrices)
    count = clusters(schedule, tokens, rows, depth, device)
    problem = _Problem(
        inputs.codes.data_ptr(),
        inputs.token_scale.data_ptr(),
        address(inputs.inner),
        tokens=tokens,
        depth=depth,
        books=fields(first.chunks.books),
    )
    if schedule.stream:
        sums = schedule.tokens * schedule.rows  # float32
        workspace = torch.empty(count * sums, dtype=torch.float32, device=first.y.device)
        problem.workspace, problem.flags = workspace.data_ptr(), flags.data_ptr()
    extents = [stretches(schedule, count) for count in rows]
    fill(problem.matrices, matrices, extents)
    problem.stretches, problem.rank_steps = sum(extents), sum(m.steps for m in matrices)
    groups, half = first.chunks.groups, first.y.dtype == torch.float16
    books = given(first.chunks.books)
    kernel = _kernel(device, schedule, groups, books, half, inner_parts(tokens))
    threads = schedule.consumers * 128 + schedule.copiers
    cluster = schedule.cluster_split * schedule.pair
    kernel.launch(problem, (count * cluster, 1), threads, cluster)


def fill(
    fields: ctypes.Array[MatrixFields], matrices: Sequence[Matrix], extents: Sequence[int]
) -> None:
    """What the kernel has to know of each matrix; `extents` says how many tiles it has."""
    first = step = 0
    for index, (matrix, extent) in enumerate(zip(matrices, extents, strict=True)):
        fields[index] = MatrixFields(
            matrix.chunks.data.data_ptr(),
            address(matrix.outer),
            matrix.row_factor.data_ptr(),
            address(matrix.bias),
            matrix.y.data_ptr(),
            matrix.y.shape[1],
            first,
            matrix.steps,
            step,
        )
        first, step = first + extent, step + matrix.steps
    for index in range(len(matrices), MATRICES):
        fields[index].first = first  # which no block will have


def address(tensor: Tensor | None) -> int | None:
    """Of its data, or null."""
    return None if tensor is None else tensor.data_ptr()
