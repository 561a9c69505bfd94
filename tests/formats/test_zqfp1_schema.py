"""The JSON Schema of quantization_config: takes all valid vectors, refuses what the reader does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
import valid_cases
import zqfp1_reader as reader
from jsonschema import Draft202012Validator

FORMATS = Path(reader.__file__).parent
SCHEMA = json.loads((FORMATS / "zqfp-1.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
REQUIRED = (
    *SCHEMA["required"],
    *(
        f"{section}.{key}"
        for section in ("producer", "weights", "activations")
        for key in SCHEMA["properties"][section]["required"]
    ),
    "lorc.rank",
    "lorc.factors",
)
VALID_CONFIGS = sorted((FORMATS / "vectors" / "valid").glob("*/config.json"))
ABSENT = "absent"
BROKEN: tuple[tuple[str, Any], ...] = (
    *((key, ABSENT) for key in REQUIRED),
    ("quant_method", "fp8"),
    ("format_version", 0),
    ("format_version", 2),
    ("format_version", 1.5),
    ("format_version", "1"),
    ("format_version", True),
    ("producer", "zqfp-convert"),
    ("producer.version", 1),
    ("required_features", None),
    ("required_features", []),
    ("required_features", "lorc"),
    ("required_features", ["lorc", "lorc"]),
    ("required_features", ["lorc", "rotation"]),
    ("required_features", ["lorc", 1]),
    ("weights", []),
    ("weights.format", "e3m0"),
    ("weights.group_size", 0),
    ("weights.group_size", -32),
    ("weights.group_size", 12.5),
    ("weights.group_size", True),
    ("weights.group_size", "column"),
    ("weights.group_size", None),
    ("weights.scales", "M2"),
    ("activations", None),
    ("activations.format", "e5m2"),
    ("activations.scale", "tensor"),
    ("activations.dynamic", False),
    ("activations.dynamic", 1),
    ("lorc", []),
    ("lorc", False),
    ("lorc.rank", 0),
    ("lorc.rank", "8"),
    ("lorc.factors", "fp8"),
    ("ignore", None),
    ("ignore", ["lm_head", "lm_head"]),
    ("ignore", [1]),
    ("recipe", None),
    ("recipe", []),
)
BOOK = valid_cases.PAIR[0]
BROKEN_CODEBOOKS: tuple[tuple[str, Any], ...] = (
    ("required_features", []),
    ("weights.format", "e2m1"),
    ("weights.format", ABSENT),
    ("weights.scales", "free"),
    ("weights.scales", ABSENT),
    ("weights.group_size", ABSENT),
    ("weights.codebooks", ABSENT),
    ("weights.codebooks", None),
    ("weights.codebooks", {}),
    ("weights.codebooks", []),
    ("weights.codebooks", BOOK),
    ("weights.codebooks", [BOOK] * 3),
    ("weights.codebooks", [BOOK, None]),
    ("weights.codebooks", [BOOK[:7]]),
    ("weights.codebooks", [[*BOOK, 7]]),
    ("weights.codebooks", [[*BOOK[:7], BOOK[6]]]),
    ("weights.codebooks", [[0.5, *BOOK[1:]]]),
    ("weights.codebooks", [[False, *BOOK[1:]]]),
    ("weights.codebooks", [[*BOOK[:2], True, *BOOK[3:]]]),
    *(
        ("weights.codebooks", [[0, least, *BOOK[2:]]])
        for least in (None, "0.5", [0.5], 0.46875, -0.5, 0)
    ),
    *(
        ("weights.codebooks", [BOOK, [*BOOK[:7], most]])
        for most in (5.25, 5.5000001, 7.5, 8, 1e300)
    ),
)


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    *parents, last = path.split(".")
    target = settings
    for parent in parents:
        target = target[parent]
    if value is ABSENT:
        del target[last]
    else:
        target[last] = value
    return settings


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", VALID_CONFIGS, ids=lambda path: path.parent.name)
def test_takes_every_valid_vector(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text())["quantization_config"])


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=lambda value: str(value))
def test_refuses_what_the_reader_refuses(tmp_path: Path, key: str, value: Any) -> None:
    refused_by_both(tmp_path, valid_cases.lorc("e4m3"), key, value)


@pytest.mark.parametrize(("key", "value"), BROKEN_CODEBOOKS, ids=lambda value: str(value))
def test_refuses_the_codebooks_that_the_reader_refuses(
    tmp_path: Path, key: str, value: Any
) -> None:
    refused_by_both(tmp_path, valid_cases.codebooks_two(), key, value)


def test_takes_the_magnitudes_that_the_reader_takes() -> None:
    second = SCHEMA["allOf"][1]["then"]["properties"]["weights"]["properties"]["codebooks"]
    assert second["items"]["items"]["enum"] == sorted(reader.BOOK_MAGNITUDES)


def refused_by_both(
    tmp_path: Path, checkpoint: tiny_checkpoint.Checkpoint, key: str, value: Any
) -> None:
    VALIDATOR.validate(checkpoint.settings)
    broken = changed(checkpoint.settings, key, value)
    assert not VALIDATOR.is_valid(broken)
    checkpoint.config["quantization_config"] = broken
    for name, data in tiny_checkpoint.render(checkpoint).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(reader.FormatError) as caught:
        reader.read(tmp_path)
    assert caught.value.rule in ("bad-config", "newer-version", "unknown-feature")
