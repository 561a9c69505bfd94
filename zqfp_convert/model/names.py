"""One mapping between the names of tensors on disk and those in the model, both ways.

transformers renames some tensors when it loads a checkpoint, and merges those of experts; its own
rules are asked, so that what the loader does here is what `from_pretrained` would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from zqfp_convert.errors import SourceError
from zqfp_convert.model.experts import Fused, mixtures

Make = Callable[[list[Tensor]], Tensor]


class NameMap:
    """Names on disk and in the model.

    Attributes:
        to_model: for each tensor on disk that the model has a place for, that place's name.
        to_disk: the other way round.
        fused: tensors on disk that hold matrices of all experts of a block: the experts' name in
            the model, and how they lie.
        merged: places whose tensors are made of others on disk: their names, and what makes it.
        single: tensors on disk of one expert that transformers itself puts together with others.
        unused: names on disk without a place in the model (left-overs of older versions).
        unfilled: places that no tensor on disk fills; those of fused ones count as such.
        missing: those of them that are not tied to a filled one either.
        shared: places that are tied to others.
    """

    def __init__(self, model: PreTrainedModel, disk: Iterable[str]) -> None:
        """Map the tensors of a checkpoint.

        Raises:
            SourceError: tensors that transformers would merge or split while loading in a way that
                is not known.
        """
        places = model.state_dict()
        rules = _Rules(model, places)
        self.to_model: dict[str, str] = {}
        self.fused: dict[str, tuple[str, Fused]] = {}
        self.unused: list[str] = []
        self.single: set[str] = set()
        whole: dict[str, list[tuple[str, str]]] = {}  # names and patterns of what is merged
        for name in disk:
            place, pattern = rules.renamed(name)
            if place in rules.fused:
                if pattern is None or rules.keeps(pattern):
                    self.fused[name] = rules.fused[place]
                    continue
                if "*" not in pattern:
                    whole.setdefault(place, []).append((name, pattern))
                    continue
                place = rules.of_expert(name, place, pattern)
                self.single.add(name)
            elif pattern is not None and place in places:
                whole.setdefault(place, []).append((name, pattern))
                continue
            if place in places:
                self.to_model[name] = place
            else:
                self.unused.append(name)
        self.merged: dict[str, tuple[tuple[str, ...], Make]] = {}
        for place, parts in whole.items():
            self.merged |= rules.merges(place, parts)
        self.to_disk = {place: name for name, place in self.to_model.items()}
        self.unfilled = sorted(set(places) - set(self.to_disk))
        filled = set(self.to_disk)
        for target, source in model.all_tied_weights_keys.items():  # each stands for the other
            if source in filled or target in filled:
                filled |= {source, target}
        self.missing = [place for place in self.unfilled if place not in filled]
        tied = model.all_tied_weights_keys.items()
        pairs = [pair for one, other in tied for pair in ((one, other), (other, one))]
        self._tied = {
            place: self.to_disk[other]
            for place, other in pairs
            if place not in self.to_disk and other in self.to_disk
        }
        self.shared = {one for pair in pairs for one in pair}

    def within(self, module: str) -> list[str]:
        """The names on disk of the tensors in the module of that name in the model."""
        return [d for d, place in self.to_model.items() if place.startswith(module + ".")]

    def tied_within(self, module: str) -> dict[str, str]:
        """Tensors on disk by the places in a module that only those tied to another place fill.

        The module's name may end in a dot.
        """
        prefix = module if not module or module.endswith(".") else f"{module}."
        return {place: disk for place, disk in self._tied.items() if place.startswith(prefix)}

    def outside(self, module: str) -> list[str]:
        """The names on disk of the tensors that the model has elsewhere."""
        return [d for d, place in self.to_model.items() if not place.startswith(module + ".")]


class _Rules:
    """The rules of transformers for a model.

    Attributes:
        fused: experts' names and layouts, by the names of the parameters that transformers fuses
            them in.
    """

    def __init__(self, model: PreTrainedModel, places: Iterable[str]) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.fused = {
            f"{path}.{name}": (path, one)
            for path, experts in mixtures(model).items()
            for name, one in experts.fused.items()
        }
        self._places = dict.fromkeys([*places, *self.fused], True)
        self._stacking: dict[str, bool] = {}  # by pattern

    def renamed(self, name: str) -> tuple[str, str | None]:
        """The place of a tensor on disk, and the pattern by which transformers would merge it."""
        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._places
        )
        # A rule for the names of its authors' own checkpoints may catch the model's own.
        return (name, None) if renamed[0] not in self._places and name in self._places else renamed

    def merges(
        self, place: str, parts: list[tuple[str, str]]
    ) -> dict[str, tuple[tuple[str, ...], Make]]:
        """What is made of tensors on disk, given with their patterns, by places.

        `place` is the first of them.

        Raises:
            SourceError: a pattern stands for several tensors, or one is missing.
        """
        converter = self._converter(parts[0][1])
        by_pattern = {pattern: name for name, pattern in parts}
        sources, targets = list(converter.source_patterns), list(converter.target_patterns)
        if sorted(by_pattern) != sorted(sources) or len(parts) != len(sources):
            raise _merged(parts[0][0])

        def make(tensors: list[Tensor], target: str) -> Tensor:
            given = {one: [tensor] for one, tensor in zip(sources, tensors, strict=True)}
            return _converted(converter, given)[target]

        names = tuple(by_pattern[one] for one in sources)
        result: dict[str, tuple[tuple[str, ...], Make]] = {
            place.replace(targets[0], one): (names, partial(make, target=one)) for one in targets
        }
        if not result.keys() <= self._places.keys():
            raise _merged(parts[0][0])
        return result

    def keeps(self, pattern: str) -> bool:
        """Whether tensors of a pattern are taken as they are after all."""
        if "*" in pattern:
            return False
        sample = torch.arange(24.0).view(2, 3, 4)
        try:
            (made,) = _converted(self._converter(pattern), {pattern: [sample]}).values()
        except (RuntimeError, ValueError, KeyError, IndexError):  # it asks for other shapes
            return False
        return torch.equal(made, sample)

    def of_expert(self, name: str, fused: str, pattern: str) -> str:
        """The place of a tensor of one expert, which transformers merges into the fused parameter.

        Raises:
            SourceError: it merges them otherwise than one expert after the other, part by part.
        """
        path, layout = self.fused[fused]
        converter = self._converter(pattern)
        sources = converter.source_patterns
        if pattern not in self._stacking:
            self._stacking[pattern] = len(sources) == len(layout.parts) and _stacks(converter)
        if not self._stacking[pattern]:
            raise _merged(name)
        before, _ = rename_source_key(name, self._renamings, [], self._prefix, self._places)
        found = re.search(pattern.replace("*.", r"(\d+)\."), before)
        if found is None:
            raise _merged(name)
        return f"{path}.{found.group(1)}.{layout.parts[sources.index(pattern)]}.{layout.leaf}"

    def _converter(self, pattern: str) -> WeightConverter:
        return next(rule for rule in self._converters if pattern in rule.source_patterns)


def _stacks(converter: WeightConverter) -> bool:
    """Whether a converter puts one expert after the other, and parts in the order of its sources.

    It is tried on matrices `[2, 3]` of two experts, each full of a number of its own.
    """
    sources = converter.source_patterns
    numbers = torch.arange(2.0 * len(sources)).view(2, len(sources))  # [expert, part]
    each = {
        source: [torch.full((2, 3), float(numbers[expert, part])) for expert in range(2)]
        for part, source in enumerate(sources)
    }
    (merged,) = _converted(converter, each).values()
    return torch.equal(merged, numbers.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 3))


def _converted(converter: WeightConverter, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """What the operations of a converter make of the tensors of its sources."""
    result: dict[str, Any] = tensors
    for operation in converter.operations:
        result = operation.convert(
            result,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
        )
    return {name: one[0] if isinstance(one, list) else one for name, one in result.items()}


def _merged(name: str) -> SourceError:
    return SourceError(
        name,
        "a tensor that has to be merged or split to fit the model",
        needed="tensors that fit the model's parameters one to one, or experts one by one",
        do="Such models cannot be converted yet.",
    )
