"""Tiny random checkpoints of every architecture that transformers can run as a decoder, and the table in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fakes import byte_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

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
    "falcon": {"alibi": False},
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
    "nanochat": {},
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

# Models of texts and images, of which the text part is run; by what it is when it is alone.
TEXT_PARTS: dict[str, str] = {
    "aya_vision": "cohere2",
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "lighton_ocr": "qwen3",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "smolvlm": "llama",
}

_SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
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
    "openai-gpt": "an attention of its own",
    "qwen3_vl_moe": "is not a causal language model",  # its experts are stored turned round
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
    if kind in TEXT_PARTS:
        return _with_images(usual)
    return type(usual)(**_tiny_values(usual) | FITTING.get(kind, {}))


def _tiny_values(usual: PretrainedConfig) -> dict[str, Any]:
    fixed = {name for name, member in vars(type(usual)).items() if isinstance(member, property)}
    values = {key: value for key, value in _COMMON.items() if hasattr(usual, key) and key not in fixed}
    if getattr(usual, "sliding_window", None):
        values["sliding_window"] = WINDOW
    return values


def _with_images(usual: PretrainedConfig) -> PretrainedConfig:
    """A tiny model of texts and images; its head is tied if that is usual for it."""
    text = usual.get_text_config(decoder=True)
    values = _tiny_values(text)
    if "qwen" in text.model_type and "vl" in text.model_type:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    parts = {key: value for key, value in usual.to_dict().items() if key != "model_type"}
    for name, part in parts.items():
        if isinstance(part, dict) and "vision" in name:
            part.update({key: value for key, value in _SMALL_VISION.items() if key in part})
        elif name.endswith(("_token_id", "_token_index")) and isinstance(part, int):
            parts[name] = 300
    return type(usual)(**parts | {"text_config": type(text)(**values).to_dict()})


def architecture_model(kind: str) -> type[AutoModelForCausalLM]:
    """The class that makes and loads models of an architecture."""
    return AutoModelForImageTextToText if kind in TEXT_PARTS else AutoModelForCausalLM


def architecture_checkpoint(folder: Path, kind: str) -> Path:
    """Makes a tiny random checkpoint; all of its weights are large enough to be missed, the norms' too."""
    torch.manual_seed(0)
    config = architecture_config(kind)
    model: PreTrainedModel = architecture_model(kind).from_config(config, dtype=torch.float32).eval()
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


def architecture_answer(folder: Path, kind: str, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own generate() answers greedily."""
    model = architecture_model(kind).from_pretrained(folder, dtype=torch.float32)
    # Without a cache: a configuration that has a sliding window gets a sliding cache even where the model ignores it.
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, use_cache=False)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer
