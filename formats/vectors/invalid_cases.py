"""The broken checkpoints among the test vectors of zqfp-1: each a valid one with one thing wrong.

An edit changes the checkpoint before its manifest is sealed, damage changes the files afterwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numbers_by_table import BF16_INFINITY, BF16_NAN
from tiny_checkpoint import (
    CONFIG,
    INDEX,
    MANIFEST,
    ONE_SHARD,
    TWO_SHARDS,
    Checkpoint,
    Files,
    Json,
    Tensor,
    join_header,
    render,
    seal,
    split_header,
    to_json,
)
from valid_cases import (
    PAIR,
    K,
    Q,
    codebooks_one,
    codebooks_two,
    input_offset,
    lorc,
    lorc_ranks,
    sharded,
    simple,
    zeros,
)

Edit = Callable[[Checkpoint], None]
Damage = Callable[[Files], None]


@dataclass(frozen=True)
class Broken:
    """A valid checkpoint, what is done to it, and the rule that this breaks."""

    rule: str
    base: Callable[[], Checkpoint]
    edit: Edit | None = None
    damage: Damage | None = None

    def files(self) -> Files:
        """Make the files, one thing wrong with them."""
        checkpoint = self.base()
        if self.edit:
            self.edit(checkpoint)
        files = render(checkpoint)
        if self.damage:
            self.damage(files)
        return files


def _m2() -> Checkpoint:
    """Three rows of three groups, K odd, span 4."""
    return simple("m2", 4, 3, 11)


def _m1() -> Checkpoint:
    return simple("m1", 4, 3, 11)


def _free() -> Checkpoint:
    return simple("free", 4, 3, 11)


def _lorc_e4m3() -> Checkpoint:
    return lorc("e4m3")


def _lorc_bf16() -> Checkpoint:
    return lorc("bf16")


def _zeros_m2() -> Checkpoint:
    return zeros("m2")


def _zeros_m1() -> Checkpoint:
    return zeros("m1")


# Edits


def _both(*edits: Edit) -> Edit:
    def edit(checkpoint: Checkpoint) -> None:
        for each in edits:
            each(checkpoint)

    return edit


def _set_setting(path: str, value: Any) -> Edit:
    def edit(checkpoint: Checkpoint) -> None:
        *parents, last = path.split(".")
        target = checkpoint.settings
        for parent in parents:
            target = target[parent]
        target[last] = value

    return edit


def _set_magnitude(code: int, value: Any) -> Edit:
    """What a code of the second codebook stands for."""

    def edit(checkpoint: Checkpoint) -> None:
        first, second = PAIR
        books = [first, [*second[:code], value, *second[code + 1 :]]]
        checkpoint.settings["weights"]["codebooks"] = books

    return edit


def _newer_version(checkpoint: Checkpoint) -> None:
    """A later version may have changed anything, so its number is judged first."""
    settings = checkpoint.settings
    settings["format_version"] = 2
    settings["required_features"] = {"not": "a list"}
    settings["weights"] = "unknown"


def _drop_setting(path: str) -> Edit:
    parent, _, last = path.rpartition(".")

    def edit(checkpoint: Checkpoint) -> None:
        del checkpoint.settings[parent][last]

    return edit


def _drop_settings(checkpoint: Checkpoint) -> None:
    del checkpoint.config["quantization_config"]


def _set_layer(key: str, value: Any) -> Edit:
    return lambda checkpoint: checkpoint.layers[Q].update({key: value})


def _unlist_layer(checkpoint: Checkpoint) -> None:
    del checkpoint.layers[Q]


def _note_change(name: str, change: str) -> Edit:
    return lambda checkpoint: checkpoint.changed.update({name: change})


def _poke(suffix: str, position: int, data: bytes, layer: str = Q) -> Edit:
    """Overwrite bytes of one of a layer's tensors."""

    def edit(checkpoint: Checkpoint) -> None:
        tensor = checkpoint.tensor(f"{layer}.{suffix}")
        tensor.data = tensor.data[:position] + data + tensor.data[position + len(data) :]

    return edit


def _poke_bf16(suffix: str, position: int, bits: int) -> Edit:
    return _poke(suffix, 2 * position, struct.pack("<H", bits))


