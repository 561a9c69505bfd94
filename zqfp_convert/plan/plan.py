"""What a conversion is going to do, worked out and checked before any work begins."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from zqfp_convert.calibration.text import Text
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.partial import check_free, check_room, room
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.origin import origin
from zqfp_convert.checkpoint.source.rotated import RotatedShards, Rotation
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import CheckpointError, OptionError, OutputError, SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import Blocks, find_blocks, linears, shape
from zqfp_convert.model.configured import configured
from zqfp_convert.model.device import resolve_device, settle_libraries, too_little_memory
from zqfp_convert.model.experts import mixtures, routers
from zqfp_convert.model.names import NameMap
from zqfp_convert.model.tokenizer import tokenizer_of
from zqfp_convert.original import match
from zqfp_convert.parallel import ALONE, World
from zqfp_convert.plan import memory
from zqfp_convert.plan.disk import journal_bytes, output_bytes
from zqfp_convert.quantize import lorc, ranks
from zqfp_convert.recipe import Recipe

NUMBER = re.compile(r"\.\d+(?=\.|$)")  # of an expert, in the middle of a name
SHARD_BYTES = 2 << 30  # of tensors that belong to no block


Place = Literal["device", "host", "file"]


@dataclass(frozen=True)
class PlannedLayer:
    """A linear that will be quantized: its names on disk and in its block, and its shape."""

    disk: str
    place: str
    rows: int
    columns: int
    packed_bytes: int

    @property
    def weights(self) -> int:
        """N K."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Plan:
    """A checked conversion.

    Attributes:
        source, out, recipe, device: as asked for; the recipe's `seq_len` fits the model.
        model: the skeleton; blocks, names: its parts; dtype: what its weights are stored in.
        text: of calibration; None where the model writes it itself, or none is needed.
        layers: for each block, the linears that will be quantized.
        left_alone: linears that stay as they are, with the reason.
        other_shards: names on disk of the tensors of no block, shard by shard.
        rotation: of the residual stream, which the source then comes with; None without.
        bytes_before, bytes_after: of all weights on disk; after at most, where ranks are found.
        tunes_roundings: whether tuning moves roundings too; where memory does not suffice for that,
            row scales, low-rank factors and norms alone.
        host_memory, device_memory: estimated peaks in bytes, beside the program itself.
        states: where the hidden states of the calibration text lie: `device`, `host` or `file`.
        spilled: bytes of the states that lie in a file in OUT.partial.
        processes, host_processes: that share out the samples, everywhere and on this host.
    """

    source: Source
    out: Path
    recipe: Recipe
    device: torch.device
    overwrite: bool
    model: PreTrainedModel
    dtype: torch.dtype
    blocks: Blocks
    names: NameMap
    text: Text | None
    layers: list[list[PlannedLayer]]
    left_alone: dict[str, str]
    other_shards: list[list[str]]
    bytes_before: int
    bytes_after: int
    tunes_roundings: bool
    host_memory: int
    device_memory: int
    states: Place = "device"
    spilled: int = 0
    processes: int = 1
    host_processes: int = 1
    rotation: Rotation | None = None

    @property
    def model_name(self) -> str:
        """The repository that the model is of, with its revision, or its folder."""
        known = origin(self.source.folder)
        if known["repository"] is None:
            return str(self.source.folder)
        return f"{known['repository']}, revision {known['revision']}"

    @property
    def weights(self) -> int:
        """How many weights will be quantized."""
        return sum(layer.weights for block in self.layers for layer in block)

    @property
    def bits(self) -> float:
        """Bits for each quantized weight, scales and low-rank factors included.

        The most that may come out where ranks are found layer by layer.
        """
        return (
            8 * sum(layer.packed_bytes for block in self.layers for layer in block) / self.weights
        )

    @property
    def calibration(self) -> str:
        """Where calibration text comes from."""
        if not self.recipe.needs_calibration:
            return "none" if self.text is None else "none (the recipe does not use the text)"
        return "self-generated" if self.text is None else self.text.name

    @property
    def tuning(self) -> str:
        """What end-to-end tuning is going to do."""
        if self.recipe.tune == 0:
            return "none"
        moved = "row scales, low-rank factors and norms"
        if self.tunes_roundings:
            return f"{self.recipe.tune} steps of roundings, {moved}"
        return f"{self.recipe.tune} steps of {moved}; there is too little memory for roundings"

    def kinds(self) -> dict[tuple[str, int, int], list[PlannedLayer]]:
        """Layers by their names in a block, stars for the numbers of experts, and their shapes."""
        found: dict[tuple[str, int, int], list[PlannedLayer]] = {}
        for layer in (layer for block in self.layers for layer in block):
            place = NUMBER.sub(".*", layer.place)
            found.setdefault((place, layer.rows, layer.columns), []).append(layer)
        return found

    def skeleton(self) -> PreTrainedModel:
        """Another skeleton of the model."""
        return skeleton.build(self.source.folder, self.device, untied=self.rotation is not None)

    def block_tensors(self, index: int) -> list[str]:
        """The names on disk of a block's tensors."""
        return self.names.within(self.blocks.name(index))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "model": self.model_name,
            "out": str(self.out),
            "architecture": type(self.model).__name__,
            "blocks": len(self.layers),
            "layers": sum(len(block) for block in self.layers),
            "weights": self.weights,
            "bits": self.bits,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "host_memory": self.host_memory,
            "device_memory": self.device_memory,
            "states": self.states,
            "disk": {
                "output": self.bytes_after,
                "beside": journal_bytes(self),
                "free": room(self.out),
            },
            "kinds": [
                {"place": place, "rows": rows, "columns": columns, "count": len(alike)}
                | {"bits": 8 * alike[0].packed_bytes / alike[0].weights}
                | {"bytes": sum(layer.packed_bytes for layer in alike)}
                for (place, rows, columns), alike in self.kinds().items()
            ],
            "device": str(self.device),
            "calibration": self.calibration,
            "tuning": self.tuning,
            "left_alone": self.left_alone,
            "code_files_not_run": [str(path) for path in self.source.code_files()],
            "recipe": self.recipe.to_json(),
        }


