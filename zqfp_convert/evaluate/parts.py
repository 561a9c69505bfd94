"""A model that is filled part by part: what streaming needs of an original and a packed one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.model import skeleton
from zqfp_convert.model.names import NameMap
from zqfp_convert.original import match
from zqfp_convert.plan import check_fit


class Parts(Protocol):
    """A model without weights, the names of its tensors, and what fills any part of it."""

    model: PreTrainedModel
    names: NameMap

    def fill(self, module: nn.Module, prefix: str, disk: Iterable[str]) -> None:
        """Give a module, whose names have `prefix` in the model, the tensors of these names."""


class SourceParts:
    """The parts of a model as it lies in its source folder.

    Attributes:
        source: the folder.
        dtype: of the weights and activations.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype | None) -> None:
        """`dtype` is the one of the model's configuration when absent.

        Raises:
            SourceError: the installed transformers does not know the model, or tensors are missing.
            CheckpointError: tensors of another shape than the configuration says.
        """
        self.source, self._device, self._cast = source, device, dtype
        self.model = skeleton.build(source.folder, device)
        self.dtype = dtype or self.model.dtype
        self.names = match(source, self.model)
        check_fit(source, self.model, self.names)

    def fill(self, module: nn.Module, prefix: str, disk: Iterable[str]) -> None:
        """As in `Parts`."""
        for name in disk:
            place = self.names.to_model[name].removeprefix(prefix)
            tensor = self.source.shards.read([name])[name].to(self._device)
            skeleton.assign(module, {place: tensor}, self._cast)
        for whole, name in (self.names.tied_within(prefix) if prefix else {}).items():
            tensor = self.source.shards.read([name])[name].to(self._device)
            skeleton.assign(module, {whole.removeprefix(prefix): tensor}, self._cast)
