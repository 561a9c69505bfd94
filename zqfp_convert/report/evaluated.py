"""The figures that `evaluate --json` has written: read, held to the checkpoint, kept beside it."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import writing
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import OptionError

FIGURES = (
    "tokens",
    "perplexity",
    "original_perplexity",
    "kl_median",
    "kl_99",
    "kl_999",
    "same_top",
)
PRIVATE = ("checkpoint", "host_memory", "device_memory", "seconds")  # of one machine


def read(packed: PackedCheckpoint, file: Path | None) -> dict[str, Any] | None:
    """The evaluation in a file, or the one kept in the checkpoint's folder, or None.

    Raises:
        OptionError: the file cannot be read, is none of `evaluate`, or of another checkpoint.
    """
    kept = packed.folder / layout.EVALUATION_FILE
    if file is None and not kept.is_file():
        return None
    path = kept if file is None else file
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, f"cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or not _whole(found):
        raise _refused(path, "not what evaluate --json writes")
    if found.get("manifest_sha256") != packed.manifest_sha256:
        raise _refused(path, "figures of another checkpoint")
    return _public(found)


def keep(folder: Path, evaluation: dict[str, Any]) -> Path:
    """Write an evaluation into a folder, for later reports and model cards.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / layout.EVALUATION_FILE
    with writing(folder):
        path.write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    return path


def _public(found: dict[str, Any]) -> dict[str, Any]:
    """Without paths and what else is nobody's business."""
    against = PurePath(str(found.get("against", ""))).name
    return {
        **{key: value for key, value in found.items() if key not in PRIVATE},
        "against": against,
    }


def _whole(found: dict[str, Any]) -> bool:
    texts = found.get("texts")
    if not isinstance(found.get("window"), int) or not isinstance(found.get("device"), str):
        return False
    return isinstance(texts, list) and bool(texts) and all(_text(text) for text in texts)


def _text(text: object) -> bool:
    if not isinstance(text, dict) or not isinstance(text.get("positions"), list):
        return False
    return isinstance(text.get("text"), str) and all(
        _figures(e) for e in (text, *text["positions"])
    )


def _figures(each: object) -> bool:
    if not isinstance(each, dict) or not all(_number(each.get(key)) for key in FIGURES):
        return False
    return all(
        isinstance(each.get(key), dict) and _number(each[key].get("mean"))
        for key in ("kl", "loss_difference")
    )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refused(path: Path, found: str) -> OptionError:
    return OptionError(
        str(path),
        found,
        needed="the figures of this checkpoint",
        do="Make them: zqfp-convert evaluate OUT/ --against MODEL --text TEXT --json FILE.",
    )
