"""Experts with linears of their own: the same function as the model's fused ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import token_ids
from mixtures import EXPERTS, architectures, configuration, original, write_mixture
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import CheckpointError, SourceError
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import find_blocks
from zqfp_convert.model.experts import IndexedExperts, SortedExperts, StandIn, mixtures, routers
from zqfp_convert.model.unfused import unfuse
from zqfp_convert.original import match

ROUTERS = {"qwen2_moe": "shared_expert_gate", "qwen3_next": "shared_expert_gate",
           "llama4": "router", "phimoe": "router", "hunyuan_v1_moe": "wg"}  # fmt: skip


def filled(folder: Path) -> transformers.PreTrainedModel:
    """The skeleton of a folder's model with its weights."""
    source, model = Source(folder), skeleton.build(folder)
    names = match(source, model)
    assert not names.missing
    assert not names.unused
    for name, place in names.to_model.items():
        skeleton.assign(model, {place: source.shards.read([name])[name]})
        assert source.shards.tensors[name].shape == tuple(model.state_dict()[place].shape)
    model.tie_weights(missing_keys=set(names.unfilled), recompute_mapping=False)
    return model


@pytest.mark.parametrize("arch", architectures())
@torch.no_grad()
def test_the_same_logits_as_transformers(arch: str, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "m", arch)
    ours, theirs = filled(folder), original(folder)
    experts = mixtures(ours)
    assert experts
    assert {len(each) for each in experts.values()} == {EXPERTS}
    have, want = ours(token_ids()).logits, theirs(token_ids()).logits
    assert (have - want).abs().max() < 1e-5 * want.abs().max()
    found = {name.rpartition(".")[2] for name in routers(ours)}
    linear = {ROUTERS[arch]} if arch in ROUTERS else set()
    assert linear <= found
    blocks = find_blocks(ours)
    assert blocks.path == "model.layers"


def meta(arch: str) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(configuration(arch))


def test_gpt_oss_rows_take_turns() -> None:
    model = meta("gpt_oss")
    unfuse(model)
    fused = model.model.layers[0].mlp.experts.fused
    assert fused["gate_up_proj"].transposed
    assert fused["gate_up_proj"].interleaved
    assert not fused["down_proj"].interleaved
    whole = torch.arange(6.0)  # a bias of gate and up rows
    assert fused["gate_up_proj_bias"].part(whole, 0).tolist() == [0, 2, 4]
    assert fused["gate_up_proj_bias"].part(whole, 1).tolist() == [1, 3, 5]


