"""A conversion under way: calibration streams, and what happens to one block after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.balancing import Balanced
from zqfp_convert.calibration.experts import arrivals
from zqfp_convert.calibration.folding import Change
from zqfp_convert.calibration.norms import find_forms, fuse_norms, kinds
from zqfp_convert.calibration.stages import statistics, trace
from zqfp_convert.calibration.stream import Call
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.partial import Partial
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.checkpoint.packed import PackedLayer
from zqfp_convert.checkpoint.source.rotated import Rotation
from zqfp_convert.conversion import host
from zqfp_convert.conversion.ahead import read_ahead
from zqfp_convert.conversion.batches import windows_at_once
from zqfp_convert.conversion.block import fill, fill_outside, fold
from zqfp_convert.conversion.experts import quantize_experts
from zqfp_convert.conversion.layers import Layers, packed_layer
from zqfp_convert.conversion.passage import Passage
from zqfp_convert.conversion.rehearsal import choose_rotation
from zqfp_convert.conversion.result import Progress
from zqfp_convert.conversion.states import States
from zqfp_convert.conversion.windows import Windows, find_windows
from zqfp_convert.errors import OptionError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import (
    get_linear,
    weight_matrix,
)
from zqfp_convert.model.experts import mixtures
from zqfp_convert.model.head import Head
from zqfp_convert.model.tokenizer import check_tokens
from zqfp_convert.parallel import ALONE, OutOfMemory, World, lacking
from zqfp_convert.plan import Plan, rotated

if TYPE_CHECKING:
    from zqfp_convert.numerics.kernels.norm import Form

START = ".tuning_start"  # of the places that tuning starts from, beside a layer's packed tensors
BATCH = "batch"  # in the journal: how many windows go through a block at once, from it on
NORMS = "norms"  # likewise: what classes of norms compute


@dataclass
class Work:
    """A conversion under way: the calibration streams, and what the manifest will say.

    A block is computed, or, where an earlier run has done so, only passed: its packed tensors are
    taken from the partial output, and the streams go through the same modules as then.
    """

    layers: Layers
    partial: Partial
    settled: Callable[[], None] = lambda: None  # waits until nothing else takes a GPU's memory
    changed: dict[str, str] = field(default_factory=dict)
    windows: Windows | None = None
    states: States | None = None
    norms: dict[str, Form | None] = field(default_factory=dict)  # what each class computes

    @property
    def plan(self) -> Plan:
        """That of the rotated model, once it is known whether it is to be rotated."""
        return self.layers.plan

    @property
    def report(self) -> Progress:
        """Called as work goes on."""
        return self.layers.report

    @property
    def world(self) -> World:
        """The processes that do it together."""
        return self.layers.world

    def calibrate(self) -> dict[str, Any]:
        """Get the text to calibrate on and rotate the plan; returns what the config says of it."""
        plan, recipe = self.plan, self.plan.recipe
        self.windows = windows = find_windows(plan, self.partial, self.report)
        calibration = windows.calibration
        check_tokens(plan.model, plan.source.folder, calibration)
        _check_enough(len(calibration), self.world.size)
        self.layers.plan = plan = self._rotated(calibration)
        if plan.rotation is not None:
            packed = {layer.disk + layout.WEIGHT for block in plan.layers for layer in block}
            self.changed |= dict.fromkeys(sorted(plan.rotation.changed - packed), "rotated")
        if not self.partial.noted(BATCH):
            mine = calibration[self.world.part(len(calibration))]
            self.settled()  # a measurement of memory decides
            size = self.world.agree(lambda: windows_at_once(plan, mine))
            self.partial.note(BATCH, {"block": 0, "windows": size})
        about: dict[str, Any] = {
            "source": plan.calibration,
            "samples": calibration.shape[0],
            "seq_len": calibration.shape[1],
            "sha256": windows.sha256,
        }
        if recipe.tune > 0:
            about["tuning"] = {
                "more_text": len(windows.more),
                "self_written": len(windows.written),
            }
        return about

    def blocks(self, files: Series, first: int) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Quantize the blocks that are not done yet.

        Args:
            files: the one of number `first + i` holds what this has yielded for block i.
            first: the number of block 0.

        Yields:
            All tensors of a block by their names on disk, and what a later run has to know of it.
        """
        plan = self.plan
        start, count = max(0, files.done - first), len(plan.layers)
        for index in range(start):
            self._recall(files.about(first + index))
            self.layers.done += sum(layer.weights for layer in plan.layers[index])
        calibrated = self.windows is not None
        if start == count and not plan.recipe.tune:
            return
        if calibrated:
            host.tidy()
            self._enter()
        passed = range(start) if calibrated else range(0)
        wanted = [*passed, *range(start, count)]
        groups = [plan.block_tensors(index) for index in wanted]
        reading = read_ahead(plan.source.shards, groups, plan.device)
        for index, tensors in zip(wanted, reading, strict=True):
            if index in passed:
                self.report(
                    f"block {index + 1}/{count}  done before", self.layers.done, plan.weights
                )
                self._pass(index, tensors, files, first)
                tensors.clear()
            else:
                self._split(index)
                found = self._block_that_fits(index, tensors, files, first)
                tensors.clear()
                host.tidy()
                yield found
                del found

    def _rotated(self, windows: Tensor) -> Plan:
        """The plan with or without a rotation, as chosen now or by an earlier run."""
        chosen = self.partial.noted("rotation")
        if not chosen:
            plan = self.plan
            if self.world.leads:
                plan = choose_rotation(plan, windows, self.report)
            found = None if plan.rotation is None else plan.rotation.to_json()
            chosen = [self.world.broadcast(found)]
            self.partial.note("rotation", chosen[0])
            if self.world.leads:
                return plan
        if chosen[0] is None:
            return replace(self.plan, recipe=self.plan.recipe.changed(rotation="none"))
        return rotated(self.plan, Rotation.from_json(chosen[0]))

    # The streams.

    def _enter(self) -> None:
        """Start the streams at the first block."""
        assert self.windows is not None
        plan, recipe = self.plan, self.plan.recipe
        fill_outside(plan, head=recipe.tune > 0)
        self.states = States(
            plan.blocks,
            self.windows.every,
            self.partial.noted(BATCH)[0]["windows"],
            plan.device,
            original=recipe.asymmetry > 0 or recipe.tune > 0,
            place=plan.states,
            folder=self.partial.folder / "states",
            world=self.world,
        )
        embedding = plan.model.get_input_embeddings()
        if recipe.tune == 0 and self.states.entrance.do_without(embedding):
            for module in (embedding, plan.model.get_output_embeddings()):
                if module is not None:  # the same weights, it may be
                    skeleton.empty(module)

    def _split(self, index: int) -> None:
        """Take the batches that the journal has for a block and those behind it."""
        for noted in self.partial.noted(BATCH):
            if self.states is not None and noted["block"] == index:
                self.states.split(noted["windows"])

    def _pass(self, index: int, tensors: dict[str, Tensor], files: Series, first: int) -> None:
        """Move the streams through a block that is done."""
        self._split(index)
        packed, about = files.load(first + index), files.about(first + index)
        block, calls, _, _ = self._prepared(index, tensors)
        student = _student(block)
        for layer in self.plan.layers[index]:
            self.layers.simulate(student, layer, self.layers.unpacked(layer, packed))
        assert self.states is not None
        self.states.advance(student, block, calls)
        if self.states.checksums() != about["states"]:
            raise self.partial.refuse(
                f"behind block {index + 1} this machine computes other hidden states than the run "
                "that it is to go on with"
            )
        if self.plan.recipe.tune > 0:
            for layer in self.plan.layers[index]:
                solved = self.layers.solved(self.layers.unpacked(layer, packed))
                start = packed.get(layer.disk + START)
                start = None if start is None else start.to(self.plan.device)
                self.layers.keep_tunable(layer, solved, start)

    def _block_that_fits(
        self, index: int, tensors: dict[str, Tensor], files: Series, first: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`_block`, again with half the windows at once as often as memory does not suffice."""
        while True:
            try:
                with lacking():
                    return self._block(index, dict(tensors))
            except torch.OutOfMemoryError as error:
                if self.states is None or self.states.size == 1:
                    raise
                if self.world.size > 1 and not isinstance(error, OutOfMemory):
                    raise  # of the solvers, to which the batch does not matter
            # Out of the handler, which keeps alive what the failed try has computed.
            self._shrink(index, files, first)

    def _shrink(self, index: int, files: Series, first: int) -> None:
        """Halve the batch from this block on."""
        assert self.states is not None
        size, moved = self.states.size // 2, self.states.moved
        if moved:
            self.states = None
        host.give_back(self.plan.device)
        self.partial.note(BATCH, {"block": index, "windows": size})
        if self.states is not None:
            self.states.split(size)
            return
        # Some batches have left the entrance of the block, and no copy stayed there. This is rare
        # (an advance takes less memory than the statistics before it), so they start again.
        self._enter()
        for earlier in range(index):
            names = self.plan.block_tensors(earlier)
            tensors = self.plan.source.shards.read(names, self.plan.device)
            self._pass(earlier, tensors, files, first)
        self._split(index)

    # One block.

    def _block(
        self, index: int, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantize a block, given its tensors by their names on disk."""
        plan, prefix = self.plan, self.plan.blocks.name(index) + "."
        planned = plan.layers[index]
        for layer in planned:
            if self.layers.entries.pop(layer.disk, None) is not None:  # of a try that failed
                self.layers.done -= layer.weights
        changed: dict[str, str] = {}
        if self.states is None:
            module = plan.blocks.modules[index]
            quantized = {
                layer.place: packed_layer(layer, solved)
                for layer in planned
                for solved in self.layers.solve(
                    index, [layer], [self.layers.matrix(layer, module, tensors)], None, self.world
                )
            }
        else:
            quantized, changes = self._calibrated(index, tensors)
            self.layers.arrived()
            for change in changes:
                name = self.layers.disk_name(prefix + change.name)
                tensors[name] = change.value.cpu()
                changed[name] = change.kind
        for layer in planned:
            del tensors[layer.disk + layout.WEIGHT]
            tensors |= quantized[layer.place].tensors()
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if plan.rotation is not None:  # what is not packed came in float32 too
            for name in plan.rotation.readers.keys() | plan.rotation.writers:
                if name in tensors:
                    tensors[name] = tensors[name].to(plan.dtype)
        if plan.recipe.tune > 0 and plan.tunes_roundings:
            for layer in planned:
                tensors[layer.disk + START] = self.layers.tunable[layer.disk].start.cpu()
        about = {
            "entries": self.layers.entries_of(index),
            "changed": changed,
            "states": None if self.states is None else self.states.checksums(),
        }
        self._recall(about)
        return tensors, about

    def _recall(self, about: dict[str, Any]) -> None:
        """Take what is known of a block that is done into what the manifest will say."""
        self.layers.entries |= about["entries"]
        self.changed |= about["changed"]

    def _prepared(
        self, index: int, tensors: dict[str, Tensor]
    ) -> tuple[nn.Module, Callable[[int], Call], list[Balanced], list[Change]]:
        """A block with its weights, norms folded, how it is called, and what the folding did."""
        plan, states = self.plan, self.states
        assert states is not None
        assert self.windows is not None
        # A copy, so that what folding adds to it is gone when the block has to be done again.
        block = copy.deepcopy(plan.blocks.modules[index])
        fill(plan, block, plan.blocks.name(index) + ".", plan.block_tensors(index), tensors)
        states.entrance.try_block(index, block)
        if index == 0 and plan.recipe.tune > 0:  # before hours of work
            head = Head(plan.model, plan.blocks, returns=states.entrance.returns)
            mine = self.world.part(len(self.windows.calibration)).start
            window = self.windows.calibration[mine : mine + 1]
            head.check(states.student.hidden[0][:1], window.to(plan.device))
        calls = states.calls(index)
        balanced, changes = fold(plan, index, block, states.student, calls, self.world)
        self._fuse_norms(block, calls)
        disk = {layer.place: layer.disk for layer in plan.layers[index]}
        self.layers.columns |= {
            disk[place]: one.columns for one in balanced for place in one.linears
        }
        return block, calls, balanced, changes

    def _fuse_norms(self, block: nn.Module, calls: Callable[[int], Call]) -> None:
        """Put fused norms into a block.

        What a class computes is tried out once, as another batch might speak for something else: a
        run that goes on with this one may have smaller ones from here on.
        """
        wanted = kinds(block)
        for noted in [] if self.norms.keys() >= wanted else self.partial.noted(NORMS):
            self.norms |= noted
        if not self.norms.keys() >= wanted:
            assert self.states is not None
            first = self.states.student.hidden[0]
            found = self.world.agree(lambda: find_forms(block, calls(0), first))
            new = {kind: form for kind, form in found.items() if kind not in self.norms}
            self.partial.note(NORMS, new)
            self.norms |= new
        fuse_norms(block, self.norms)

    def _calibrated(
        self, index: int, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, PackedLayer], list[Change]]:
        """Quantize a block's linears stage by stage, and move the streams through it."""
        plan, recipe, states = self.plan, self.plan.recipe, self.states
        assert states is not None
        block, calls, balanced, changes = self._prepared(index, tensors)
        planned = {layer.place: layer for layer in plan.layers[index]}
        student = _student(block)
        teacher = block if recipe.asymmetry > 0 else None
        quantized: dict[str, PackedLayer] = {}
        experts = [
            path
            for path in mixtures(student)
            if any(place.startswith(path + ".") for place in planned)
        ]
        plain = [
            place for place in planned if not place.startswith(tuple(f"{e}." for e in experts))
        ]
        traced = [*plain, *experts] if planned else []
        with self.world.attempt():
            trial = states.trial(index)
        stages = self.world.agree(lambda: trace(student, traced, *trial) if traced else [])
        spare = len(self.partial.noted(BATCH)) == 1
        passage = Passage(plan, self.world, states, student, teacher, planned, trial, spare)
        for number, stage in enumerate(stages):
            for path in [place for place in stage if place in experts]:
                with self.world.attempt():
                    batches = arrivals(
                        path, student, states.student, teacher, states.teacher, calls
                    )
                solve = partial(self.layers.solve_stages, index, student, planned, quantized, ALONE)
                share = partial(self.layers.share, student, planned, quantized)
                seen = quantize_experts(
                    path, planned, student, teacher, batches, solve, self.world, share
                )
                for place, found in seen.items():
                    entry = self.layers.entries[planned[place].disk]
                    entry["tokens"], entry["pooled"] = found.tokens, found.pooled
            linears = [place for place in stage if place not in experts]
            if linears:
                last = stage is stages[-1]
                done = [place for each in stages[: number + 1] for place in each]
                later = {place for each in stages[number + 1 :] for place in each}
                again = not later <= set(experts)
                moves = passage.moves(done, linears, last=last, again=again)
                moments = statistics(
                    linears,
                    student,
                    states.student,
                    teacher,
                    states.teacher,
                    calls,
                    last=last,
                    moves=moves,
                    world=self.world,
                )
                passage.leave(moves)
                self.layers.solve_stages(
                    index, student, planned, quantized, self.world, [linears], moments
                )
                del moments  # one of the largest matrices there are
        for place in [place for place in planned if place not in quantized]:  # no token went there
            weight = weight_matrix(get_linear(block, place))
            (solved,) = self.layers.solve(index, [planned[place]], [weight], None, self.world)
            quantized[place] = self.layers.put(student, planned[place], solved)
        states.advance(student, block, calls)
        for one in balanced:
            norm = self.layers.disk_name(f"{plan.blocks.name(index)}.{one.norm}{layout.WEIGHT}")
            for place in one.linears:
                self.layers.entries[planned[place].disk]["balanced"] = norm
        return quantized, changes


def _check_enough(windows: int, processes: int) -> None:
    """Refuse more processes than there are windows."""
    if windows < processes:
        raise OptionError(
            "calibration",
            f"{windows} windows of text for {processes} processes",
            needed="a window for each process",
            do="Give more text, more --samples, a shorter --seq-len, or start fewer processes.",
        )


def _student(block: nn.Module) -> nn.Module:
    """Another block with the same weights, which are replaced in it, never written to."""
    shared = {id(parameter): parameter for parameter in block.parameters()}
    return copy.deepcopy(block, shared)
