"""A linear of vLLM, maybe fused of several, maybe one rank's part, with a packed weight.

vLLM's own parameter classes cut and stack the tensors as they lie on disk; when all are loaded they
become one `QuantizedLinear`, which multiplies as it does in `zqfp_convert.load`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
QKV = {"q": 0, "k": 1, "v": 2}
SCRATCH = Scratch()  # one for all models, with the same key in each process: it is compiled in

Loader = Callable[..., None]
Shard = int | str | tuple[int, ...] | None


@register_weight_loader_v2_supported_method
class ZqfpLinearMethod(LinearMethodBase):
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
            suffix: str, kind: type, shape: tuple[int, ...], dtype: torch.dtype, count: int,
            loader: Loader = load, **place: int,
        ) -> None:  # fmt: skip
            name = suffix.removeprefix(".")
            data = torch.zeros(shape, dtype=dtype)
            counted = self._counted(name, loader)
            layer.register_parameter(name, kind(data=data, weight_loader=counted, **place))
            self._wanted[name] = count

        # A scale that is a whole row's is the same for each of the row's parts.
        by_group = GroupQuantScaleParameter if groups > 1 or self._whole else None
        scale_kind = by_group or ChannelQuantScaleParameter
        scale_place = {"output_dim": 0} | ({"input_dim": 1} if by_group else {})
        scale_dtype = torch.bfloat16 if about.kind == "free" else torch.uint8
        count = len(self._sources)
        packed = {"input_dim": 1, "output_dim": 0, "packed_dim": 1, "packed_factor": 2}
        half = -(-columns // 2)
        add(layout.PACKED, PackedvLLMParameter, (rows, half), torch.uint8, count, **packed)
        add(layout.SCALE, scale_kind, (rows, groups), scale_dtype, count, **scale_place)
        if about.kind == "m2":
            row = ChannelQuantScaleParameter
            add(layout.ROW_SCALE, row, (rows,), torch.bfloat16, count, output_dim=0)
        if len(about.books) > 1:  # a bit for each group on disk, a byte until all are loaded
            unpacked = _prepared(load, lambda one: bits.unpack(one, min(8 * len(one), output_size)))
            add(layout.CODEBOOK, scale_kind, (rows, groups), torch.bool, count, unpacked,
                **scale_place)  # fmt: skip
        of_parts = _by_part(layer, parts)
        ranks = [source.rank for source in self._sources]
        if rank := max(ranks):
            count = sum(one > 0 for one in ranks)
            dtype = fp8.DTYPE if about.factors == "e4m3" else torch.bfloat16
            shape = (parts, rank, columns)
            add(layout.LORC_A, BasevLLMParameter, shape, dtype, count, of_parts)
            wide = _prepared(load, lambda one: _widened(one, rank))
            add(layout.LORC_B, ChannelQuantScaleParameter, (rows, rank), dtype, count, wide,
                output_dim=0)  # fmt: skip
            if about.factors == "e4m3":
                scale = torch.float32
                add(layout.LORC_SCALE, BasevLLMParameter, (parts, rank), scale, count, of_parts)
        if about.input_offset:
            shape = (parts, 1, columns)
            add(layout.INPUT_OFFSET, BasevLLMParameter, shape, torch.bfloat16, 0, of_parts)
        if added := sum(source.bias_added for source in self._sources):
            row = ChannelQuantScaleParameter
            add(ADDED_BIAS, row, (rows,), torch.float32, added, output_dim=0)

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
        rows = [0]
        for one in packed:
            if self._whole:  # rules are about whole rows
                one.check()
            rows.append(rows[-1] + one.rows)
        layer.quantized = nn.ModuleList(
            QuantizedLinear(
                one, None if bias is None else bias[rows[i] : rows[i + 1]], SCRATCH, self._dtype
            )
            for i, one in enumerate(packed)
        )
        # vLLM asks a linear's weight for its device.
        layer.weight_packed = next(layer.quantized[0].buffers())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
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

    def _bias(self, layer: nn.Module) -> Tensor | None:
        """What is to be added with the product on this rank, `[N]`."""
        if isinstance(layer, RowParallelLinear) and layer.tp_rank > 0:
            return None
        own = None if layer.skip_bias_add else layer.bias
        added = getattr(layer, ADDED_BIAS, None)
        if own is None or added is None:
            return own if added is None else added.data
        return own.float() + added

    def _packed(self, layer: nn.Module) -> list[PackedLayer]:
        """The whole linear as one layer; or its parts, if the kernels take no such rank."""

        def tensor(suffix: str) -> Tensor | None:
            found = getattr(layer, suffix.removeprefix("."), None)
            return None if found is None else found.data

        about, sizes = self._scheme, self._sizes
        packed, scale, row_scale, choice = (
            tensor(name) for name in (layout.PACKED, layout.SCALE, layout.ROW_SCALE, layout.CODEBOOK)
        )
        assert packed is not None
        assert scale is not None
        A, B, lorc_scale = (
            tensor(name) for name in (layout.LORC_A, layout.LORC_B, layout.LORC_SCALE)
        )
        offset = self._offset(tensor(layout.INPUT_OFFSET))

        def part(rows: slice, lorc: tuple[Tensor | None, Tensor | None, Tensor | None]) -> PackedLayer:
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
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        rows = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
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


def _by_part(layer: nn.Module, parts: int) -> Loader:
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
