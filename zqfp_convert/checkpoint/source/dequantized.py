"""A source whose weights are stored in FP8 or in MXFP4, as if they were stored in bfloat16.

`weight_scale_inv` is a grid of numbers that blocks of an FP8 weight are multiplied with
(DeepSeek-V3), or one number for all of it (Ministral 3); `*_blocks` and `*_scales` (gpt-oss) are
pairs of E2M1 codes and an E8M0 scale for 32 of them (OCP Microscaling Formats, version 1.0). Values
are those that transformers dequantizes to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards, TensorInfo
from zqfp_convert.errors import SourceError
from zqfp_convert.numerics import codebook, nibbles

METHODS = ("fp8", "mxfp4")
SCALE_INV = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
FP8 = ("F8_E4M3", "F8_E5M2")
OF_INPUTS = ("activation_scale", "input_scale")  # that FP8 weights come with, for static scales
MX_GROUP = 32
E8M0_BIAS = 127
DTYPE = torch.bfloat16
ROWS = 4096  # dequantized at a time


class DequantizedShards(Shards):
    """The tensors of a folder, dequantized as they are asked for.

    Scales, of inputs too, are not listed. `X_blocks` and `X_scales`, `[experts, N, K / 32, 16]` and
    `[experts, N, K / 32]`, are one tensor `X`, `[experts, K, N]`.
    """

    def __init__(self, base: Shards, block: tuple[int, int] | None) -> None:
        """`block` is the shape of FP8 blocks, by the configuration, if it says so.

        Raises:
            SourceError: a quantized tensor without scales, or with scales that do not fit.
        """
        self._base, self._block = base, block
        held = base.tensors
        tensors: dict[str, TensorInfo] = {}
        shape: tuple[int, ...]
        self.quantized = 0  # how many tensors are
        for name, info in held.items():
            if name.endswith(SCALE_INV) and name.removesuffix(SCALE_INV) in held:
                continue
            if self._is_of_inputs(name):
                continue
            if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in held:
                continue
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in held:
                self._check_mx(name, info)
                count, rows, groups, _ = info.shape
                name, shape = name.removesuffix(BLOCKS), (count, groups * MX_GROUP, rows)
            elif info.dtype in FP8:
                self._check_fp8(name, info)
                shape = info.shape
            else:
                tensors[name] = info
                continue
            self.quantized += 1
            size = DTYPE.itemsize * torch.Size(shape).numel()
            tensors[name] = TensorInfo(info.file, "BF16", shape, size)
        super().__init__(base.folder, tensors)

    @property
    def stored_bytes(self) -> int:
        """As in `Shards`."""
        return self._base.stored_bytes

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As in `Shards`."""
        names = list(names)
        plain = self._base.read([name for name in names if self._is_plain(name)], device)

        def whole(name: str) -> Tensor:
            return self._base.read([name], device)[name]

        return {
            name: plain[name] if name in plain else self._dequantized(name, whole) for name in names
        }

    def read_at(self, name: str, index: int) -> Tensor:
        """As in `Shards`."""
        if self._is_plain(name):
            return self._base.read_at(name, index)
        if len(self.tensors[name].shape) == 2:  # a row has no blocks of its own
            return self.read([name])[name][index]
        return self._dequantized(name, lambda part: self._base.read_at(part, index))

    def _is_plain(self, name: str) -> bool:
        return name in self._base.tensors and self._base.tensors[name].dtype not in FP8

    def _dequantized(self, name: str, read: Any) -> Tensor:
        if name in self._base.tensors:
            return from_blocks(read(name), read(name + SCALE_INV), self._block)
        return from_mxfp4(read(name + BLOCKS), read(name + SCALES))

    def _is_of_inputs(self, name: str) -> bool:
        """Whether it is a scale of what an FP8 weight is multiplied with."""
        for ending in OF_INPUTS:
            weight = name.removesuffix("." + ending) + ".weight"
            if name.endswith("_" + ending):  # experts, several matrices in one tensor
                weight = name.removesuffix("_" + ending)
            info = self._base.tensors.get(weight)
            if name.endswith(ending) and info is not None and info.dtype in FP8:
                return True
        return False

    def _check_fp8(self, name: str, info: TensorInfo) -> None:
        scale = self._base.tensors.get(name + SCALE_INV)
        grid = None if scale is None else _grid(info.shape, scale.shape)
        if grid is None or _block(info.shape, grid, self._block) is None:
            found = "no scales" if scale is None else f"scales {list(scale.shape)}"
            raise SourceError(
                f"{name} in {info.file}",
                f"{found} for an FP8 weight {list(info.shape)}",
                needed=f"'{name}{SCALE_INV}', one scale for the weight or one for each block of it",
                do="Convert the model that this one was made from; or download this one again, if "
                "it is not whole.",
            )

    def _check_mx(self, name: str, info: TensorInfo) -> None:
        scales = self._base.tensors[name.removesuffix(BLOCKS) + SCALES]
        right = len(info.shape) == 4 and info.shape[:-1] == scales.shape
        if not right or info.shape[-1] != MX_GROUP // 2 or {info.dtype, scales.dtype} != {"U8"}:
            raise SourceError(
                f"{name} in {info.file}",
                f"{info.dtype} {list(info.shape)} with scales {scales.dtype} {list(scales.shape)}",
                needed="U8 [experts, N, K / 32, 16] with scales U8 [experts, N, K / 32] (MXFP4)",
                do="Download the model again, or convert the one that this one was made from.",
            )


def from_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """An FP8 weight `[..., N, K]` times the scales `[..., n, k]` of its blocks, in bfloat16.

    Scales `[...]`, or `[1]` for one matrix, are of whole matrices. They are floating numbers, or
    uint8 exponents (E8M0); products are rounded once.
    """
    grid = _grid(tuple(weight.shape), tuple(scales.shape))
    assert grid is not None
    size = _block(tuple(weight.shape), grid, block)
    assert size is not None
    scales = scales.reshape(grid)
    rows, columns = size
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - E8M0_BIAS)
    result = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    for at in range(0, weight.shape[-2], ROWS):
        part = weight[..., at : at + ROWS, :].float()
        here = torch.arange(at, at + part.shape[-2], device=scales.device) // rows
        each = scales[..., here, :].float().repeat_interleave(columns, -1)
        result[..., at : at + ROWS, :] = (part * each[..., : part.shape[-1]]).to(DTYPE)
    return result


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 codes uint8 `[..., N, G, 16]` with scales uint8 `[..., N, G]`, `[..., 32 G, N]` bf16.

    Each value is a code times a power of two, which bfloat16 holds exactly.
    """
    codes = nibbles.unpack(blocks, MX_GROUP)  # [..., N, G, 32]
    value = (
        codebook.decode(codes, codebook.E2M1) * torch.exp2(scales.float() - E8M0_BIAS)[..., None]
    )
    return value.to(DTYPE).flatten(-2).transpose(-1, -2)


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """The scales of an FP8 weight as a grid for each matrix; None if there are not as many."""
    matrices = shape[:-2]
    if len(shape) < 2:
        return None
    if scales == matrices or (scales == (1,) and not matrices):
        return (*matrices, 1, 1)
    return scales if len(scales) == len(shape) and scales[:-2] == matrices else None


def _block(
    shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a block; None if no block divides the weight so."""
    (rows, columns), (down, across) = shape[-2:], grid[-2:]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (down, across):
        return block
    if down and across and rows % down == 0 and columns % across == 0:
        return rows // down, columns // across
    return None
