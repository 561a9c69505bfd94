"""Read a zqfp-1 checkpoint with nothing but Python's standard library.

The reference reader of the format in zqfp-1.md: it checks every rule named there, in the order
given there, and decodes weights, factors and activations bit for bit. Plain rather than fast; it
knows nothing of any converter, model or runtime.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import reprlib
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

VERSION = 1
FEATURES = ("lorc", "input_offset", "codebooks")
CHANGES = ("bias_added", "bias_changed", "norm_changed", "rotated")
MAX_SPAN = 11
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

RULES = (
    "newer-version",
    "unknown-feature",
    "bad-config",
    "bad-manifest",
    "missing-file",
    "outside-folder",
    "bad-shard",
    "shard-size",
    "shard-hash",
    "missing-tensor",
    "extra-tensor",
    "wrong-dtype",
    "wrong-shape",
    "scale-forbidden",
    "row-scale",
    "padding-nibble",
    "row-maximum",
    "span",
    "zero-group",
    "codebook-choice",
    "lorc-value",
    "offset-value",
)

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_row_scale",
    "weight_codebook",
    "lorc_A",
    "lorc_B",
    "lorc_scale",
    "input_offset",
)

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LOW_NIBBLE = bytes(byte & 15 for byte in range(256))
HIGH_NIBBLE = bytes(byte >> 4 for byte in range(256))
ZERO_CODES = b"\x00\x08"
BF16_ONE = 0x3F80
BF16_INFINITY = 0x7F80

_ABSENT = object()
_SHORT = reprlib.Repr()
_SHORT.maxlist = 8  # a whole codebook
_RESTORE = "fetch the checkpoint again, or convert the model again"


class FormatError(ValueError):
    """A checkpoint breaks a rule of the format; `rule` is its id, `message` says what and where."""

    def __init__(self, rule: str, message: str) -> None:
        assert rule in RULES, rule
        super().__init__(f"{message} [{rule}]")
        self.rule = rule
        self.message = message


def _fail(rule: str, where: str, found: str, needed: str, remedy: str = _RESTORE) -> NoReturn:
    raise FormatError(rule, f"{where}: found {found}; needed: {needed}; {remedy}.")


# Values


def _decode_e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    magnitude = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -magnitude if byte & 0x80 else magnitude


def _encode_e4m3(value: float) -> int:
    """The E4M3 byte nearest to a float32 `value`, ties to even, saturating; any NaN is 0x7F."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    magnitude = min(abs(value), 448.0)
    if magnitude < 2.0**-6:
        return sign | round(magnitude * 512)
    fraction, exponent = math.frexp(magnitude)  # fraction in [1/2, 1)
    return sign | (exponent + 6 << 3) + round(fraction * 16) - 8  # a carry moves to the exponent


E4M3 = tuple(map(_decode_e4m3, range(256)))
BOOK_MAGNITUDES = frozenset(value for value in E4M3 if 0.5 <= value <= 7)  # and 0


def _with_signs(magnitudes: Sequence[float]) -> tuple[float, ...]:
    positive = (0.0, *map(float, magnitudes[1:]))
    return (*positive, *(-value for value in positive))


def _decode_bf16(data: bytes) -> array[float]:
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return array("f", struct.unpack(f"<{len(data) // 2}f", wide))


def quantize_token(values: Sequence[float]) -> tuple[float, bytes]:
    """One token's activations (float32) as its scale (float32) and one E4M3 byte for each value.

    Dividing in float64 and rounding to float32 gives the float32 quotient: 53 bits are more than
    the 2 * 24 + 2 from which on the double rounding cannot be seen.
    """
    row = array("f", values)
    absmax = math.nan if any(map(math.isnan, row)) else max(map(abs, row), default=0.0)
    floored = absmax if math.isnan(absmax) else max(absmax, 2.0**-100)
    scale = array("f", (floored / 448,))[0]
    return scale, bytes(map(_encode_e4m3, array("f", (value / scale for value in row))))


