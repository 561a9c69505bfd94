"""Reads a packed checkpoint, and holds it to the rules of the format in the order it names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.description import AGAIN, codebooks, read_config, read_manifest
from zqfp_convert.checkpoint.output.disk import sha256
from zqfp_convert.checkpoint.packed import PackedLayer, unpack
from zqfp_convert.checkpoint.shards import DTYPES, Shards, TensorInfo, read_header, read_index
from zqfp_convert.errors import CheckpointError
from zqfp_convert.numerics.codebook import Codebook

FLOATING = ("F64", "F32", "F16", "BF16")


class PackedCheckpoint:
    """A packed checkpoint in a folder.

    Attributes:
        folder: where it lies.
        config: the whole `config.json`.
        quantization: its `quantization_config`.
        manifest: the manifest.
        shards: its tensors.
        layers: the names of the quantized linears on disk, sorted.
    """

    def __init__(self, folder: Path, *, check_hashes: bool = False) -> None:
        """Open a checkpoint: descriptions, sizes (and hashes) of shards, headers.

        The rules on values are checked where a layer is read.

        Raises:
            CheckpointError: with the broken rule of the format.
        """
        self.folder = folder
        self.config = read_config(folder)
        self.quantization = self.config[layout.CONFIG_KEY]
        self.manifest = read_manifest(folder, self.quantization)
        self.layers: list[str] = sorted(self.manifest["layers"])
        self.shards = Shards(folder, self._read_headers(check_hashes))
        self._check_listed()
        for layer in self.layers:
            self._check_layer(layer)

    @property
    def manifest_sha256(self) -> str:
        """What tells this checkpoint from any other: the manifest has the hash of every shard."""
        return sha256(self.folder / layout.MANIFEST_FILE)

    @property
    def scales(self) -> Literal["free", "m1", "m2"]:
        """The kind of scales."""
        kind: Literal["free", "m1", "m2"] = self.quantization["weights"]["scales"]
        return kind

    @property
    def books(self) -> tuple[Codebook, ...]:
        """What the codes stand for: one codebook, or two."""
        return codebooks(self.quantization)

    def layer(self, name: str) -> PackedLayer:
        """One layer, read and held to the rules on values.

        Raises:
            CheckpointError: with the broken rule.
        """
        layer = self._unpack(name, self.shards.read(self._present(name)))
        layer.check()
        span = self.manifest["layers"][name]["span"]
        if layer.scales().span != span:
            self._bad_manifest(f"span {span} of {name}, which has {layer.scales().span}")
        return layer

    def outline(self, name: str) -> PackedLayer:
        """One layer on the meta device: shapes and dtypes alone."""
        infos = {tensor: self.shards.tensors[tensor] for tensor in self._present(name)}
        return self._unpack(name, {
            tensor: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
            for tensor, info in infos.items()
        })  # fmt: skip

    def _present(self, name: str) -> list[str]:
        return [name + s for s in layout.PACKED_SUFFIXES if name + s in self.shards.tensors]

    def _unpack(self, name: str, tensors: dict[str, Tensor]) -> PackedLayer:
        columns = self.manifest["layers"][name]["shape"][1]
        size = self.quantization["weights"]["group_size"]
        group = columns if size == "row" else size
        return unpack(name, tensors, self.scales, group, columns, self.books)

    def bits(self, name: str) -> float:
        """Bits a weight of a layer, from the bytes of its tensors in the file, bias aside."""
        rows, columns = self.manifest["layers"][name]["shape"]
        names = [name + suffix for suffix in layout.PACKED_SUFFIXES]
        held = self.shards.tensors
        count: int = rows * columns
        return 8 * sum(held[n].bytes for n in names if n in held) / count

    def bias(self, name: str) -> Tensor | None:
        """The bias of a layer, or None."""
        bias = name + layout.BIAS
        return self.shards.read([bias])[bias] if bias in self.shards.tensors else None

    def _read_headers(self, check_hashes: bool) -> dict[str, TensorInfo]:
        """Steps 6 to 8: index, then each shard, then whether the two agree."""
        files = sorted(self.manifest["shards"])
        index = None if files == [layout.SINGLE_SHARD] else read_index(self.folder)
        if index is not None and sorted(set(index.values())) != files:
            self._bad_manifest("other shards than the index")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            self._check_file(file, check_hashes)
            header = read_header(self.folder, file)
            if twice := sorted(tensors.keys() & header.keys()):
                self._bad_shard(file, f"tensor {twice[0]!r}, which an earlier shard has too")
            tensors |= header
        if index is not None and index != {name: info.file for name, info in tensors.items()}:
            self._bad_shard(layout.INDEX_FILE, "other tensors than the shards hold")
        return tensors

    def _check_file(self, file: str, check_hash: bool) -> None:
        path, entry = self.folder / file, self.manifest["shards"][file]
        if not path.is_file():
            raise CheckpointError(
                "missing-file", str(path), "no such file", needed="every shard", do=AGAIN
            )
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                "shard-size", str(path), f"{size} bytes", needed=f"{entry['size']} bytes", do=AGAIN
            )
        if check_hash and sha256(path) != entry["sha256"]:
            raise CheckpointError(
                "shard-hash",
                str(path),
                "another SHA-256 than the manifest's",
                needed=str(entry["sha256"]),
                do=AGAIN,
            )

    def _check_listed(self) -> None:
        """Step 9: no packed tensor of an unlisted layer, every changed tensor there."""
        for name in sorted(self.shards.tensors):
            layer = layout.layer_of(name)
            if layer is not None and layer not in self.manifest["layers"]:
                self._bad_manifest(f"layer {layer!r} is not listed")
        for name in sorted(self.manifest["changed"]):
            if name not in self.shards.tensors:
                raise CheckpointError(
                    "missing-tensor",
                    name,
                    "no such tensor",
                    needed="what 'changed' names",
                    do=AGAIN,
                )

    def _check_layer(self, name: str) -> None:
        """Step 10: a layer's tensors, their dtypes and shapes."""
        wanted = self._wanted(name)
        held = self.shards.tensors
        offset_or_bias = {layout.INPUT_OFFSET, layout.BIAS}
        required = [s for s in wanted if s not in offset_or_bias]
        if name + layout.INPUT_OFFSET in held:
            required.append(layout.BIAS)
        for suffix in required:
            if name + suffix not in held:
                raise CheckpointError(
                    "missing-tensor",
                    name + suffix,
                    "no such tensor",
                    needed="a tensor " + _describe(*wanted[suffix]),
                    do=AGAIN,
                )
        for suffix in (layout.WEIGHT, *layout.PACKED_SUFFIXES):
            if name + suffix in held and suffix not in wanted:
                raise CheckpointError(
                    "extra-tensor",
                    name + suffix,
                    "a tensor that does not belong here",
                    needed=f"none, by {layout.CONFIG_FILE} and {layout.MANIFEST_FILE}",
                    do=AGAIN,
                )
        present = {s: rule for s, rule in wanted.items() if name + s in held}
        for suffix, (dtypes, shape) in present.items():
            if held[name + suffix].dtype not in dtypes:
                found, needed = held[name + suffix].dtype, _describe(dtypes, shape)
                raise CheckpointError("wrong-dtype", name + suffix, found, needed=needed, do=AGAIN)
        for suffix, (_, shape) in present.items():
            if held[name + suffix].shape != shape:
                raise CheckpointError(
                    "wrong-shape",
                    name + suffix,
                    f"{list(held[name + suffix].shape)}",
                    needed=f"{list(shape)}",
                    do=AGAIN,
                )

    def _wanted(self, name: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """The tensors that a layer has or may have, with the dtypes and the shape of each."""
        rows, columns = self.manifest["layers"][name]["shape"]
        rank = self.manifest["layers"][name]["rank"]
        size, lorc = self.quantization["weights"]["group_size"], self.quantization["lorc"]
        groups = 1 if size == "row" else -(-columns // size)
        scale = "BF16" if self.scales == "free" else "U8"
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            layout.PACKED: (("U8",), (rows, -(-columns // 2))),
            layout.SCALE: ((scale,), (rows, groups)),
        }
        if self.scales == "m2":
            wanted[layout.ROW_SCALE] = (("BF16",), (rows,))
        if len(self.books) > 1:
            wanted[layout.CODEBOOK] = (("U8",), (-(-rows // 8), groups))
        if rank > 0:
            factors = "F8_E4M3" if lorc["factors"] == "e4m3" else "BF16"
            wanted[layout.LORC_A] = ((factors,), (rank, columns))
            wanted[layout.LORC_B] = ((factors,), (rows, rank))
            if factors == "F8_E4M3":
                wanted[layout.LORC_SCALE] = (("F32",), (rank,))
        if "input_offset" in self.quantization["required_features"]:
            wanted[layout.INPUT_OFFSET] = (("BF16",), (columns,))
        wanted[layout.BIAS] = (FLOATING, (rows,))
        return wanted

    def _bad_manifest(self, found: str) -> NoReturn:
        where = str(self.folder / layout.MANIFEST_FILE)
        needed = "the manifest that was written with these shards"
        raise CheckpointError("bad-manifest", where, found, needed=needed, do=AGAIN)

    def _bad_shard(self, file: str, found: str) -> NoReturn:
        needed = "shards and index that were written together"
        raise CheckpointError("bad-shard", str(self.folder / file), found, needed=needed, do=AGAIN)


def _describe(dtypes: tuple[str, ...], shape: tuple[int, ...]) -> str:
    return f"{' or '.join(dtypes)} {list(shape)}"
