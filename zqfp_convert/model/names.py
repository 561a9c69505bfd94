"""One mapping between the names of tensors on disk and those in the model, both ways.

transformers renames some tensors when it loads a checkpoint; its own rules are asked, so that
what the loader does here is what `from_pretrained` would do.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from zqfp_convert.errors import SourceError


class NameMap:
    """Names on disk and in the model.

    Attributes:
        to_model: for each tensor on disk that the model has a place for, that place's name.
        to_disk: the other way round.
        unused: names on disk without a place in the model (left-overs of older versions).
        unfilled: places that no tensor on disk fills.
        missing: those of them that are not tied to a filled one either.
    """

    def __init__(self, model: PreTrainedModel, disk: Iterable[str]) -> None:
        """Map the tensors of a checkpoint.

        Raises:
            SourceError: tensors that transformers would merge or split while loading.
        """
        places = model.state_dict()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.to_model: dict[str, str] = {}
        self.unused: list[str] = []
        for name in disk:
            place, converter = rename_source_key(
                name, renamings, converters, model.base_model_prefix, places
            )
            if converter is not None and place in places:
                raise SourceError(
                    name,
                    "a tensor that has to be merged or split to fit the model",
                    needed="tensors that fit the model's parameters one to one",
                    do="Such models (mixtures of experts, mostly) cannot be converted yet.",
                )
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
