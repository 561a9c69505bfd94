"""The two descriptions in a packed checkpoint, `quantization_config` and manifest, checked.

The steps are those of `formats/zqfp-1.md`, section Rules.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.shards import check_inside, read_json
from zqfp_convert.errors import CheckpointError
from zqfp_convert.numerics import codebook
from zqfp_convert.numerics.codebook import Codebook

AGAIN = "Convert the model again with zqfp-convert, or download the checkpoint again."
CHANGES = ("bias_added", "bias_changed", "norm_changed", "rotated")


def manifest(
    shards: dict[str, Any], layers: dict[str, Any], changed: dict[str, str]
) -> dict[str, Any]:
    """The manifest of a checkpoint with these shards (size and SHA-256 of each) and layers."""
    return {
        "format": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "shards": shards,
        "layers": layers,
        "changed": changed,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The whole `config.json`, its `quantization_config` checked (steps 1 to 4).

    Raises:
        CheckpointError: `missing-file`, `bad-config`, `newer-version`, `unknown-feature`.
    """
    path = folder / layout.CONFIG_FILE
    whole = read_json(path, "bad-config", constants=True)

    def fail(found: str, needed: str) -> NoReturn:
        raise CheckpointError("bad-config", str(path), found, needed=needed, do=AGAIN)

    config = whole.get(layout.CONFIG_KEY)
    if not isinstance(config, dict) or config.get("quant_method") != layout.FORMAT:
        raise CheckpointError(
            "bad-config",
            str(path),
            "no quantization_config of zqfp",
            needed="a checkpoint made by zqfp-convert",
            do="Give one, or make one of this model first: zqfp-convert MODEL OUT/.",
        )
    version = config.get("format_version")
    if not isinstance(version, int) or not _whole(version, 1):
        fail(f"format_version {version!r}", "a whole number, 1 or more")
    if version > layout.FORMAT_VERSION:
        raise CheckpointError(
            "newer-version",
            str(path),
            f"format version {version}",
            needed=f"format version {layout.FORMAT_VERSION} or older",
            do="Upgrade (pip install -U zqfp-convert) to a release that reads format version "
            f"{version}.",
        )
    features = config.get("required_features")
    if not isinstance(features, list) or not _names(features):
        fail(f"required_features {features!r}", "a list of distinct names")
    for feature in features:
        if feature not in layout.KNOWN_FEATURES:
            raise CheckpointError(
                "unknown-feature",
                str(path),
                f"required feature {feature!r}",
                needed="one of " + ", ".join(layout.KNOWN_FEATURES),
                do="Upgrade (pip install -U zqfp-convert) to a release that knows it.",
            )
    producer = config.get("producer")
    if not _has(producer, name=str, version=str):
        fail(f"producer {producer!r}", "a name and a version")
    weights = config.get("weights")
    kind = "codebooks" if "codebooks" in features else "e2m1"
    if not isinstance(weights, dict) or weights.get("format") != kind:
        fail(f"weights {weights!r}", f"weights of format {kind}, by required_features")
    if weights.get("scales") not in ("free", "m1", "m2"):
        fail(f"scales {weights.get('scales')!r}", "free, m1 or m2")
    if kind == "codebooks":
        books = weights.get("codebooks")
        if weights["scales"] == "free" or not _codebooks(books):
            fail(
                f"codebooks {books!r} with scales {weights['scales']}",
                "one or two lists of eight E4M3 numbers, 0 and then from 0.5 to 7, that rise; "
                "scales m1 or m2",
            )
    size = weights.get("group_size")
    if size != "row" and not _whole(size, 1):
        fail(f"group_size {size!r}", "a positive whole number, or 'row'")
    activations = config.get("activations")
    wanted = {"format": "e4m3", "scale": "token", "dynamic": True}
    given = activations if isinstance(activations, dict) else {}
    if any(given.get(key) != value for key, value in wanted.items()):
        fail(f"activations {activations!r}", f"{wanted}")
    lorc = config.get("lorc", "absent")
    if lorc is not None:
        described = isinstance(lorc, dict) and _whole(lorc.get("rank"), 1)
        if not described or lorc.get("factors") not in ("e4m3", "bf16"):
            fail(f"lorc {lorc!r}", "null, or a rank and factors e4m3 or bf16")
    if (lorc is not None) != ("lorc" in features):
        fail(f"lorc {lorc!r} with required_features {features}", "'lorc' required where it is used")
    if not _names(config.get("ignore")):
        fail(f"ignore {config.get('ignore')!r}", "a list of distinct names")
    if not isinstance(config.get("recipe"), dict):
        fail("no recipe", "an object with the choices of the conversion")
    return whole


def codebooks(quantization: dict[str, Any]) -> tuple[Codebook, ...]:
    """What the codes stand for, by a `quantization_config`: one codebook, or two."""
    if "codebooks" not in quantization["required_features"]:
        return (codebook.E2M1,)
    given = quantization["weights"]["codebooks"]
    return tuple((0.0, *map(float, book[1:])) for book in given)


def read_manifest(folder: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """The manifest, held to what can be known without the shards (step 5).

    Raises:
        CheckpointError: `missing-file`, `bad-manifest`, `outside-folder`.
    """
    path = folder / layout.MANIFEST_FILE
    manifest = read_json(path, "bad-manifest")

    def need(holds: bool, found: str) -> None:
        if not holds:
            needed = "the manifest that was written with these shards"
            raise CheckpointError("bad-manifest", str(path), found, needed=needed, do=AGAIN)

    version = manifest.get("format_version")
    right = version == layout.FORMAT_VERSION and not isinstance(version, bool)
    need(manifest.get("format") == layout.FORMAT and right, "not a manifest of this format")
    shards, layers = manifest.get("shards"), manifest.get("layers")
    changed = manifest.get("changed")
    need(isinstance(shards, dict) and bool(shards), "no shards")
    need(isinstance(layers, dict), "no layers")
    need(isinstance(changed, dict), "no 'changed'")
    assert isinstance(shards, dict)
    assert isinstance(layers, dict)
    assert isinstance(changed, dict)
    for file, entry in shards.items():
        sized = isinstance(entry, dict) and _whole(entry.get("size"), 0)
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        hashed = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
        need(sized and hashed, f"shard {file!r} without size and sha256")
    bound = (quantization["lorc"] or {"rank": 0})["rank"]
    free = quantization["weights"]["scales"] == "free"
    for name, entry in layers.items():
        need(name not in quantization["ignore"], f"layer {name!r}, which is in 'ignore' too")
        need(isinstance(entry, dict), f"layer {name!r} is no object")
        shape, span = entry.get("shape"), entry.get("span")
        shaped = isinstance(shape, list) and len(shape) == 2 and all(_whole(x, 1) for x in shape)
        need(shaped, f"layer {name!r} with shape {shape!r}")
        rank, most = entry.get("rank"), min(bound, *shape)
        ranked = _whole(rank, 0) and (rank == most or (rank < most and rank % layout.RANKS == 0))
        need(ranked, f"layer {name!r} with rank {rank!r}")
        spanned = span is None if free else _whole(span, 0)
        need("span" in entry and spanned, f"layer {name!r} with span {span!r}")
        raised = entry.get("raised_groups")
        need(_whole(raised, 0) and (not free or raised == 0), f"layer {name!r}: raised_groups")
        need(_error(entry.get("weight_error")), f"layer {name!r}: weight_error")
        output = entry.get("output_error", "absent")
        need(output is None or _error(output), f"layer {name!r}: output_error")
    need(all(kind in CHANGES for kind in changed.values()), "an unknown kind of change")
    for file in shards:
        check_inside(path, file)
    return manifest


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _error(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _names(value: object) -> bool:
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return listed and len(set(value)) == len(value)  # type: ignore[arg-type, call-overload]


def _codebooks(value: object) -> bool:
    """One or two codebooks that the format admits."""
    if not isinstance(value, list) or len(value) not in (1, 2):
        return False
    numbers = all(
        isinstance(book, list) and all(type(number) in (int, float) for number in book)
        for book in value
    )
    return numbers and all(codebook.admissible(tuple(book)) for book in value)


def _has(value: object, **kinds: type) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in kinds.items())
