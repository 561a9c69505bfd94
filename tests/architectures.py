"""Tiny random models of every architecture that conversion is proved on, and a tokenizer.

Biases and norms are random too: a bias that gets lost shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

Maker = Callable[..., Path]

# Small groups and little calibration, yet more tokens than any layer has inputs; few rounds.
QUICK: dict[str, Any] = {
    "device": "cpu",
    "samples": 12,
    "seq_len": 32,
    "group_size": 32,
    "low_rank_rounds": 1,
    "tune_samples": 0,
    "rotation": "none",  # has tests of its own; on random models it is chosen at random
}
VOCABULARY = 384
LAYERS = 2
LIKE_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {key: LIKE_LLAMA[key] for key in LIKE_LLAMA if key != "num_key_value_heads"}
LIKE_GPT2 = {"vocab_size": VOCABULARY, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 1,
             "eos_token_id": 2}  # fmt: skip
SLIDING = {"sliding_window": 16}

ARCHITECTURES: dict[str, tuple[type[hf.PretrainedConfig], dict[str, Any]]] = {
    # 172 is no multiple of the group size: the last group of a row is shorter.
    "llama": (hf.LlamaConfig, {**LIKE_LLAMA, "intermediate_size": 172}),
    "mistral": (hf.MistralConfig, {**LIKE_LLAMA, **SLIDING}),
    "qwen2": (hf.Qwen2Config, LIKE_LLAMA),
    "qwen3": (hf.Qwen3Config, {**LIKE_LLAMA, "head_dim": 24}),
    "gemma3": (hf.Gemma3TextConfig, {**LIKE_LLAMA, **SLIDING, "head_dim": 16, "layer_types": [
        "sliding_attention", "full_attention"]}),
    "phi3": (hf.Phi3Config, LIKE_LLAMA),
    "opt": (hf.OPTConfig, {**SMALL, "ffn_dim": 160, "word_embed_proj_dim": 64}),
    "gpt2": (hf.GPT2Config, {**LIKE_GPT2, "n_embd": 64, "n_positions": 128}),
    "gpt_neox": (hf.GPTNeoXConfig, SMALL),
    "falcon": (hf.FalconConfig, {**SMALL, "num_kv_heads": 1}),
    "bloom": (hf.BloomConfig, {**LIKE_GPT2, "hidden_size": 64}),
    "stablelm": (hf.StableLmConfig, {**LIKE_LLAMA, "use_qkv_bias": True}),
    "granite": (hf.GraniteConfig, {**LIKE_LLAMA, "attention_bias": True}),
    "olmo2": (hf.Olmo2Config, LIKE_LLAMA),
    "cohere": (hf.CohereConfig, LIKE_LLAMA),
}  # fmt: skip
TIED = ("gemma3", "opt", "gpt2", "falcon", "bloom", "cohere")
WITH_LAYER_NORMS = ("opt", "gpt2", "gpt_neox", "falcon", "bloom", "stablelm")


def configuration(arch: str, **changes: Any) -> hf.PretrainedConfig:
    """The tiny configuration of an architecture."""
    kind, settings = ARCHITECTURES[arch]
    return kind(**{**settings, **changes})


def random_model(
    config: hf.PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> hf.PreTrainedModel:
    """A model with random weights, norms and biases; the same for the same seed."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.ndim == 2:
            parameter.data *= 2.0
    return model.to(dtype).eval()


def write_model(
    folder: Path,
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a tiny random model; returns the folder."""
    model = random_model(configuration(arch, **changes), dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one token for each ASCII character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {chr(code): code for code in range(4, 128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def token_ids(batch: int = 2, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 `[batch, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, tokens), generator=generator)
