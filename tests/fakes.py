"""Tiny random checkpoints with a tokenizer of bytes: real files of real architectures, quickly made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
CONTEXT = 512

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}

# Class of the configuration, and what differs from the common one.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": ("Gemma2Config", {"sliding_window": 20}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3]},
    ),
    "qwen3": ("Qwen3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": 20}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 12.0, "head_dim": None}),
    "gpt2": ("GPT2Config", {}),
    # Turned by other factors beyond its first 128 positions.
    "phi3_longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


def tiny_config(kind: str, **changes: Any) -> transformers.PretrainedConfig:
    """The configuration of a tiny model."""
    name, special = KINDS[kind]
    values = _COMMON | special | changes
    if kind == "gpt2":
        renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        renamed |= {"max_position_embeddings": "n_positions"}
        dropped = {"intermediate_size", "num_key_value_heads", "head_dim"}
        values = {renamed.get(key, key): value for key, value in values.items() if key not in dropped}
    return getattr(transformers, name)(**{key: value for key, value in values.items() if value is not None})


def tiny_checkpoint(
    folder: Path, kind: str = "llama", *, seed: int = 0, shard_size: str = "1GB", **changes: Any
) -> Path:
    """Makes a tiny random checkpoint in a folder; weights are large enough that greedy tokens vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=torch.float32).eval()
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02 if parameter is embeddings else 0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template; ids 256 and up are special or unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def reference(folder: Path, prompt: list[int], tokens: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """What transformers' own generate() answers greedily, the end of text included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Without a cache: a configuration that has a sliding window gets a sliding cache even where the model ignores it.
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, use_cache=False)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer
