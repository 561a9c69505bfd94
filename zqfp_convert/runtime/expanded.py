"""The expanded path: the layer's exact FP8 matrix in a shared scratch buffer, then `_scaled_mm`.

For GPUs with FP8 tensor cores. With `s = 6 - (b_max - b)` in [-5, 6] each code times 2^s is an
E4M3 number, so nothing is lost by the expansion; what is left of the scale, one float32 for each
row, is applied to the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from zqfp_convert.numerics import bits, codebook, fp8, nibbles
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import MAX_SPAN, power_of_two
from zqfp_convert.runtime import operators
from zqfp_convert.runtime.scratch import scratch as scratch_of

TOP_SHIFT = 6  # the shift of a row's largest exponent: 7 * 2^6 = 448 is the largest product
ALIGNMENT = 16  # `_scaled_mm` wants every extent to be a multiple of it
COLUMNS = 128  # the kernels' activations come in blocks of so many
CHUNK = 1 << 24  # weights expanded at a time, to bound the temporary memory


def available(device: torch.device) -> bool:
    """Whether the device multiplies FP8 matrices (compute capability 8.9 or higher)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def shift_table(device: torch.device | str = "cpu", book: Codebook = codebook.E2M1) -> Tensor:
    """E4M3 of every code times 2^(6 - d), for d from 0 to 11: uint8 `[12, 16]`, exact."""
    values = torch.tensor(book + tuple(-value for value in book))
    shifts = TOP_SHIFT - torch.arange(MAX_SPAN + 1)
    table = fp8.encode(values * power_of_two(shifts)[:, None])  # [12, 16]
    return table.view(torch.uint8).to(device)


