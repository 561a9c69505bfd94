"""What the kernels are compared with: torch's products in bfloat16 and FP8, and their problem.

A contender is made with `(rows, columns, copies)` for a weight `[rows, columns]`; `prepare(tokens)`
makes inputs `[tokens, columns]`; `multiply(copy)` multiplies inputs that are already in the form
the kernel takes; `quantize()` makes that form of bfloat16 inputs, `quantize_and_multiply(copy)`
does both. `error()` compares with float32, and `weight_bytes` is what one call has to read.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

GROUP = 128
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CHECKED = 256  # tokens that are compared with float32


class Problem:
    """A random weight as it lies in the file (M2), and products with it in float32.

    Attributes:
        books: the magnitudes that codes stand for, of one codebook or two.
        second: bool `[N, G]`, which groups have the second one.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: str = "cuda",
        books: tuple[tuple[float, ...], ...] = (MAGNITUDES,),
    ) -> None:
        self.rows, self.columns, self.books = rows, columns, books
        groups = rows, columns // GROUP
        self.second = torch.randint(len(books), groups, device=device).bool()
        # uint8 [N, K / 2], even columns in the low nibble
        self.packed = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
        # uint8 [N, G], the largest of each row 127
        below = torch.randint(7, (rows, columns // GROUP), dtype=torch.uint8, device=device)
        self.exponents = 127 - below + below.amin(1, keepdim=True)
        scale = (0.5 + torch.rand(rows, device=device)) * columns**-0.5
        self.row_scale = scale.bfloat16()  # [N]

    def dense(self, part: slice) -> Tensor:
        """Some rows of the weight, float32."""
        books = torch.tensor(self.books, device=self.packed.device)
        table = torch.cat([books, -books], 1).flatten()
        packed = self.packed[part].int()
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)  # [n, K]
        scales = torch.exp2(self.exponents[part].float() - 127) * self.row_scale[part, None].float()
        codes += 16 * self.second[part].repeat_interleave(GROUP, 1)
        return table[codes] * scales.repeat_interleave(GROUP, 1)

    def product(self, x: Tensor) -> Tensor:
        """`x [M, K]` times the weight, float32 `[M, N]`."""
        parts = [slice(start, start + 4096) for start in range(0, self.rows, 4096)]
        return torch.cat([x.float() @ self.dense(part).t() for part in parts], 1)

    def error(self, have: Tensor, x: Tensor) -> float:
        """Relative Frobenius error of a product `[M, N]` with `x [M, K]`, on some tokens."""
        want = self.product(x[:CHECKED])
        return float((have[:CHECKED].float() - want).norm() / want.norm())


def random_inputs(tokens: int, columns: int) -> Tensor:
    """Bfloat16 `[M, K]`."""
    return torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes `[M, K]` and float32 scales `[M, 1]`, for where that is not what is measured."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(2.0**-100) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class Bf16:
    """`torch.mm` in bfloat16."""

    name: ClassVar[str] = "bf16"

    def __init__(self, rows: int, columns: int, copies: int) -> None:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        self.weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        self.weight_bytes = weight.nbytes

    @staticmethod
    def size(rows: int, columns: int) -> int:
        return 2 * rows * columns

    def prepare(self, tokens: int) -> None:
        rows, columns = self.weights[0].shape
        self.x = random_inputs(tokens, columns)
        self.y = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")

    def multiply(self, copy: int) -> Tensor:
        return torch.mm(self.x, self.weights[copy].t(), out=self.y)


class Fp8:
    """`torch._scaled_mm` in E4M3, a scale for each row and token, fast accumulation."""

    name: ClassVar[str] = "fp8"

    def __init__(self, rows: int, columns: int, copies: int) -> None:
        weight = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)
        self.weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        self.scale = torch.rand(1, rows, device="cuda")
        self.weight_bytes = weight.nbytes

    @staticmethod
    def size(rows: int, columns: int) -> int:
        return rows * columns

    def prepare(self, tokens: int) -> None:
        padded = -(-tokens // 16) * 16  # what it takes
        self.x, self.x_scale = quantized(random_inputs(padded, self.weights[0].shape[1]))

    def multiply(self, copy: int) -> Tensor:
        return torch._scaled_mm(
            self.x,
            self.weights[copy].t(),
            scale_a=self.x_scale,
            scale_b=self.scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
