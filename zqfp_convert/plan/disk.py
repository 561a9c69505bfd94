"""What a conversion takes of the disk that OUT lies on, and what is free there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from zqfp_convert.checkpoint.partial import partial_folder
from zqfp_convert.errors import OutputError

if TYPE_CHECKING:
    from zqfp_convert.plan.plan import Plan

TOKEN = 8  # bytes of a token's id
ENTRY = 1000  # of a layer in the journal and in the manifest, about
ALWAYS = 16 << 20  # tokenizer, configuration, index


def journal_bytes(plan: Plan) -> int:
    """What lies in OUT.partial beside the checkpoint: journal, text, what waits for tuning."""
    recipe = plan.recipe
    layers = sum(len(block) for block in plan.layers)
    total = ENTRY * layers
    if recipe.needs_calibration:
        total += TOKEN * recipe.samples * recipe.seq_len
    if recipe.tune > 0:  # all blocks are kept, and where each weight starts from
        total += TOKEN * recipe.tune_samples * recipe.seq_len
        total += plan.bytes_after + (2 * plan.weights if plan.tunes_roundings else 0)
    return total + plan.spilled


def needed(plan: Plan) -> int:
    """All of it."""
    layers = sum(len(block) for block in plan.layers)
    return plan.bytes_after + journal_bytes(plan) + ENTRY * layers + ALWAYS


def free(plan: Plan) -> int:
    """What is free, with what an earlier run has left, which is gone on with or thrown away."""
    earlier = partial_folder(plan.out)
    unfinished = sum(path.stat().st_size for path in earlier.rglob("*") if path.is_file())
    return shutil.disk_usage(folder(plan)).free + unfinished


def folder(plan: Plan) -> Path:
    """A folder that is there, on the disk where the output will be."""
    return next(p for p in plan.out.absolute().parents if p.exists())


def check(plan: Plan) -> None:
    """Refuse what does not fit.

    Raises:
        OutputError: too little is free.
    """
    wanted, found = needed(plan), free(plan)
    if found < wanted:
        raise OutputError(
            str(folder(plan)),
            f"{found / 1e6:,.0f} MB of free disk space",
            needed=f"{wanted / 1e6:,.0f} MB for the checkpoint and what lies beside it meanwhile",
            do="Make room, or give an output folder on another disk.",
        )