def test_another_function_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta("mixtral")
    experts = model.model.layers[0].mlp.experts
    before = type(experts).forward

    def louder(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return 1.001 * before(self, hidden, index, weights)

    monkeypatch.setattr(type(experts), "forward", louder)
    unfuse(model)
    assert model.model.layers[0].mlp.experts is experts
    with pytest.raises(SourceError, match="of a kind that is not known") as raised:
        find_blocks(model)
    assert "mlp.experts" in raised.value.found


def test_a_module_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta("mixtral")
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setattr(type(experts), "forward", lambda self, hidden, index, weights: 1 / 0)
    unfuse(model)
    assert model.model.layers[0].mlp.experts is experts


def test_a_limit_is_noticed() -> None:
    """Small inputs do not reach the limit of gpt-oss's activation; the proof must not miss it."""
    model = meta("gpt_oss")
    experts = model.model.layers[0].mlp.experts

    def unlimited(merged: Tensor) -> Tensor:
        gate, up = merged[..., ::2], merged[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    # copies of the module, which the proof makes, have it; its class, which computes, does not
    experts.__dict__["_apply_gate"] = unlimited
    forward = type(experts).forward

    class Honest(type(experts)):
        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self.__dict__.pop("_apply_gate", None)
            return forward(self, hidden, index, weights)

    experts.__class__ = Honest
    unfuse(model)
    assert model.model.layers[0].mlp.experts is experts


@pytest.mark.parametrize(
    "config",
    [
        transformers.DbrxConfig(
            d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96,
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ),
        transformers.JetMoeConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2,
            kv_channels=8, intermediate_size=16, num_local_experts=4, pad_token_id=0,
        ),
    ],
    ids=["dbrx", "jetmoe"],
)  # fmt: skip
def test_unknown_experts_are_refused(config: transformers.PretrainedConfig) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    unfuse(model)
    with pytest.raises(SourceError, match="of a kind that is not known"):
        find_blocks(model)


def test_rows_of_indexed_experts() -> None:
    experts = IndexedExperts([nn.Identity() for _ in range(4)], {})
    index = torch.tensor([[0, 2], [2, 4], [1, 0]])  # 4 is none of them
    rows = experts.rows(torch.zeros(3, 5), index, torch.ones(3, 2))
    assert [sorted(each.tolist()) for each in rows] == [[0, 2], [2], [0, 1], []]
    hidden, weights = torch.randn(3, 5), torch.rand(3, 2)
    want = hidden * (weights * (index < 4)).sum(1, keepdim=True)
    torch.testing.assert_close(experts(hidden, index, weights), want)


def test_rows_of_sorted_experts() -> None:
    experts = SortedExperts([nn.Identity() for _ in range(2)], {})
    hidden = torch.zeros(6, 3)  # two experts, three tokens each
    hidden[1, 2] = hidden[3, 0] = hidden[5] = 1
    assert [each.tolist() for each in experts.rows(hidden)] == [[1], [3, 5]]
    assert torch.equal(experts(hidden), hidden)


def test_a_stand_in_tells_one_routing_from_another() -> None:
    hidden, index, weights = torch.randn(3, 5), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    here = StandIn()(hidden, index, weights)
    assert not torch.equal(here, StandIn()(hidden, index + 1, weights))
    assert not torch.equal(here, StandIn()(hidden, index, 2 * weights))
    assert not torch.equal(here, StandIn()(2 * hidden, index, weights))
    assert torch.equal(StandIn()(hidden), hidden)


def test_a_fused_tensor_of_another_shape(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "m", "llama4")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"num_local_experts": 4', '"num_local_experts": 3')
    )
    with pytest.raises(CheckpointError, match="wrong-shape") as raised:
        match(Source(folder), skeleton.build(folder))
    assert "experts" in raised.value.where


def test_experts_keep_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "m", "gpt_oss", torch.bfloat16)
    source, model = Source(folder), skeleton.build(folder)
    for name, place in match(source, model).to_model.items():
        skeleton.assign(model, {place: source.shards.read([name])[name]}, torch.float32)
    experts = [p for each in mixtures(model).values() for p in each.parameters()]
    assert {p.dtype for p in experts} == {torch.bfloat16}
    others = {id(p) for p in experts}
    assert {p.dtype for p in model.parameters() if id(p) not in others} == {torch.float32}
    logits = model(token_ids()).logits
    assert logits.dtype == torch.float32
    want = original(folder).float()(token_ids()).logits
    assert (logits - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def test_compiles_but_for_a_whole_graph() -> None:
    """With an error that callers know: benchmarks then time the model as it is."""
    hidden = torch.randn(8, 5)
    routing = torch.tensor([[0, 1]] * 8), torch.rand(8, 2)
    identities = [nn.Identity() for _ in range(2)]
    for experts, args in (
        (IndexedExperts(identities, {}), (hidden, *routing)),
        (SortedExperts(identities, {}), (hidden,)),
    ):
        want = experts(*args)
        torch.testing.assert_close(torch.compile(experts, backend="eager")(*args), want)
        torch.compiler.reset()
        with pytest.raises(TorchDynamoException):
            torch.compile(experts, backend="eager", fullgraph=True)(*args)
        torch.compiler.reset()