def make_plan(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe,
    calibration: str | Path | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    world: World = ALONE,
) -> Plan:
    """Check everything that can be checked before work begins, and say what will be done.

    The memory is that of one process of a `world` on its GPU, and of all of them on their host.

    Raises:
        ZqfpError: whatever stands in the way; nothing has been written.
    """
    settle_libraries()  # before the probe uses them
    target, destination = resolve_device(device), Path(out).expanduser()
    check_free(destination, overwrite=overwrite)
    text = Text.named(calibration) if calibration is not None else None
    source = Source(hub.fetch(model, revision))
    for read in (source.folder, text.file if text is not None else None):
        if read is not None and read.resolve().is_relative_to(destination.resolve()):
            raise OutputError(
                str(destination),
                f"holds {read}, which is to be read",
                needed="a folder apart from the model and the calibration text",
                do="Give another OUT.",
            )
    if destination.resolve().is_relative_to(source.folder.resolve()):
        raise OutputError(
            str(destination),
            f"lies in the model's folder {source.folder}",
            needed="a folder outside the model",
            do="Give another OUT.",
        )
    network = skeleton.build(source.folder, target)
    blocks = find_blocks(network)
    names = match(source, network)
    check_fit(source, network, names)
    if text is not None and recipe.needs_calibration:
        tokenizer_of(source.folder)
    recipe = dataclasses.replace(recipe, seq_len=min(recipe.seq_len, positions(network)))

    layers, left_alone = _layers(network, blocks, names, recipe)
    in_blocks = set(names.within(blocks.path))
    others = [disk for disk in source.shards.tensors if disk not in in_blocks]
    before = sum(info.bytes for info in source.shards.tensors.values())
    replaced = sum(
        source.shards.tensors[layer.disk + layout.WEIGHT].bytes - layer.packed_bytes
        for block in layers
        for layer in block
    )
    plan = Plan(
        source=source,
        out=destination,
        recipe=recipe,
        device=target,
        overwrite=overwrite,
        model=network,
        dtype=network.dtype,
        blocks=blocks,
        names=names,
        text=text,
        layers=layers,
        left_alone=left_alone,
        other_shards=_split(source, others),
        bytes_before=source.shards.stored_bytes,
        bytes_after=before - replaced,
        tunes_roundings=recipe.tune > 0,
        host_memory=0,
        device_memory=0,
        processes=world.size,
        host_processes=world.local_size,
    )
    _check_processes(plan)
    plan = _that_fits(plan)
    _check_room(plan)
    return plan


