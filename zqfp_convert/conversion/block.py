"""What a plan does to a block before its linears are solved: weights in, norms folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from zqfp_convert.calibration.balancing import Balanced, balance_norms
from zqfp_convert.calibration.centering import center_norms
from zqfp_convert.calibration.folding import Change
from zqfp_convert.calibration.stages import Calls
from zqfp_convert.calibration.stream import Stream
from zqfp_convert.model import skeleton
from zqfp_convert.model.device import compute_dtype
from zqfp_convert.parallel import ALONE, World
from zqfp_convert.plan import Plan
from zqfp_convert.quantize.weight import quantize_weight


def fill(
    plan: Plan,
    module: nn.Module,
    prefix: str,
    disk: Iterable[str],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Give a module, which has `prefix` in the model, the tensors of these names on disk."""
    dtype = compute_dtype(plan.device, plan.dtype)
    for name in disk:
        value = tensors[name] if tensors else plan.source.shards.read([name], plan.device)[name]
        place = plan.names.to_model[name].removeprefix(prefix)
        skeleton.assign(module, {place: value.to(plan.device)}, dtype)
    if prefix:  # what blocks share lies in one of them
        for whole, name in plan.names.tied_within(prefix).items():
            value = plan.source.shards.read([name], plan.device)[name]
            skeleton.assign(module, {whole.removeprefix(prefix): value}, dtype)


def fill_outside(plan: Plan, *, head: bool = True) -> None:
    """Give the plan's model all weights that lie outside its blocks.

    Without `head`, only what runs from token ids to the last block.
    """
    places = plan.names.to_model
    others = [name for names in plan.other_shards for name in names if name in places]
    if not head:
        owned = {id(parameter) for parameter in plan.blocks.decoder.parameters()}
        owned |= {id(buffer) for buffer in plan.blocks.decoder.buffers()}
        held = plan.model.state_dict(keep_vars=True)
        others = [name for name in others if id(held[places[name]]) in owned]
    fill(plan, plan.model, "", others)
    plan.model.tie_weights(missing_keys=set(plan.names.unfilled), recompute_mapping=False)


def fold(
    plan: Plan,
    index: int,
    block: nn.Module,
    stream: Stream,
    calls: Calls,
    world: World = ALONE,
) -> tuple[list[Balanced], list[Change]]:
    """Balance and centre the norms of a block, in place, as the recipe says."""
    places = {layer.place for layer in plan.layers[index]}
    balanced: list[Balanced] = []
    changes: list[Change] = []
    if plan.recipe.balance_norms and places:
        balanced = balance_norms(
            block, places, stream, calls, plan.dtype, lambda weight: rounded(plan, weight), world
        )
        changes += [change for one in balanced for change in one.changes]
    if plan.recipe.center_norms and places:
        changes += center_norms(block, places, stream, calls, plan.dtype, world)
    return balanced, changes


def rounded(plan: Plan, weight: Tensor, **choices: Any) -> Tensor:
    """A weight `[N, K]` as the format has it, rounded to nearest, float32.

    `choices` of the recipe may be others.
    """
    plain = plan.recipe.changed(solver="round", sweeps=0, rank=0, tune=0, **choices)
    return quantize_weight(weight, None, plain).dequantize()
