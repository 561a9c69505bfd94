"""Build a tiny zqfp-1 checkpoint in memory, and the files that it makes.

For the maker of the test vectors: writes what it is told, checks nothing, and notes beside each
layer what a reader must decode. Knows neither the reader nor any converter.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from numbers_by_table import (
    BF16_ONE,
    MAGNITUDES,
    bf16_value,
    code_value,
    e4m3_value,
    float32,
    pseudo_random,
)

Json = dict[str, Any]
Files = dict[str, bytes]

CONFIG, MANIFEST = "config.json", "zqfp_manifest.json"
ONE_SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
TWO_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass
class Tensor:
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Checkpoint:
    """A checkpoint before it becomes files, and what a reader must find in it."""

    config: Json
    shards: dict[str, dict[str, Tensor]]
    layers: dict[str, Json]
    changed: dict[str, str] = field(default_factory=dict)
    expected: dict[str, Json] = field(default_factory=dict)

    @property
    def settings(self) -> Json:
        """Its quantization_config."""
        settings: Json = self.config["quantization_config"]
        return settings

    def tensor(self, name: str) -> Tensor:
        """Find a tensor in whichever shard it is."""
        return next(tensors[name] for tensors in self.shards.values() if name in tensors)

    def drop(self, name: str) -> None:
        """Remove a tensor from whichever shard it is in."""
        next(tensors for tensors in self.shards.values() if name in tensors).pop(name)


def new_checkpoint(
    group_size: int | str,
    scales: str,
    shards: tuple[str, ...],
    books: list[list[float]] | None = None,
) -> Checkpoint:
    """Make a checkpoint without layers; one norm stands for all that is not quantized."""
    weights: Json = {"format": "e2m1"}
    if books is not None:
        weights = {"format": "codebooks", "codebooks": books}
    settings = {
        "quant_method": "zqfp",
        "format_version": 1,
        "producer": {"name": "zqfp-convert", "version": "0.0.0"},
        "required_features": [] if books is None else ["codebooks"],
        "weights": weights | {"group_size": group_size, "scales": scales},
        "activations": {"format": "e4m3", "scale": "token", "dynamic": True},
        "lorc": None,
        "ignore": ["lm_head"],
        "recipe": {},
    }
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": settings}
    norm = Tensor("BF16", [4], struct.pack("<4H", *[BF16_ONE] * 4))
    tensors: dict[str, dict[str, Tensor]] = {shard: {} for shard in shards}
    tensors[shards[0]]["model.norm.weight"] = norm
    return Checkpoint(config, tensors, layers={})


def pack(codes: list[int]) -> bytes:
    """Pack a row of codes, even columns in the low nibble."""
    padded = codes + [0] * (len(codes) % 2)
    return bytes(low | high << 4 for low, high in zip(padded[::2], padded[1::2], strict=True))


def pack_choice(choice: list[list[int]]) -> bytes:
    """Pack the groups' choices of codebooks, of eight rows in a byte, the first in bit 0."""
    packed = []
    for start in range(0, len(choice), 8):
        for bits in zip(*choice[start : start + 8], strict=True):
            packed.append(sum(bit << place for place, bit in enumerate(bits)))
    return bytes(packed)


