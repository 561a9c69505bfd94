"""Converts a model: block by block from source shards to a packed checkpoint.

This is the road of the data; the method itself is `quantize/weight.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zqfp_convert import __version__
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.writer import Writer
from zqfp_convert.conversion.result import Conversion, Progress
from zqfp_convert.conversion.work import Work
from zqfp_convert.errors import SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.numerics import codebook
from zqfp_convert.plan import Plan, make_plan
from zqfp_convert.recipe import Recipe


def convert(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "best",
    calibration: str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> Conversion:
    """Convert a Hugging Face causal language model into a packed FP4 checkpoint.

    Args:
        model: a folder, or a repository on the Hub.
        out: the folder to make.
        recipe: a name (`fast`, `paper`, `best`, `max`) or a whole recipe.
        calibration: a .txt or .jsonl file, or a data set on the Hub; by default the model writes
            its own text.
        device: where to compute; the first GPU when there is one.
        overwrite: replace `out` if it is a checkpoint of ours.
        revision: of a repository on the Hub.
        progress: called as work goes on.
        choices: fields of `Recipe` to set, such as `group_size=64`.

    Raises:
        ZqfpError: with what stands in the way; `out` has not been made, or is what it was before.
    """
    named = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    plan = make_plan(
        model,
        out,
        recipe=named.changed(**choices),
        calibration=calibration,
        device=device,
        overwrite=overwrite,
        revision=revision,
    )
    return run(plan, progress)


def run(plan: Plan, progress: Progress | None = None) -> Conversion:
    """Carry out a plan, once. Raises what `convert` raises."""
    try:
        return _run(plan, progress)
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"memory of {plan.device}",
            str(error).split(".")[0],
            needed=f"about {plan.device_memory / 1e6:,.0f} MB, by the plan's estimate",
            do="Use fewer --samples, a shorter --seq-len, or another --device.",
        ) from error
    finally:
        skeleton.empty(plan.model)


@torch.no_grad()
def _run(plan: Plan, progress: Progress | None) -> Conversion:
    began = time.monotonic()
    report = progress or (lambda text, done, total: None)
    report("checking weights", 0, plan.weights)
    plan.source.check_finite()
    work = Work(plan, report)
    shards = len(plan.other_shards) + len(plan.layers)
    with Writer(plan.out, shards, overwrite=plan.overwrite) as writer:
        calibration = work.calibrate() if plan.recipe.needs_calibration else None
        plan = work.plan  # of the rotated model, maybe
        blocks: Iterable[dict[str, Tensor]] = map(work.block, range(len(plan.layers)))
        if plan.recipe.tune > 0:
            blocks = work.tune([*blocks])
        for names in plan.other_shards:
            writer.add_shard(plan.source.shards.read(names) | work.tuned_of(names))
        for tensors in blocks:
            writer.add_shard(tensors)
        report("writing", plan.weights, plan.weights)
        writer.copy(plan.source.folder, plan.source.other_files())
        largest = max(entry["rank"] for entry in work.entries.values())
        bound = largest if plan.recipe.rank == "auto" else plan.recipe.rank
        quantization = _quantization_config(plan, bound, calibration)
        config = {**plan.source.config, layout.CONFIG_KEY: quantization}
        writer.finish(config, work.entries, work.changed)
    after = sum(path.stat().st_size for path in plan.out.glob("*.safetensors"))
    skeleton.empty(plan.model)  # of a rotated plan only what was made stays
    seconds = time.monotonic() - began
    bits = 8 * sum(work.sizes.values()) / plan.weights
    return Conversion(
        plan.out, plan, work.entries, work.changed, bits, after, seconds, calibration, work.outcome
    )


def _quantization_config(
    plan: Plan, rank: int, calibration: dict[str, Any] | None
) -> dict[str, Any]:
    recipe = plan.recipe
    lorc = {"rank": rank, "factors": recipe.factors} if rank > 0 else None
    features = ["lorc"] if lorc else []
    weights: dict[str, Any] = {
        "format": "e2m1",
        "group_size": recipe.group_size,
        "scales": recipe.scales,
    }
    if recipe.codebooks == "pair":
        features.append("codebooks")
        weights |= {"format": "codebooks", "codebooks": codebook.PAIR}
    return {
        "quant_method": layout.FORMAT,
        "format_version": layout.FORMAT_VERSION,
        "producer": {"name": "zqfp-convert", "version": __version__},
        "required_features": features,
        "weights": weights,
        "activations": {"format": "e4m3", "scale": "token", "dynamic": True},
        "lorc": lorc,
        "ignore": sorted(plan.left_alone),
        "recipe": recipe.to_json(),
        "calibration": calibration,
    }
