"""Architectures: the parts of those that fit, and a sentence for each that does not."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from architectures import WINDOW, architecture_config
from fakes import CONTEXT, KINDS, tiny_config
from transformers import AutoConfig, PretrainedConfig

from distllm.model import attention, families
from distllm.model.cache import KVShape
from distllm.model.shard import check_passes_through

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    attention.register()


def refusal(config: PretrainedConfig) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the sentence
        check_passes_through(config, families.inspect(config))
    return str(error.value)


# Those that fit


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_found(kind: str) -> None:
    config = tiny_config(kind)
    before = copy.deepcopy(config.to_dict())
    anatomy = families.inspect(config)
    parts = ("wte", "h", ("ln_f",)) if kind == "gpt2" else ("embed_tokens", "layers", ("norm",))
    assert (anatomy.embed, anatomy.layers, anatomy.after) == parts
    assert (anatomy.before, anatomy.positions) == ((("drop",), ("wpe",)) if kind == "gpt2" else ((), ()))
    assert anatomy.context_length == (128 if kind == "phi3_longrope" else CONTEXT)
    groups = 4 if kind == "gpt2" else 2
    assert [layer.shape for layer in anatomy.attention] == [KVShape(groups, 16, 16)] * 5
    check_passes_through(config, anatomy)
    assert config.to_dict() == before, "the configuration was written to"


@pytest.mark.parametrize(
    ("kind", "windows"),
    [
        ("llama", [None] * 5),
        ("mistral", [24] * 5),
        ("gemma2", [20, None, 20, None, 20]),
        ("gemma3_text", [20, None, 20, 20, 20]),
        ("gpt2", [None] * 5),
    ],
)
def test_windows_of_the_layers(kind: str, windows: list[int | None]) -> None:
    assert [layer.window for layer in families.inspect(tiny_config(kind)).attention] == windows


def test_windows_and_chunks_that_are_only_in_the_mask() -> None:
    """Of these, transformers tells the attention function nothing."""
    config = architecture_config("qwen2_moe")
    wanted = [WINDOW if kind == "sliding_attention" else None for kind in config.layer_types]
    assert set(wanted) == {WINDOW, None}
    assert [layer.window for layer in families.inspect(config).attention] == wanted
    chunks = [layer.chunk for layer in families.inspect(architecture_config("llama4_text")).attention]
    assert chunks == [16, 16, 16, None]


def test_parts_inside_of_a_decoder() -> None:
    anatomy = families.inspect(architecture_config("opt"))
    assert (anatomy.embed, anatomy.layers) == ("decoder.embed_tokens", "decoder.layers")
    assert anatomy.positions == ("decoder.embed_positions",)
    assert anatomy.after == ("decoder.final_layer_norm",)
    narrow = architecture_config("opt")
    narrow.word_embed_proj_dim = 32
    anatomy = families.inspect(narrow)
    assert anatomy.before == ("decoder.project_in",)
    assert anatomy.after == ("decoder.final_layer_norm", "decoder.project_out")


def test_a_part_that_works_twice() -> None:
    anatomy = families.inspect(architecture_config("nanochat"))
    assert (anatomy.before, anatomy.after) == (("norm",), ("norm",))


def test_a_part_with_weights_that_works_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks would hold it; nothing says so yet."""
    from transformers.models.nanochat import modeling_nanochat

    class Weighted(modeling_nanochat.NanoChatRMSNorm):
        def __init__(self, eps: float = 1e-6) -> None:
            super().__init__(eps)
            self.weight = torch.nn.Parameter(torch.ones(64))

    monkeypatch.setattr(modeling_nanochat, "NanoChatRMSNorm", Weighted)
    assert refusal(architecture_config("nanochat")).startswith("nanochat uses its norm before and after its layers")


def test_attention_that_is_torchs_own_is_led_to_ours() -> None:
    anatomy = families.inspect(architecture_config("falcon"))
    assert {layer.shape for layer in anatomy.attention} == {KVShape(1, 16, 16)}
    assert anatomy.in_tuples
    config = architecture_config("falcon")
    config.alibi = True
    assert refusal(config).startswith("falcon has an attention of its own (ALiBi, for example)")


