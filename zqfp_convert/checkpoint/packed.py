"""One packed layer: from codes, scales and factors to tensors on disk, and back with checks.

`pack` guarantees the rules of the format, `PackedLayer.check` holds read tensors to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.errors import CheckpointError
from zqfp_convert.numerics import bits, codebook, nibbles, scales
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import Kind, Scales


@dataclass(frozen=True)
class PackedLayer:
    """The tensors of a quantized linear of shape `[N, K]`, as they lie on disk.

    Attributes:
        name: on disk.
        kind, group_size: of the scales; `group_size` is K for groups of a whole row.
        columns: K.
        packed: uint8 `[N, ceil(K / 2)]`.
        scale: uint8 `[N, G]` (E8M0), or bfloat16 where scales are free.
        row_scale: bfloat16 `[N]`, M2 only.
        lorc_A, lorc_B: `[r, K]`, `[N, r]`, float8_e4m3fn or bfloat16, or None.
        lorc_scale: float32 `[r]`, with float8 factors.
        input_offset: bfloat16 `[K]`, or None.
        books: one codebook, or two.
        choice: uint8 `[ceil(N / 8), G]`, a bit for each group, with two codebooks.
    """

    name: str
    kind: Kind
    group_size: int
    columns: int
    packed: Tensor
    scale: Tensor
    row_scale: Tensor | None = None
    lorc_A: Tensor | None = None
    lorc_B: Tensor | None = None
    lorc_scale: Tensor | None = None
    input_offset: Tensor | None = None
    books: tuple[Codebook, ...] = (codebook.E2M1,)
    choice: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.packed.shape[0]

    @property
    def rank(self) -> int:
        """r, 0 without low-rank factors."""
        return 0 if self.lorc_A is None else self.lorc_A.shape[0]

    @property
    def bits(self) -> float:
        """Bits a weight, counted from all the bytes that stand for the weight in the file."""
        return 8 * sum(t.nbytes for t in self.tensors().values()) / (self.rows * self.columns)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names on disk."""
        parts = {
            layout.PACKED: self.packed,
            layout.SCALE: self.scale,
            layout.ROW_SCALE: self.row_scale,
            layout.CODEBOOK: self.choice,
            layout.LORC_A: self.lorc_A,
            layout.LORC_B: self.lorc_B,
            layout.LORC_SCALE: self.lorc_scale,
            layout.INPUT_OFFSET: self.input_offset,
        }
        return {self.name + key: tensor for key, tensor in parts.items() if tensor is not None}

    def codes(self) -> Tensor:
        """uint8 `[N, K]`."""
        return nibbles.unpack(self.packed, self.columns)

    def scales(self) -> Scales:
        """The scales that the tensors spell."""
        if self.kind == "free":
            value = self.scale.float()
            exponent = torch.zeros_like(value, dtype=torch.int16)
            return Scales("free", value, exponent, self.group_size)
        exponent = self.scale.to(torch.int16) - layout.E8M0_BIAS
        if self.row_scale is None:
            factor = torch.ones(self.rows, 1, device=exponent.device)
        else:
            factor = self.row_scale.float()[:, None]
        choice = None if self.choice is None else bits.unpack(self.choice, self.rows)
        return Scales(self.kind, factor, exponent, self.group_size, books=self.books, choice=choice)

    def dequantize(self) -> Tensor:
        """The float32 weight `[N, K]`, without low-rank compensation."""
        return scales.dequantize(self.codes(), self.scales())

    def lorc_factors(self) -> tuple[Tensor, Tensor] | None:
        """`diag(s) A [r, K]` and `B [N, r]` in float32, or None."""
        if self.lorc_A is None or self.lorc_B is None:
            return None
        A = self.lorc_A.float()
        if self.lorc_scale is not None:
            A = A * self.lorc_scale[:, None]
        return A, self.lorc_B.float()

    def lorc_product(self) -> Tensor | None:
        """`B diag(s) A`, float32 `[N, K]`, or None."""
        factors = self.lorc_factors()
        return None if factors is None else factors[1] @ factors[0]

    def approximation(self) -> Tensor:
        """The float32 weight `[N, K]`, low-rank compensation included."""
        weight, product = self.dequantize(), self.lorc_product()
        return weight if product is None else weight + product

    def to(self, device: torch.device, *, wait: bool = True) -> PackedLayer:
        """The same with its tensors on another device.

        Without `wait` those that go from a GPU to the CPU are there, in locked memory, when the
        GPU's current stream has come so far.
        """
        parts: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {key: value.to(device, non_blocking=not wait) for key, value in parts.items()}
        return replace(self, **moved)

    def check(self) -> None:
        """Hold the layer to every rule of the format on values.

        Raises:
            CheckpointError: with the broken rule.
        """
        self._check_scales()
        if self.columns % 2 and bool((self.packed[:, -1] >> 4).any()):
            self._break("padding-nibble", "a last high nibble that is not 0", needed="0 for odd K")
        if self.kind != "free":
            self._check_zero_groups()
        for tensor in (self.lorc_A, self.lorc_B, self.lorc_scale):
            if tensor is not None and not bool(torch.isfinite(tensor.float()).all()):
                self._break("lorc-value", "NaN or infinity in LoRC", needed="finite factors")
        if self.input_offset is not None and not bool(torch.isfinite(self.input_offset).all()):
            self._break("offset-value", "NaN or infinity in the offset", needed="finite offsets")

    def _check_scales(self) -> None:
        if self.kind == "free":
            value = self.scale.float()
            if not bool(((value > 0) & torch.isfinite(value)).all()):
                self._break("scale-forbidden", "a scale that is 0, negative, NaN or infinite",
                            needed="positive, finite scales")  # fmt: skip
            return
        if bool((self.scale == layout.E8M0_FORBIDDEN).any()):
            self._break("scale-forbidden", "exponent byte 255", needed="bytes from 0 to 254")
        if self.row_scale is not None:
            value = self.row_scale.float()
            if not bool(((value > 0) & torch.isfinite(value)).all()):
                self._break("row-scale", "a row scale that is 0, negative, NaN or infinite",
                            needed="positive, finite row scales")  # fmt: skip
            if bool((self.scale.amax(1) != layout.E8M0_BIAS).any()):
                self._break("row-maximum", f"a row whose largest exponent byte is not "
                            f"{layout.E8M0_BIAS}", needed=str(layout.E8M0_BIAS))  # fmt: skip
        span = self.scales().span
        if span is not None and span > scales.MAX_SPAN:
            self._break("span", f"span {span}", needed=f"at most {scales.MAX_SPAN}")

    def _check_zero_groups(self) -> None:
        spelled = self.scales()
        magnitudes = self.codes() & 7
        wanted = scales.canonical(magnitudes, spelled)
        same = torch.equal(wanted.exponent, spelled.exponent)
        if not same or not torch.equal(wanted.factor, spelled.factor):
            self._break(
                "zero-group",
                "a group or row of zeros with another scale than the format's",
                needed="the row's largest exponent; for a row of zeros byte 127 and row scale 1",
            )
        if self.choice is None:
            return
        assert wanted.choice is not None
        if not torch.equal(bits.pack(wanted.choice), self.choice):
            self._break(
                "codebook-choice",
                "a bit that is not 0 for a group of zeros, or beyond the last row",
                needed="0",
            )

    def _break(self, rule: str, found: str, *, needed: str) -> None:
        raise CheckpointError(
            rule, self.name, found, needed=needed, do="Convert the model again with zqfp-convert."
        )