def _add_tensor(name: str, dtype: str, shape: list[int], size: int) -> Edit:
    def edit(checkpoint: Checkpoint) -> None:
        checkpoint.shards[ONE_SHARD][name] = Tensor(dtype, shape, bytes(size))

    return edit


def _drop_tensor(name: str) -> Edit:
    return lambda checkpoint: checkpoint.drop(name)


def _retype(suffix: str, dtype: str, shape: list[int]) -> Edit:
    def edit(checkpoint: Checkpoint) -> None:
        tensor = checkpoint.tensor(f"{Q}.{suffix}")
        tensor.dtype, tensor.shape = dtype, shape

    return edit


# Damage


def _edit_json(file: str, change: Callable[[Json], Any]) -> Damage:
    def damage(files: Files) -> None:
        value = json.loads(files[file])
        change(value)
        files[file] = to_json(value)

    return damage


def _cut(file: str) -> Damage:
    return lambda files: files.update({file: files[file][:-2]})


def _flip(file: str) -> Damage:
    return lambda files: files.update({file: files[file][:-1] + bytes([files[file][-1] ^ 1])})


def _remove(file: str) -> Damage:
    def damage(files: Files) -> None:
        del files[file]

    return damage


def _repeat_key(file: str, key: str) -> Damage:
    """The first occurrence of `"key":` is preceded by another, of value null."""

    def damage(files: Files) -> None:
        found = f'"{key}":'.encode()
        assert found in files[file], key
        files[file] = files[file].replace(found, found + b" null, " + found, 1)

    return damage


def _reshard(change: Callable[[bytes], bytes]) -> Damage:
    """Rewrite the shard and seal it again, so that its size and hash are the manifest's."""

    def damage(files: Files) -> None:
        files[ONE_SHARD] = change(files[ONE_SHARD])
        seal(files)

    return damage


def _reheader(change: Callable[[Json], Any]) -> Damage:
    def rewrite(shard: bytes) -> bytes:
        header, data = split_header(shard)
        change(header)
        return join_header(header, data)

    return _reshard(rewrite)


def _repeat_tensor(shard: bytes) -> bytes:
    header, data = split_header(shard)
    again = json.dumps({"model.norm.weight": header["model.norm.weight"]})
    return join_header((json.dumps(header)[:-1] + ", " + again[1:]).encode(), data)


def _huge_header(shard: bytes) -> bytes:
    return struct.pack("<Q", 2**63) + shard[8:]


def _move_offsets(name: str, begin: int, end: int) -> Callable[[Json], None]:
    def change(header: Json) -> None:
        old_begin, old_end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old_begin + begin, old_end + end]

    return change


def _rename_in_index(new: str) -> Damage:
    """The index names another file for all that the second shard holds."""

    def change(index: Json) -> None:
        weight_map = index["weight_map"]
        index["weight_map"] = {
            name: new if file == TWO_SHARDS[1] else file for name, file in weight_map.items()
        }

    return _edit_json(INDEX, change)


def _rename_in_manifest(new: str) -> Damage:
    def change(manifest: Json) -> None:
        manifest["shards"][new] = manifest["shards"].pop(ONE_SHARD)

    return _edit_json(MANIFEST, change)


def _forget_in_index(index: Json) -> None:
    del index["weight_map"]["model.norm.weight"]


PACKED, SCALE, ROW_SCALE = "weight_packed", "weight_scale", "weight_row_scale"
CHOICE = "weight_codebook"
NORM = "model.norm.weight"
F32_INFINITY = struct.pack("<I", 0x7F800000)

