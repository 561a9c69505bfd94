"""A model that is tuned: what it computes, and its gradients, against the whole model's."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, configuration, random_model, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

from zqfp_convert.distill.student import Student
from zqfp_convert.distill.train import kl
from zqfp_convert.distill.tunable import TunableLinear, tunables
from zqfp_convert.model.blocks import bias_of, find_blocks, linears, put, weight_matrix
from zqfp_convert.quantize.weight import quantize_weight
from zqfp_convert.recipe import Recipe

RECIPE = Recipe.named("best", group_size=32, rank=2, tune=1)


def quantized(model: PreTrainedModel, stored: torch.dtype = torch.float32) -> Student:
    model = copy.deepcopy(model).requires_grad_(False)
    blocks = find_blocks(model)
    for block in blocks.modules:
        for name, linear in [*linears(block)]:
            solved = quantize_weight(weight_matrix(linear), None, RECIPE)
            put(block, name, TunableLinear(solved, bias_of(linear)))
    return Student(model, blocks, stored)


def learning(student: Student) -> list[nn.Parameter]:
    found = [
        parameter
        for linear in tunables(student.model)
        for parameter in (linear.handle, linear.row_gain, linear.A, linear.B)
        if parameter is not None
    ]
    found += student.norms.values()
    for parameter in found:
        parameter.requires_grad_(True).grad = None
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_the_whole_models(arch: str) -> None:
    model, ids = random_model(configuration(arch)), token_ids()
    student = quantized(model)
    with torch.no_grad():
        hidden = student.hidden(ids)
        assert hidden.shape[:2] == ids.shape
        whole = student.model(ids, use_cache=False).logits.flatten(0, 1)
        torch.testing.assert_close(
            student.logits(hidden.flatten(0, 1)), whole, rtol=1e-4, atol=1e-4
        )
        for vector in student.norms.values():
            vector.mul_(1.5)
        blocks = find_blocks(model)
        seen: list[Tensor] = []
        hook = blocks.modules[-1].register_forward_hook(
            lambda module, args, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        want = model(ids, use_cache=False).logits.flatten(0, 1)
        hook.remove()
        have = student.original_logits(seen[0].flatten(0, 1))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert all("forward" not in vars(block) for block in student._blocks.modules)


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3"])
def test_gradients_are_those_without_checkpoints(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zqfp_convert.distill.train.TOKENS_AT_ONCE", 7)
    model, ids = random_model(configuration(arch)), token_ids()
    student, wanted = quantized(model), torch.randn(ids.numel(), 64)
    parameters = learning(student)
    hidden = student.hidden(ids).flatten(0, 1)
    kl(student.original_logits, student.logits, wanted, hidden).backward()
    have = [p.grad for p in parameters]
    q = student.model(ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    p = student.original_logits(wanted).log_softmax(-1)
    parameters = learning(student)
    (p.exp() * (p - q)).sum(-1).mean().backward()
    for mine, parameter in zip(have, parameters, strict=True):
        assert mine is not None
        assert parameter.grad is not None
        close = 2e-2 if parameter.dtype == torch.bfloat16 else 1e-3
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(mine, parameter.grad, rtol=close, atol=close * size)


def test_norms_are_seen_as_the_file_will_have_them() -> None:
    student = quantized(random_model(configuration("llama")), torch.bfloat16)
    name, vector = next(item for item in student.norms.items() if "layernorm" in item[0])
    with torch.no_grad():
        vector.add_(torch.randn_like(vector) * 0.01)
    seen = student.model.get_submodule(name.removesuffix(".weight")).weight
    assert torch.equal(seen, student.stored_norms()[name].float())
    assert not torch.equal(seen, vector)
