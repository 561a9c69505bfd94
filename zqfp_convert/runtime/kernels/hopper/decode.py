"""The product for few tokens, as when a model decodes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from zqfp_convert.runtime.kernels.hopper import layout
from zqfp_convert.runtime.kernels.hopper.books import BookFields, fields, given
from zqfp_convert.runtime.kernels.hopper.driver import Kernel
from zqfp_convert.runtime.kernels.hopper.multiply import (
    MATRICES,
    SHARED_LIMIT,
    Inputs,
    Matrix,
    MatrixFields,
    address,
    fill,
    inner_parts,
)

ROWS = 16  # of a tile
TILE_BYTES = 16  # that decode.cu notes about a tile
ALIGNMENT = 1024  # of the codes in shared memory
WARPGROUPS = 4
SLICES = 4  # warps of a warpgroup, chunks of a unit
AHEAD = 8
STATIC = 2048  # bytes of shared memory beside the dynamic ones, at most
MOST_TOKENS = 8


class _Problem(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("token_scale", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("units", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("rank_steps", ctypes.c_int),
        ("most_steps", ctypes.c_int),
        ("most_tiles", ctypes.c_int),
        ("parts", ctypes.c_int),
        ("books", BookFields),
        ("matrices", MatrixFields * MATRICES),
    )


@dataclass(frozen=True)
class Cut:
    """How a product is shared out.

    Attributes:
        blocks: one for each multiprocessor at most.
        tiles: of 16 rows, that a block has at most.
        parts: tiles that a warp has a part of, at most.
        shared: bytes of shared memory.
    """

    blocks: int
    tiles: int
    parts: int
    shared: int


def operand_columns(tokens: int) -> int:
    """Of a tensor-core operation: four for each token, a power of two."""
    return max(8, 4 << (tokens - 1).bit_length())


@cache
def cut(tokens: int, rows: tuple[int, ...], depth: int, steps: tuple[int, ...], device: int) -> Cut:
    """For M tokens, N of each matrix, `ceil(K / 128)`, steps of 8 ranks of each."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    count = sum(-(-n // ROWS) for n in rows)
    tiles = -(-count // processors)
    blocks = -(-count // tiles)
    units = -(-depth // SLICES)
    of_group = -(-tiles * units // WARPGROUPS)
    parts = min(tiles, -(-of_group // units) + 1)
    z = sum(steps) * tokens * layout.RANKS * 4
    shared = ALIGNMENT + units * operand_columns(tokens) * layout.COLUMNS
    shared += inner_parts(tokens) * z + 4 * MOST_TOKENS + z
    shared += tiles * (2 * ROWS * 4 + max(steps) * ROWS * layout.RANKS * 2)
    shared += WARPGROUPS * SLICES * parts * tokens * ROWS * 4 + tiles * TILE_BYTES
    return Cut(blocks, tiles, parts, shared)


def fits(
    tokens: int, rows: tuple[int, ...], depth: int, steps: tuple[int, ...], device: int
) -> bool:
    """Whether there is shared memory for a product, and M is small enough."""
    if tokens > MOST_TOKENS:
        return False
    return cut(tokens, rows, depth, steps, device).shared + STATIC <= SHARED_LIMIT


def codes_shape(tokens: int, depth: int) -> tuple[int, int, int, int]:
    """Of the codes that `decode` takes."""
    return -(-depth // SLICES), operand_columns(tokens), 8, 16


def scales(tokens: int) -> int:
    """Elements of the tokens' scales that `decode` takes: M, filled up to 16 bytes."""
    return -(-tokens // 4) * 4


@cache
def _kernel(device: int, columns: int, groups: int, books: bool, half: bool) -> Kernel:
    constants = {
        "TOKENS": columns,
        "WARPGROUPS": WARPGROUPS,
        "AHEAD": AHEAD,
        "GROUPS": groups,
        "BOOKS": books,
        "INNER_PARTS": inner_parts(MOST_TOKENS),
        "HALF": half,
    }
    return Kernel("decode", constants, SHARED_LIMIT - STATIC)


def decode(inputs: Inputs, matrices: Sequence[Matrix]) -> None:
    """`y = W^ x^ + B z + bias` for weights that get the same activations, 1 to 8 tokens.

    Args:
        inputs: the activations; codes of `codes_shape`, scales as many as `scales` says.
        matrices: 1 to 4 of them, all with as many scales for 128 columns and the same codebooks.
    """
    first = matrices[0]
    _, depth, _ = first.chunks.data.shape
    tokens, device = first.y.shape[0], first.y.device.index or 0
    rows = tuple(matrix.y.shape[1] for matrix in matrices)
    assert inputs.codes.shape == codes_shape(tokens, depth)
    assert inputs.token_scale.numel() >= scales(tokens)
    steps = tuple(matrix.steps for matrix in matrices)
    way = cut(tokens, rows, depth, steps, device)
    problem = _Problem(
        inputs.codes.data_ptr(),
        inputs.token_scale.data_ptr(),
        address(inputs.inner),
        tokens=tokens,
        depth=depth,
        units=-(-depth // SLICES),
        rank_steps=sum(steps),
        most_steps=max(steps),
        most_tiles=way.tiles,
        parts=way.parts,
        books=fields(first.chunks.books),
    )
    extents = [-(-count // ROWS) for count in rows]
    fill(problem.matrices, matrices, extents)
    problem.tiles = sum(extents)
    groups, half = first.chunks.groups, first.y.dtype == torch.float16
    books = given(first.chunks.books)
    kernel = _kernel(device, operand_columns(tokens), groups, books, half)
    kernel.launch(problem, (way.blocks, 1), WARPGROUPS * 128, shared=way.shared)
