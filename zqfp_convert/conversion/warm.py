"""Makes a GPU ready while text is read: its context, its libraries, the kernels to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch

from zqfp_convert.model.configured import configured
from zqfp_convert.numerics import codebook, fp8, kernels, scales
from zqfp_convert.plan import Plan
from zqfp_convert.quantize import eigen, ranks
from zqfp_convert.quantize.columns import BLOCK, FEW_ROWS, settle
from zqfp_convert.quantize.lorc import OVERSAMPLING
from zqfp_convert.quantize.substitution import divide
from zqfp_convert.runtime import resident

ROWS, COLUMNS = 256, 512  # multiples of 16, as those of most models are: that is compiled for
TOKENS = 4096 + 16  # kernels differ for fewer


def warm(plan: Plan) -> Callable[[], None]:
    """Begin to do so, if the plan is for a GPU; returns what waits for the end of it."""
    if plan.device.type != "cuda":
        return lambda: None
    thread = Thread(target=_run_all, args=(plan,), name="warm", daemon=True)
    thread.start()
    return thread.join


@torch.no_grad()
def _run_all(plan: Plan) -> None:
    """Run what conversions run, on noise and on a stream of its own; it changes no setting."""
    recipe, device = plan.recipe, plan.device
    cuda: Any = torch.cuda
    with cuda.device(device), cuda.stream(cuda.Stream(device)):
        noise = torch.full((ROWS, COLUMNS), 0.01, device=device)
        if not kernels.take(noise):
            return
        books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
        size = COLUMNS if recipe.group_size == "row" else recipe.group_size
        chosen = scales.choose(noise, recipe.scales, recipe.scale_rounding, size, None, books)
        if recipe.needs_calibration:
            _activations(plan)
            _norm(plan)
            marks = chosen.marks(torch.arange(COLUMNS, device=device))
            coupling, step = noise[:BLOCK, :BLOCK], noise[0, :BLOCK]
            for rows in (ROWS, FEW_ROWS + ROWS):  # two kernels
                block = noise.new_zeros(rows, BLOCK)
                grid_marks = marks[:1, :BLOCK].expand(rows, -1).contiguous()
                settle(block, block.clone(), coupling, grid_marks, chosen, step)
            wanted = range(ranks.STEP, ranks.MOST + 1, ranks.STEP)
            for rank in wanted if recipe.rank == "auto" else [max(1, recipe.rank)]:
                small = torch.eye(rank + OVERSAMPLING, device=device)
                eigen.leading(small, rank)
            torch.linalg.cholesky_ex(small)
            torch.linalg.cholesky_ex(small.double())
            torch.linalg.solve_triangular(small.double(), small.double(), upper=True)
            divide(noise, torch.eye(COLUMNS, device=device))
        cuda.current_stream(device).synchronize()


def _activations(plan: Plan) -> None:
    """Their quantization at the widths of this model, for its own sake and before products."""
    from zqfp_convert.runtime.kernels.portable.quantize import quantize

    recipe = plan.recipe
    rank = recipe.rank if isinstance(recipe.rank, int) else 0
    for columns in sorted({layer.columns for block in plan.layers for layer in block}):
        noise = torch.full((TOKENS, columns), 0.01, device=plan.device, dtype=torch.bfloat16)
        fp8.simulate(noise[:ROWS])
        if recipe.scales != "free" and resident.available(plan.device):
            factors = (noise[:rank].to(fp8.DTYPE), noise[:rank, 0].float()) if rank else None
            quantize(noise, None, factors, parts=True)


def _norm(plan: Plan) -> None:
    """The norm that most models have, at the width of this one."""
    from zqfp_convert.numerics.kernels.norm import WIDEST, rms_norm

    width = configured(plan.model, "hidden_size") or 0
    if 0 < width <= WIDEST:
        noise = torch.ones(1, width, device=plan.device, dtype=torch.bfloat16)
        rms_norm(noise, noise[0], 1e-6, "twice")
