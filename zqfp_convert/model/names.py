"""One mapping between the names of tensors on disk and those in the model, both ways.

transformers renames some tensors when it loads a checkpoint, and merges those of experts; its own
rules are asked, so that what the loader does here is what `from_pretrained` would do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from zqfp_convert.errors import SourceError
from zqfp_convert.model.experts import Fused, mixtures


class NameMap:
    """Names on disk and in the model.

    Attributes:
        to_model: for each tensor on disk that the model has a place for, that place's name.
        to_disk: the other way round.
        fused: tensors on disk that hold matrices of all experts of a block: the experts' name in
            the model, and how they lie.
        unused: names on disk without a place in the model (left-overs of older versions).
        unfilled: places that no tensor on disk fills; those of fused ones count as such.
        missing: those of them that are not tied to a filled one either.
    """

    def __init__(self, model: PreTrainedModel, disk: Iterable[str]) -> None:
        """Map the tensors of a checkpoint.

        Raises:
            SourceError: tensors that transformers would merge or split while loading, experts' own
                aside.
        """
        places = model.state_dict()
        rules = _Rules(model, places)
        self.to_model: dict[str, str] = {}
        self.fused: dict[str, tuple[str, Fused]] = {}
        self.unused: list[str] = []
        for name in disk:
            place, pattern = rules.renamed(name)
            if place in rules.fused:
                if pattern is None or rules.keeps(pattern):
                    self.fused[name] = rules.fused[place]
                    continue
                place = rules.of_expert(name, place, pattern)
            elif pattern is not None and place in places:
                raise _merged(name)
            if place in places:
                self.to_model[name] = place
            else:
                self.unused.append(name)
        self.to_disk = {place: name for name, place in self.to_model.items()}
        self.unfilled = sorted(set(places) - set(self.to_disk))
        filled = set(self.to_disk)
        for target, source in model.all_tied_weights_keys.items():  # each stands for the other
            if source in filled or target in filled:
                filled |= {source, target}
        self.missing = [place for place in self.unfilled if place not in filled]

    def within(self, module: str) -> list[str]:
        """The names on disk of the tensors in the module of that name in the model."""
        return [d for d, place in self.to_model.items() if place.startswith(module + ".")]

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
        return renamed

    def keeps(self, pattern: str) -> bool:
        """Whether tensors of a pattern are taken as they are after all."""
        if "*" in pattern:
            return False
        sample = torch.arange(24.0).view(2, 3, 4)
        (made,) = _converted(self._converter(pattern), {pattern: [sample]}).values()
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
