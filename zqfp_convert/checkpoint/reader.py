"""Reads a packed checkpoint, and holds it to the format: configuration, manifest, tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.checkpoint.shards import Shards, read_json
from zqfp_convert.checkpoint.writer import sha256
from zqfp_convert.errors import CheckpointError

AGAIN = "Convert the model again with zqfp-convert, or download the checkpoint again."


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
        """Open a checkpoint: configuration, manifest, sizes (and hashes) of shards, headers.

        Raises:
            CheckpointError: with the broken rule of the format.
        """
        self.folder = folder
        self.config = read_json(folder / layout.CONFIG_FILE, "bad-config")
        self.quantization = self._quantization()
        self.manifest = read_json(folder / layout.MANIFEST_FILE, "bad-manifest")
        self._check_manifest(check_hashes)
        self.shards = Shards(folder)
        self._check_listed()
        self.layers: list[str] = sorted(self.manifest["layers"])
        self._check_layers()

    @property
    def scales(self) -> Literal["free", "m1", "m2"]:
        """The kind of scales."""
        kind: Literal["free", "m1", "m2"] = self.quantization["weights"]["scales"]
        return kind

    def layer(self, name: str, *, check: bool = True) -> PackedLayer:
        """One layer, read and held to the rules on values unless `check` is false."""
        names = [name + suffix for suffix in layout.PACKED_SUFFIXES]
        tensors = self.shards.read([n for n in names if n in self.shards.tensors])
        return self.assemble(name, tensors, check=check)

    def assemble(self, name: str, tensors: dict[str, Tensor], *, check: bool = True) -> PackedLayer:
        """The layer whose tensors, by their names on disk, have been read already."""
        columns = self.manifest["layers"][name]["shape"][1]
        size = self.quantization["weights"]["group_size"]
        layer = PackedLayer(
            name,
            self.scales,
            columns if size == "row" else size,
            columns,
            tensors[name + layout.PACKED],
            tensors[name + layout.SCALE],
            tensors.get(name + layout.ROW_SCALE),
            tensors.get(name + layout.LORC_A),
            tensors.get(name + layout.LORC_B),
            tensors.get(name + layout.LORC_SCALE),
            tensors.get(name + layout.INPUT_OFFSET),
        )
        if check:
            layer.check()
        return layer

    def _quantization(self) -> dict[str, Any]:
        config = self.config.get(layout.CONFIG_KEY)
        if not isinstance(config, dict) or config.get("quant_method") != layout.FORMAT:
            self._bad_config("no quantization_config of zqfp", "a checkpoint made by zqfp-convert")
        version = config.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            self._bad_config(f"format_version {version!r}", "a whole number, 1 or more")
        if version > layout.FORMAT_VERSION:
            raise CheckpointError(
                "newer-version",
                str(self.folder / layout.CONFIG_FILE),
                f"format version {version}",
                needed=f"format version {layout.FORMAT_VERSION} or older",
                do=f"Upgrade: pip install -U zqfp-convert, to a release that reads format version "
                f"{version}.",
            )
        features = config.get("required_features", [])
        if not isinstance(features, list):
            self._bad_config("required_features is no list", "a list of names")
        for feature in features:
            if feature not in layout.KNOWN_FEATURES:
                raise CheckpointError(
                    "unknown-feature",
                    str(self.folder / layout.CONFIG_FILE),
                    f"required feature {feature!r}",
                    needed="one of " + ", ".join(layout.KNOWN_FEATURES),
                    do="Upgrade: pip install -U zqfp-convert.",
                )
        weights = config.get("weights")
        if not isinstance(weights, dict) or weights.get("format") != "e2m1":
            self._bad_config("weights are not described", "weights of format e2m1")
        if weights.get("scales") not in ("free", "m1", "m2"):
            self._bad_config(f"scales {weights.get('scales')!r}", "free, m1 or m2")
        size = weights.get("group_size")
        whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if size != "row" and not whole:
            self._bad_config(f"group_size {size!r}", "a positive whole number, or 'row'")
        activations = config.get("activations")
        wanted = {"format": "e4m3", "scale": "token", "dynamic": True}
        if not isinstance(activations, dict) or not wanted.items() <= activations.items():
            self._bad_config(f"activations {activations!r}", f"{wanted}")
        self._check_lorc(config.get("lorc"), features)
        return config

    def _check_lorc(self, lorc: object, features: list[str]) -> None:
        if lorc is None:
            return
        described = (
            isinstance(lorc, dict)
            and isinstance(lorc.get("rank"), int)
            and lorc["rank"] > 0
            and lorc.get("factors") in ("e4m3", "bf16")
        )
        if not described or "lorc" not in features:
            self._bad_config(
                f"lorc {lorc!r}", "a rank, factors e4m3 or bf16, and the required feature 'lorc'"
            )

    def _check_manifest(self, check_hashes: bool) -> None:
        manifest = self.manifest
        shards, layers = manifest.get("shards"), manifest.get("layers")
        if manifest.get("format") != layout.FORMAT or not isinstance(shards, dict):
            self._bad_manifest("no zqfp manifest")
        if not isinstance(layers, dict) or not isinstance(manifest.get("changed", {}), dict):
            self._bad_manifest("no layers")
        for name, entry in layers.items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            rank = entry.get("rank") if isinstance(entry, dict) else None
            whole = isinstance(shape, list) and all(isinstance(x, int) and x > 0 for x in shape)
            if not whole or len(shape or []) != 2 or not isinstance(rank, int) or rank < 0:
                self._bad_manifest(f"layer {name!r} without shape and rank")
        for file, entry in shards.items():
            if Path(file).name != file:
                raise CheckpointError(
                    "outside-folder",
                    str(self.folder / layout.MANIFEST_FILE),
                    f"shard {file!r}",
                    needed="shards in the checkpoint's own folder",
                    do="Do not use this checkpoint: it reaches for other files.",
                )
            if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
                self._bad_manifest(f"shard {file!r} without size and sha256")
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(
                    "missing-file", str(path), "no such file", needed="every shard", do=AGAIN
                )
            if path.stat().st_size != entry["size"]:
                raise CheckpointError(
                    "shard-size",
                    str(path),
                    f"{path.stat().st_size} bytes",
                    needed=f"{entry['size']} bytes",
                    do=AGAIN,
                )
            if check_hashes and sha256(path) != entry["sha256"]:
                raise CheckpointError(
                    "shard-hash",
                    str(path),
                    "another SHA-256 than the manifest's",
                    needed=str(entry["sha256"]),
                    do=AGAIN,
                )

    def _check_listed(self) -> None:
        unlisted = [file for file in self.shards.files if file not in self.manifest["shards"]]
        if unlisted:
            self._bad_manifest(f"shard {unlisted[0]!r} is not listed")

    def _check_layers(self) -> None:
        """Hold names, dtypes and shapes of all tensors to what configuration and manifest say."""
        packed = {layout.layer_of(name) for name in self.shards.tensors} - {None}
        if extra := sorted(packed - set(self.layers), key=str):
            self._bad_manifest(f"layer {extra[0]!r} is not listed")
        size = self.quantization["weights"]["group_size"]
        lorc = self.quantization.get("lorc")
        for name in self.layers:
            rows, columns = self.manifest["layers"][name]["shape"]
            rank = self.manifest["layers"][name]["rank"]
            groups = 1 if size == "row" else -(-columns // size)
            scale = "BF16" if self.scales == "free" else "U8"
            wanted: dict[str, tuple[str, tuple[int, ...]]] = {
                layout.PACKED: ("U8", (rows, -(-columns // 2))),
                layout.SCALE: (scale, (rows, groups)),
            }
            if self.scales == "m2":
                wanted[layout.ROW_SCALE] = ("BF16", (rows,))
            if rank > 0:
                e4m3 = lorc is not None and lorc["factors"] == "e4m3"
                factors = "F8_E4M3" if e4m3 else "BF16"
                wanted[layout.LORC_A] = (factors, (rank, columns))
                wanted[layout.LORC_B] = (factors, (rows, rank))
                if e4m3:
                    wanted[layout.LORC_SCALE] = ("F32", (rank,))
            if name + layout.INPUT_OFFSET in self.shards.tensors:
                wanted[layout.INPUT_OFFSET] = ("BF16", (columns,))
            for suffix, (dtype, shape) in wanted.items():
                self._check_tensor(name + suffix, dtype, shape)

    def _check_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        info = self.shards.tensors.get(name)
        if info is None:
            raise CheckpointError(
                "missing-tensor", name, "no such tensor", needed=f"{dtype} {list(shape)}", do=AGAIN
            )
        if info.dtype != dtype:
            raise CheckpointError("wrong-dtype", name, info.dtype, needed=dtype, do=AGAIN)
        if info.shape != shape:
            raise CheckpointError(
                "wrong-shape", name, f"{list(info.shape)}", needed=f"{list(shape)}", do=AGAIN
            )

    def _bad_config(self, found: str, needed: str) -> NoReturn:
        where = str(self.folder / layout.CONFIG_FILE)
        raise CheckpointError("bad-config", where, found, needed=needed, do=AGAIN)

    def _bad_manifest(self, found: str) -> NoReturn:
        where = str(self.folder / layout.MANIFEST_FILE)
        needed = "the manifest that was written with these shards"
        raise CheckpointError("bad-manifest", where, found, needed=needed, do=AGAIN)