def rotated(plan: Plan, rotation: Rotation) -> Plan:
    """The same plan for the model with a rotated residual stream.

    Raises:
        OutputError: the output head, a tensor of its own now, does not fit the disk.
    """
    source = copy.copy(plan.source)
    source.shards = RotatedShards(plan.source.shards, rotation)
    source.config = copy.deepcopy(source.config)
    for config in (source.config, source.config.get("text_config")):
        if isinstance(config, dict):  # head and embedding differ from now on
            config["tie_word_embeddings"] = False
    turned = dataclasses.replace(plan, source=source, rotation=rotation)
    model = turned.skeleton()
    names = NameMap(model, source.shards.tensors)
    check_fit(source, model, names)
    blocks = find_blocks(model)
    in_blocks = set(names.within(blocks.path))
    others = [disk for disk in source.shards.tensors if disk not in in_blocks]
    held = (plan.source.shards.tensors.values(), source.shards.tensors.values())
    before, now = (sum(info.bytes for info in tensors) for tensors in held)
    turned = dataclasses.replace(
        turned,
        recipe=plan.recipe.changed(rotation="residual"),
        model=model,
        blocks=blocks,
        names=names,
        other_shards=_split(source, others),
        bytes_after=plan.bytes_after + now - before,
    )
    _check_disk(turned)
    return _estimated(turned)


def check_fit(source: Source, model: PreTrainedModel, names: NameMap) -> None:
    """Hold the shapes on disk to those of the model.

    Raises:
        SourceError: a tensor is missing.
        CheckpointError: `wrong-shape`.
    """
    if names.missing:
        made_of = source.config.get("architectures") or ["the model"]
        raise SourceError(
            str(source.folder),
            f"no tensor for {names.missing[0]}"
            + (f" and {len(names.missing) - 1} more" if len(names.missing) > 1 else "")
            + f" among the weights of {made_of[0]}",
            needed="weights that belong to config.json, of a causal language model",
            do="Download the model again; if it persists, another transformers version may be "
            "needed.",
        )
    places = model.state_dict()
    for disk, place in names.to_model.items():
        info = source.shards.tensors[disk]
        if info.shape != tuple(places[place].shape):
            raise CheckpointError(
                "wrong-shape",
                f"{disk} in {info.file}",
                f"shape {list(info.shape)}",
                needed=f"{list(places[place].shape)}, by config.json",
                do="Download the model again: weights and config.json do not belong together.",
            )


def _layers(
    model: PreTrainedModel, blocks: Blocks, names: NameMap, recipe: Recipe
) -> tuple[list[list[PlannedLayer]], dict[str, str]]:
    planned: list[list[PlannedLayer]] = []
    left_alone: dict[str, str] = {}
    reached = set()
    choosing = routers(model)
    for index, block in enumerate(blocks.modules):
        members = []
        for local, linear in linears(block):
            place = f"{blocks.name(index)}.{local}"
            reached.add(place)
            disk = names.to_disk.get(place + layout.WEIGHT, place + layout.WEIGHT)
            if not disk.endswith(layout.WEIGHT):
                left_alone[disk] = "has a name on disk that does not end in 'weight'"
                continue
            disk = disk.removesuffix(layout.WEIGHT)
            if place + layout.WEIGHT in names.shared:
                left_alone[disk] = "shared between blocks"
                continue
            if recipe.ignores(disk) or recipe.ignores(place):
                left_alone[disk] = "matches --ignore"
                continue
            if place in choosing:
                left_alone[disk] = "chooses or weighs experts"
                continue
            rows, columns = shape(linear)
            size = _packed_bytes(rows, columns, recipe)
            members.append(PlannedLayer(disk, local, rows, columns, size))
        planned.append(members)
    for place, _ in linears(model):
        if place not in reached:
            disk = names.to_disk.get(place + layout.WEIGHT, place + layout.WEIGHT)
            disk = disk.removesuffix(layout.WEIGHT)
            ignored = recipe.ignores(disk) or recipe.ignores(place)
            left_alone[disk] = "matches --ignore" if ignored else "outside the decoder's blocks"
    _check_patterns(model, names, recipe)
    if not any(planned):
        raise SourceError(
            type(model).__name__,
            "every linear layer of the decoder matches --ignore",
            needed="at least one layer to quantize",
            do="Give narrower --ignore patterns.",
        )
    return planned, left_alone


def _check_processes(plan: Plan) -> None:
    """Refuse more processes than can share the work."""
    recipe, count = plan.recipe, plan.processes
    if count > 1 and recipe.tune > 0 and any(mixtures(block) for block in plan.blocks.modules):
        # Experts are handed out, and process 0 would need them all.
        raise OptionError(
            "tune",
            f"{recipe.tune} for a mixture of experts, with {count} processes",
            needed="one process to tune a mixture of experts",
            do="Give --tune 0 (as recipe best has), or start one process.",
        )
    if recipe.needs_calibration and recipe.samples < count:
        raise OptionError(
            "samples",
            f"{recipe.samples} for {count} processes",
            needed="a window for each process",
            do="Give more samples, or start fewer processes.",
        )