def expand(
    packed: Tensor,
    exponents: Tensor,
    group_size: int,
    out: Tensor,
    books: tuple[Codebook, ...] = (codebook.E2M1,),
    choice: Tensor | None = None,
) -> None:
    """Write the FP8 matrix of a layer into `out`.

    Args:
        packed: uint8 `[N, ceil(K / 2)]`.
        exponents: uint8 `[N, G]`, the E8M0 bytes; span at most 11.
        out: uint8 `[N', K']` with `N' >= N`, `K' >= K`, multiples of 16; what lies beyond N and K
            is set to 0.
        books, choice: as in `PackedLayer`.
    """
    rows, columns = packed.shape[0], out.shape[1]
    table = torch.cat([shift_table(packed.device, book) for book in books])
    below = (exponents.amax(1, keepdim=True) - exponents).int()  # [N, G], 0 to 11
    if choice is not None:  # the second codebook's shifts come after the first one's
        below += (MAX_SPAN + 1) * bits.unpack(choice, rows).int()
    step = max(1, CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        codes = nibbles.unpack(packed[part], 2 * packed.shape[1]).int()[:, :columns]
        shifts = below[part].repeat_interleave(group_size, 1)[:, : codes.shape[1]]
        codes = codes[:, : shifts.shape[1]]
        out[part, : codes.shape[1]] = table[shifts, codes]
        out[part, codes.shape[1] :] = 0
    out[rows:] = 0


def row_factor(exponents: Tensor, row_scale: Tensor | None) -> Tensor:
    """What is left of each row's scale: `row_scale * 2^(b_max - 127 - 6)`, float32 `[N]`."""
    left = power_of_two(exponents.amax(1).int() - 127 - TOP_SHIFT)
    return left if row_scale is None else left * row_scale.float()


def matrix_factor(exponents: Tensor, row_scale: Tensor | None) -> Tensor:
    """`row_factor` for the rows of the FP8 matrix, ones beyond N: float32 `[N']`."""
    factor = row_factor(exponents, row_scale)
    return torch.nn.functional.pad(factor, (0, -len(factor) % ALIGNMENT), value=1.0)


def matrix_shape(rows: int, columns: int) -> tuple[int, int]:
    """The extents `[N', K']` of the FP8 matrix of a layer `[N, K]` in a model's scratch buffer."""
    return rows + -rows % ALIGNMENT, columns + -columns % COLUMNS


def linear(
    x: Tensor,
    matrix: Tensor,
    rows: int,
    factor: Tensor,
    lorc: tuple[Tensor, Tensor, Tensor | None] | None,
    bias: Tensor | None,
    input_offset: Tensor | None,
) -> Tensor:
    """Multiply on the FP8 tensor cores; the same function as `reference.linear`.

    Args:
        x: `[..., K]`, bfloat16 or float16.
        matrix: float8_e4m3fn `[N', K']` from `expand`.
        rows: N.
        factor: float32 `[N']`, from `matrix_factor`.
        lorc: `A [r, K]` and `B [N, r]` as in the file, and the scales `[r]` or None.
        bias, input_offset: as in `reference.linear`.

    Returns:
        `[..., N]` in the dtype of x.
    """
    tokens = x.reshape(-1, x.shape[-1])  # [M, K]
    if not tokens.shape[0]:
        return x.new_empty(*x.shape[:-1], rows)
    seen = tokens.float() if input_offset is None else tokens.float() - input_offset.float()
    codes, scale = fp8.quantize(seen)  # [M, K], [M, 1]
    z = B = None
    if lorc is not None:
        A, B, lorc_scale = lorc
        inner = codes.to(torch.bfloat16) @ A.to(torch.bfloat16).t()  # [M, r]
        z = inner.float() * scale
        z = z if lorc_scale is None else z * lorc_scale
    missing = (0, matrix.shape[1] - codes.shape[1])
    codes = torch.nn.functional.pad(codes.view(torch.uint8), missing).view(fp8.DTYPE)
    y = finish(product(codes, scale, matrix, factor, rows), z, B, bias, x.dtype)
    return y.reshape(*x.shape[:-1], rows)


def product(codes: Tensor, scale: Tensor, matrix: Tensor, factor: Tensor, rows: int) -> Tensor:
    """`factor * scale * (matrix codes)`, bfloat16 `[M, N]`.

    Args:
        codes: float8_e4m3fn `[M, K']`.
        scale: float32 `[M, 1]`.
        matrix: float8_e4m3fn `[N', K']`.
        factor: float32 `[N']`.
        rows: N.
    """
    tokens = codes.shape[0]
    missing = (0, 0, 0, -tokens % ALIGNMENT)
    if missing[3]:
        codes = torch.nn.functional.pad(codes.view(torch.uint8), missing).view(fp8.DTYPE)
        scale = torch.nn.functional.pad(scale, missing, value=1.0)
    y = torch._scaled_mm(
        codes,
        matrix.t(),
        scale_a=scale,
        scale_b=factor[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y[:tokens, :rows]


def finish(
    y: Tensor, z: Tensor | None, B: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`y + B z + bias`, rounded once beside the rounding of y.

    Args:
        y: bfloat16 `[M, N]`; overwritten.
        z: float32 `[M, r]`, `s (A x^)`, and
        B: `[N, r]`, float8_e4m3fn or bfloat16; or None and None.
        bias: `[N]`, any floating dtype, or None.
        dtype: of the result.

    Returns:
        `[M, N]`, contiguous.
    """
    left, right = [], []
    if z is not None and B is not None:
        left += _parts(z)
        right += [B.to(torch.bfloat16)] * 2
    if bias is not None:  # two more ranks, whose z is 1
        left.append(y.new_ones(y.shape[0], 2))
        right += [part[:, None] for part in _parts(bias)]
    if left:
        y = y if dtype == torch.bfloat16 else y.float()  # float16 has more bits to lose
        y.addmm_(torch.cat(left, 1).to(y.dtype), torch.cat(right, 1).t().to(y.dtype))
    return y.to(dtype).contiguous()


def _parts(values: Tensor) -> list[Tensor]:
    """Two bfloat16 tensors whose sum has 16 bits of the values."""
    high = values.to(torch.bfloat16)
    return [high, (values.float() - high.float()).to(torch.bfloat16)]


def _work(
    x: Tensor,
    rows: int,
    packed: Tensor,
    exponents: Tensor,
    group_size: int,
    row_scale: Tensor | None,
    bias: Tensor | None,
    input_offset: Tensor | None,
    lorc_A: Tensor | None,
    lorc_B: Tensor | None,
    lorc_scale: Tensor | None,
    magnitudes: Sequence[float],
    choice: Tensor | None,
    scratch: int,
) -> Tensor:
    """The expanded path from the tensors as they lie on disk, x `[M, K]`.

    `magnitudes` are those of one codebook after another.
    """
    matrix = scratch_of(scratch).matrix(*matrix_shape(rows, x.shape[1]), x.device)
    expand(packed, exponents, group_size, matrix, codebook.split(magnitudes), choice)
    factor = matrix_factor(exponents, row_scale)
    lorc = None if lorc_A is None or lorc_B is None else (lorc_A, lorc_B, lorc_scale)
    return linear(x, matrix.view(fp8.DTYPE), rows, factor, lorc, bias, input_offset)


operator = operators.register("expanded_linear", _work)