INVALID: dict[str, Broken] = {
    "newer-version": Broken("newer-version", _m2, _newer_version),
    "unknown-feature": Broken(
        "unknown-feature", _m2, _set_setting("required_features", ["rotation"])
    ),
    "bad-config-json": Broken("bad-config", _m2, damage=_cut(CONFIG)),
    "bad-config-repeated-key": Broken("bad-config", _m2, damage=_repeat_key(CONFIG, "weights")),
    "bad-config-absent": Broken("bad-config", _m2, _drop_settings),
    "bad-config-method": Broken("bad-config", _m2, _set_setting("quant_method", "awq")),
    "bad-config-version": Broken("bad-config", _m2, _set_setting("format_version", True)),
    "bad-config-group-size": Broken("bad-config", _m2, _set_setting("weights.group_size", 0)),
    "bad-config-scales": Broken("bad-config", _m2, _set_setting("weights.scales", "m3")),
    "bad-config-feature": Broken("bad-config", _lorc_e4m3, _set_setting("required_features", [])),
    "bad-config-codebooks-absent": Broken(
        "bad-config", codebooks_two, _drop_setting("weights.codebooks")
    ),
    "bad-config-codebooks-none": Broken(
        "bad-config", codebooks_two, _set_setting("weights.codebooks", [])
    ),
    "bad-config-codebooks-three": Broken(
        "bad-config", codebooks_two, _set_setting("weights.codebooks", [*PAIR, PAIR[0]])
    ),
    "bad-config-codebooks-seven": Broken(
        "bad-config", codebooks_one, _set_setting("weights.codebooks", [PAIR[0][:7]])
    ),
    "bad-config-codebooks-nine": Broken(
        "bad-config", codebooks_one, _set_setting("weights.codebooks", [[*PAIR[0], 6]])
    ),
    "bad-config-codebooks-first": Broken("bad-config", codebooks_two, _set_magnitude(0, 0.5)),
    "bad-config-codebooks-equal": Broken("bad-config", codebooks_two, _set_magnitude(4, 2)),
    "bad-config-codebooks-falling": Broken("bad-config", codebooks_two, _set_magnitude(4, 1.75)),
    "bad-config-codebooks-negative": Broken("bad-config", codebooks_two, _set_magnitude(7, -7)),
    "bad-config-codebooks-small": Broken("bad-config", codebooks_two, _set_magnitude(1, 0.46875)),
    "bad-config-codebooks-large": Broken("bad-config", codebooks_two, _set_magnitude(7, 7.5)),
    "bad-config-codebooks-inexact": Broken("bad-config", codebooks_two, _set_magnitude(2, 1.06)),
    "bad-config-codebooks-boolean": Broken("bad-config", codebooks_two, _set_magnitude(2, True)),
    "bad-config-codebooks-free": Broken(
        "bad-config", codebooks_one, _set_setting("weights.scales", "free")
    ),
    "bad-config-codebooks-format": Broken(
        "bad-config", codebooks_one, _set_setting("weights.format", "e2m1")
    ),
    "bad-config-codebooks-feature": Broken(
        "bad-config", codebooks_one, _set_setting("required_features", [])
    ),
    "bad-manifest-json": Broken("bad-manifest", _m2, damage=_cut(MANIFEST)),
    "bad-manifest-version": Broken(
        "bad-manifest", _m2, damage=_edit_json(MANIFEST, lambda m: m.update(format_version=2))
    ),
    "bad-manifest-rank": Broken("bad-manifest", _lorc_e4m3, _set_layer("rank", 2)),
    "bad-manifest-rank-bound": Broken("bad-manifest", lorc_ranks, _set_setting("lorc.rank", 16)),
    "bad-manifest-rank-odd": Broken("bad-manifest", lorc_ranks, _set_layer("rank", 20)),
    "bad-manifest-rank-rows": Broken(
        "bad-manifest", lorc_ranks, _both(_set_setting("lorc.rank", 64), _set_layer("rank", 32))
    ),
    "bad-manifest-span": Broken("bad-manifest", _m2, _set_layer("span", 3)),
    "bad-manifest-ignored": Broken("bad-manifest", _m2, _set_setting("ignore", [Q])),
    "bad-manifest-change": Broken("bad-manifest", _m2, _note_change(NORM, "improved")),
    "bad-manifest-unlisted": Broken("bad-manifest", _m2, _unlist_layer),
    "bad-manifest-shards": Broken(
        "bad-manifest", sharded, damage=_rename_in_index("model-00003-of-00003.safetensors")
    ),
    "missing-file-manifest": Broken("missing-file", _m2, damage=_remove(MANIFEST)),
    "missing-file-index": Broken("missing-file", sharded, damage=_remove(INDEX)),
    "missing-file-shard": Broken("missing-file", sharded, damage=_remove(TWO_SHARDS[1])),
    "outside-folder-index": Broken(
        "outside-folder", sharded, damage=_rename_in_index("../model.safetensors")
    ),
    "outside-folder-manifest": Broken(
        "outside-folder", _m2, damage=_rename_in_manifest("/model.safetensors")
    ),
    "bad-shard-short-header": Broken("bad-shard", _m2, damage=_reshard(lambda shard: shard[:64])),
    "bad-shard-huge-header": Broken("bad-shard", _m2, damage=_reshard(_huge_header)),
    "bad-shard-overlap": Broken(
        "bad-shard", _m2, damage=_reheader(_move_offsets(f"{Q}.{SCALE}", -1, -1))
    ),
    "bad-shard-hole": Broken("bad-shard", _m2, damage=_reheader(lambda header: header.pop(NORM))),
    "bad-shard-past-end": Broken("bad-shard", _m2, damage=_reshard(lambda shard: shard[:-1])),
    "bad-shard-trailing": Broken("bad-shard", _m2, damage=_reshard(lambda shard: shard + b"\0")),
    "bad-shard-length": Broken(
        "bad-shard", _m2, damage=_reheader(_move_offsets(f"{Q}.{ROW_SCALE}", 0, -1))
    ),
    "bad-shard-repeated-key": Broken("bad-shard", _m2, damage=_reshard(_repeat_tensor)),
    "bad-shard-index": Broken("bad-shard", sharded, damage=_edit_json(INDEX, _forget_in_index)),
    "shard-size": Broken(
        "shard-size", _m2, damage=lambda f: f.update({ONE_SHARD: f[ONE_SHARD][:-1]})
    ),
    "shard-hash": Broken("shard-hash", _m2, damage=_flip(ONE_SHARD)),
    "missing-tensor": Broken("missing-tensor", _m2, _drop_tensor(f"{Q}.{SCALE}")),
    "missing-tensor-lorc": Broken("missing-tensor", _lorc_e4m3, _drop_tensor(f"{Q}.lorc_scale")),
    "missing-tensor-bias": Broken("missing-tensor", input_offset, _drop_tensor(f"{Q}.bias")),
    "missing-tensor-codebook": Broken(
        "missing-tensor", codebooks_two, _drop_tensor(f"{Q}.{CHOICE}")
    ),
    "missing-tensor-changed": Broken("missing-tensor", _m2, _note_change("x.bias", "bias_changed")),
    "extra-tensor-weight": Broken(
        "extra-tensor", _m2, _add_tensor(f"{Q}.weight", "BF16", [3, 11], 66)
    ),
    "extra-tensor-row-scale": Broken(
        "extra-tensor", _m1, _add_tensor(f"{Q}.{ROW_SCALE}", "BF16", [3], 6)
    ),
    "extra-tensor-rank-0": Broken("extra-tensor", _lorc_bf16, _set_layer("rank", 0)),
    "extra-tensor-lorc-scale": Broken(
        "extra-tensor", _lorc_bf16, _add_tensor(f"{Q}.lorc_scale", "F32", [3], 12)
    ),
    "extra-tensor-offset": Broken(
        "extra-tensor", input_offset, _set_setting("required_features", [])
    ),
    "extra-tensor-codebook": Broken(
        "extra-tensor", codebooks_one, _add_tensor(f"{Q}.{CHOICE}", "U8", [3, 1], 3)
    ),
    "wrong-dtype": Broken("wrong-dtype", _m2, _retype(PACKED, "I8", [3, 6])),
    "wrong-dtype-bias": Broken("wrong-dtype", input_offset, _retype("bias", "I32", [3])),
    "wrong-dtype-codebook": Broken("wrong-dtype", codebooks_two, _retype(CHOICE, "BOOL", [2, 10])),
    "wrong-shape": Broken("wrong-shape", _m2, _retype(PACKED, "U8", [6, 3])),
    "wrong-shape-lorc": Broken("wrong-shape", _lorc_e4m3, _retype("lorc_A", "F8_E4M3", [18, 3])),
    "wrong-shape-bias": Broken("wrong-shape", input_offset, _retype("bias", "F32", [3, 1])),
    "wrong-shape-codebook": Broken("wrong-shape", codebooks_two, _retype(CHOICE, "U8", [10, 2])),
    "scale-forbidden-m1": Broken("scale-forbidden", _m1, _poke(SCALE, 4, b"\xff")),
    "scale-forbidden-m2": Broken("scale-forbidden", _m2, _poke(SCALE, 8, b"\xff")),
    "scale-forbidden-zero": Broken("scale-forbidden", _free, _poke_bf16(SCALE, 4, 0)),
    "scale-forbidden-negative": Broken("scale-forbidden", _free, _poke_bf16(SCALE, 4, 0xBC00)),
    "scale-forbidden-infinite": Broken(
        "scale-forbidden", _free, _poke_bf16(SCALE, 8, BF16_INFINITY)
    ),
    "row-scale-zero": Broken("row-scale", _m2, _poke_bf16(ROW_SCALE, 2, 0)),
    "row-scale-negative": Broken("row-scale", _m2, _poke_bf16(ROW_SCALE, 1, 0xBC00)),
    "row-scale-infinite": Broken("row-scale", _m2, _poke_bf16(ROW_SCALE, 2, BF16_INFINITY)),
    "row-scale-nan": Broken("row-scale", _m2, _poke_bf16(ROW_SCALE, 0, BF16_NAN)),
    # The last byte of row 1 (6 bytes a row); its low nibble, code 7, is used.
    "padding-nibble": Broken("padding-nibble", _m2, _poke(PACKED, 11, b"\x17")),
    "padding-nibble-negative-zero": Broken("padding-nibble", _free, _poke(PACKED, 17, b"\x87")),
    "row-maximum-low": Broken("row-maximum", _m2, _poke(SCALE, 3, bytes([126, 125, 124]))),
    "row-maximum-high": Broken("row-maximum", _m2, _poke(SCALE, 3, bytes([127, 128, 127]))),
    "span-m1": Broken("span", _m1, _poke(SCALE, 3, bytes([120, 108, 119]))),
    "span-m2": Broken("span", _m2, _poke(SCALE, 6, bytes([115, 126, 127]))),
    "zero-group-m1": Broken("zero-group", _zeros_m1, _poke(SCALE, 1, bytes([119]))),
    "zero-group-m2": Broken("zero-group", _zeros_m2, _poke(SCALE, 8, bytes([126]))),
    # All codes of a group are set to 8: zeros all the same.
    "zero-group-negative": Broken(
        "zero-group",
        _m2,
        _both(_poke(PACKED, 2, b"\x88\x88"), _poke(SCALE, 0, bytes([127, 124, 125]))),
    ),
    "zero-group-row-scale": Broken("zero-group", _zeros_m2, _poke_bf16(ROW_SCALE, 1, 0x3F00)),
    "zero-group-row-m1": Broken("zero-group", _zeros_m1, _poke(SCALE, 3, bytes([121] * 3))),
    "zero-group-row-m2": Broken("zero-group", _zeros_m2, _poke(SCALE, 4, bytes([126]))),
    # 9 rows of 10 groups: of the second ten bytes only the lowest bit is used.
    "codebook-choice-padding": Broken("codebook-choice", codebooks_two, _poke(CHOICE, 13, b"\x02")),
    # Group 8 of k_proj's row 2 has codes 8, 8, 0, 8.
    "codebook-choice-zeros": Broken("codebook-choice", codebooks_two, _poke(CHOICE, 8, b"\x05", K)),
    "lorc-value-nan": Broken("lorc-value", _lorc_e4m3, _poke("lorc_A", 20, b"\xff")),
    "lorc-value-infinite": Broken("lorc-value", _lorc_bf16, _poke_bf16("lorc_B", 5, BF16_INFINITY)),
    "lorc-value-scale": Broken("lorc-value", _lorc_e4m3, _poke("lorc_scale", 4, F32_INFINITY)),
    "offset-value": Broken("offset-value", input_offset, _poke_bf16("input_offset", 7, BF16_NAN)),
}