def test_a_model_that_does_not_name_its_base() -> None:
    with torch.device("meta"):
        model = families.build(architecture_config("llama4_text"), torch.bfloat16)
    assert model.base_model is model
    assert families.base_of(model) is model.model


def test_keys_and_values_of_different_sizes() -> None:
    config = transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )
    anatomy = families.inspect(config)
    assert {layer.shape for layer in anatomy.attention} == {KVShape(4, 24, 12)}


def test_nothing_is_allocated_for_the_weights() -> None:
    """A model of many gigabytes is looked at without them."""
    config = tiny_config("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=20)
    anatomy = families.inspect(config)
    assert len(anatomy.attention) == 20
    with torch.device("meta"):
        model = families.build(config, torch.bfloat16)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())


def test_buffers_are_real_where_only_parameters_are_on_meta() -> None:
    with families.parameters_on_meta():
        model = families.build(tiny_config("llama"), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = list(model.buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers)
    assert not torch.nn.Linear(2, 2).weight.is_meta, "models made afterwards are as usual"


# Those that do not


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}, "an encoder"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}, "state distllm cannot keep"),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "an attention of its own (ALiBi"),
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "rotary_dim": 8}, "attention of its own"),
        ("qwen3_next", SMALL | {"num_experts": 4}, "linear_attention"),
        ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "looks at later tokens"),
        ("bart", {"d_model": 32, "is_encoder_decoder": False, "vocab_size": 64}, "counts positions by itself"),
        ("vit", {"hidden_size": 32, "num_hidden_layers": 2}, "is not a causal language model"),
    ],
)
def test_architectures_that_do_not_fit(kind: str, values: dict[str, object], reason: str) -> None:
    sentence = refusal(AutoConfig.for_model(kind, **values))
    assert sentence.startswith(kind)
    assert reason in sentence


def test_a_configuration_that_contradicts_itself() -> None:
    """Whatever transformers stumbles over, the user gets a sentence."""
    assert "llama is not a causal language model that transformers can build" in refusal(
        tiny_config("llama", pad_token_id=5000)
    )


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mixtral", {"num_local_experts": -1}, "negative dimension -1"),
        ("gpt2", {"activation_function": "nonesuch"}, "'nonesuch' is unknown"),
        ("llama", {"hidden_size": 2**62}, "overflowed"),
        ("llama", {"num_key_value_heads": 0}, "by zero"),
        ("llama", {"vocab_size": 2**63, "pad_token_id": None}, "Overflow"),
    ],
)
def test_a_configuration_that_cannot_be_built(kind: str, change: dict[str, object], reason: str) -> None:
    sentence = refusal(tiny_config(kind, **change))
    assert sentence.startswith(f"{kind} is not a causal language model that transformers can build")
    assert reason in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_holds_nothing(window: int) -> None:
    sentence = refusal(tiny_config("gemma3_text", sliding_window=window))
    assert sentence == f"gemma3_text: layer 0 has a sliding window of {window}: it must be at least 1"


def test_attention_that_looks_both_ways() -> None:
    sentence = refusal(tiny_config("gemma3_text", use_bidirectional_attention=True))
    assert "gemma3_text" in sentence
    assert "masks of its own" in sentence


def test_masks_of_the_models_own() -> None:
    sentence = refusal(AutoConfig.for_model("doge", **SMALL))
    assert sentence == "doge has an attention of its own (ALiBi, for example), whose state distllm cannot keep"


def test_a_scaled_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite multiplies what it is given; if the table did not say so, a cut model would multiply twice."""
    config = tiny_config("granite", embedding_multiplier=12.0)
    check_passes_through(config, families.inspect(config))
    monkeypatch.setattr(families, "INPUT_SCALE", "nonesuch")
    sentence = refusal(config)
    assert "granite changes the hidden states before its first layer" in sentence


def test_weights_outside_of_the_known_parts_are_noticed() -> None:
    """Its head has a layer and a norm before it, which belong neither to the base model nor to the head."""
    sentence = refusal(architecture_config("modernbert-decoder"))
    assert "modernbert-decoder has lm_head.dense.weight outside of its embeddings, layers, norm and head" in sentence


def test_longrope_keeps_to_the_context_in_which_rows_do_not_see_each_other() -> None:
    config = tiny_config("phi3_longrope")
    assert (config.max_position_embeddings, families.inspect(config).context_length) == (512, 128)
