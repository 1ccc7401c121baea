"""Tiny random checkpoints of every architecture that transformers can run as a decoder, and the table in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fakes import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

LAYERS = 4
WINDOW = 24  # shorter than the prompts of the tests

# Every value that a configuration knows; with multipliers that are not 1, so that one applied twice is seen.
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "attention_chunk_size": 16,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

# Keys and values are made of a latent vector, for every head of the queries.
_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}

# What differs from the common values.
FITTING: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _LATENT,
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cwm": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {"n_shared_experts": 1, "sliding_window": None},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "llama": {},
    "llama4_text": {},
    "mimo_v2_flash": {},
    "minicpm3": _LATENT,
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "youtu": _LATENT | {"pad_token_id": None},
}

# Architectures that cannot be cut into stages, by the words that say why.
REFUSED: dict[str, str] = {
    "bart": "has an encoder",
    "bert": "looks at later tokens too",
    "bloom": "an attention of its own",
    "ctrl": "changes the hidden states before its first layer",
    "deepseek_v32": "layers of type indexed_attention",
    "diffllama": "asks for attention more than once",
    "doge": "an attention of its own",
    "falcon_h1": "layers of type hybrid",
    "falcon_mamba": "layers of type linear_attention",
    "gptj": "an attention of its own",
    "jamba": "layers of type linear_attention",
    "mamba": "layers of type linear_attention",
    "mpt": "an attention of its own",
    "nanochat": "uses its norm before and after its layers",
    "openai-gpt": "an attention of its own",
    "qwen3_next": "layers of type linear_attention",
    "recurrent_gemma": "layers of type linear_attention",
    "roberta": "looks at later tokens too",
    "rwkv": "recurrent or linear attention",
    "t5": "has an encoder",
    "xglm": "an attention of its own",
}


def architecture_config(kind: str) -> PretrainedConfig:
    """The configuration of a tiny model of an architecture."""
    usual = AutoConfig.for_model(kind)
    fixed = {name for name, member in vars(type(usual)).items() if isinstance(member, property)}
    values = {key: value for key, value in _COMMON.items() if hasattr(usual, key) and key not in fixed}
    if getattr(usual, "sliding_window", None):
        values["sliding_window"] = WINDOW
    return type(usual)(**values | FITTING.get(kind, {}))


def architecture_checkpoint(folder: Path, kind: str) -> Path:
    """Makes a tiny random checkpoint; all of its weights are large enough to be missed, the norms' too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture_config(kind), dtype=torch.float32).eval()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.04 if parameter is embeddings else 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