def unpack(
    name: str,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    group_size: int,
    columns: int,
    books: tuple[Codebook, ...],
) -> PackedLayer:
    """The layer that `tensors()` has spelled, among others maybe; nothing is checked."""

    def optional(suffix: str) -> Tensor | None:
        return tensors.get(name + suffix)

    return PackedLayer(
        name,
        kind,
        group_size,
        columns,
        tensors[name + layout.PACKED],
        tensors[name + layout.SCALE],
        optional(layout.ROW_SCALE),
        optional(layout.LORC_A),
        optional(layout.LORC_B),
        optional(layout.LORC_SCALE),
        optional(layout.INPUT_OFFSET),
        books=books,
        choice=optional(layout.CODEBOOK),
    )


def pack(
    name: str,
    codes: Tensor,
    chosen: Scales,
    factors: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> PackedLayer:
    """Pack codes uint8 `[N, K]`, their scales and LoRC factors (A, B, scale)."""
    exponent = (chosen.exponent + layout.E8M0_BIAS).to(torch.uint8)
    A, B, lorc_scale = factors if factors is not None else (None, None, None)

    def plain(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().contiguous()

    scale = chosen.factor.bfloat16() if chosen.kind == "free" else exponent
    return PackedLayer(
        name,
        chosen.kind,
        chosen.group_size,
        codes.shape[1],
        nibbles.pack(codes).contiguous(),
        scale.contiguous(),
        plain(chosen.factor[:, 0].bfloat16()) if chosen.kind == "m2" else None,
        plain(A),
        plain(B),
        plain(lorc_scale),
        books=chosen.books,
        choice=None if chosen.choice is None else plain(bits.pack(chosen.choice)),
    )
