"""Writes a GGUF file: MXFP4 tensors, metadata, tokenizer; one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import sync, writing
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.checkpoint.shards import DTYPES
from zqfp_convert.exporting import adapter, microscaling
from zqfp_convert.exporting.llama_cpp import vocabulary
from zqfp_convert.exporting.llama_cpp.architecture import Architecture
from zqfp_convert.exporting.opened import Opened
from zqfp_convert.numerics import nibbles

TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
ROUTER = "ffn_gate_inp"
ADAPTER = "lorc-adapter.gguf"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: there.
        shape: of its numbers.
        type: of them.
        make: gives its bytes, uint8 with rows as in `shape`.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    make: Callable[[], Tensor]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        found: tuple[int, ...] = gguf.quant_shape_to_byte_shape(self.shape, self.type)
        return found


class Plan:
    """What will be written; everything that can be refused is, before any work."""

    def __init__(self, opened: Opened, name: str) -> None:
        """Plan the file of a checkpoint; `name` is what the model is called there.

        Raises:
            SourceError: llama.cpp cannot have this model, or not without loss.
        """
        microscaling.check(opened.checkpoint)
        self.opened, self.architecture = opened, Architecture(opened.model)
        self.ranks = adapter.ranks(opened)
        self.entries = list(self._entries())
        self.writer = gguf.GGUFWriter(None, self.architecture.family.arch)
        self.writer.add_type(gguf.GGUFType.MODEL)
        self.writer.add_name(name)
        self.writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.architecture.describe(self.writer)
        vocabulary.write(opened.folder, self.architecture.config.vocab_size, self.writer)

    @property
    def bytes(self) -> int:
        """Of all tensors, the adapter's too."""
        entries = [*self.entries, *(self._factors() if self.ranks else ())]
        return sum(math.prod(entry.bytes_shape) for entry in entries)

    def write(self, path: Path, report: Report) -> None:
        """Write the file, and the adapter beside it where there is compensation.

        Raises:
            OutputError: it cannot be written.
        """
        _write(self.writer, path, self.entries, report)
        if self.ranks:
            writer = gguf.GGUFWriter(None, self.architecture.family.arch)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(max(self.ranks.values())))
            _write(writer, path.with_name(ADAPTER), list(self._factors()), report)

    def _entries(self) -> Iterator[Entry]:
        opened = self.opened
        together = self._experts()
        for name, layers in together.items():
            rows, columns = opened.checkpoint.manifest["layers"][layers[0]]["shape"]
            shape = (len(layers), rows, columns)
            yield Entry(name, shape, Type.MXFP4, partial(self._stacked, layers))
        stacked = {layer for layers in together.values() for layer in layers}
        for layer in opened.checkpoint.layers:
            if layer in stacked:
                continue
            name = self.architecture.name(opened.place(layer) + layout.WEIGHT)
            rows, columns = opened.checkpoint.manifest["layers"][layer]["shape"]
            yield Entry(name, (rows, columns), Type.MXFP4, partial(self._packed, layer, name))
        for disk in opened.plain:
            if disk not in opened.names.to_model:
                continue
            name = self.architecture.name(opened.names.to_model[disk])
            info = opened.checkpoint.shards.tensors[disk]
            dtype = DTYPES[info.dtype]
            if len(info.shape) < 2 or dtype not in TYPES or ROUTER in name:
                dtype = torch.float32
            yield Entry(name, info.shape, TYPES[dtype], partial(self._plain, disk, name, dtype))
        factors = self.architecture.frequencies()
        if factors is not None:
            make = partial(_bytes, factors)
            yield Entry("rope_freqs.weight", tuple(factors.shape), Type.F32, make)

    def _experts(self) -> dict[str, list[str]]:
        """The layers that are one tensor there, an expert each, by its name."""
        opened, found = self.opened, {}
        layers = {opened.place(layer): layer for layer in opened.checkpoint.layers}
        for path, experts in opened.mixtures.items():
            for part in {part for fused in experts.fused.values() for part in fused.parts}:
                places = [f"{path}.{expert}.{part}" for expert in range(len(experts))]
                if all(place in layers for place in places):
                    name = self.architecture.name(f"{path}.{part}{layout.WEIGHT}")
                    found[name] = [layers[place] for place in places]
        return dict(sorted(found.items()))

    def _stacked(self, layers: list[str]) -> Tensor:
        return torch.stack([mxfp4(self.opened.checkpoint.layer(layer)) for layer in layers])

    def _packed(self, layer: str, name: str) -> Tensor:
        packed = mxfp4(self.opened.checkpoint.layer(layer))
        order = self.architecture.rows(name)
        return packed if order is None else packed[order]

    def _plain(self, disk: str, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.opened.checkpoint.shards.read([disk])[disk]
        order = self.architecture.rows(name)
        return _bytes((tensor if order is None else tensor[order]).to(dtype))

    def _factors(self) -> Iterator[Entry]:
        rank = max(self.ranks.values())
        for layer in self.ranks:
            name = self.architecture.name(self.opened.place(layer) + layout.WEIGHT)
            rows, columns = self.opened.checkpoint.manifest["layers"][layer]["shape"]

            def factor(number: int, layer: str = layer, name: str = name) -> Tensor:
                found = adapter.factors(self.opened, layer, rank)[number]
                order = self.architecture.rows(name) if number else None
                return _bytes(found if order is None else found[order])

            yield Entry(f"{name}.lora_a", (rank, columns), Type.F32, partial(factor, 0))
            yield Entry(f"{name}.lora_b", (rows, rank), Type.F32, partial(factor, 1))


def mxfp4(layer: PackedLayer) -> Tensor:
    """A layer as GGUF's MXFP4, uint8 `[N, 17 K / 32]`.

    A block of 32 weights is its E8M0 byte and 16 bytes: weight j in the low nibble of byte j,
    weight j + 16 in its high one (`block_mxfp4` of ggml).
    """
    codes = nibbles.unpack(layer.packed, layer.columns)
    codes = codes.view(layer.rows, -1, 2, microscaling.GROUP // 2)  # [N, K / 32, 2, 16]
    pairs = codes[:, :, 0] | codes[:, :, 1] << 4
    exponents = microscaling.exponents(layer)[:, :, None]
    return torch.cat([exponents, pairs], 2).flatten(1)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _write(writer: gguf.GGUFWriter, path: Path, entries: list[Entry], report: Report) -> None:
    for entry in entries:
        shape = entry.bytes_shape
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), entry.type)
    with writing(path):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for number, entry in enumerate(entries):
        report(entry.name, number, len(entries))
        made = entry.make().numpy()
        assert made.shape == entry.bytes_shape, entry.name
        with writing(path):
            writer.write_tensor_data(made)
    with writing(path):
        writer.close()
        sync(path)
