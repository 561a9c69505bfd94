"""A conversion under way: calibration streams, and what happens to one block after the other."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zqfp_convert.calibration import text
from zqfp_convert.calibration.experts import Moments, arrivals
from zqfp_convert.calibration.folding import Change
from zqfp_convert.calibration.simulated import SimulatedExpertLinear, SimulatedLinear
from zqfp_convert.calibration.stages import statistics, trace
from zqfp_convert.calibration.stream import Entrance, Stream, batches_of
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import pack
from zqfp_convert.conversion.block import fill, fill_outside, fold
from zqfp_convert.conversion.experts import quantize_experts
from zqfp_convert.conversion.rehearsal import choose_rotation
from zqfp_convert.conversion.result import Progress
from zqfp_convert.distill.train import Outcome, distill
from zqfp_convert.distill.tunable import TunableLinear
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import (
    Linear,
    bias_of,
    find_blocks,
    get_linear,
    is_transposed,
    put,
    weight_matrix,
)
from zqfp_convert.model.device import compute_dtype
from zqfp_convert.model.experts import ExpertLinear, mixtures
from zqfp_convert.model.head import Head
from zqfp_convert.model.tokenizer import check_tokens, tokenizer_of
from zqfp_convert.plan import TOKENS_AT_ONCE, Plan, PlannedLayer
from zqfp_convert.quantize.hessian import Curvature, activation_error, prepare
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_together


@dataclass
class Work:
    """A conversion under way: the calibration streams, and what the manifest will say."""

    plan: Plan
    report: Progress
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # in bytes, of layers by names on disk
    done: int = 0
    entrance: Entrance | None = None
    teacher: Stream | None = None  # hidden states of the original model
    student: Stream | None = None  # hidden states behind the quantized blocks
    windows: Tensor | None = None  # of calibration, for tuning
    tunable: dict[str, TunableLinear] = field(default_factory=dict)  # by names on disk
    tuned: dict[str, Tensor] = field(default_factory=dict)  # norms by their names on disk
    columns: dict[str, Tensor] = field(default_factory=dict)  # of balanced layers, by names on disk
    outcome: Outcome | None = None

    def calibrate(self) -> dict[str, Any]:
        """Get the calibration tokens and start the streams; returns what the config says of it."""
        plan, recipe = self.plan, self.plan.recipe
        windows, more, written = self._text()
        check_tokens(plan.model, plan.source.folder, windows)
        self.plan = plan = choose_rotation(plan, windows, self.report)
        if plan.rotation is not None:
            packed = {layer.disk + layout.WEIGHT for block in plan.layers for layer in block}
            self.changed |= dict.fromkeys(sorted(plan.rotation.changed - packed), "rotated")
        fill_outside(plan)
        at_once = TOKENS_AT_ONCE[plan.device.type]
        batches = batches_of(windows, at_once, plan.device)
        only_tuned_on = [
            batch for part in (written, more) for batch in batches_of(part, at_once, plan.device)
        ]
        self.entrance = Entrance(plan.blocks, batches + only_tuned_on)
        entering = self.entrance.first()
        self.student = Stream(entering[: len(batches)])
        if recipe.asymmetry > 0 or recipe.tune > 0:
            self.teacher = Stream(entering)
        about: dict[str, Any] = {
            "source": plan.calibration,
            "samples": windows.shape[0],
            "seq_len": windows.shape[1],
            "sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        }
        if recipe.tune > 0:  # what is held back to judge by comes last: text not calibrated on
            self.windows = torch.cat([windows, written, more])
            about["tuning"] = {"more_text": len(more), "self_written": len(written)}
        return about

    def _text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Windows to calibrate on, more of the same text to tune on, and self-written ones."""
        plan, recipe = self.plan, self.plan.recipe
        length, count = recipe.seq_len, recipe.samples
        extra = max(0, recipe.tune_samples - count) if recipe.tune > 0 else 0
        if plan.text is None:
            self.report("writing calibration text", 0, plan.weights)
            written = text.generate(self._whole(), count + extra, length, recipe.seed)
            return written[:count], written[:0], written[count:]
        self.report("reading calibration text", 0, plan.weights)
        tokenizer = tokenizer_of(plan.source.folder)
        found, more = text.windows_and_more(plan.text, tokenizer, count, length, recipe.seed, extra)
        missing = recipe.tune_samples - len(found) - len(more) if recipe.tune > 0 else 0
        if missing <= 0:
            return found, more, found[:0]
        self.report("writing text to tune on", 0, plan.weights)
        return found, more, text.generate(self._whole(), missing, length, recipe.seed)

    def block(self, index: int) -> dict[str, Tensor]:
        """Quantize a block; returns all tensors of its shard by their names on disk."""
        plan, prefix = self.plan, self.plan.blocks.name(index) + "."
        disk = plan.block_tensors(index)
        tensors = plan.source.shards.read(disk)
        block = plan.blocks.modules[index]
        if self.student is None:
            quantized = {
                layer.place: solved
                for layer in plan.layers[index]
                for solved in self._solve(
                    index, [layer], [self._matrix(layer, block, tensors)], None
                )
            }
        else:
            fill(plan, block, prefix, disk, tensors)
            quantized, changes = self._calibrated(index, block)
            for change in changes:
                name = self._disk(prefix + change.name)
                tensors[name] = change.value.cpu()
                self.changed[name] = change.kind
            skeleton.empty(block)
        for layer in plan.layers[index]:
            del tensors[layer.disk + layout.WEIGHT]
            tensors |= self._packed(layer, quantized[layer.place])
        if plan.rotation is not None:  # what is not packed came in float32 too
            for name in plan.rotation.readers.keys() | plan.rotation.writers:
                if name in tensors:
                    tensors[name] = tensors[name].to(plan.dtype)
        return tensors

    def tune(self, blocks: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Tune all blocks, given as their shards' tensors, together; returns them as they are then.

        Of the original only what its last block gave is there, and its weights one by one.
        """
        plan = self.plan
        assert self.windows is not None
        assert self.teacher is not None
        original = torch.cat([hidden.cpu() for hidden in self.teacher.hidden])
        self.entrance = self.teacher = self.student = None
        skeleton.empty(plan.model)
        model = plan.skeleton()
        parts = find_blocks(model)
        for names in plan.other_shards:
            fill(plan, model, "", [name for name in names if name in plan.names.to_model])
        for index, tensors in enumerate(blocks):
            disk = [name for name in tensors if name in plan.names.to_model]
            fill(plan, model, "", disk, tensors)
            for layer in plan.layers[index]:
                linear = self.tunable[layer.disk]
                bias = tensors.get(layer.disk + layout.BIAS)
                if bias is not None:
                    bias = bias.to(plan.device, compute_dtype(plan.device, plan.dtype))
                    linear.bias = nn.Parameter(bias, requires_grad=False)
                put(model, f"{plan.blocks.name(index)}.{layer.place}", linear)
        model.tie_weights(missing_keys=set(plan.names.unfilled), recompute_mapping=False)
        self.outcome = distill(
            model,
            parts,
            original,
            self.windows,
            plan.recipe.tune,
            plan.dtype,
            seed=plan.recipe.seed,
            report=lambda done, total: self.report(
                f"tuning, step {done}/{total}", plan.weights, plan.weights
            ),
        )
        if not self.outcome.kept:
            return blocks
        for place, value in self.outcome.norms.items():
            name = plan.names.to_disk[place]
            self.tuned[name] = value.cpu()
            self.changed[name] = "norm_changed"
        for index, tensors in enumerate(blocks):
            tensors |= self.tuned_of(list(tensors))
            for layer in plan.layers[index]:
                result = self.tunable.pop(layer.disk).result(self._target(index, layer))
                tensors |= self._packed(layer, result)
                entry = self.entries[layer.disk]
                entry["weight_error"], entry["output_error"] = result.weight_error, None
        return blocks

    def _target(self, index: int, layer: PlannedLayer) -> Tensor:
        """The weight that a layer stands for: the source's, balanced if it was."""
        name = layer.disk + layout.WEIGHT
        block = self.plan.blocks.modules[index]
        weight = self._matrix(layer, block, self.plan.source.shards.read([name]))
        weight = weight.to(self.plan.device)
        columns = self.columns.get(layer.disk)
        return weight if columns is None else weight * columns.to(weight.dtype)

    def tuned_of(self, names: list[str]) -> dict[str, Tensor]:
        """Those of the tensors, by their names on disk, that tuning has changed."""
        return {name: self.tuned[name] for name in names if name in self.tuned}

    def _disk(self, place: str) -> str:
        """The name on disk of a tensor of the model, which the source may not have."""
        names = self.plan.names.to_disk
        owner, _, leaf = place.rpartition(".")
        return names.get(place, names[owner + layout.WEIGHT].removesuffix("weight") + leaf)

    def _whole(self) -> PreTrainedModel:
        """The original model."""
        plan = self.plan
        whole = plan.skeleton()
        fill(plan, whole, "", list(plan.names.to_model))
        whole.tie_weights(missing_keys=set(plan.names.unfilled), recompute_mapping=False)
        return whole

    def _calibrated(
        self, index: int, block: nn.Module
    ) -> tuple[dict[str, QuantizedWeight], list[Change]]:
        """Quantize a block's linears stage by stage, and move the streams through it."""
        plan, recipe = self.plan, self.plan.recipe
        assert self.entrance is not None
        assert self.student is not None
        if index == 0:
            self.entrance.try_first(block)
            if recipe.tune > 0:  # before hours of work
                head = Head(plan.model, plan.blocks, returns_tuple=self.entrance.returns_tuple)
                assert self.windows is not None
                head.check(self.student.hidden[0][:1], self.windows[:1].to(plan.device))
        calls = self.entrance.calls(index)
        layers = {layer.place: layer for layer in plan.layers[index]}
        balanced, changes = fold(plan, index, block, self.student, calls)
        norms: dict[str, str] = {}  # of balanced layers, on disk
        for one in balanced:
            for place in one.linears:
                norms[place] = self._disk(f"{plan.blocks.name(index)}.{one.norm}{layout.WEIGHT}")
                self.columns[layers[place].disk] = one.columns
        shared = {id(parameter): parameter for parameter in block.parameters()}
        student = copy.deepcopy(block, shared)  # its weights are replaced, never written to
        teacher = block if recipe.asymmetry > 0 else None
        quantized: dict[str, QuantizedWeight] = {}
        experts = {
            path
            for path in mixtures(student)
            if any(place.startswith(path + ".") for place in layers)
        }
        plain = [place for place in layers if not place.startswith(tuple(f"{e}." for e in experts))]
        traced = [*plain, *experts] if layers else []
        for stage in trace(student, traced, calls(0), self.student.hidden[0]) if traced else []:
            for path in [place for place in stage if place in experts]:
                batches = arrivals(path, student, self.student, teacher, self.teacher, calls)
                solve = partial(self._solve_stages, index, student, layers, quantized)
                seen = quantize_experts(path, layers, student, teacher, batches, solve)
                for place, found in seen.items():
                    entry = self.entries[layers[place].disk]
                    entry["tokens"], entry["pooled"] = found.tokens, found.pooled
            linears = [place for place in stage if place not in experts]
            if linears:
                shared_input = statistics(
                    linears, student, self.student, teacher, self.teacher, calls
                )
                self._solve_stages(
                    index, student, layers, quantized, [linears], Moments(*shared_input, 0)
                )
        for place in [place for place in layers if place not in quantized]:  # no token went there
            weight = weight_matrix(get_linear(block, place))
            (quantized[place],) = self._solve(index, [layers[place]], [weight], None)
        self.student.advance(student, calls)
        if self.teacher is not None:
            self.teacher.advance(block, calls)
        for place, norm in norms.items():
            self.entries[layers[place].disk]["balanced"] = norm
        return quantized, changes

    def _solve_stages(
        self,
        index: int,
        student: nn.Module,
        layers: dict[str, PlannedLayer],
        quantized: dict[str, QuantizedWeight],
        stages: list[list[str]],
        moments: Moments,
    ) -> None:
        """Quantize the linears of stages of which the inputs have these moments; put them in."""
        recipe = self.plan.recipe
        curvature = prepare(
            moments.hessian,
            moments.cross,
            damping=recipe.damping,
            activation_order=recipe.activation_order,
        )
        if recipe.rank != "auto":  # one at a time takes less memory, but finds no rank for all
            stages = [[place] for stage in stages for place in stage]
        for together in stages:
            members = [layers[place] for place in together]
            linears = [get_linear(student, place) for place in together]
            weights = [weight_matrix(linear) for linear in linears]
            found = self._solve(index, members, weights, curvature)
            for place, linear, solved in zip(together, linears, found, strict=True):
                weight = weight_matrix(linear).float()
                lost = activation_error(weight, moments.rounding, moments.hessian)
                self.entries[layers[place].disk]["activation_error"] = lost
                put(student, place, _simulated(linear, solved))
                quantized[place] = solved

    def _solve(
        self,
        index: int,
        layers: list[PlannedLayer],
        weights: list[Tensor],
        curvature: Curvature | None,
    ) -> list[QuantizedWeight]:
        """Quantize layers that get the same input."""
        total, places = len(self.plan.layers), ", ".join(layer.place for layer in layers)
        self.report(f"block {index + 1}/{total}  {places}", self.done, self.plan.weights)
        here = [weight.to(self.plan.device) for weight in weights]
        quantized = quantize_together(here, curvature, self.plan.recipe)
        for layer, solved in zip(layers, quantized, strict=True):
            self._note(layer, solved, curvature)
        return quantized

    def _note(
        self, layer: PlannedLayer, solved: QuantizedWeight, curvature: Curvature | None
    ) -> None:
        """What the manifest will say of a layer."""
        if self.plan.recipe.tune > 0:
            roundings = self.plan.tunes_roundings
            self.tunable[layer.disk] = TunableLinear(solved, roundings=roundings)
            solved = replace(solved, doubt=None)
        self.done += layer.weights
        self.entries[layer.disk] = {
            "shape": [layer.rows, layer.columns],
            "rank": 0 if solved.factors is None else len(solved.factors.A),
            "span": solved.scales.span,
            "raised_groups": solved.scales.raised,
            "weight_error": solved.weight_error,
            "output_error": solved.output_error,
        }
        if self.plan.rotation is not None:
            name = layer.disk + layout.WEIGHT
            if name in self.plan.rotation.readers or name in self.plan.rotation.writers:
                self.entries[layer.disk]["rotated"] = self.plan.rotation.readers.get(name)
        if curvature is not None and curvature.retries:
            self.entries[layer.disk]["damping"] = curvature.damping
            self.entries[layer.disk]["damping_retries"] = curvature.retries

    def _matrix(self, layer: PlannedLayer, block: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The weight `[N, K]` of a layer, straight from the file."""
        stored = tensors[layer.disk + layout.WEIGHT]
        return stored.t() if is_transposed(get_linear(block, layer.place)) else stored

    def _packed(self, layer: PlannedLayer, solved: QuantizedWeight) -> dict[str, Tensor]:
        factors = solved.factors
        triple = None if factors is None else (factors.A, factors.B, factors.scale)
        packed = pack(layer.disk, solved.codes, solved.scales, triple)
        packed.check()
        tensors = {name: tensor.cpu() for name, tensor in packed.tensors().items()}
        self.sizes[layer.disk] = sum(tensor.nbytes for tensor in tensors.values())
        return tensors


def _simulated(linear: Linear, solved: QuantizedWeight) -> nn.Module:
    """What stands for a linear while blocks behind it are calibrated."""
    if isinstance(linear, ExpertLinear):
        return SimulatedExpertLinear(solved, bias_of(linear))
    return SimulatedLinear(solved.dequantize().to(linear.weight.dtype), bias_of(linear))
