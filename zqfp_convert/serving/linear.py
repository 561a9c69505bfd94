"""A linear of vLLM, maybe fused of several, maybe one rank's part, with a packed weight.

vLLM's own parameter classes cut and stack the tensors as they lie on disk; when all are loaded they
become one `QuantizedLinear`, which multiplies as it does in `zqfp_convert.load`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.errors import OptionError
from zqfp_convert.numerics import bits, fp8
from zqfp_convert.runtime import paths
from zqfp_convert.runtime.linear import QuantizedLinear, Scratch
from zqfp_convert.serving import factors
from zqfp_convert.serving.scheme import Entry, Scheme, incomplete

ADDED_BIAS = "added_bias"
U8, BF16, F32 = torch.uint8, torch.bfloat16, torch.float32
QKV = {"q": 0, "k": 1, "v": 2}
SCRATCH = Scratch()  # one for all models, with the same key in each process: it is compiled in

Loader = Callable[..., None]
Shard = int | str | tuple[int, ...] | None


@register_weight_loader_v2_supported_method
class ZqfpLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads a packed linear, and multiplies with it."""

    def __init__(self, scheme: Scheme, prefix: str, sources: Sequence[Entry]) -> None:
        """`sources` are the layers on disk that the linear `prefix` is made of."""
        self._scheme, self._prefix, self._sources = scheme, prefix, sources
        self._loaded: Counter[str] = Counter()
        self._wanted: dict[str, int] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the tensors of the format, as this rank has them.

        Raises:
            OptionError: a group of weights would be cut in two.
        """
        about, self._dtype = self._scheme, params_dtype
        self._sizes, self._columns = output_partition_sizes, input_size_per_partition
        self._whole = input_size_per_partition == input_size
        rows, columns, parts = sum(self._sizes), self._columns, len(self._sizes)
        groups = about.groups(self._prefix, input_size, columns)
        self._group = min(about.group(input_size), columns)
        load: Loader = extra_weight_attrs["weight_loader"]

        def add(
            suffix: str,
            kind: type,
            shape: tuple[int, ...],
            dtype: torch.dtype,
            loader: Loader,
            place: dict[str, int],
            count: int = len(self._sources),
        ) -> None:
            name = suffix.removeprefix(".")
            loader = self._counted(name, loader)
            data = torch.zeros(shape, dtype=dtype)
            layer.register_parameter(name, kind(data=data, weight_loader=loader, **place))
            self._wanted[name] = count

        row, both = {"output_dim": 0}, {"output_dim": 0, "input_dim": 1}
        of_row, whole = ChannelQuantScaleParameter, BasevLLMParameter
        packed = {**both, "packed_dim": 1, "packed_factor": 2}
        add(layout.PACKED, PackedvLLMParameter, (rows, -(-columns // 2)), U8, load, packed)
        by_group: tuple[type, dict[str, int]] = (GroupQuantScaleParameter, both)
        if about.group(input_size) == input_size:  # a row's scale is that of each of its parts
            by_group = (of_row, row)
        scale = BF16 if about.kind == "free" else U8
        add(layout.SCALE, by_group[0], (rows, groups), scale, load, by_group[1])
        if about.kind == "m2":
            add(layout.ROW_SCALE, of_row, (rows,), BF16, load, row)
        if len(about.books) > 1:  # a bit for each group on disk, a byte until all are loaded
            bytewise = _prepared(load, lambda one: bits.unpack(one, min(8 * len(one), output_size)))
            shape = (rows, groups)
            add(layout.CODEBOOK, by_group[0], shape, U8, bytewise, by_group[1])
        by_part = _by_part(layer, parts)
        if rank := max(source.rank for source in self._sources):
            count = sum(source.rank > 0 for source in self._sources)
            dtype = fp8.DTYPE if about.factors == "e4m3" else BF16
            wide = _prepared(load, lambda one: _widened(one, rank))
            add(layout.LORC_A, whole, (parts, rank, columns), dtype, by_part, {}, count)
            add(layout.LORC_B, of_row, (rows, rank), dtype, wide, row, count)
            if about.factors == "e4m3":
                add(layout.LORC_SCALE, whole, (parts, rank), F32, by_part, {}, count)
        if about.input_offset:  # not all layers have one
            add(layout.INPUT_OFFSET, whole, (parts, 1, columns), BF16, by_part, {}, 0)
        if added := sum(source.bias_added for source in self._sources):
            add(ADDED_BIAS, of_row, (rows,), F32, load, row, added)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Arrange the weights for the kernels of the device they are on.

        Raises:
            CheckpointError: a tensor has not been loaded, or breaks a rule of the format.
        """
        for name, wanted in self._wanted.items():
            if self._loaded[name] < wanted:
                raise incomplete(self._prefix, f".{name}", self._loaded[name], wanted)
        bias = self._bias(layer)
        packed = self._packed(layer)
        for name in self._wanted:
            delattr(layer, name)
        layer.quantized = nn.ModuleList()
        first = 0
        for one in packed:
            if self._whole:  # the rules on values are about whole rows
                one.check()
            of_rows = None if bias is None else bias[first : first + one.rows]
            layer.quantized.append(QuantizedLinear(one, of_rows, SCRATCH, self._dtype))
            first += one.rows
        # vLLM asks a linear's weight for its device.
        layer.weight_packed = next(layer.quantized[0].buffers())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., K]` to `[..., N]`; the bias is added with the product, so it is not looked at."""
        outputs = [linear(x) for linear in layer.quantized]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _counted(self, name: str, load: Loader) -> Loader:
        """Counts the tensors that come, so that none is missing unnoticed."""

        def counted(param: Tensor, loaded_weight: Tensor, loaded_shard_id: Shard = None) -> None:
            self._loaded[name] += 1
            if loaded_shard_id is None:
                load(param, loaded_weight)
            else:
                load(param, loaded_weight, loaded_shard_id)

        return counted

    def _bias(self, layer: Any) -> Tensor | None:
        """What is to be added with the product on this rank, `[N]`."""
        if isinstance(layer, RowParallelLinear) and layer.tp_rank > 0:
            return None
        biases: list[Tensor] = []
        if layer.bias is not None and not layer.skip_bias_add:
            biases.append(layer.bias.data)
        if hasattr(layer, ADDED_BIAS):
            biases.append(getattr(layer, ADDED_BIAS).data)
        return sum((bias.float() for bias in biases[1:]), biases[0]) if biases else None

    def _packed(self, layer: nn.Module) -> list[PackedLayer]:
        """The whole linear as one layer; or its parts, if the kernels take no such rank."""

        def tensor(suffix: str) -> Tensor | None:
            found = getattr(layer, suffix.removeprefix("."), None)
            return None if found is None else found.data

        about, sizes = self._scheme, self._sizes
        packed, scale, row_scale, choice = (
            tensor(name)
            for name in (layout.PACKED, layout.SCALE, layout.ROW_SCALE, layout.CODEBOOK)
        )
        assert packed is not None
        assert scale is not None
        A, B, lorc_scale = (
            tensor(name) for name in (layout.LORC_A, layout.LORC_B, layout.LORC_SCALE)
        )
        offset = self._offset(tensor(layout.INPUT_OFFSET))

        def part(
            rows: slice, lorc: tuple[Tensor | None, Tensor | None, Tensor | None]
        ) -> PackedLayer:
            return PackedLayer(
                self._prefix,
                about.kind,
                self._group,
                self._columns,
                packed[rows],
                scale[rows],
                None if row_scale is None else row_scale[rows],
                *lorc,
                offset,
                about.books,
                None if choice is None else bits.pack(choice[rows]),
            )

        everything = slice(None)
        if A is None or B is None:
            return [part(everything, (None, None, None))]
        stacked = factors.stack(A, B, lorc_scale, sizes)
        ways = {
            paths.kernels_for(packed.device, about.kind, self._group, self._columns, one.shape[-2])
            for one in (A, stacked[0])
        }
        if len(ways) == 1:
            return [part(everything, stacked)]
        rows = [slice(*pair) for pair in pairwise(accumulate(sizes, initial=0))]
        scales = [None] * len(sizes) if lorc_scale is None else list(lorc_scale)
        return [part(one, (A[i], B[one], scales[i])) for i, one in enumerate(rows)]

    def _offset(self, offsets: Tensor | None) -> Tensor | None:
        """That of the input, which is the same for all parts."""
        if offsets is None or not bool(offsets.any()):
            return None
        if bool((offsets != offsets[0]).any()):
            raise OptionError(
                self._prefix,
                "parts with different input offsets",
                needed="one input for all of them, since vLLM multiplies them as one matrix",
                do="Convert again with --offset none.",
            )
        return offsets[0, 0]


def _by_part(layer: Any, parts: int) -> Loader:
    """Loads `[..., K]` of one part of a fused linear, or of several, into `[parts, r, K']`.

    K' are the columns of this rank, where ranks share them. What has less than r rows is filled up
    with zeros.
    """

    def load(param: Tensor, loaded: Tensor, shard: Shard = None) -> None:
        room = param.data
        if loaded.ndim == 1 and room.ndim == 3:
            loaded = loaded[None]
        if loaded.shape[-1] != room.shape[-1] and room.ndim == 3:
            width = room.shape[-1]
            loaded = loaded.narrow(-1, layer.tp_rank * width, width)
        if isinstance(shard, tuple):
            places: Sequence[int] = shard
        elif shard is None:
            places = range(parts)
        else:
            places = [QKV[shard] if isinstance(shard, str) else shard]
        for place in places:
            room[place, : len(loaded)].copy_(loaded)

    return load


def _prepared(load: Loader, prepare: Callable[[Tensor], Tensor]) -> Loader:
    """Does something to a tensor before it is loaded."""

    def prepared(param: Tensor, loaded: Tensor, *shard: Shard) -> None:
        load(param, prepare(loaded), *shard)

    return prepared


def _widened(B: Tensor, rank: int) -> Tensor:
    """`[N, r]` filled up with zeros to a larger rank."""
    wide = torch.zeros(*B.shape[:-1], rank, dtype=B.dtype, device=B.device)
    wide[..., : B.shape[-1]] = B
    return wide