def _check_patterns(model: PreTrainedModel, names: NameMap, recipe: Recipe) -> None:
    """Refuse a pattern of --ignore that somebody has given and that no layer matches."""
    every = [place for place, _ in linears(model)]
    every += [
        names.to_disk.get(place + layout.WEIGHT, "").removesuffix(layout.WEIGHT) for place in every
    ]
    for pattern in recipe.ignore:
        alone = recipe.changed(ignore=(pattern,))
        if pattern in Recipe.ignore or any(map(alone.ignores, every)):
            continue
        raise OptionError(
            "ignore",
            f"{pattern!r}, which no linear layer of the model matches",
            needed="the name of a layer, an end of it behind a dot, or a pattern of such",
            do="Names are those that zqfp-convert MODEL OUT/ --dry-run lists.",
        )


def _packed_bytes(rows: int, columns: int, recipe: Recipe) -> int:
    size = columns if recipe.group_size == "row" else recipe.group_size
    groups = -(-columns // size)
    rank = ranks.at_most(recipe.rank, rows, columns)
    return (
        rows * -(-columns // 2)
        + rows * groups * (2 if recipe.scales == "free" else 1)
        + (2 * rows if recipe.scales == "m2" else 0)
        + (-(-rows // 8) * groups if recipe.codebooks == "pair" else 0)
        + lorc.size(rank, rows, columns, recipe.factors)
    )


def _split(source: Source, names: list[str]) -> list[list[str]]:
    """Tensors in shards of a bounded size, in the order of the source."""
    shards: list[list[str]] = []
    size = SHARD_BYTES
    for name in names:
        extent = source.shards.tensors[name].bytes
        if size + extent > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += extent
    return shards


def positions(model: PreTrainedModel) -> int:
    """The longest window a model takes, in tokens; a very large number where it has no limit."""
    limit = configured(model, "max_position_embeddings")
    return limit if limit is not None and limit > 1 else 1 << 30


def _that_fits(plan: Plan) -> Plan:
    """The plan with its estimates; where memory is short, with less tuned or states elsewhere.

    Where nothing fits, as if all states lay on the device.
    """
    places: tuple[Place, ...] = ("device", "file")
    if plan.device.type != "cpu":
        places = ("device", "host", "file")
    if not plan.recipe.needs_calibration:
        places = ("device",)
    tried = []
    for roundings in (True, False) if plan.recipe.tune > 0 else (False,):
        for place in places:
            spilled = memory.states_bytes(plan) * plan.processes if place == "file" else 0
            tuned = dataclasses.replace(plan, tunes_roundings=roundings)
            tried.append(_estimated(dataclasses.replace(tuned, states=place, spilled=spilled)))
            if _short_of(tried[-1]) is None:
                return tried[-1]
    return tried[-len(places)]


def _estimated(plan: Plan) -> Plan:
    host, on_device = memory.peaks(plan)
    return dataclasses.replace(plan, host_memory=host, device_memory=on_device)


def _short_of(plan: Plan) -> tuple[str, str, str] | None:
    """The memory that will not do: where, what is free, what is needed."""
    return too_little_memory(plan.host_memory, plan.device, plan.device_memory)


def _check_disk(plan: Plan) -> None:
    """Refuse a plan that the disk has no room for."""
    try:
        check_room(plan.out, output_bytes(plan))
    except OutputError as error:
        if not plan.spilled:
            raise
        raise OutputError(
            error.where,
            error.found,
            needed=f"{error.needed}: of it {plan.spilled / 1e6:,.0f} MB for hidden states of the "
            f"calibration text ({plan.recipe.samples} x {plan.recipe.seq_len} tokens), which do "
            "not fit the memory",
            do=f"Use fewer --samples or a shorter --seq-len. {error.do}",
        ) from None


def _check_room(plan: Plan) -> None:
    _check_disk(plan)
    tunes = plan.recipe.tune > 0
    generated = plan.recipe.needs_calibration and plan.text is None
    short = _short_of(plan)
    if short is not None:
        where, found, wanted = short
        raise SourceError(
            where,
            found,
            needed=wanted
            + (" (the whole model, to write its own calibration text)" if generated else ""),
            do="Give --calibration FILE, so that the model is streamed block by block."
            if generated
            else (
                "Use fewer --samples or a shorter --seq-len, or another --device"
                if plan.recipe.needs_calibration
                else "Use another --device, or a machine with more memory"
            )
            + (", or --tune-samples 0, so that the model need not write text" if tunes else "")
            + (", or start fewer processes on a host." if plan.host_processes > 1 else "."),
        )
