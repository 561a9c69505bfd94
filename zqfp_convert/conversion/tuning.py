"""End-to-end tuning of all quantized blocks together, read back from the partial output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.conversion.block import fill
from zqfp_convert.conversion.layers import packed_layer
from zqfp_convert.conversion.work import START, Work
from zqfp_convert.distill.train import Outcome, distill
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import find_blocks, put
from zqfp_convert.model.device import compute_dtype


@dataclass
class Tuned:
    """A tuned model: `outcome`, `blocks()`, and the changed tensors that are not packed.

    Attributes:
        norms: by their names on disk.
    """

    work: Work
    files: Series
    outcome: Outcome
    norms: dict[str, Tensor] = field(default_factory=dict)

    def of(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, those that tuning has changed as they are now."""
        return {name: self.norms.get(name, tensor) for name, tensor in names.items()}

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """All tensors of each block by their names on disk; the manifest's entries are mended."""
        work = self.work
        for index, layers in enumerate(work.plan.layers):
            tensors = self.of(stored(self.files, index))
            for layer in layers if self.outcome.kept else []:
                result = work.layers.tunable.pop(layer.disk).result(
                    work.layers.target(index, layer)
                )
                tensors |= packed_layer(layer, result).to(torch.device("cpu")).tensors()
                entry = work.layers.entries[layer.disk]
                entry["weight_error"], entry["output_error"] = result.weight_error, None
            yield tensors


def stored(files: Series, index: int) -> dict[str, Tensor]:
    """The tensors of an untuned block by their names on disk."""
    tensors = files.load(index)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(START)}


def tune(work: Work, files: Series) -> Tuned | None:
    """Tune all blocks, given as files, together.

    Of the original only what its last block gave is there, and its weights one by one. Of several
    processes the first tunes, on its device; the others get None, and wait.
    """
    plan, states, windows = work.plan, work.states, work.windows
    assert states is not None
    assert windows is not None
    assert states.teacher is not None
    original = states.original()
    work.states = states = None
    skeleton.empty(plan.model)
    if original is None:
        work.layers.tunable.clear()
        return None
    model = plan.skeleton()
    parts = find_blocks(model)
    for names in plan.other_shards:
        fill(plan, model, "", [name for name in names if name in plan.names.to_model])
    for index, layers in enumerate(plan.layers):
        tensors = stored(files, index)
        disk = [name for name in tensors if name in plan.names.to_model]
        fill(plan, model, "", disk, tensors)
        for layer in layers:
            linear = work.layers.tunable[layer.disk]
            bias = tensors.get(layer.disk + layout.BIAS)
            if bias is not None:
                bias = bias.to(plan.device, compute_dtype(plan.device, plan.dtype))
                linear.bias = nn.Parameter(bias, requires_grad=False)
            put(model, f"{plan.blocks.name(index)}.{layer.place}", linear)
    model.tie_weights(missing_keys=set(plan.names.unfilled), recompute_mapping=False)
    outcome = distill(
        model,
        parts,
        original,
        torch.cat(windows.every),
        plan.recipe.tune,
        plan.dtype,
        seed=plan.recipe.seed,
        report=lambda done, total: work.report(
            f"tuning, step {done}/{total}", plan.weights, plan.weights
        ),
    )
    tuned = Tuned(work, files, outcome)
    for place, value in outcome.norms.items():  # none if the outcome is not kept
        name = plan.names.to_disk[place]
        tuned.norms[name] = value.cpu()
        work.changed[name] = "norm_changed"
    return tuned
