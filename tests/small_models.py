"""The smallest sensible model of every causal language model that transformers has.

A configuration is made of the default one by rules over the names of its fields, `EXTRA` has what
no rule can know. Of a model's blocks one of each kind stays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from architectures import VOCABULARY, write_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Config = hf.PretrainedConfig
MOST = 60_000_000  # parameters of a model that is small still
BLOCKS = 2, 6  # fewest and most
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks",
         "num_decoder_layers")  # fmt: skip
WIDTH, INNER, HEADS, GROUPS, HEAD, EXPERTS = 64, 96, 4, 2, 16, 4

# The first pattern that a field's whole name matches gives its value.
RULES: list[tuple[str, int]] = [
    (r"(mamba_|linear_)?(num_)?(n_)?groups|n_group|mamba_ngroups|mamba_n_groups", 1),
    (r"num_expert_group|topk_group|o_groups", 1),
    (r"type_vocab_size", 2),
    (r".*vocab_size.*|.*_group_vocab|decoder_vocab_size", VOCABULARY),
    (r"(num_|n_)(hidden_)?layers?|num_(encoder|decoder)_layers|(encoder|decoder)_layers", 2),
    (r"conf_num_hidden_layers|num_blocks|depth", 2),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts", EXPERTS),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"(moe_)?(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", -1),
    (r"num_nextn_predict_layers", 0),
    (r"linear_num_key_heads", 2),
    (r"(swa_)?(num_)?(key_value|kv)_(n_)?heads|num_query_groups|kv_n_heads", GROUPS),
    (r"swa_num_key_value_heads|linear_num_value_heads|linear_num_heads|swa_num_attention_heads",
     HEADS),
    (r"(.*_)?(num|n)_(attention_)?heads?|(encoder|decoder|num)?_?attention_heads", HEADS),
    (r"num_(encoder|decoder)_attention_heads|n_mamba_heads|heads_per_ngram", HEADS),
    (r"rotary_dim", 8),
    (r"qk_head_dim", 2 * HEAD),
    (r"(.*_)?head_dim|dim_head|kv_channels|d_kv|d_head|attention_head_size|.*_head_?dim", HEAD),
    (r"mamba_d_head|mamba_headdim", HEAD),
    (r".*lora_rank|adapter_rank|laurel_rank|hc_lowrank|mamba_dt_rank|time_step_rank|.*norm_rank|"
     r"d_rel", 16),
    (r"mamba_d_state|ssm_state_size|state_size", 16),
    (r"mamba_d_ssm|lru_width", WIDTH),
    (r"(moe_|.*expert.*)intermediate_size|shared_intermediate_size|expert_ffn_hidden_size|"
     r"hidden_size_per_layer_input", 32),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|d_ff|dim_ff|dff|n_inner|ffn_hidden_size|d_inner|"
     r"feed_forward_size|mlp_dim", INNER),
    (r"hidden_size(_global)?|d_model|n_embd|(out|router|.*backbone)_hidden_size|embedding_(dim|size)|"
     r"emb_dim|word_embed_proj_dim|(input|output)_embedding_size|ple_embed_dim|.*(p|s)e_embed_dim|"
     r".*_embed_dim|dim_model_base|projector_.*_dim|vision_output_dim|adapter_(in|out)_dim", WIDTH),
    (r"index_topk|keep_window_size", 8),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|"
     r"max_source_positions|model_max_length|original_max_position_embeddings)", 128),
    (r"(attention_)?(sliding_)?(window_size|window)|sliding_window_size|attention_chunk_size|"
     r"attention_window_size|local_attention", 16),
    (r"(mamba_)?chunk_size|index_block_size", 16),
    (r"block_multiple_of", 16),
    (r"ngram_vocab_size_base", 512),
    (r"rel_extent", 64),
    (r"num_layers_per_stack", 1),
]  # fmt: skip
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "decoder_start": 2, "mask": 3}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
           "indexer_budget": 16, "indexer_compress_ratio": 4}  # fmt: skip
DOTS3 = {
    "num_key_value_heads": HEADS,
    **{f"swa_{name}": HEADS for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")},
    "swa_v_head_dim": HEAD,
    "swa_head_dim": 2 * HEAD,
}
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "deepseek_v4": {"hc_mult": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "dots3_note": {
        "text_config": DOTS3,
        "audio_config": {"adapter_input_size": WIDTH},
    },
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 2}
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
        }
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": EXPERTS, "moe_topk": [2, 2]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": GROUPS},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": HYBRID,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,  # some versions do not go without them by themselves
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": HYBRID,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """All that the installed transformers maps to a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> Config:
    """The smallest sensible configuration of a type."""
    return _small(hf.CONFIG_MAPPING[model_type], EXTRA.get(model_type, {}))


def small_model(model_type: str, seed: int = 0) -> hf.PreTrainedModel:
    """A model with random weights, norms and biases, whose activations stay of one size.

    Raises:
        ValueError: too many parameters for a small one.
    """
    config = small_config(model_type)
    with torch.device("meta"):
        skeleton = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    if count > MOST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    own = {id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"}
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.ndim == 2 or (parameter.ndim == 3 and parameter.shape[0] == EXPERTS):
            inputs = parameter.shape[0 if id(parameter) in own else -1]
            parameter.data = torch.randn_like(parameter) * (2.0 / inputs) ** 0.5
    return model.eval()


def write_small(folder: Path, model_type: str) -> Path:
    """Save a small random model with a tokenizer; returns the folder."""
    small_model(model_type).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _small(kind: type[Config], extra: dict[str, Any]) -> Config:
    """A small configuration of a class, with these fields as given; inner ones by dicts."""
    try:
        default = kind()
    except Exception:  # some defaults do not go together
        default = kind(**extra)
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, Config):
            settings[name] = _small(type(value), extra.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            found = _rule(name, value)
            if found is not None:
                settings[name] = found
    if vars(default).get("is_decoder") is False:
        settings["is_decoder"] = True
    if "kv_lora_rank" in settings:  # latent attention has keys and values for every head
        settings["num_key_value_heads"] = HEADS
    settings |= _blocks(default)
    settings |= {name: value for name, value in extra.items() if name not in settings
                 or not isinstance(settings[name], Config)}  # fmt: skip
    return kind(**settings)


def _rule(name: str, value: int) -> int | None:
    token = re.fullmatch(r"(?:forced_)?(\w+)_token_(?:id|index)", name)
    if token is not None:
        return TOKENS.get(token.group(1), 3)
    if value <= 0:
        return None
    return next((to for pattern, to in RULES if re.fullmatch(pattern, name)), None)


def _blocks(default: Config) -> dict[str, Any]:
    """Settings with one entry for each block: one block of each kind stays."""
    name = next((name for name in DEPTH if isinstance(vars(default).get(name), int)), None)
    if name is None:
        return {}
    depth = vars(default)[name]
    lists = {
        field: list(value)
        for field, value in vars(default).items()
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > 1
    }
    kinds = list(zip(*lists.values(), strict=True))
    kept = [at for at, kind in enumerate(kinds) if kind not in kinds[:at]][: BLOCKS[1]]
    kept += [at for at in range(depth) if at not in kept][: max(0, BLOCKS[0] - len(kept))]
    kept.sort()
    result: dict[str, Any] = {name: min(len(kept), depth) if kinds else min(BLOCKS[0], depth)}
    for field, values in lists.items():
        small = [values[at] for at in kept]
        result[field] = [
            (_rule(field, one) or one) if type(one) is int else one for one in small
        ]  # fmt: skip
    return result
