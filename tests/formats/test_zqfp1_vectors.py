"""The reader of zqfp-1 against the test vectors, bit for bit, and these against their maker."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import zqfp1_reader as reader

FORMATS = Path(reader.__file__).parent
VECTORS = FORMATS / "vectors"
VALID = sorted((VECTORS / "valid").iterdir())
INVALID = sorted((VECTORS / "invalid").iterdir())
ACTIVATIONS = json.loads((VECTORS / "activations.json").read_text())["rows"]
SPECIFICATION = (FORMATS / "zqfp-1.md").read_text()


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def to_hex(values: array[float] | None) -> str | None:
    return None if values is None else struct.pack(f"<{len(values)}f", *values).hex()


def read_all(folder: Path) -> dict[str, bytes]:
    paths = [folder / "activations.json"]
    for part in ("valid", "invalid"):
        paths += [path for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python without site packages: the standard library is all there is."""
    command = [sys.executable, "-S", "-E", "-B", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", VALID, ids=lambda folder: folder.name)
def test_valid_vectors_decode_bit_for_bit(folder: Path) -> None:
    checkpoint = reader.read(folder)
    expected = load(folder / "expected.json")["layers"]
    assert sorted(expected) == list(checkpoint.layers)
    for name, layer in checkpoint.layers.items():
        factors = layer.lorc()
        found = {
            "bytes": layer.byte_count,
            "span": layer.span,
            "weight": to_hex(layer.dequantize()),
            "lorc": factors and dict(zip("ABs", map(to_hex, factors), strict=True)),
            "input_offset": to_hex(layer.input_offset()),
        }
        assert found == expected[name]


@pytest.mark.parametrize("folder", INVALID, ids=lambda folder: folder.name)
def test_invalid_vectors_name_their_rule(folder: Path) -> None:
    with pytest.raises(reader.FormatError) as caught:
        reader.read(folder)
    assert caught.value.rule == load(folder / "error.json")["rule"]
    assert "found" in caught.value.message
    assert "needed" in caught.value.message


@pytest.mark.parametrize("row", ACTIVATIONS, ids=lambda row: row["name"])
def test_activations_are_quantized_bit_for_bit(row: dict[str, str]) -> None:
    data = bytes.fromhex(row["x"])
    scale, codes = reader.quantize_token(struct.unpack(f"<{len(data) // 4}f", data))
    assert struct.pack("<f", scale).hex() == row["scale"]
    assert codes.hex() == row["codes"]


def test_every_rule_is_specified_and_has_a_vector() -> None:
    vectors = {load(folder / "error.json")["rule"] for folder in INVALID}
    assert vectors == set(reader.RULES)
    steps = SPECIFICATION.split("## Rules")[1].split("## A worked example")[0]
    rows = [line.split("|")[3] for line in steps.splitlines() if re.match(r"\| \d", line)]
    specified = set(re.findall("`([a-z-]+)`", " ".join(rows))) - {"span"}
    assert specified | {"span"} == set(reader.RULES)


def test_hashes_can_be_skipped_and_nothing_else() -> None:
    assert reader.read(VECTORS / "invalid" / "shard-hash", check_hashes=False).layers
    with pytest.raises(reader.FormatError) as caught:
        reader.read(VECTORS / "invalid" / "shard-size", check_hashes=False)
    assert caught.value.rule == "shard-size"


def test_a_newer_version_says_which_program_to_get() -> None:
    with pytest.raises(reader.FormatError, match="get a zqfp-convert that reads format version 2"):
        reader.read(VECTORS / "invalid" / "newer-version")


def test_the_worked_example_is_a_vector() -> None:
    (layer,) = reader.read(VECTORS / "valid" / "worked-example").layers.values()
    for suffix in ("weight_packed", "weight_scale", "weight_row_scale"):
        data = layer.tensors[suffix].read().hex(" ").upper()
        assert re.search(rf"{suffix} +{data}\n", SPECIFICATION)
    weight = [f"{value:g}".replace("-", "\u2212") for value in layer.dequantize()]
    assert f"| {' | '.join(weight)} |" in SPECIFICATION


def test_make_reproduces_the_vectors(tmp_path: Path) -> None:
    made = run(VECTORS / "make.py", tmp_path)
    assert made.returncode == 0, made.stderr
    assert read_all(tmp_path) == read_all(VECTORS)


def test_the_reader_prints_a_table() -> None:
    printed = run(FORMATS / "zqfp1_reader.py", VECTORS / "valid" / "lorc-e4m3")
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    titles = ["layer", "shape", "group", "scales", "rank", "span", "bits a weight"]
    assert re.split("  +", lines[0]) == titles
    assert lines[1].split() == [
        "model.layers.0.mlp.down_proj",
        "2x9",
        "8",
        "m2",
        "0",
        "4",
        "8.0000",
    ]
    assert lines[-1].startswith("3 layers, 180 weights, ")


def test_the_reader_reports_a_broken_rule_without_traceback() -> None:
    printed = run(FORMATS / "zqfp1_reader.py", VECTORS / "invalid" / "span-m2")
    assert (printed.returncode, printed.stdout) == (2, "")
    assert printed.stderr.endswith("[span]\n")
    assert "Traceback" not in printed.stderr
