"""The quantized linear layer: weights stay packed, the way to multiply is chosen for each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.runtime import expanded, paths, reference
from zqfp_convert.runtime.gradients import StraightThrough
from zqfp_convert.runtime.paths import PATH_VARIABLE, Kernels, Path
from zqfp_convert.runtime.scratch import Scratch

if TYPE_CHECKING:
    from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights
    from zqfp_convert.runtime.kernels.portable.linear import PortableWeights
    from zqfp_convert.runtime.siblings import Siblings

__all__ = ["PATH_VARIABLE", "Path", "QuantizedLinear", "Scratch"]


class QuantizedLinear(nn.Module):
    """`y = W^ x^ + B (s (A x^)) + bias` for a packed weight `[N, K]`.

    On a GPU with kernels for it the weights lie in the order of these, in `arranged`, and nowhere
    else; `packed` and `state_dict` give them as they lie on disk wherever they are.
    `ZQFP_PATH=fused|expanded|reference` in the environment forces a path.
    """

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_row_scale: Tensor | None
    weight_codebook: Tensor | None
    lorc_A: Tensor | None
    lorc_B: Tensor | None
    lorc_scale: Tensor | None
    input_offset: Tensor | None
    bias: Tensor | None
    arranged: HopperWeights | PortableWeights | None

    def __init__(
        self,
        layer: PackedLayer,
        bias: Tensor | None,
        scratch: Scratch,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is that of the model around, and of `weight` for code that asks for it."""
        super().__init__()
        self.dtype = dtype
        self.name, self.kind, self.group_size = layer.name, layer.kind, layer.group_size
        self.in_features, self.out_features = layer.columns, layer.rows
        self.books = layer.books
        self.register_buffer("weight_packed", layer.packed)
        self.register_buffer("weight_scale", layer.scale)
        self.register_buffer("weight_row_scale", layer.row_scale)
        self.register_buffer("weight_codebook", layer.choice)
        self.register_buffer("lorc_A", layer.lorc_A)
        self.register_buffer("lorc_B", layer.lorc_B)
        self.register_buffer("lorc_scale", layer.lorc_scale)
        self.register_buffer("input_offset", layer.input_offset)
        self.register_buffer("bias", bias)
        self.register_module("arranged", None)
        self._scratch = scratch
        self._siblings: Siblings | None = None
        self._place = 0
        self._about = f"{self.kind} scales in groups of {self.group_size}, rank {self.rank}"
        self._arrange()

    @property
    def rank(self) -> int:
        """r, 0 without low-rank factors."""
        return 0 if self.lorc_A is None else self.lorc_A.shape[0]

    def packed(self) -> PackedLayer:
        """The layer's tensors as they lie on disk (sharing memory, where they still do)."""
        if self.arranged is None:
            assert self.weight_packed is not None
            assert self.weight_scale is not None
            packed, scale = self.weight_packed, self.weight_scale
        else:
            packed, scale = self.arranged.restore()
        return PackedLayer(
            self.name,
            self.kind,
            self.group_size,
            self.in_features,
            packed,
            scale,
            self.weight_row_scale,
            self.lorc_A,
            self.lorc_B,
            self.lorc_scale,
            self.input_offset,
            self.books,
            self.weight_codebook,
        )

    def take(self, layer: PackedLayer, bias: Tensor | None) -> None:
        """Copy a layer of the same shapes into the buffers that are there, where they lie.

        They are part of the state dict from then on.
        """
        self._restore()
        given = {**layer.tensors(), self.name + layout.BIAS: bias}
        for name, buffer in self.named_buffers(recurse=False):
            tensor = given[f"{self.name}.{name}"]
            assert tensor is not None
            buffer.copy_(tensor)
        self._non_persistent_buffers_set = set()
        self._arrange()

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]` it stands for, LoRC included, made anew at each call.

        For models that read the weight of a linear themselves instead of calling it.
        """
        layer = self.packed()
        compensation = layer.lorc_product()
        weight = layer.dequantize()
        return (weight if compensation is None else weight + compensation).to(self.dtype)

    def path(self, x: Tensor) -> Path:
        """The way to multiply for an input, when it multiplies by itself.

        Raises:
            OptionError: `ZQFP_PATH` names no path, or one that this device or dtype cannot take.
        """
        way = self._wanted(x)
        if way != "auto":
            return way
        assert self.arranged is not None
        tokens = x.numel() // self.in_features
        return "expanded" if self.arranged.prefers_expanded(tokens, x.dtype) else "fused"

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]` in the dtype of x; differentiable in x.

        Raises:
            OptionError: as `path`.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        way = self._wanted(x)
        if way == "reference":
            layer = self.packed()
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                self._check(x)
                return self._reference(x, layer)
            factors = layer.lorc_factors()
            return reference.linear(x, layer.dequantize(), factors, self.bias, self.input_offset)
        self._check(x)
        tokens = x.reshape(-1, self.in_features)  # [M, K]
        made = None
        if self._siblings is not None:
            made = self._siblings.output(self._place, self, x, way, self._scratch.key)
        if made is not None:
            y = made
        elif self.arranged is not None:
            y = self.arranged.multiply(tokens, way, self._scratch.key)
        else:
            y = expanded.operator(
                tokens,
                self.out_features,
                self.weight_packed,
                self.weight_scale,
                self.group_size,
                self.weight_row_scale,
                self.bias,
                self.input_offset,
                self.lorc_A,
                self.lorc_B,
                self.lorc_scale,
                [magnitude for book in self.books for magnitude in book],
                self.weight_codebook,
                self._scratch.key,
            )
        return y.reshape(*x.shape[:-1], self.out_features)

    def _reference(self, x: Tensor, layer: PackedLayer) -> Tensor:
        """The reference path as one operator, for torch.compile: the same bytes as without."""
        y = reference.operator(
            x.reshape(-1, self.in_features),
            self.out_features,
            layer.packed,
            layer.scale,
            layer.kind,
            layer.group_size,
            layer.row_scale,
            self.bias,
            layer.input_offset,
            layer.lorc_A,
            layer.lorc_B,
            layer.lorc_scale,
            [magnitude for book in layer.books for magnitude in book],
            layer.choice,
        )
        return y.reshape(*x.shape[:-1], self.out_features)

    def join(self, siblings: Siblings, place: int) -> None:
        """Share the work with linears that get the same input; `place` is its own among them."""
        self._siblings, self._place = siblings, place

    def _check(self, x: Tensor) -> None:
        """Kernels get addresses, so what does not fit must not reach them."""
        if x.shape[-1] != self.in_features or x.device != self._device:
            raise OptionError(
                "the input of a quantized linear",
                f"{x.shape[-1]} features on {x.device}",
                needed=f"{self.in_features} features on {self._device}",
                do="Move the input to the model's device, or look at what comes before the layer.",
            )

    def _wanted(self, x: Tensor) -> paths.Wanted:
        return paths.wanted(self._kernels, x, self._about)

    @property
    def _device(self) -> torch.device:
        """Where the weights are."""
        if self.arranged is not None:
            return self.arranged.row_top.device
        assert self.weight_packed is not None
        return self.weight_packed.device

    def _arrange(self) -> None:
        """Lay the weights out for the kernels of the device they have arrived on, if it has any."""
        if self._siblings is not None:
            self._siblings.forget()
        layer = self.packed()
        device = layer.packed.device
        self._kernels: Kernels = paths.kernels_for(
            device, self.kind, self.group_size, self.in_features, self.rank
        )
        match self._kernels:
            case "hopper":
                from zqfp_convert.runtime.kernels.hopper.linear import HopperWeights

                self.arranged = HopperWeights(layer, self.bias)
            case "portable":
                from zqfp_convert.runtime.kernels.portable.linear import PortableWeights

                self.arranged = PortableWeights(layer, self.bias)
        if self.arranged is not None:
            self.weight_packed = self.weight_scale = None
        if self._kernels != "none":
            shape = expanded.matrix_shape(self.out_features, self.in_features)
            self._scratch.matrix(*shape, device)

    def _restore(self) -> None:
        """Back to the order on disk."""
        layer = self.packed()
        self.weight_packed, self.weight_scale = layer.packed, layer.scale
        self.arranged, self._kernels = None, "none"
        if self._siblings is not None:
            self._siblings.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves between devices; casts (`model.half()`) leave the packed tensors as they are."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        probe = torch.empty(0, dtype=torch.uint8, device=self._device)
        stays = fn(probe).device == self._device
        if not stays:
            self._restore()
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if not stays:
            self._arrange()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The names and bytes on disk, however the weights lie here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.arranged is not None:
            layer = self.packed()
            destination[prefix + "weight_packed"] = layer.packed
            destination[prefix + "weight_scale"] = layer.scale

    def _load_from_state_dict(self, *given: Any) -> None:
        """Takes the names and bytes on disk too."""
        self._restore()
        super()._load_from_state_dict(*given)
        self._arrange()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        group = "row" if self.group_size == self.in_features else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scales={self.kind}, group_size={group}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
