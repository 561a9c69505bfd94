"""What a conversion takes of the disk that OUT lies on, and what is free there."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def untied_bytes(plan: Plan) -> int:
    """What the output head takes once a rotation makes it a tensor of its own; 0 if it is one."""
    places = {module: name for name, module in plan.model.named_modules()}
    head, table = plan.model.get_output_embeddings(), plan.model.get_input_embeddings()
    if head is None or f"{places[head]}.weight" in plan.names.to_disk:
        return 0
    stored = plan.names.to_disk.get(f"{places[table]}.weight")
    return 0 if stored is None else plan.source.shards.tensors[stored].bytes


def output_bytes(plan: Plan) -> int:
    """All of it."""
    layers = sum(len(block) for block in plan.layers)
    return plan.bytes_after + journal_bytes(plan) + ENTRY * layers + ALWAYS
