"""GGUF files tensor by tensor: what transformers makes of the whole at once, in the memory of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from distllm.model import gguf_file
from distllm.model.checkpoint import SINGLE
from distllm.model.files import TensorInfo
from distllm.model.gguf_file import Written, convert

VOCABULARY = 257


def fields_of(writer: GGUFWriter) -> None:
    """A tiny model of one layer, with a tokenizer of bytes."""
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCABULARY)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(32)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*alphabet, "".join(alphabet[:2])])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges([" ".join(alphabet[:2])])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def written(path: Path, architecture: str, tensors: dict[str, np.ndarray], kind: GGMLQuantizationType) -> Path:
    """A GGUF file; matrices are quantized as `kind` says."""
    writer = GGUFWriter(str(path), architecture)
    fields_of(writer)
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(folder: Path, architecture: str) -> dict[str, np.ndarray]:
    """By their names in GGUF, those of the model that a file with these fields describes."""
    one = {"output.weight": np.zeros((VOCABULARY, 64), np.float32)}  # or the head would be tied
    empty = written(folder / "empty.gguf", architecture, one, GGMLQuantizationType.F32)
    parsed = load_gguf_checkpoint(str(empty), return_tensors=False)
    config = CONFIG_MAPPING[parsed["config"]["model_type"]].from_dict(parsed["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(model, processor)
    shapes = {name: list(each.shape) for name, each in model.state_dict().items()}
    noise = np.random.default_rng(0)
    found = {}
    for name, hf_name in names.items():
        if hf_name not in shapes:
            continue
        shape = list(shapes[hf_name])
        if "ffn_gate_exps" in name or "ffn_up_exps" in name:
            shape[1] //= 2
        found[name if name.endswith((".weight", ".bias")) else f"{name}.weight"] = noise.standard_normal(
            shape, dtype=np.float32
        )
    return found


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3moe"])
def test_the_same_as_by_transformers(
    architecture: str, kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "SLAB_BYTES", 1000)
    path = written(tmp_path / "model.gguf", architecture, random_tensors(tmp_path, architecture), kind)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16).state_dict()
    target = tmp_path / "target"
    target.mkdir()
    convert(path, target)
    found = load_file(target / SINGLE)
    assert len(found) > 8
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    config = AutoConfig.from_pretrained(target)
    assert (config.dtype, config.architectures) == (torch.bfloat16, [type_of(architecture)])
    assert AutoTokenizer.from_pretrained(target).decode([5]) == AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=path.name
    ).decode([5])


def type_of(architecture: str) -> str:
    return {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}[architecture]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("blk.0.ffn_down.weight"), r"^has no tensor for model\.layers\.0\.mlp\.down_proj"),
        (
            lambda tensors: tensors.update({"blk.0.ffn_norm.weight": np.zeros(32, np.float32)}),
            r"^tensor model\.layers\.0\.post_attention_layernorm\.weight has shape \(32,\), not \(64,\)$",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, np.ndarray]], object], sentence: str, tmp_path: Path
) -> None:
    tensors = random_tensors(tmp_path, "llama")
    change(tensors)
    path = written(tmp_path / "model.gguf", "llama", tensors, GGMLQuantizationType.F32)
    with pytest.raises(ValueError, match=sentence):
        convert(path, tmp_path)


def test_what_is_put_in_is_in_the_file(tmp_path: Path) -> None:
    infos = {"a": TensorInfo("f", (2, 3), "BF16"), "b": TensorInfo("f", (5,), "F32")}
    file = Written(tmp_path / "f", infos)
    file["b"] = torch.arange(5.0)
    file["b"].narrow(0, 1, 2).fill_(7)
    assert ("a" in file, "b" in file, list(file), len(file)) == (False, True, ["b"], 1)
    file["a"] = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"^a is in the file for good$"):
        del file["a"]
    file.keep()
    found = load_file(tmp_path / "f")
    assert found["b"].tolist() == [0, 7, 7, 3, 4]
    assert torch.equal(found["a"], torch.ones(2, 3, dtype=torch.bfloat16))
