"""The linears of a model on their way: solved, noted for the manifest, put in their places.

What lies on disk for a linear, what stands in a block for it, and what is tuned later are made here
from one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.simulated import SimulatedExpertLinear, SimulatedLinear
from zqfp_convert.calibration.stages import Moments
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.packed import PackedLayer, pack, unpack
from zqfp_convert.conversion import host
from zqfp_convert.conversion.result import Progress
from zqfp_convert.distill.tunable import TunableLinear
from zqfp_convert.model.blocks import bias_of, get_linear, is_transposed, weight_matrix
from zqfp_convert.model.blocks import put as replace_linear
from zqfp_convert.model.experts import ExpertLinear
from zqfp_convert.numerics import codebook
from zqfp_convert.parallel import World
from zqfp_convert.plan import TOGETHER, Plan, PlannedLayer
from zqfp_convert.quantize.hessian import Curvature, activation_energy, prepare, relative
from zqfp_convert.quantize.lorc import Factors
from zqfp_convert.quantize.weight import QuantizedWeight, quantize_together
from zqfp_convert.runtime import resident
from zqfp_convert.runtime.resident import ResidentLinear


@dataclass
class Layers:
    """The linears of a plan.

    Attributes:
        plan: that of the rotated model, if it is rotated.
        report: called as linears are solved.
        world: the processes that convert the model.
        entries: what the manifest will say of those that are solved, by names on disk.
        done: how many weights these have.
        tunable: by names on disk, where the recipe tunes.
        columns: of balanced ones, by names on disk.
    """

    plan: Plan
    report: Progress
    world: World
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: int = 0
    tunable: dict[str, TunableLinear] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def entries_of(self, index: int) -> dict[str, dict[str, Any]]:
        """Those of a block, in the order in which its layers were solved."""
        here = {layer.disk for layer in self.plan.layers[index]}
        return {name: entry for name, entry in self.entries.items() if name in here}

    def solve_stages(
        self,
        index: int,
        student: nn.Module,
        layers: dict[str, PlannedLayer],
        quantized: dict[str, PackedLayer],
        world: World,
        stages: list[list[str]],
        moments: Moments,
    ) -> None:
        """Quantize the linears of stages of which the inputs have these moments; put them in.

        The processes of `world` do it together.
        """
        recipe = self.plan.recipe
        curvature = prepare(
            moments.hessian,
            moments.cross,
            damping=recipe.damping,
            activation_order=recipe.activation_order,
            outputs=moments.outputs,
        )
        moments.cross = moments.outputs = None  # the curvature gives it up as soon as it can be
        if recipe.rank != "auto":  # a part takes less memory, but finds no rank for all
            stages = [part for stage in stages for part in _parts(stage, layers)]
        for together in stages:
            members = [layers[place] for place in together]
            weights = [weight_matrix(get_linear(student, place)) for place in together]
            spend = together is stages[-1]
            lost = [activation_energy(weight, moments.rounding) for weight in weights]
            found = self.solve(index, members, weights, curvature, world, spend=spend)
            for place, solved, energy in zip(
                together, found, torch.stack(lost).tolist(), strict=True
            ):
                assert solved.output_energy is not None
                entry = self.entries[layers[place].disk]
                entry["activation_error"] = relative(energy, solved.output_energy)
                quantized[place] = self.put(student, layers[place], solved)

    def share(
        self,
        student: nn.Module,
        layers: dict[str, PlannedLayer],
        quantized: dict[str, PackedLayer],
        places: list[str],
    ) -> None:
        """Get what other processes have quantized of linears; all put in all, in the same order."""
        if self.world.size == 1:
            return
        self.arrived()
        own = [place for place in places if place in quantized]
        device = self.plan.device
        packed = {n: t for place in own for n, t in quantized[place].tensors().items()}
        tensors = self.world.merge(packed, device)
        entries = self.world.gather({p: self.entries.pop(layers[p].disk) for p in own})
        for place in places:
            layer = layers[place]
            self.entries[layer.disk] = next(each[place] for each in entries if place in each)
            if place in own:
                continue
            self.done += layer.weights
            found = self.unpacked(layer, tensors)
            self.simulate(student, layer, found)
            quantized[place] = found.to(torch.device("cpu"))

    def solve(
        self,
        index: int,
        layers: list[PlannedLayer],
        weights: list[Tensor],
        curvature: Curvature | None,
        world: World,
        *,
        spend: bool = False,
    ) -> list[QuantizedWeight]:
        """Quantize layers that get the same input; `spend` as in `quantize_together`."""
        total, places = len(self.plan.layers), ", ".join(layer.place for layer in layers)
        self.report(f"block {index + 1}/{total}  {places}", self.done, self.plan.weights)
        here = [weight.to(self.plan.device) for weight in weights]
        quantized = quantize_together(here, curvature, self.plan.recipe, world, spend=spend)
        if self.plan.device.type == "cpu":
            host.trim()  # what solving took in small pieces is not wanted by packing
        for layer, solved in zip(layers, quantized, strict=True):
            self._note(layer, solved, curvature)
        return quantized

    def _note(
        self, layer: PlannedLayer, solved: QuantizedWeight, curvature: Curvature | None
    ) -> None:
        """What the manifest will say of a layer."""
        self.done += layer.weights
        if self.plan.recipe.tune > 0:
            self.keep_tunable(layer, solved)
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

    def keep_tunable(
        self, layer: PlannedLayer, solved: QuantizedWeight, start: Tensor | None = None
    ) -> None:
        """Keep what tuning needs of a layer, with the places that it starts from if not its own."""
        roundings = self.plan.tunes_roundings
        self.tunable[layer.disk] = TunableLinear(solved, roundings=roundings, start=start)

    # Between a linear and what lies on disk for it.

    def matrix(self, layer: PlannedLayer, block: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The weight `[N, K]` of a layer, straight from the file."""
        stored = tensors[layer.disk + layout.WEIGHT]
        return stored.t() if is_transposed(get_linear(block, layer.place)) else stored

    def target(self, index: int, layer: PlannedLayer) -> Tensor:
        """The weight that a layer stands for: the source's, balanced if it was."""
        name = layer.disk + layout.WEIGHT
        block = self.plan.blocks.modules[index]
        weight = self.matrix(layer, block, self.plan.source.shards.read([name]))
        weight = weight.to(self.plan.device)
        columns = self.columns.get(layer.disk)
        return weight if columns is None else weight * columns.to(weight.dtype)

    def disk_name(self, place: str) -> str:
        """The name on disk of a tensor of the model, which the source may not have."""
        names = self.plan.names.to_disk
        owner, _, leaf = place.rpartition(".")
        return names.get(place, names[owner + layout.WEIGHT].removesuffix("weight") + leaf)

    def unpacked(self, layer: PlannedLayer, tensors: dict[str, Tensor]) -> PackedLayer:
        """A layer among the tensors of a file."""
        recipe = self.plan.recipe
        size = layer.columns if recipe.group_size == "row" else recipe.group_size
        books = codebook.PAIR if recipe.codebooks == "pair" else (codebook.E2M1,)
        return unpack(layer.disk, tensors, recipe.scales, size, layer.columns, books)

    def solved(self, packed: PackedLayer) -> QuantizedWeight:
        """The quantized weight that a packed layer spells, errors aside."""
        here = packed.to(self.plan.device)
        factors = None
        if here.lorc_A is not None and here.lorc_B is not None:
            factors = Factors(here.lorc_A, here.lorc_B, here.lorc_scale)
        return QuantizedWeight(here.codes(), here.scales(), factors, 0.0, None)

    def put(self, student: nn.Module, layer: PlannedLayer, solved: QuantizedWeight) -> PackedLayer:
        """Put a quantized linear into a block; returns it as it lies on disk, on the CPU.

        Its bytes are there after `arrived`.
        """
        packed = packed_layer(layer, solved)
        self.simulate(student, layer, packed)
        return packed.to(torch.device("cpu"), wait=False)

    def arrived(self) -> None:
        """Wait until all that `put` has returned is there."""
        if self.plan.device.type == "cuda":
            torch.cuda.current_stream(self.plan.device).synchronize()

    def simulate(self, student: nn.Module, layer: PlannedLayer, packed: PackedLayer) -> None:
        """Let a linear of a block do what its packed tensors, as they lie on disk, will do."""
        linear = get_linear(student, layer.place)
        here, bias = packed.to(self.plan.device), bias_of(linear)
        if isinstance(linear, ExpertLinear):
            replace_linear(student, layer.place, SimulatedExpertLinear(here, bias))
            return
        if resident.takes(here, linear.weight.dtype):
            replace_linear(student, layer.place, ResidentLinear(here, bias))
            return
        weight = here.approximation().to(linear.weight.dtype)
        replace_linear(student, layer.place, SimulatedLinear(weight, bias))


def _parts(stage: list[str], layers: dict[str, PlannedLayer]) -> Iterator[list[str]]:
    """A stage's linears in as few parts as have at most TOGETHER weights, or are of one linear."""
    part: list[str] = []
    for place in stage:
        if part and sum(layers[one].weights for one in [*part, place]) > TOGETHER:
            yield part
            part = []
        part.append(place)
    yield part


def packed_layer(layer: PlannedLayer, solved: QuantizedWeight) -> PackedLayer:
    """A quantized weight as it lies on disk, held to the rules of the format."""
    factors = solved.factors
    triple = None if factors is None else (factors.A, factors.B, factors.scale)
    packed = pack(layer.disk, solved.codes, solved.scales, triple)
    packed.check()
    return packed
