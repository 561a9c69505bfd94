"""Exports to GGUF, read back by the package `gguf`, and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers as hf
from architectures import token_ids
from exported_models import DEMO, Packer, dequantized, logits, plain, source_of, weights
from gguf import GGMLQuantizationType as Type
from huggingface_hub import metadata_load
from packaging.version import Version
from safetensors import safe_open

import zqfp_convert
from zqfp_convert.errors import OptionError, SourceError

NOTES = Path(__file__).parents[1] / "benchmarks" / "NOTES.md"  # some text
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def with_words(packed: Packer, tmp_path: Path) -> Packer:
    """As `packed`, with a tokenizer that llama.cpp knows."""

    def make(arch: str, **options: Any) -> Path:
        checkpoint = tmp_path / f"{arch}-with-words"
        shutil.copytree(packed(arch, **options), checkpoint)
        if arch != "demo":
            small = json.loads((DEMO / "tokenizer.json").read_text())
            vocabulary = small["model"]["vocab"]
            small["model"]["vocab"] = {w: n for w, n in vocabulary.items() if n < 300}
            small["model"]["merges"] = [
                pair
                for pair in small["model"]["merges"]
                if "".join(pair) in small["model"]["vocab"]
            ]
            (checkpoint / "tokenizer.json").write_text(json.dumps(small))
            shutil.copy(DEMO / "tokenizer_config.json", checkpoint)
        return checkpoint

    return make


def tensors(path: Path) -> dict[str, np.ndarray]:
    """What the package `gguf` reads, dequantized, by names."""
    found = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in found}


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys, halves of each head by turns, as llama.cpp has them."""
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return torch.stack((halves[:, 0], halves[:, 1]), 2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("demo", {}),
        ("demo", {"group_size": 64}),
        ("qwen2", {"group_size": "row"}),
        ("qwen3", {"config": {"head_dim": 16}}),
    ],
)
def test_weights_are_read_back(
    with_words: Packer, packed: Packer, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    checkpoint = with_words(arch, **options)
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    path = tmp_path / "gg" / "gg-mxfp4.gguf"
    assert metadata_load(tmp_path / "gg" / "README.md")["library_name"] == "gguf"
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    have = tensors(path)
    config = hf.AutoConfig.from_pretrained(source_of(packed(arch, **options)))
    for name, weight in weights(checkpoint, merged=False).items():
        _, _, block, module = name.split(".", 3)
        theirs = f"blk.{block}.{NAMES[module]}.weight"
        assert kinds[theirs] is Type.MXFP4
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if arch == "demo" and NAMES[module] in heads:  # a Llama
            weight = turned(weight, heads[NAMES[module]])
        assert np.array_equal(have[theirs].astype(np.float64), weight.numpy()), theirs
    assert kinds["token_embd.weight"] is Type.BF16
    assert kinds["output_norm.weight"] is Type.F32
    stored = {}
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(str(shard), "pt") as file:
            stored |= {n: file.get_tensor(n) for n in file.keys() if "packed" not in n}  # noqa: SIM118
    embeddings = stored["model.embed_tokens.weight"].float().numpy()
    assert np.array_equal(have["token_embd.weight"], embeddings)
    if arch == "qwen2":
        bias = stored["model.layers.1.self_attn.k_proj.bias"].float().numpy()
        assert np.array_equal(have["blk.1.attn_k.bias"], bias)
    assert len(have) == len([n for n in stored if n.endswith((".weight", ".bias"))]) + len(
        weights(checkpoint, merged=False)
    )


def test_transformers_loads_it(with_words: Packer, packed: Packer, tmp_path: Path) -> None:
    checkpoint = with_words("demo")
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    file = {"gguf_file": "gg-mxfp4.gguf"}
    have = plain(tmp_path / "gg", dtype=torch.float32, **file)
    want = dequantized(packed("demo"), torch.float32)
    assert torch.equal(logits(have, token_ids()), logits(want, token_ids()))
    for field in ("num_hidden_layers", "vocab_size", "head_dim", "intermediate_size"):
        assert getattr(have.config, field) == getattr(want.config, field)
    texts = ["Once upon a time, it's 1234 times   nicer\n\n here — naïve", "  two  spaces"]
    one = hf.AutoTokenizer.from_pretrained(tmp_path / "gg", **file)
    other = hf.AutoTokenizer.from_pretrained(checkpoint)
    have_ids, want_ids = one(texts)["input_ids"], other(texts)["input_ids"]
    if Version(hf.__version__) < Version("5.8"):  # puts BOS before texts, whatever the file says
        have_ids = [ids[1:] for ids in have_ids]
    assert have_ids == want_ids


def test_the_licence_goes_along(with_words: Packer, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(with_words("demo"), tmp_path / "packed"))
    (checkpoint / "LICENSE.txt").write_text("Some terms.")
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    names = {path.name for path in (tmp_path / "gg").iterdir()}
    assert names == {"LICENSE.txt", "README.md", "gg-mxfp4.gguf"}


def test_experts_are_stacked(with_words: Packer, tmp_path: Path) -> None:
    config = {"moe_intermediate_size": 64, "norm_topk_prob": True, "head_dim": 8}
    checkpoint = with_words("qwen3_moe", config=config)
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    have = tensors(tmp_path / "gg" / "gg-mxfp4.gguf")
    found = weights(checkpoint, merged=False)
    for part in ("gate", "up", "down"):
        experts = [found[f"model.layers.1.mlp.experts.{e}.{part}_proj"] for e in range(4)]
        theirs = have[f"blk.1.ffn_{part}_exps.weight"]
        assert np.array_equal(theirs.astype(np.float64), torch.stack(experts).numpy())
    fields = gguf.GGUFReader(tmp_path / "gg" / "gg-mxfp4.gguf").fields
    assert fields["qwen3moe.expert_count"].contents() == 4
    assert fields["qwen3moe.expert_used_count"].contents() == 2
    assert fields["general.architecture"].contents() == "qwen3moe"


def test_metadata(with_words: Packer, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = {"intermediate_size": 160, "rope_parameters": rope}
    checkpoint = with_words("llama", config=config)
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    reader = gguf.GGUFReader(tmp_path / "gg" / "gg-mxfp4.gguf")
    held = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert {key: held[key] for key in wanted} == wanted
    assert len(held["tokenizer.ggml.tokens"]) == len(held["tokenizer.ggml.token_type"]) == 384
    kinds = held["tokenizer.ggml.token_type"]
    assert kinds[0] == gguf.TokenType.CONTROL
    assert kinds[299:301] == [gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    # Llama 3.1's rule: frequencies whose waves are long in the original context slow down
    waves = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((64 / waves - 1.0) / (4.0 - 1.0), 0, 1)
    want = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = tensors(tmp_path / "gg" / "gg-mxfp4.gguf")["rope_freqs.weight"]
    np.testing.assert_allclose(factors, want, rtol=1e-5)
    assert 1 < want[1] < 8


def test_compensation_is_an_adapter(with_words: Packer, packed: Packer, tmp_path: Path) -> None:
    checkpoint = with_words("demo", rank=3)
    made = zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    assert made.adapter == tmp_path / "gg" / "lorc-adapter.gguf"
    held = tensors(made.adapter)
    fields = gguf.GGUFReader(made.adapter).fields
    assert fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == 3
    both, without = (weights(checkpoint, merged=merged) for merged in (True, False))
    for name, weight in both.items():
        _, _, block, module = name.split(".", 3)
        theirs = f"blk.{block}.{NAMES[module]}.weight"
        product = held[f"{theirs}.lora_b"].astype(np.float64) @ held[f"{theirs}.lora_a"]
        want = weight - without[name]
        heads = {"attn_q": 6, "attn_k": 2}
        if NAMES[module] in heads:
            want = turned(want, heads[NAMES[module]])
        np.testing.assert_allclose(product, want.numpy(), atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("opt", {}, "model_type 'opt'; needed: one of llama, mistral"),
        ("qwen2", {"scales": "m2"}, "--scales m1"),
        ("mistral", {"config": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
        ("qwen3", {"config": {"attention_bias": True, "head_dim": 16}}, "_proj.bias'"),
        (
            "qwen2",
            {"config": {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                "original_max_position_embeddings": 64}}},
            "rotary embeddings 'yarn'",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    with_words: Packer, tmp_path: Path, arch: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        zqfp_convert.export(with_words(arch, **options), tmp_path / "gg", "gguf")
    assert not (tmp_path / "gg").exists()
    assert not (tmp_path / "gg.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "changes the text first"),
        (lambda t: t["model"].update(byte_fallback=True), "does not work on bytes"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "splits text in a way"),
        (lambda t: t["model"].update(ignore_merges=True), "splits text in a way"),
    ],
)
def test_other_tokenizers_are_refused(
    with_words: Packer, tmp_path: Path, change: Any, message: str
) -> None:
    checkpoint = with_words("demo")
    described = json.loads((checkpoint / "tokenizer.json").read_text())
    change(described)
    (checkpoint / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(SourceError, match=message):
        zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")


def train_pieces(folder: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model, in the place of the tokenizer of a checkpoint."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(NOTES.read_text(encoding="utf-8").splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.json").unlink()
    described = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                 "unk_token": "<unk>", "add_bos_token": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_pieces_of_sentencepiece(with_words: Packer, tmp_path: Path) -> None:
    checkpoint = with_words("demo")
    pieces = train_pieces(checkpoint, "bpe")
    zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")
    reader = gguf.GGUFReader(tmp_path / "gg" / "gg-mxfp4.gguf")
    held = {name: field.contents() for name, field in reader.fields.items()}
    assert held["tokenizer.ggml.model"] == "llama"
    assert held["tokenizer.ggml.add_bos_token"] is True
    assert (held["tokenizer.ggml.bos_token_id"], held["tokenizer.ggml.eos_token_id"]) == (1, 2)
    count = pieces.vocab_size()
    texts, scores = held["tokenizer.ggml.tokens"], held["tokenizer.ggml.scores"]
    assert len(texts) == 1024 > count > 300
    assert texts[:count] == [pieces.id_to_piece(number) for number in range(count)]
    assert scores[:count] == [pieces.get_score(number) for number in range(count)]
    kinds = [gguf.TokenType(kind) for kind in held["tokenizer.ggml.token_type"]]
    assert kinds[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert kinds[3] is gguf.TokenType.BYTE
    assert kinds[count - 1 : count + 1] == [gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]


def test_pieces_that_are_not_merged_are_refused(with_words: Packer, tmp_path: Path) -> None:
    checkpoint = with_words("demo")
    train_pieces(checkpoint, "unigram")
    with pytest.raises(SourceError, match="does not merge pairs"):
        zqfp_convert.export(checkpoint, tmp_path / "gg", "gguf")


def test_without_the_package(
    packed: Packer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zqfp_convert.exporting.pipeline.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="gguf is not installed"):
        zqfp_convert.export(packed("demo"), tmp_path / "gg", "gguf")
