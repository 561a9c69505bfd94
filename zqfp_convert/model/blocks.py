"""Finds a decoder's blocks and the linears in them by structure, not by a table of names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zqfp_convert.errors import SourceError
from zqfp_convert.model.experts import Experts, mixtures

Linear: TypeAlias = "nn.Linear | Conv1D"
# How many outputs blocks of a class have beside hidden states; None if they return a bare tensor.
Returns: TypeAlias = "Mapping[type[nn.Module], int | None]"
MOST_UNKNOWN = 0.25  # of a block's numbers, in matrices that are in no linear


@dataclass(frozen=True)
class Blocks:
    """The decoder's list of blocks, of one kind or of several (attention here, recurrence there).

    Attributes:
        decoder: the module whose forward runs from token ids to the last block's output.
        path: the list's name in the model, such as `model.layers`.
        modules: the blocks in order.
    """

    decoder: nn.Module
    path: str
    modules: list[nn.Module]

    def name(self, index: int) -> str:
        """The name of a block in the model."""
        return f"{self.path}.{index}"


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The outermost list of modules that holds most of the decoder's linear weights.

    Towers for pictures and sound, which start from something else than tokens, do not count.

    Raises:
        SourceError: there is none, or its blocks hold experts of a kind that is not known.
    """
    for decoder in (model.get_decoder(), model.base_model, model):
        # what some models name so is their output head
        best = _largest_list(decoder) if isinstance(decoder, nn.Module) else None
        if best is not None:
            break
    else:
        raise SourceError(
            type(model).__name__,
            "no list of decoder blocks with linear layers",
            needed="a decoder made of a list of blocks",
            do="This architecture cannot be converted yet.",
        )
    path, found = best
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for block in found:
        _refuse_experts(type(model).__name__, block)
    return Blocks(decoder, f"{prefix}.{path}".lstrip("."), list(found))


def _largest_list(decoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The outermost list of modules that holds most linear weights, and its name."""
    best: tuple[int, str, nn.ModuleList] | None = None
    towers = tuple(f"{path}." for path, part in decoder.named_modules() if path and _is_tower(part))
    for path, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or isinstance(module, Experts) or not len(module):
            continue
        size = sum(weight_matrix(w).numel() for block in module for _, w in linears(block))
        alike = len({type(block) for block in module}) == 1
        composed = all(any(True for _ in block.children()) for block in module)
        usable = (alike or composed) and not f"{path}.".startswith(towers)
        if usable and size and (best is None or size > best[0]):
            best = (size, path, module)
    return None if best is None else best[1:]


def _is_tower(module: nn.Module) -> bool:
    """Whether a module is a model that starts from something else than tokens."""
    if not isinstance(module, PreTrainedModel):
        return False
    taken = inspect.signature(module.forward).parameters.keys()
    return module.main_input_name != "input_ids" or not taken & {"input_ids", "inputs_embeds"}


def linears(block: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers in a module with their names; GPT-2's transposed ones too."""
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def weight_matrix(linear: Linear) -> Tensor:
    """The weight of a linear as `[N, K]`; `Conv1D` stores it transposed."""
    weight: Tensor = linear.weight
    return weight.t() if isinstance(linear, Conv1D) else weight


def shape(linear: Linear) -> tuple[int, int]:
    """(N, K) of a linear."""
    rows, columns = weight_matrix(linear).shape
    return rows, columns


def is_transposed(linear: nn.Module) -> bool:
    """Whether the checkpoint stores the weight as `[K, N]`."""
    return isinstance(linear, Conv1D)


def get_linear(module: nn.Module, name: str) -> Linear:
    """The linear of that name in a module."""
    linear = module.get_submodule(name)
    assert isinstance(linear, (nn.Linear, Conv1D)), type(linear)
    return linear


def bias_of(linear: Linear) -> Tensor | None:
    """The bias `[N]` of a linear, or None."""
    bias: Tensor | None = linear.bias
    return bias


def put(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of that name."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, new)


def others(output: object) -> int | None:
    """How many outputs there are beside hidden states in what a block returns, as in `Returns`."""
    return len(output) - 1 if isinstance(output, (tuple, list)) else None


def as_returned(
    hidden: Tensor, block: nn.Module, returns: Returns, beside: Sequence[object] = ()
) -> object:
    """Hidden states in the form in which a block returns them.

    Args:
        returns: what is known of classes of blocks; one that is not is taken to be as another.
        beside: other outputs, as far as they matter.
    """
    count = returns.get(type(block), next(iter(returns.values()), None))
    if count is None:
        return hidden
    return (hidden, *[*beside, *[None] * count][:count])


def first_tensor(output: object) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that starts with one."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, torch.Tensor), type(found)
    return found


def _refuse_experts(model: str, block: nn.Module) -> None:
    """Refuse experts in other modules than those of `model/experts.py`.

    Raises:
        SourceError: there are some, and where.
    """
    known = mixtures(block)
    plain = 0
    unknown: dict[str, int] = {}  # numbers in matrices that are in no linear, by module
    for name, module in block.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, (nn.Linear, Conv1D)):
            plain += module.weight.numel()
            continue
        if name not in known and not isinstance(module, nn.Conv1d):
            unknown[name] = sum(p.numel() for p in parameters if p.ndim > 1)
    if sum(unknown.values()) > MOST_UNKNOWN * plain:
        raise _unknown_experts(model, max(unknown, key=lambda name: unknown[name]))


def _unknown_experts(model: str, name: str) -> SourceError:
    return SourceError(
        model,
        f"matrices that are in no linear layer (in '{name}' of each block): a mixture of experts, "
        "or a layer, of a kind that is not known",
        needed="blocks of plain linear layers, or experts whose matrices are in 'gate_up_proj' "
        "and 'down_proj'",
        do="This architecture cannot be converted yet; a newer transformers may keep its matrices "
        "so.",
    )
