"""What decides over the bytes of a conversion: all of it has to be the same to go on with one."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from zqfp_convert import __version__
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import sha256
from zqfp_convert.checkpoint.source.origin import origin
from zqfp_convert.model.device import describe
from zqfp_convert.plan import Plan


def identity(plan: Plan, processes: int) -> dict[str, Any]:
    """As plain JSON values, with words for keys that an error can name.

    Of the weights only what their headers say; what they hold takes reading them all. The number
    of processes decides over the order of sums.
    """
    folder, text = plan.source.folder, plan.text
    calibration = plan.calibration
    if text is not None and text.file is not None:
        calibration = f"{text.name} with the hash {sha256(text.file)}"
    return {
        "zqfp-convert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": describe(plan.device),
        "processes": processes,
        "recipe": plan.recipe.to_json(),
        "calibration": calibration,
        "model": {layout.CONFIG_FILE: sha256(folder / layout.CONFIG_FILE)}
        | {path.as_posix(): sha256(folder / path) for path in plan.source.other_files()}
        | {layout.CARD: origin(folder)["card"]},
        "tensors": {
            name: f"{info.dtype} {list(info.shape)}"
            for name, info in sorted(plan.source.shards.tensors.items())
        },
    }
