"""The bfloat16 model to compare with: the original itself, or random weights of its shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import OptionError, SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.original import match

DTYPE = torch.bfloat16
SPREAD = 0.02  # of random weights
ALIKE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def find(checkpoint: PackedCheckpoint, named: str | None) -> Path | None:
    """The original's folder: the one that is named, else the one on record if it is still there.

    Raises:
        SourceError: there is no such model.
        OptionError: the one that is named has other shapes than the checkpoint.
    """
    config = skeleton.build(checkpoint.folder).config
    if named is not None:
        folder = hub.fetch(named)
        Source(folder)
        if different := _difference(skeleton.build(folder).config, config):
            raise OptionError(
                "original",
                f"{folder}, of another {different}",
                needed="the model that the checkpoint was made from",
                do="Give that model, or none for random weights of the same shapes.",
            )
        return folder
    for folder in _recorded(checkpoint):
        try:
            Source(folder)
            if not _difference(skeleton.build(folder).config, config):
                return folder
        except SourceError:
            continue
    return None


def _recorded(checkpoint: PackedCheckpoint) -> Iterator[Path]:
    """Folders of this machine that the checkpoint's record of its source may mean.

    A repository that is in the Hub's cache, or a folder of that name beside the checkpoint.
    """
    recorded = checkpoint.quantization.get("source")
    if isinstance(recorded, dict):
        repository, name = recorded.get("repository"), recorded.get("name")
        if isinstance(repository, str):
            folder = hub.cached(repository, recorded.get("revision"))
            if folder is not None:
                yield folder
        elif isinstance(name, str) and name:
            yield checkpoint.folder.absolute().parent / Path(name).name
    before = checkpoint.config.get("_name_or_path")
    if isinstance(before, str) and before:
        yield Path(before)


def size(folder: Path) -> int:
    """Bytes of the weights of a folder's model in bfloat16."""
    numbers: int = sum(parameter.numel() for parameter in skeleton.build(folder).parameters())
    return numbers * DTYPE.itemsize


def read(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model in bfloat16, tensor by tensor to the device.

    Raises:
        SourceError: it lacks weights that its configuration asks for.
    """
    source = Source(folder)
    model = skeleton.build(folder, device)
    names = match(source, model)
    if names.missing:
        raise SourceError(
            str(folder),
            f"no tensor for {names.missing[0]}",
            needed="all weights of the model of its config.json",
            do="Download the model again.",
        )
    for name, place in names.to_model.items():
        skeleton.assign(model, {place: source.shards.read([name])[name].to(device)}, DTYPE)
    return _tied(model, names.unfilled)


def random(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model of a folder's configuration, its weights small random numbers, in bfloat16."""
    model = skeleton.build(folder, device)
    generator = torch.Generator(device).manual_seed(0)
    return fill(model, device, generator)


def fill(
    model: PreTrainedModel, device: torch.device, generator: torch.Generator
) -> PreTrainedModel:
    """The model, with random numbers for all that is still on the meta device.

    Never zeros: multiplying them takes less power, and so less time.
    """
    tied = list(model.all_tied_weights_keys)
    # Not `state_dict`, which would bring packed weights back to the order on disk.
    places = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, place in places:
        if place.is_meta and name not in tied:
            value = torch.empty(place.shape, dtype=DTYPE, device=device)
            skeleton.assign(model, {name: value.normal_(0, SPREAD, generator=generator)}, DTYPE)
    return _tied(model, tied)


def _tied(model: PreTrainedModel, unfilled: list[str]) -> PreTrainedModel:
    model.config.dtype = DTYPE
    model.tie_weights(missing_keys=set(unfilled), recompute_mapping=False)
    return model.eval()


def _difference(given: PretrainedConfig, wanted: PretrainedConfig) -> str | None:
    one, other = given.get_text_config(), wanted.get_text_config()
    for name in ALIKE:
        if getattr(one, name, None) != getattr(other, name, None):
            return name
    return None
