"""Weights: exactly the tensors of a span, bit for bit, out of exactly the files that hold them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from fakes import KINDS, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig

from distllm.core import Span
from distllm.model import conversion, families, weights
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import INDEX, SINGLE, Checkpoint
from distllm.model.shard import Shard

CPU = torch.device("cpu")
WHOLE = Span(0, 5, embed=True, head=True)
SPLITS = {
    "whole": (WHOLE,),
    "2+2+1": (Span(0, 2, embed=True), Span(2, 4), Span(4, 5, head=True)),
    "ends apart": (Span(0, 0, embed=True), Span(0, 5), Span(5, 5, head=True)),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of many files of 100 KB."""

    @cache
    def make(kind: str) -> Path:
        return tiny_checkpoint(tmp_path_factory.mktemp(kind), kind, shard_size="100KB")

    return make


@pytest.fixture(scope="module")
def blueprint_of(folder_of: Callable[[str], Path]) -> Callable[[str], Blueprint]:
    return cache(lambda kind: blueprint(folder_of(kind)))


def blueprint(folder: Path, dtype: str = "auto") -> Blueprint:
    return Blueprint(folder, dtype=dtype, context_length=None)


def loaded(plan: Blueprint, span: Span, progress: Callable[[int], None] = lambda _: None) -> Shard:
    shard = Shard(plan.config, plan.anatomy, span, plan.dtype)
    weights.load(shard, plan.tensors, CPU, progress)
    return shard


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_one_file(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy with all weights in one file, some changed, added or taken away."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors = {name: tensor for name, tensor in (stored(folder) | changes).items() if tensor is not None}
    save_file(tensors, target / SINGLE, {"format": "pt"})
    return target


def is_of(name: str, span: Span, *, tied: bool) -> bool:
    """Whether a tensor of a Llama checkpoint belongs to a span."""
    if name.startswith("model.layers."):
        return span.start <= int(name.split(".")[2]) < span.stop
    if name == "model.embed_tokens.weight":
        return span.embed or (span.head and tied)
    return span.head


# What is read


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_only_the_tensors_of_the_span_are_read(kind: str, split: str, folder_of: Callable[[str], Path]) -> None:
    plan, tensors = blueprint(folder_of(kind)), stored(folder_of(kind))
    for span in SPLITS[split]:
        reads: list[int] = []
        shard = loaded(plan, span, reads.append)
        mine = {name: tensor for name, tensor in tensors.items() if is_of(name, span, tied=kind == "llama_tied")}
        assert set(plan.tensors.owned(shard)) == set(mine)
        assert sorted(reads) == sorted(tensor.nbytes for tensor in mine.values())


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_files_of_other_spans_are_not_opened(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of(kind), tmp_path / kind))
    plan = blueprint(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    span = Span(2, 4)
    shard = Shard(plan.config, plan.anatomy, span, plan.dtype)
    mine = {file for name, file in index.items() if {".2.", ".3."} & {f".{part}." for part in name.split(".")[:3]}}
    assert plan.tensors.files(shard) == mine
    assert mine < set(index.values())
    for file in set(index.values()) - mine:
        (folder / file).unlink()
    weights.load(shard, plan.tensors, CPU)
    assert not any(parameter.is_meta for parameter in shard.model.parameters())


# What is held


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_plan(kind: str, split: str, blueprint_of: Callable[[str], Blueprint]) -> None:
    plan = blueprint_of(kind)
    total, owned = 0, set()
    for span in SPLITS[split]:
        shard = loaded(plan, span)
        assert shard.nbytes == plan.sizes.weight_bytes(span)
        total += shard.nbytes
        owned |= set(plan.tensors.owned(shard))
    assert owned == set(plan.checkpoint.tensors), "a tensor that no stage reads"
    whole = sum(tensor.nbytes for tensor in plan.checkpoint.tensors.values())
    assert total == whole + (plan.sizes.tied_bytes if split != "whole" else 0)


def test_tied_tables_are_counted_where_they_are_copied(blueprint_of: Callable[[str], Blueprint]) -> None:
    table = 320 * 64 * 4
    assert blueprint_of("llama").sizes.tied_bytes == 0
    for kind in ("llama_tied", "gemma2", "gemma3_text", "gpt2"):
        assert blueprint_of(kind).sizes.tied_bytes == table
    whole = loaded(blueprint_of("llama_tied"), WHOLE).model
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    last = loaded(blueprint_of("llama_tied"), Span(4, 5, head=True)).model
    assert torch.equal(last.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_bytes_in_another_dtype(kind: str, folder_of: Callable[[str], Path]) -> None:
    plan, full = blueprint(folder_of(kind), "bfloat16"), blueprint(folder_of(kind))
    for span in SPLITS["2+2+1"]:
        assert loaded(plan, span).nbytes == plan.sizes.weight_bytes(span) == full.sizes.weight_bytes(span) // 2
    assert plan.sizes.kv_bytes == tuple(size // 2 for size in full.sizes.kv_bytes) == (2 * 2 * 16 * 2,) * 5


@pytest.mark.parametrize("span", SPLITS["2+2+1"], ids=str)
def test_tensors_are_those_of_the_checkpoint(
    span: Span, folder_of: Callable[[str], Path], blueprint_of: Callable[[str], Blueprint]
) -> None:
    tensors = stored(folder_of("llama"))
    parameters = dict(loaded(blueprint_of("llama"), span).model.named_parameters())
    assert set(parameters) == {name for name in tensors if is_of(name, span, tied=False)}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, tensors[name])
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_that_of_transformers(
    kind: str, folder_of: Callable[[str], Path], blueprint_of: Callable[[str], Blueprint]
) -> None:
    ours = loaded(blueprint_of(kind), WHOLE).model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder_of(kind)).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_experts_are_fused(folder_of: Callable[[str], Path], blueprint_of: Callable[[str], Blueprint]) -> None:
    """Mixtral's checkpoint has a tensor an expert, the model one for all of a layer."""
    tensors = stored(folder_of("mixtral"))
    parameters = dict(loaded(blueprint_of("mixtral"), Span(3, 4)).model.named_parameters())
    experts = "model.layers.3.block_sparse_moe.experts"
    for number in range(4):
        w1, w2, w3 = (tensors[f"{experts}.{number}.w{which}.weight"] for which in (1, 2, 3))
        assert torch.equal(parameters["model.layers.3.mlp.experts.gate_up_proj"][number], torch.cat([w1, w3]))
        assert torch.equal(parameters["model.layers.3.mlp.experts.down_proj"][number], w2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_converted(dtype: str, folder_of: Callable[[str], Path]) -> None:
    wanted = getattr(torch, dtype)
    tensors = stored(folder_of("llama"))
    for name, parameter in loaded(blueprint(folder_of("llama"), dtype), Span(1, 3)).model.named_parameters():
        assert parameter.dtype == wanted
        assert torch.equal(parameter, tensors[name].to(wanted))


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that the kernel says is mapped at a tensor's place; empty if none."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        borders, *_, path = line.split(maxsplit=5) + [""] * (6 - len(line.split(maxsplit=5)))
        begin, end = (int(border, 16) for border in borders.split("-"))
        if begin <= address < end:
            return path
    raise AssertionError("not in memory at all")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux what is mapped")
def test_tensors_of_the_same_dtype_stay_in_the_mapped_files(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    shard = loaded(blueprint(folder), WHOLE)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, parameter in shard.model.named_parameters():
        assert mapped_from(parameter) == str(folder / index[name]), name
    converted = loaded(blueprint(folder, "bfloat16"), Span(0, 2))
    assert not any(str(folder) in mapped_from(parameter) for parameter in converted.model.parameters())


def test_buffers_that_a_checkpoint_stores_count_too(tmp_path: Path) -> None:
    """GLM 4's experts have a correction that is not a parameter."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    config = Glm4MoeConfig(**sizes, **heads, **experts, num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    plan = blueprint(tmp_path)
    assert any(name.endswith("e_score_correction_bias") for name in plan.checkpoint.tensors)
    for span in (Span(0, 2, embed=True), Span(2, 3, head=True)):
        assert loaded(plan, span).nbytes == plan.sizes.weight_bytes(span)


# Checkpoints that are unlike what transformers writes today


def test_a_tied_head_that_is_stored_all_the_same(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    table = stored(folder_of("llama_tied"))["model.embed_tokens.weight"]
    folder = as_one_file(folder_of("llama_tied"), tmp_path / "twice", **{"lm_head.weight": table.clone()})
    plan = blueprint(folder)
    for span in (WHOLE, *SPLITS["2+2+1"]):
        shard = loaded(plan, span)
        assert shard.nbytes == plan.sizes.weight_bytes(span)
        assert "lm_head.weight" not in plan.tensors.owned(shard)
    last = loaded(plan, Span(5, 5, head=True)).model
    assert torch.equal(last.lm_head.weight, table)


def test_a_tied_head_that_is_stored_alone(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    table = stored(folder_of("llama_tied"))["model.embed_tokens.weight"]
    changes = {"lm_head.weight": table.clone(), "model.embed_tokens.weight": None}
    plan = blueprint(as_one_file(folder_of("llama_tied"), tmp_path / "head", **changes))
    for spans in SPLITS.values():
        for span in spans:
            shard = loaded(plan, span)
            assert shard.nbytes == plan.sizes.weight_bytes(span), span
            if span.embed:
                assert torch.equal(shard.model.model.embed_tokens.weight, table)
            if span.head:
                assert torch.equal(shard.model.lm_head.weight, table)


@pytest.mark.parametrize(
    ("kind", "table"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.0.attn.bias")],
)
def test_tables_that_were_stored_once_are_left_alone(
    kind: str, table: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = blueprint(as_one_file(folder_of(kind), tmp_path / "extra", **{table: torch.ones(8)}))
    assert table not in plan.tensors.owned(loaded(plan, WHOLE))
    assert plan.sizes.weight_bytes(WHOLE) == blueprint(folder_of(kind)).sizes.weight_bytes(WHOLE)


def test_tensors_that_transformers_leaves_out_knowingly(folder_of: Callable[[str], Path]) -> None:
    model = families.build(Checkpoint(folder_of("llama")).config, torch.float32)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.61.*"]
    names = ["model.layers.61.mlp.up_proj.weight", "model.layers.60.mlp.up_proj.weight", "vision_tower.a"]
    assert list(conversion.surplus(model, names, is_part=False)) == names[1:]
    assert list(conversion.surplus(model, [*names, "language_model.b"], is_part=True)) == ["language_model.b"]


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "model.layers.0.mlp.ghost", "ghost"])
def test_a_tensor_without_a_place(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = as_one_file(folder_of("llama"), tmp_path / "extra", **{name: torch.ones(3)})
    sentence = f"{folder / SINGLE}: tensor {name} has no place in this llama model; is config.json another's?"
    assert refusal(folder) == sentence


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_without_the_base_models_prefix(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Older checkpoints were saved from the base model."""
    tensors = stored(folder_of(kind))
    prefix = "model." if kind == "llama" else "transformer."
    bare: dict[str, torch.Tensor | None] = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    gone: dict[str, torch.Tensor | None] = {name: None for name in tensors if name.startswith(prefix)}
    plan = blueprint(as_one_file(folder_of(kind), tmp_path / "bare", **(gone | bare)))
    original = blueprint(folder_of(kind))
    for span in SPLITS["2+2+1"]:
        ours, theirs = loaded(plan, span), loaded(original, span)
        assert ours.nbytes == plan.sizes.weight_bytes(span)
        for name, tensor in theirs.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], tensor)


# Broken ones


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.3.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("llama_tied", "model.embed_tokens.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias"),
    ],
)
def test_a_missing_tensor_is_named(kind: str, name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = as_one_file(folder_of(kind), tmp_path / "less", **{name: None})
    with pytest.raises(ValueError, match="is the checkpoint whole") as error:
        blueprint(folder)
    assert f"{folder}: no tensor for {name}" in str(error.value)


def test_many_missing_tensors_are_counted(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    gone = {name: None for name in stored(folder_of("llama")) if name.startswith("model.layers.4.")}
    folder = as_one_file(folder_of("llama"), tmp_path / "less", **gone)
    with pytest.raises(ValueError, match=rf"no tensor for model.layers.4.\S+ and {len(gone) - 1} more"):
        blueprint(folder)


def expert(layer: int, number: int, which: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{which}.weight"


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the sentence
        blueprint(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("which", "complaint"),
    [
        ("w1", f"no tensor {expert(1, 0, 'w1')} and 3 more; is the checkpoint whole?"),
        ("w2", "no tensor for model.layers.1.mlp.experts.down_proj; is the checkpoint whole?"),
    ],
)
def test_a_missing_kind_of_expert_is_named(
    which: str, complaint: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    gone = {expert(1, number, which): None for number in range(4)}
    folder = as_one_file(folder_of("mixtral"), tmp_path / "less", **gone)
    assert refusal(folder) == f"{folder}: {complaint}"


@pytest.mark.parametrize("which", ["w1", "w2", "w3"])
@pytest.mark.parametrize(("layer", "number"), [(0, 0), (1, 2), (4, 3)])
def test_a_missing_expert_is_named(
    layer: int, number: int, which: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name = expert(layer, number, which)
    folder = as_one_file(folder_of("mixtral"), tmp_path / "less", **{name: None})
    assert refusal(folder) == f"{folder}: no tensor {name}; is the checkpoint whole?"


def test_an_expert_that_all_layers_lack(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    gone = {expert(layer, 3, which): None for layer in range(5) for which in ("w1", "w3")}
    folder = as_one_file(folder_of("mixtral"), tmp_path / "less", **gone)
    sentence = refusal(folder)
    assert sentence.startswith(f"{folder / SINGLE}: model.layers.0.block_sparse_moe.experts.0.w")
    assert "make model.layers.0.mlp.experts.gate_up_proj of shape (3, 256, 64)" in sentence
    assert sentence.endswith("but config.json asks for (4, 256, 64)")


def test_experts_that_do_not_go_together(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    changes = {expert(layer, 0, "w1"): torch.zeros(128, 60) for layer in range(5)}
    changes |= {expert(layer, 1, "w1"): torch.zeros(128, 60) for layer in range(5)}
    folder = as_one_file(folder_of("mixtral"), tmp_path / "odd", **changes)
    sentence = refusal(folder)
    assert sentence.startswith(f"{folder / SINGLE}: ")
    assert "experts." in sentence
    assert "\n" not in sentence


def test_a_wrong_shape_is_named_with_its_file(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    folder = as_one_file(folder_of("llama"), tmp_path / "odd", **{name: torch.zeros(128, 63)})
    with pytest.raises(ValueError, match="asks for") as error:
        blueprint(folder)
    wanted = f"{folder / SINGLE}: tensor {name} has shape (128, 63), but config.json asks for (128, 64)"
    assert str(error.value) == wanted


@pytest.mark.parametrize("numbers", [(2,), (0, 1, 2, 3)], ids=["one", "all of a layer"])
def test_a_wrong_shape_of_an_expert_is_named(
    numbers: tuple[int, ...], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    changes = {expert(1, number, "w2"): torch.zeros(64, 100) for number in numbers}
    folder = as_one_file(folder_of("mixtral"), tmp_path / "odd", **changes)
    where = f"{folder / SINGLE}: tensor {expert(1, numbers[0], 'w2')}"
    assert refusal(folder) == f"{where} has shape (64, 100), but most of its kind have (64, 128)"


def test_experts_of_another_size_than_the_configuration_says(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("mixtral"), tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    name = expert(0, 0, "w2")
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    made = "model.layers.0.mlp.experts.down_proj of shape (4, 64, 128), but config.json asks for (4, 64, 96)"
    assert refusal(folder) == f"{folder / file}: {name} and 3 more tensors make {made}"


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.3.mlp.up_proj.weight"), ("mixtral", expert(1, 2, "w2"))]
)
def test_whole_numbers_are_no_weights(kind: str, name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    whole = stored(folder_of(kind))[name].to(torch.int8)
    folder = as_one_file(folder_of(kind), tmp_path / "int8", **{name: whole})
    assert f"{folder / SINGLE}: tensor {name} holds numbers of type I8: quantized weights" in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("gone", "no such file, but weights that are wanted lie in it"),
        ("cut", "is not a whole safetensors file"),
        ("replaced", "tensor lm_head.weight is not as rank 0 has found it"),
    ],
)
def test_files_that_change_after_they_were_looked_through(
    damage: str, complaint: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = as_one_file(folder_of("llama"), tmp_path / "changing")
    plan = blueprint(folder)
    file = folder / SINGLE
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        save_file({"something": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=complaint) as error:
        loaded(plan, WHOLE)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(1,), (1, 3)])
def test_numbers_that_are_none_are_told_of(
    layers: tuple[int, ...],
    dtype: torch.dtype,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in layers]
    weights = {name: stored(folder_of("llama"))[name].to(dtype) for name in names}
    for weight in weights.values():
        weight[3, 5] = torch.nan
    folder = as_one_file(folder_of("llama"), tmp_path / "copy", **weights)
    plan = blueprint(folder)
    for span, told in ((Span(0, 4, embed=True), layers), (Span(4, 5, head=True), ())):
        caplog.clear()
        loaded(plan, span)
        more = f" and {len(told) - 1} more" if len(told) > 1 else ""
        sentence = f"{folder / SINGLE}: tensor {names[0]}{more}: holds NaN, so the answers will make no sense"
        assert caplog.messages == [f"{sentence}; fetch the checkpoint again"] * bool(told)


def test_progress_adds_up_to_the_weights(blueprint_of: Callable[[str], Blueprint]) -> None:
    plan = blueprint_of("mixtral")
    read: list[int] = []
    shard = loaded(plan, Span(1, 3), read.append)
    assert sum(read) == shard.nbytes
    assert len(read) == 2 * (4 * 3 + 7), "experts, attention, router and norms of two layers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("numbers", "broken"),
    [
        ([1.0, -2.0], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
        ([60_000.0] * 100, False),
        ([1.0, float("nan")], True),
        ([float("inf"), float("nan"), float("-inf")], True),
        ([], False),
    ],
)
def test_what_is_no_number_is_told_from_what_is_too_large(
    numbers: list[float], broken: bool, dtype: torch.dtype
) -> None:
    assert weights.has_nan(torch.tensor(numbers, dtype=dtype)) == broken