def add_layer(
    checkpoint: Checkpoint,
    name: str,
    codes: list[list[int]],
    scales: list[list[int]],
    row_scales: list[int] | None = None,
    shard: str | None = None,
    choice: list[list[int]] | None = None,
) -> None:
    """`scales` holds E8M0 bytes, or BF16 bits where scales are free; `row_scales` BF16 bits.

    `choice` has the codebook of each group, 0 or 1, where there are two.
    """
    kind = checkpoint.settings["weights"]["scales"]
    n, k, groups = len(codes), len(codes[0]), len(scales[0])
    size = checkpoint.settings["weights"]["group_size"]
    size = k if size == "row" else size
    tensors = checkpoint.shards[shard or next(iter(checkpoint.shards))]
    tensors[f"{name}.weight_packed"] = Tensor("U8", [n, (k + 1) // 2], b"".join(map(pack, codes)))
    flat = [scale for row in scales for scale in row]
    data = struct.pack(f"<{len(flat)}H", *flat) if kind == "free" else bytes(flat)
    tensors[f"{name}.weight_scale"] = Tensor("BF16" if kind == "free" else "U8", [n, groups], data)
    if row_scales is not None:
        data = struct.pack(f"<{n}H", *row_scales)
        tensors[f"{name}.weight_row_scale"] = Tensor("BF16", [n], data)
    books: list[list[float]] = [list(MAGNITUDES)]
    if "codebooks" in checkpoint.settings["required_features"]:
        books = checkpoint.settings["weights"]["codebooks"]
    if choice is not None:
        data = pack_choice(choice)
        tensors[f"{name}.weight_codebook"] = Tensor("U8", [(n + 7) // 8, groups], data)
    weight = b""
    for row, code_row in enumerate(codes):
        for column, code in enumerate(code_row):
            scale = scales[row][column // size]
            factor = bf16_value(scale) if kind == "free" else 2.0 ** (scale - 127)
            if row_scales is not None:
                factor *= bf16_value(row_scales[row])
            book = books[choice[row][column // size] if choice is not None else 0]
            weight += float32(code_value(code, book) * factor)
    span = None if kind == "free" else max(max(row) - min(row) for row in scales)
    checkpoint.layers[name] = {
        "shape": [n, k],
        "rank": 0,
        "span": span,
        "raised_groups": 0,
        "weight_error": 0.09375,
        "output_error": None,
    }
    checkpoint.expected[name] = {
        "span": span,
        "weight": weight.hex(),
        "lorc": None,
        "input_offset": None,
    }


def add_random_layer(
    checkpoint: Checkpoint,
    name: str,
    n: int,
    k: int,
    *,
    span: int = 4,
    shard: str | None = None,
) -> None:
    """Any codes but 8, every rule kept; row 0 has exactly the span asked for."""
    weights = checkpoint.settings["weights"]
    size = k if weights["group_size"] == "row" else weights["group_size"]
    groups = -(-k // size)
    noise = pseudo_random(f"{name} {n} {k}", n * (k + groups + 2))
    usable = [byte % 16 if byte % 16 != 8 else 1 for byte in noise[: n * k]]
    codes = [usable[k * r :][:k] for r in range(n)]
    for row in codes:
        row[::size] = [code or 7 for code in row[::size]]  # no group of zeros
    rest = noise[n * k :]
    exponents = [[b % (span + 1) for b in rest[groups * r :][:groups]] for r in range(n)]
    tops = rest[n * groups :][:n]
    for r, row in enumerate(exponents):
        row[r % groups] = 0
        if r == 0 and groups > 1:
            row[1] = span
        top = 115 + tops[r] % 8 if weights["scales"] == "m1" else 127
        row[:] = [top - down for down in row]
    row_scales = [0x3C00 + noise[r] + 2 * tops[r] for r in range(n)]
    if weights["scales"] == "free":
        exponents = [[(b - 8) << 7 | 37 * b % 128 for b in row] for row in exponents]
    has_row_scales = weights["scales"] == "m2"
    choice = None
    if weights["format"] == "codebooks" and len(weights["codebooks"]) == 2:
        bits = [byte % 2 for byte in pseudo_random(f"{name} choice", n * groups)]
        choice = [bits[groups * r :][:groups] for r in range(n)]
    add_layer(
        checkpoint, name, codes, exponents, row_scales if has_row_scales else None, shard, choice
    )


def add_lorc(checkpoint: Checkpoint, bound: int, factors: str, ranks: dict[str, int]) -> None:
    """Give the layers in `ranks` pseudo-random factors under the upper bound `bound`."""
    settings = checkpoint.settings
    settings["lorc"] = {"rank": bound, "factors": factors}
    settings["required_features"].append("lorc")
    tensors = next(iter(checkpoint.shards.values()))
    for name, rank in ranks.items():
        n, k = checkpoint.layers[name]["shape"]
        checkpoint.layers[name]["rank"] = rank
        answer = {}
        for letter, shape in (("A", [rank, k]), ("B", [n, rank])):
            noise = pseudo_random(f"{name} {letter}", shape[0] * shape[1])
            if factors == "e4m3":
                data = bytes(byte if byte % 128 != 127 else 8 for byte in noise)
                decoded = [e4m3_value(byte) for byte in data]
            else:
                bits = [0x3A00 + 3 * byte | byte % 2 << 15 for byte in noise]
                data = struct.pack(f"<{len(bits)}H", *bits)
                decoded = [bf16_value(value) for value in bits]
            dtype = "F8_E4M3" if factors == "e4m3" else "BF16"
            tensors[f"{name}.lorc_{letter}"] = Tensor(dtype, shape, data)
            answer[letter] = b"".join(map(float32, decoded)).hex()
        scales = b"".join(float32(1.0) for _ in range(rank))
        if factors == "e4m3":
            scales = b"".join(float32((j + 1) * 2.0**-14 / 3) for j in range(rank))
            tensors[f"{name}.lorc_scale"] = Tensor("F32", [rank], scales)
        checkpoint.expected[name]["lorc"] = answer | {"s": scales.hex()}


def add_offset(checkpoint: Checkpoint, name: str) -> None:
    """An input offset, and the F32 bias that it makes necessary in a BF16 model."""
    n, k = checkpoint.layers[name]["shape"]
    bits = [0x3D00 + 2 * byte | byte % 2 << 15 for byte in pseudo_random(f"{name} offset", k)]
    tensors = next(iter(checkpoint.shards.values()))
    tensors[f"{name}.input_offset"] = Tensor("BF16", [k], struct.pack(f"<{k}H", *bits))
    tensors[f"{name}.bias"] = Tensor("F32", [n], b"".join(float32(i / 7) for i in range(n)))
    checkpoint.settings["required_features"].append("input_offset")
    checkpoint.changed[f"{name}.bias"] = "bias_added"
    decoded = b"".join(float32(bf16_value(value)) for value in bits)
    checkpoint.expected[name]["input_offset"] = decoded.hex()


def to_json(value: Any) -> bytes:
    """Encode as JSON, the same bytes each time."""
    return (json.dumps(value, indent=1) + "\n").encode()


def safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Encode tensors as a safetensors file, in the order given."""
    header: Json = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    return join_header(header, data)


def join_header(header: Json | bytes, data: bytes) -> bytes:
    """Put a safetensors file together from header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def split_header(shard: bytes) -> tuple[Json, bytes]:
    """Take a safetensors file apart into header and data."""
    (length,) = struct.unpack("<Q", shard[:8])
    return json.loads(shard[8 : 8 + length]), shard[8 + length :]


def seal(files: Files) -> None:
    """Write the shards' present sizes and hashes into the manifest."""
    manifest = json.loads(files[MANIFEST])
    for name in manifest["shards"]:
        data = files[name]
        manifest["shards"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files[MANIFEST] = to_json(manifest)


def render(checkpoint: Checkpoint) -> Files:
    """Make the checkpoint's files, index and manifest among them."""
    files = {name: safetensors(tensors) for name, tensors in checkpoint.shards.items()}
    manifest = {
        "format": "zqfp",
        "format_version": 1,
        "shards": dict.fromkeys(checkpoint.shards),
        "layers": checkpoint.layers,
        "changed": checkpoint.changed,
    }
    if list(checkpoint.shards) != [ONE_SHARD]:
        weight_map = {name: file for file, tensors in checkpoint.shards.items() for name in tensors}
        total = sum(len(t.data) for tensors in checkpoint.shards.values() for t in tensors.values())
        files[INDEX] = to_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    files |= {CONFIG: to_json(checkpoint.config), MANIFEST: to_json(manifest)}
    seal(files)
    return files


def count_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Count the bytes of a layer's tensors but its bias."""
    tensors = [(n, t) for shard in checkpoint.shards.values() for n, t in shard.items()]
    return sum(len(t.data) for n, t in tensors if n.startswith(f"{name}.") and n != f"{name}.bias")
