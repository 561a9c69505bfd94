"""`eigen.leading` in one launch, which nobody has to wait for: a program to a matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zqfp_convert.numerics.kernels.casts import on

WARPS = 8  # 95 us for 16 columns on an H200, where one warp takes 287
SWEEPS = 16  # at most; half of them do
DONE = 1e-28  # what the elements off the diagonal have of the energy at the end, at most


def leading(matrices: Tensor, count: int) -> Tensor:
    """As `eigen.leading`, for matrices that it takes; NaN for those that are not finite."""
    width = matrices.shape[-1]
    given = matrices.contiguous()
    found = torch.empty((*given.shape[:-1], count), dtype=given.dtype, device=given.device)
    with on(given):
        _leading[(given.numel() // width**2,)](
            given,
            found,
            width,
            count,
            SIZE=max(2, triton.next_power_of_2(width)),
            SWEEPS=SWEEPS,
            DONE=DONE,
            num_warps=WARPS,
        )
    return found


@triton.jit
def _leading(
    matrices: tl.tensor,
    found: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    SIZE: tl.constexpr,
    SWEEPS: tl.constexpr,
    DONE: tl.constexpr,
) -> None:
    """Jacobi's method: rotations of two rows and columns each, SIZE / 2 pairs of them at a time.

    Which pairs go together is the order of a round robin, so a sweep of SIZE - 1 steps has them
    all (Brent and Luk, "The solution of singular value and symmetric eigenvalue problems on
    multiprocessor arrays", SIAM J. Sci. Stat. Comput. 6, 1985). In float64.
    """
    matrices += tl.program_id(0) * width * width
    found += tl.program_id(0) * width * count
    i = tl.arange(0, SIZE)
    row, column = i[:, None], i[None, :]
    inside = (row < width) & (column < width)
    upper = tl.load(matrices + row * width + column, inside, other=0.0).to(tl.float64)
    lower = tl.load(matrices + column * width + row, inside, other=0.0).to(tl.float64)
    same = row == column
    A = 0.5 * (upper + lower)
    whole = tl.sum(tl.sum(tl.abs(A), 1), 0)
    A = A / tl.where(whole > 0, whole, 1.0)
    A = tl.where(same & (row >= width), -1.0, A)  # below all eigenvalues that are asked for
    V = tl.where(same, 1.0, 0.0).to(tl.float64)
    energy = tl.sum(tl.sum(A * A, 1), 0)
    left = tl.sum(tl.sum(tl.where(same, 0.0, A * A), 1), 0)
    sweep = 0
    while (sweep < SWEEPS) & (left > DONE * energy):
        for step in range(SIZE - 1):
            partner = (step - i + SIZE - 1) % (SIZE - 1)  # i + partner = step, modulo SIZE - 1
            odd = (step * (SIZE // 2)) % (SIZE - 1)  # its own partner by that: the last one's
            partner = tl.where(i == odd, SIZE - 1, tl.where(i == SIZE - 1, odd, partner))
            by_row = tl.broadcast_to(partner[:, None], [SIZE, SIZE])
            by_column = tl.broadcast_to(partner[None, :], [SIZE, SIZE])
            own = tl.sum(tl.where(same, A, 0.0), 1)
            others = tl.gather(A, by_row, 0)  # row i holds that of the partner
            theirs = tl.sum(tl.where(column == by_row, others, 0.0), 1)
            # Of both elements, as rounding makes them differ: partners have to turn alike.
            shared = tl.sum(tl.where(same, others, tl.where(column == by_row, A, 0.0)), 1) * 0.5
            apart = theirs - own
            sign = tl.where((apart > 0) | ((apart == 0) & (i < partner)), 1.0, -1.0)
            hypotenuse = tl.sqrt(apart * apart + 4.0 * shared * shared)
            long = tl.abs(apart) + hypotenuse
            tangent = tl.where(long > 0, 2.0 * shared * sign / tl.where(long > 0, long, 1.0), 0.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = tangent * cosine
            A = cosine[:, None] * A - sine[:, None] * others
            A = cosine[None, :] * A - sine[None, :] * tl.gather(A, by_column, 1)
            V = cosine[None, :] * V - sine[None, :] * tl.gather(V, by_column, 1)
        left = tl.sum(tl.sum(tl.where(same, 0.0, A * A), 1), 0)
        sweep += 1
    rows = tl.sum(tl.where(same, A, 0.0), 1)[:, None]  # the eigenvalues, and as columns
    columns = tl.sum(tl.where(same, A, 0.0), 0)[None, :]
    before = (rows > columns) | ((rows == columns) & (row < column))
    place = tl.sum(before.to(tl.int32), 0)[None, :]  # of each one's column
    finite = energy < float("inf")
    place = tl.where(finite, place, column)
    V = tl.where(finite, V, float("nan"))
    tl.store(found + row * count + place, V, (row < width) & (place < count))
