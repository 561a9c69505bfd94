"""One architecture the whole way: made small, converted, loaded and compared."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import token_ids
from mixtures import QUICK
from small_models import write_small
from torch import nn
from transformers import AutoModelForCausalLM
from whole_reference import original, reference

import zqfp_convert
from zqfp_convert.errors import ZqfpError

RECIPES = ("fast", "best")
WORKS, REFUSED, UNBUILT, WRONG, CRASHED = "works", "refused", "not built", "wrong", "crashed"


@dataclass(frozen=True)
class Outcome:
    """What became of a model type with a recipe, and why."""

    kind: str
    reason: str = ""
    error: float | None = None  # to the reference, relative
    lost: float | None = None  # to the original, relative


def try_type(model_type: str, folder: Path) -> dict[str, Outcome]:
    """Make, convert, load and compare a model type with each recipe."""
    try:
        source = write_small(folder / "source", model_type)
        with torch.no_grad():
            want = original(source)(input_ids=token_ids(), use_cache=False).logits
        if want.shape[:2] != token_ids().shape or not want.isfinite().all():
            raise ValueError(f"logits of shape {list(want.shape)}, or not finite")
    except Exception as error:  # of transformers, which has many kinds
        return dict.fromkeys(RECIPES, Outcome(UNBUILT, _line(error)))
    return {recipe: _tried(source, folder / recipe, recipe, want) for recipe in RECIPES}


def _tried(source: Path, folder: Path, recipe: str, original_logits: torch.Tensor) -> Outcome:
    ids = token_ids()
    note, text = "", folder / "text.txt"
    folder.mkdir()
    text.write_text("the quick brown fox jumps over the lazy dog; " * 40)
    try:
        try:
            zqfp_convert.convert(source, folder / "packed", recipe=recipe, **QUICK)
        except ZqfpError as error:
            if "--calibration" not in str(error):
                raise
            note = "with --calibration: " + error.found
            zqfp_convert.convert(
                source, folder / "packed", recipe=recipe, calibration=text, **QUICK
            )
        with torch.no_grad():
            have, other = (
                aligned(model)(input_ids=ids, use_cache=False).logits
                for model in (
                    zqfp_convert.load(folder / "packed", device="cpu"),
                    AutoModelForCausalLM.from_pretrained(folder / "packed"),
                )
            )
    except ZqfpError as error:
        return Outcome(REFUSED, f"{error.found}; needed: {error.needed}")
    except Exception as error:
        return Outcome(CRASHED, f"{_line(error)} ({_where(error)})")
    try:
        want = reference(source, folder / "packed", folder / "scratch")(ids)
    except Exception as error:
        return Outcome(CRASHED, f"reference: {_line(error)} ({_where(error)})")
    errors = (have - want).norm(dim=-1) / want.norm(dim=-1)  # [batch, tokens]
    error = float((have - want).norm() / want.norm())
    lost = float((have - original_logits).norm() / original_logits.norm())
    # Another FP8 rounding, of sums in another order, moves a token a little; first tokens are
    # before most of it.
    same = float(errors.flatten().quantile(0.1)) < 1e-4 and error < 0.25 * lost
    if same and not torch.equal(have, other):
        return Outcome(WRONG, "from_pretrained gives other logits than load", error, lost)
    return Outcome(WORKS if same else WRONG, note if same else _figures(errors), error, lost)


def aligned(model: nn.Module) -> nn.Module:
    """The model with weights where the allocator puts them, and not where they lie in a file.

    Products on the CPU may sum in another order where an address is no multiple of 64.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _figures(errors: torch.Tensor) -> str:
    low, middle, high = errors.flatten().quantile(torch.tensor([0.1, 0.5, 1.0])).tolist()
    return f"logits off by {low:.1e}, {middle:.1e}, {high:.1e} (10 %, median, all tokens)"


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
