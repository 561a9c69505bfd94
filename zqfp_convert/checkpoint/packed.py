"""One packed layer: from codes, scales and factors to tensors on disk, and back with checks.

`pack` guarantees the rules of the format, `PackedLayer.check` holds read tensors to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
            CheckpointError: with the broken rule, the first one if several are.
        """
        rules = [*self._of_scales(), *self._of_codes(), *self._of_factors()]
        broken = torch.stack([rule.broken for rule in rules])  # for a GPU is waited once
        for rule, found in zip(rules, broken.tolist(), strict=True):
            if found:
                raise CheckpointError(
                    rule.name, self.name, rule.found.format(found), needed=rule.needed,
                    do="Convert the model again with zqfp-convert.",
                )  # fmt: skip

    def _of_scales(self) -> Iterator[_Rule]:
        if self.kind == "free":
            yield _Rule("scale-forbidden", "a scale that is 0, negative, NaN or infinite",
                        "positive, finite scales", _any_not_positive(self.scale))  # fmt: skip
            return
        yield _Rule("scale-forbidden", "exponent byte 255", "bytes from 0 to 254",
                    (self.scale == layout.E8M0_FORBIDDEN).any())  # fmt: skip
        if self.row_scale is not None:
            yield _Rule("row-scale", "a row scale that is 0, negative, NaN or infinite",
                        "positive, finite row scales",
                        _any_not_positive(self.row_scale))  # fmt: skip
            bias = layout.E8M0_BIAS
            yield _Rule("row-maximum", f"a row whose largest exponent byte is not {bias}",
                        str(bias), (self.scale.amax(1) != bias).any())  # fmt: skip
        span = self.scales().spans.max()
        yield _Rule("span", "span {}", f"at most {scales.MAX_SPAN}",
                    torch.where(span > scales.MAX_SPAN, span, 0))  # fmt: skip

    def _of_codes(self) -> Iterator[_Rule]:
        if self.columns % 2:
            yield _Rule("padding-nibble", "a last high nibble that is not 0", "0 for odd K",
                        (self.packed[:, -1] >> 4).any())  # fmt: skip
        if self.kind == "free":
            return
        spelled = self.scales()
        wanted = scales.canonical(self.codes() & 7, spelled)
        exponents, factors = wanted.exponent != spelled.exponent, wanted.factor != spelled.factor
        yield _Rule("zero-group", "a group or row of zeros with another scale than the format's",
                    "the row's largest exponent; for a row of zeros byte 127 and row scale 1",
                    exponents.any() | factors.any())  # fmt: skip
        if wanted.choice is not None and self.choice is not None:
            yield _Rule("codebook-choice",
                        "a bit that is not 0 for a group of zeros, or beyond the last row", "0",
                        (bits.pack(wanted.choice) != self.choice).any())  # fmt: skip

    def _of_factors(self) -> Iterator[_Rule]:
        for tensor in (self.lorc_A, self.lorc_B, self.lorc_scale):
            if tensor is not None:
                yield _Rule("lorc-value", "NaN or infinity in LoRC", "finite factors",
                            ~torch.isfinite(tensor.float()).all())  # fmt: skip
        if self.input_offset is not None:
            yield _Rule("offset-value", "NaN or infinity in the offset", "finite offsets",
                        ~torch.isfinite(self.input_offset).all())  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    """What a layer is held to.

    `broken` is a number `[]` on the layer's device, 0 where it is not; `found` may show it by {}.
    """

    name: str
    found: str
    needed: str
    broken: Tensor


def _any_not_positive(values: Tensor) -> Tensor:
    value = values.float()
    return ~((value > 0) & torch.isfinite(value)).all()


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