# Files


def _open(path: Path) -> BinaryIO:
    try:
        if os.path.isfile(path):
            return path.open("rb")
        found = "no such file"
    except OSError as error:
        found = f"a file that cannot be opened ({error.strerror})"
    _fail("missing-file", repr(str(path)), found, "a readable file")


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return result


def _parse_object(
    data: bytes, rule: str, where: str, constant: Callable[[str], Any] = _reject_constant
) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        _fail(rule, where, f"no valid JSON ({error})", "UTF-8 JSON without repeated keys")
    if not isinstance(value, dict):
        _fail(rule, where, f"JSON {reprlib.repr(value)}", "a JSON object")
    return value


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # bool is an int to isinstance


def _is_error(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_distinct_strings(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, str) for item in value)
        and len(set(value)) == len(value)
    )


def _is_codebook(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 8
        and all(type(number) in (int, float) for number in value)
        and value[0] == 0
        and set(value[1:]) <= BOOK_MAGNITUDES
        and value == sorted(set(value))
    )


def _is_codebooks(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (1, 2) and all(map(_is_codebook, value))


def _check_plain_name(name: str, where: str) -> None:
    if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
        needed = "the plain name of a file in the checkpoint's own folder"
        remedy = "do not use this checkpoint unless you trust where it came from"
        _fail("outside-folder", where, f"the file name {reprlib.repr(name)}", needed, remedy)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes lie; they are read when asked for, and never kept."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    size: int  # bytes

    def read(self) -> bytes:
        """Read the tensor's bytes."""
        with _open(self.path) as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) != self.size:
            found = f"{len(data)} of {self.size} bytes at offset {self.start}"
            _fail("bad-shard", repr(str(self.path)), found, "a shard that nobody writes to")
        return data


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes; checks the whole header."""
    where = repr(str(path))
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            found = f"a header of {length} bytes in a file of {size}"
            _fail("bad-shard", where, found, "a header within the file, of 100 MB at most")
        text = file.read(length)
    if not text.startswith(b"{"):
        _fail("bad-shard", where, f"a header that begins {text[:8]!r}", "a JSON object at once")
    header = _parse_object(text, "bad-shard", where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found = f"__metadata__ {reprlib.repr(metadata)}"
        _fail("bad-shard", where, found, "an object of strings")
    data_start = 8 + length
    tensors = {
        name: _read_entry(path, f"{where}, tensor {name!r}", entry, data_start)
        for name, entry in header.items()
    }
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)))
    end = data_start
    for name, tensor in tensors.items():
        if tensor.start != end:
            found = f"data at offset {tensor.start - data_start} where {end - data_start} is next"
            needed = "tensors that neither overlap nor leave holes"
            _fail("bad-shard", f"{where}, tensor {name!r}", found, needed)
        end += tensor.size
    if end != size:
        found = f"tensors that end at byte {end} of {size}"
        _fail("bad-shard", where, found, "tensors that fill the file exactly")
    return tensors


def _read_entry(path: Path, where: str, entry: Any, data_start: int) -> Tensor:
    needed = "a known dtype, a shape, and [begin, end] offsets as long as both say"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            dtype in DTYPE_BITS
            and all(_is_int(length, 0) for length in shape)
            and _is_int(begin, 0)
            and _is_int(end, begin)
            and 8 * (end - begin) == math.prod(shape) * DTYPE_BITS[dtype]
        ):
            return Tensor(path, dtype, tuple(shape), data_start + begin, end - begin)
    _fail("bad-shard", where, reprlib.repr(entry), needed)


# Config and manifest


@dataclass(frozen=True)
class Settings:
    """What a reader needs of `quantization_config`."""

    group_size: int | None  # None: one group a row
    scales: str
    books: tuple[tuple[float, ...], ...]  # one or two; the values of the 16 codes
    rank: int  # an upper bound; 0 without low-rank compensation
    factors: str | None
    features: tuple[str, ...]
    ignore: frozenset[str]


def _read_config(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        data = file.read()
    # What Python writes for the NaN and Infinity of a model's own settings is not ours to judge.
    config = _parse_object(data, "bad-config", repr(str(path)), float)
    value = config.get("quantization_config")
    if not isinstance(value, dict):
        found = f"quantization_config {reprlib.repr(value)}"
        _fail("bad-config", repr(str(path)), found, "an object", "give a zqfp checkpoint")
    return value


def _check_config(config: dict[str, Any], where: str) -> Settings:
    def take(key: str, is_right: Callable[[Any], bool], needed: str, do: str = _RESTORE) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if not is_right(value):
            found = "nothing" if value is _ABSENT else _SHORT.repr(value)
            _fail("bad-config", f"{where}, quantization_config.{key}", found, needed, do)
        return value

    def take_one_of(key: str, *values: str, do: str = _RESTORE) -> str:
        name: str = take(key, values.__contains__, " or ".join(map(repr, values)), do)
        return name

    def is_size(value: Any) -> bool:
        return _is_int(value, 1)

    take_one_of("quant_method", "zqfp", do="give a zqfp checkpoint")
    version = take("format_version", is_size, "a positive integer")
    if version > VERSION:
        needed = f"format version {VERSION}, the newest that this reader knows"
        do = f"get a zqfp-convert that reads format version {version}"
        _fail("newer-version", where, f"format version {version}", needed, do)
    features = take("required_features", _is_distinct_strings, "a list of distinct strings")
    for feature in features:
        if feature not in FEATURES:
            needed = f"features out of {', '.join(FEATURES)}"
            do = f"get a zqfp-convert that knows {feature!r}"
            _fail("unknown-feature", where, f"the required feature {feature!r}", needed, do)
    for key in ("producer.name", "producer.version"):
        take(key, lambda value: isinstance(value, str), "a string")
    kind = "codebooks" if "codebooks" in features else "e2m1"
    needed = f"{kind!r}, by required_features"
    take("weights.format", lambda value: value == kind, needed)
    group_size = take(
        "weights.group_size",
        lambda value: value == "row" or is_size(value),
        "a positive integer or 'row'",
    )
    kinds = ("free", "m1", "m2") if kind == "e2m1" else ("m1", "m2")
    scales = take_one_of("weights.scales", *kinds)
    books: tuple[tuple[float, ...], ...] = (E2M1,)
    if kind == "codebooks":
        needed = "one or two lists of 8 rising numbers, 0 and E4M3 numbers from 0.5 to 7"
        magnitudes = take("weights.codebooks", _is_codebooks, needed)
        books = tuple(map(_with_signs, magnitudes))
    take_one_of("activations.format", "e4m3")
    take_one_of("activations.scale", "token")
    take("activations.dynamic", lambda value: value is True, "true")
    rank, factors = 0, None
    lorc = take("lorc", lambda value: value is None or isinstance(value, dict), "null or an object")
    if lorc is not None:
        rank = take("lorc.rank", is_size, "a positive integer")
        factors = take_one_of("lorc.factors", "e4m3", "bf16")
        needed = "'lorc' among them, as lorc is not null"
        take("required_features", lambda value: "lorc" in value, needed)
    ignore = take("ignore", _is_distinct_strings, "a list of distinct strings")
    take("recipe", lambda value: isinstance(value, dict), "an object")
    size = None if group_size == "row" else group_size
    return Settings(size, scales, books, rank, factors, tuple(features), frozenset(ignore))


def _check_manifest(manifest: dict[str, Any], where: str, settings: Settings) -> None:
    def need(condition: bool, part: str, value: Any, needed: str) -> None:
        if not condition:
            _fail("bad-manifest", f"{where}, {part}", reprlib.repr(value), needed)

    need(manifest.get("format") == "zqfp", "format", manifest.get("format"), "'zqfp'")
    version = manifest.get("format_version")
    need(_is_int(version, 1) and version == VERSION, "format_version", version, f"{VERSION}")
    for part in ("shards", "layers", "changed"):
        need(isinstance(manifest.get(part), dict), part, manifest.get(part), "an object")
    need(bool(manifest["shards"]), "shards", {}, "one file at least")
    for name, shard in manifest["shards"].items():
        match shard:
            case {"size": size, "sha256": str(digest)} if _is_int(size, 0) and (
                len(digest) == 64 and set(digest) <= set("0123456789abcdef")
            ):
                continue
        needed = "a size in bytes and a SHA-256 in 64 lower-case hexadecimal digits"
        need(False, f"shard {name!r}", shard, needed)
    for name, entry in manifest["layers"].items():
        part = f"layer {name!r}"
        need(isinstance(entry, dict), part, entry, "an object")
        shape, rank = entry.get("shape"), entry.get("rank")
        sized = isinstance(shape, list) and len(shape) == 2 and all(_is_int(n, 1) for n in shape)
        need(sized, f"{part}, shape", shape, "[N, K], both positive")
        full = min(settings.rank, *shape)
        ranked = _is_int(rank, 0) and (rank == full or (rank < full and rank % 8 == 0))
        need(ranked, f"{part}, rank", rank, f"{full}, or a multiple of 8 below")
        span, raised = entry.get("span"), entry.get("raised_groups")
        if settings.scales == "free":
            need("span" in entry and span is None, f"{part}, span", span, "null (free scales)")
        else:
            need(_is_int(span, 0), f"{part}, span", span, "an integer")
        need(_is_int(raised, 0), f"{part}, raised_groups", raised, "a count of groups")
        error, output = entry.get("weight_error"), entry.get("output_error")
        need(_is_error(error), f"{part}, weight_error", error, "a number of 0 or more")
        measured = _is_error(output) or (output is None and "output_error" in entry)
        need(measured, f"{part}, output_error", output, "null or a number of 0 or more")
        need(name not in settings.ignore, part, name, "a layer that config.json does not ignore")
    for name, change in manifest["changed"].items():
        known = isinstance(change, str) and change in CHANGES
        need(known, f"changed, {name!r}", change, f"one of {', '.join(CHANGES)}")
    for name in manifest["shards"]:
        _check_plain_name(name, where)


# Shards


def _read_index(path: Path, shards: dict[str, Any]) -> dict[str, str]:
    where = repr(str(path))
    with _open(path) as file:
        weight_map = _parse_object(file.read(), "bad-shard", where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file_name, str) for file_name in weight_map.values()
    ):
        found = f"weight_map {reprlib.repr(weight_map)}"
        _fail("bad-shard", where, found, "an object from tensor names to file names")
    for file_name in sorted(set(weight_map.values())):
        _check_plain_name(file_name, where)
    if set(weight_map.values()) != set(shards):
        found = f"shards {reprlib.repr(sorted(set(weight_map.values())))}"
        _fail("bad-manifest", where, found, f"the manifest's, {reprlib.repr(sorted(shards))}")
    return weight_map


def _check_shard(path: Path, entry: dict[str, Any], check_hash: bool) -> None:
    where, digest = repr(str(path)), hashlib.sha256()
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["size"]:
            _fail("shard-size", where, f"{size} bytes", f"the manifest's {entry['size']}")
        while check_hash and (chunk := file.read(1 << 20)):
            digest.update(chunk)
    if check_hash and digest.hexdigest() != entry["sha256"]:
        found, needed = f"SHA-256 {digest.hexdigest()}", f"the manifest's {entry['sha256']}"
        _fail("shard-hash", where, found, needed)


def _read_shards(folder: Path, shards: dict[str, Any], check_hashes: bool) -> dict[str, Tensor]:
    index = None
    if set(shards) != {"model.safetensors"}:
        index = _read_index(folder / "model.safetensors.index.json", shards)
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(shards):
        _check_shard(folder / file_name, shards[file_name], check_hashes)
        header = _read_header(folder / file_name)
        if twice := sorted(tensors.keys() & header.keys()):
            found = f"tensor {twice[0]!r} in an earlier shard too"
            _fail("bad-shard", repr(str(folder / file_name)), found, "each tensor in one shard")
        tensors |= header
    if index is not None:
        held = {name: tensor.path.name for name, tensor in tensors.items()}
        if wrong := sorted(dict(index.items() ^ held.items())):
            found = f"tensor {wrong[0]!r} in {index.get(wrong[0])!r}"
            needed = f"what the shards hold, which is in {held.get(wrong[0])!r}"
            _fail("bad-shard", repr(str(folder / "model.safetensors.index.json")), found, needed)
    return tensors


# Layers


@dataclass(frozen=True)
class Layer:
    """One quantized linear layer; its tensors are read from disk at each call."""

    name: str
    shape: tuple[int, int]  # N, K
    group_size: int  # K for one group a row
    scales: str  # "free", "m1" or "m2"
    books: tuple[tuple[float, ...], ...]  # E2M1, or the codebooks: the values of the 16 codes
    rank: int  # 0 without low-rank compensation
    span: int | None  # None for free scales
    tensors: dict[str, Tensor]  # by suffix: "weight_packed", "weight_scale", ...

    @property
    def groups(self) -> int:
        """How many groups a row has."""
        return -(-self.shape[1] // self.group_size)

    @property
    def byte_count(self) -> int:
        """Bytes of everything the layer needs but its bias."""
        return sum(tensor.size for suffix, tensor in self.tensors.items() if suffix != "bias")

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, the bias left out."""
        return 8 * self.byte_count / math.prod(self.shape)

    def dequantize(self) -> array[float]:
        """The weight without low-rank compensation, float32 `[N * K]`, row after row."""
        weight = array("f")
        rows = zip(self._code_rows(), self._scale_rows(), self._choice_rows(), strict=True)
        for codes, scales, choices in rows:
            for group, scale, choice in zip(self._split(codes), scales, choices, strict=True):
                values = [value * scale for value in self.books[choice]]  # exact in float64
                weight.extend(map(values.__getitem__, group))
        return weight

    def lorc(self) -> tuple[array[float], array[float], array[float]] | None:
        """`A [r * K]`, `B [N * r]`, `s [r]` in float32, or None for a layer of rank 0."""
        if self.rank == 0:
            return None
        factor_a, factor_b = (self._decode(suffix) for suffix in ("lorc_A", "lorc_B"))
        if "lorc_scale" not in self.tensors:
            return factor_a, factor_b, array("f", [1.0] * self.rank)
        return factor_a, factor_b, self._decode("lorc_scale")

    def input_offset(self) -> array[float] | None:
        """What is subtracted from the activations, float32 `[K]`, or None."""
        return self._decode("input_offset") if "input_offset" in self.tensors else None

    def _decode(self, suffix: str) -> array[float]:
        tensor = self.tensors[suffix]
        data = tensor.read()
        match tensor.dtype:
            case "F8_E4M3":
                return array("f", map(E4M3.__getitem__, data))
            case "BF16":
                return _decode_bf16(data)
            case "F32":
                return array("f", struct.unpack(f"<{len(data) // 4}f", data))
        raise AssertionError(tensor.dtype)

    def _split(self, codes: bytes) -> Iterator[bytes]:
        for start in range(0, len(codes), self.group_size):
            yield codes[start : start + self.group_size]

    def _code_rows(self) -> Iterator[bytes]:
        """One byte for each code of a row; even k from the low nibble."""
        packed, width = self.tensors["weight_packed"].read(), (self.shape[1] + 1) // 2
        for start in range(0, len(packed), width):
            row = packed[start : start + width]
            codes = bytearray(2 * width)
            codes[0::2], codes[1::2] = row.translate(LOW_NIBBLE), row.translate(HIGH_NIBBLE)
            yield bytes(codes[: self.shape[1]])

    def _exponent_rows(self) -> Iterator[bytes]:
        data = self.tensors["weight_scale"].read()
        for start in range(0, len(data), self.groups):
            yield data[start : start + self.groups]

    def _scale_rows(self) -> Iterator[list[float]]:
        if self.scales == "free":
            scales = self._decode("weight_scale").tolist()
            for start in range(0, len(scales), self.groups):
                yield scales[start : start + self.groups]
            return
        row_scales = [1.0] * self.shape[0]
        if self.scales == "m2":
            row_scales = self._decode("weight_row_scale").tolist()
        for exponents, row_scale in zip(self._exponent_rows(), row_scales, strict=True):
            yield [math.ldexp(row_scale, b - 127) for b in exponents]

    def _choice_rows(self) -> Iterator[list[int]]:
        """Which of the books each group of a row has."""
        if "weight_codebook" not in self.tensors:
            for _ in range(self.shape[0]):
                yield [0] * self.groups
            return
        data = self.tensors["weight_codebook"].read()
        for n in range(self.shape[0]):
            start = n // 8 * self.groups
            yield [byte >> n % 8 & 1 for byte in data[start : start + self.groups]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that keeps every rule of the format."""

    folder: Path
    config: dict[str, Any]  # quantization_config
    manifest: dict[str, Any]
    layers: dict[str, Layer]  # by name, in ascending order
    tensors: dict[str, Tensor]  # all that the shards hold


def _make_layer(
    name: str, entry: dict[str, Any], settings: Settings, tensors: dict[str, Tensor]
) -> Layer:
    """A layer whose tensors are all there, and none too many, of the right dtypes and shapes."""
    (n, k), rank = entry["shape"], entry["rank"]
    group_size = settings.group_size or k
    groups, free = -(-k // group_size), settings.scales == "free"
    layout: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("U8",), (n, (k + 1) // 2)),
        "weight_scale": (("BF16" if free else "U8",), (n, groups)),
    }
    if settings.scales == "m2":
        layout["weight_row_scale"] = (("BF16",), (n,))
    if len(settings.books) == 2:
        layout["weight_codebook"] = (("U8",), ((n + 7) // 8, groups))
    if rank:
        factor = ("F8_E4M3" if settings.factors == "e4m3" else "BF16",)
        layout |= {"lorc_A": (factor, (rank, k)), "lorc_B": (factor, (n, rank))}
        if settings.factors == "e4m3":
            layout["lorc_scale"] = (("F32",), (rank,))
    offset = "input_offset" in settings.features and f"{name}.input_offset" in tensors
    if offset:
        layout["input_offset"] = (("BF16",), (k,))
    if offset or f"{name}.bias" in tensors:
        layout["bias"] = (("F64", "F32", "F16", "BF16"), (n,))

    for suffix in layout:
        if f"{name}.{suffix}" not in tensors:
            where = f"layer {name!r}"
            _fail("missing-tensor", where, "no such tensor", repr(f"{name}.{suffix}"))
    for suffix in (*SUFFIXES, "weight"):
        if suffix not in layout and f"{name}.{suffix}" in tensors:
            found = f"tensor {f'{name}.{suffix}'!r}"
            needed = f"{', '.join(layout)} alone, by config and manifest"
            _fail("extra-tensor", f"layer {name!r}", found, needed)
    for suffix, (dtypes, _) in layout.items():
        if (dtype := tensors[f"{name}.{suffix}"].dtype) not in dtypes:
            _fail("wrong-dtype", f"tensor {f'{name}.{suffix}'!r}", dtype, " or ".join(dtypes))
    for suffix, (_, shape) in layout.items():
        if (found_shape := tensors[f"{name}.{suffix}"].shape) != shape:
            where = f"tensor {f'{name}.{suffix}'!r}"
            _fail("wrong-shape", where, f"shape {list(found_shape)}", f"shape {list(shape)}")
    own = {suffix: tensors[f"{name}.{suffix}"] for suffix in layout}
    scales, books = settings.scales, settings.books
    return Layer(name, (n, k), group_size, scales, books, rank, entry["span"], own)


def _check_listed(tensors: dict[str, Tensor], manifest: dict[str, Any], where: str) -> None:
    for name in sorted(tensors):
        stem, dot, suffix = name.rpartition(".")
        if dot and suffix in SUFFIXES and stem not in manifest["layers"]:
            _fail("bad-manifest", where, f"no layer {stem!r}", f"one, as there is tensor {name!r}")
    for name in sorted(manifest["changed"]):
        if name not in tensors:
            found = f"{name!r}, a tensor that no shard holds"
            _fail("missing-tensor", f"{where}, changed", found, "tensors of this checkpoint")


def _bf16_bits(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 2}H", data)


def _check_values(layer: Layer) -> None:
    where = f"layer {layer.name!r}"
    _check_scales(layer, where)
    if layer.shape[1] % 2:
        width = layer.tensors["weight_packed"].shape[1]
        for n, last in enumerate(layer.tensors["weight_packed"].read()[width - 1 :: width]):
            if last >> 4:
                found = f"last high nibble {last >> 4}"
                _fail("padding-nibble", f"{where}, row {n}", found, "0, as K is odd")
    if layer.scales != "free":
        _check_exponents(layer, where)
    if "weight_codebook" in layer.tensors:
        _check_choices(layer, where)
    for suffix in ("lorc_A", "lorc_B", "lorc_scale", "input_offset"):
        if suffix not in layer.tensors:
            continue
        for position, value in enumerate(layer._decode(suffix)):
            if not math.isfinite(value):
                rule = "offset-value" if suffix == "input_offset" else "lorc-value"
                _fail(rule, f"{where}, {suffix}, element {position}", f"{value}", "a finite value")
    if layer.scales != "free":
        span = max(max(exponents) - min(exponents) for exponents in layer._exponent_rows())
        if span != layer.span:
            found = f"span {layer.span} in the manifest"
            _fail("bad-manifest", where, found, f"the {span} that its scales have")


def _check_scales(layer: Layer, where: str) -> None:
    data = layer.tensors["weight_scale"].read()
    if layer.scales == "free":
        for position, bits in enumerate(_bf16_bits(data)):
            if not 0 < bits < BF16_INFINITY:
                place = f"{where}, row {position // layer.groups}, group {position % layer.groups}"
                found = f"scale {_decode_bf16(data)[position]}"
                _fail("scale-forbidden", place, found, "a positive, finite scale")
    elif (position := data.find(255)) >= 0:
        place = f"{where}, row {position // layer.groups}, group {position % layer.groups}"
        _fail("scale-forbidden", place, "b = 255", "b from 0 to 254")
    if layer.scales == "m2":
        row_scales = layer.tensors["weight_row_scale"].read()
        for n, bits in enumerate(_bf16_bits(row_scales)):
            if not 0 < bits < BF16_INFINITY:
                found = f"row scale {_decode_bf16(row_scales)[n]}"
                _fail("row-scale", f"{where}, row {n}", found, "a positive, finite row scale")


def _check_exponents(layer: Layer, where: str) -> None:
    if layer.scales == "m2":
        for n, exponents in enumerate(layer._exponent_rows()):
            if max(exponents) != 127:
                found = f"largest b = {max(exponents)}"
                _fail("row-maximum", f"{where}, row {n}", found, "127, under M2")
    for n, exponents in enumerate(layer._exponent_rows()):
        if (span := max(exponents) - min(exponents)) > MAX_SPAN:
            _fail("span", f"{where}, row {n}", f"span {span}", f"{MAX_SPAN} at most")
    row_scales = (BF16_ONE,) * layer.shape[0]
    if layer.scales == "m2":
        row_scales = _bf16_bits(layer.tensors["weight_row_scale"].read())
    rows = zip(layer._code_rows(), layer._exponent_rows(), row_scales, strict=True)
    for n, (codes, exponents, row_scale) in enumerate(rows):
        if not codes.strip(ZERO_CODES):
            if set(exponents) != {127} or row_scale != BF16_ONE:
                found = f"a row of zeros with b {min(exponents)} to {max(exponents)}"
                needed = "b = 127 in each group, and row scale 1 under M2"
                _fail("zero-group", f"{where}, row {n}", found, needed)
            continue
        largest = max(exponents)
        for g, (group, b) in enumerate(zip(layer._split(codes), exponents, strict=True)):
            if b != largest and not group.strip(ZERO_CODES):
                place = f"{where}, row {n}, group {g}"
                found = f"a group of zeros with b = {b}"
                _fail("zero-group", place, found, f"its row's largest b, {largest}")


def _check_choices(layer: Layer, where: str) -> None:
    rows = layer.shape[0]
    used = (rows - 1) % 8 + 1  # bits of the last bytes
    for g, last in enumerate(layer.tensors["weight_codebook"].read()[-layer.groups :]):
        if last >> used:
            found = f"last byte {last:#04x} of weight_codebook"
            needed = f"0 but for its {used} lowest bits, as there are {rows} rows"
            _fail("codebook-choice", f"{where}, group {g}", found, needed)
    for n, (codes, choices) in enumerate(
        zip(layer._code_rows(), layer._choice_rows(), strict=True)
    ):
        for g, (group, choice) in enumerate(zip(layer._split(codes), choices, strict=True)):
            if choice and not group.strip(ZERO_CODES):
                place = f"{where}, row {n}, group {g}"
                found = "a group of zeros with the second codebook"
                _fail("codebook-choice", place, found, "the first, bit 0")


def read(folder: str | os.PathLike[str], *, check_hashes: bool = True) -> Checkpoint:
    """The checkpoint in `folder`, every rule checked; `check_hashes=False` skips `shard-hash`.

    Raises FormatError, with the id of the first rule broken in the order of zqfp-1.md.
    """
    root = Path(folder)
    config = _read_config(root / "config.json")
    settings = _check_config(config, repr(str(root / "config.json")))
    path = root / "zqfp_manifest.json"
    where = repr(str(path))
    with _open(path) as file:
        manifest = _parse_object(file.read(), "bad-manifest", where)
    _check_manifest(manifest, where, settings)
    tensors = _read_shards(root, manifest["shards"], check_hashes)
    _check_listed(tensors, manifest, where)
    layers = {
        name: _make_layer(name, entry, settings, tensors)
        for name, entry in sorted(manifest["layers"].items())
    }
    for layer in layers.values():
        _check_values(layer)
    return Checkpoint(root, config, manifest, layers, tensors)


def _print_table(checkpoint: Checkpoint) -> None:
    rows = [("layer", "shape", "group", "scales", "rank", "span", "bits a weight")]
    for name, layer in checkpoint.layers.items():
        shown = name.encode("unicode_escape").decode("ascii")
        span = "-" if layer.span is None else str(layer.span)
        shape, bits = "x".join(map(str, layer.shape)), f"{layer.bits_per_weight:.4f}"
        size, rank = str(layer.group_size), str(layer.rank)
        rows.append((shown, shape, size, layer.scales, rank, span, bits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(row[0].ljust(widths[0]), *cells, sep="  ")
    weights = sum(math.prod(layer.shape) for layer in checkpoint.layers.values())
    if weights:
        total = 8 * sum(layer.byte_count for layer in checkpoint.layers.values()) / weights
        print(f"{len(checkpoint.layers)} layers, {weights} weights, {total:.4f} bits a weight")


def main() -> int:
    """Check the folder that the command line names and print its layers; 2 for a broken rule."""
    parser = argparse.ArgumentParser(description="Check a zqfp-1 checkpoint and list its layers.")
    parser.add_argument("folder", help="folder with config.json and zqfp_manifest.json")
    try:
        _print_table(read(parser.parse_args().folder))
    except FormatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
