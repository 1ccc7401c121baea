"""Shards whose weights are quantized on the disk: what is loaded of them is what quantizing while loading gives."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer, tiny_checkpoint

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig, QuantizationConfig
from distllm.core import Plan, Span, Stage
from distllm.engine.stored import check_stored, stored_quantization
from distllm.model import manifest as manifests
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint, read_manifest
from distllm.model.manifest import MANIFEST
from distllm.model.quantize import Recipe
from distllm.shards import get_shard_paths, reconstruct_model, shard_model

HEAD = "lm_head.weight"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of sizes that 4 bits take, but for keys and values, which fall back to 8."""
    return cache(lambda kind: tiny_checkpoint(tmp_path_factory.mktemp(kind), kind, vocab_size=384))


def cut(model: Path, folder: Path, quantization: QuantizationConfig, layers: tuple[int, ...] = (2, 2, 1)) -> Path:
    shard_model(ModelConfig(path=str(model), dtype="bfloat16"), folder, layers=layers, quantization=quantization)
    return folder


def state(folder: Path, plan: Plan, rank: int, quantization: QuantizationConfig) -> tuple[dict[str, torch.Tensor], int]:
    """What a rank holds, and the bytes that it read for it."""
    blueprint = Blueprint(folder, dtype="bfloat16", context_length=None)
    runner = blueprint.load(
        plan,
        rank,
        block_tokens=4,
        max_requests=1,
        device=torch.device("cpu"),
        recipe=Recipe.of(quantization) if quantization.on(rank) else None,
        pack_weights=False,
    )
    assert runner is not None
    return runner.shard.model.state_dict(), runner.shard.read_bytes


def plan_of(spans: tuple[Span, ...]) -> Plan:
    stages = (Stage(rank=n, span=span, weight_bytes=0, kv_bytes=0, work_share=0.0) for n, span in enumerate(spans))
    return Plan(stages=tuple(stages), idle=(), kv_tokens=64)


@pytest.mark.parametrize("head", ["none", "int8", "int4"])
@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mixtral", "gpt2", "gpt_oss"])
def test_each_stage_is_as_if_quantized_while_loading(
    kind: str, method: str, head: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantization = QuantizationConfig(method=method, head=head)
    shards = cut(model_of(kind), tmp_path / "shards", quantization)
    spans = Checkpoint(shards).manifest.spans  # type: ignore[union-attr]
    for rank, path in enumerate(get_shard_paths(shards)):
        own = Path(shutil.copytree(shards, tmp_path / f"rank{rank}", ignore=shutil.ignore_patterns("*.safetensors")))
        shutil.copy(path, own)
        wanted, _ = state(model_of(kind), plan_of(spans), rank, quantization)
        found, read = state(own, plan_of(spans), rank, quantization)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert found[next(iter(found))].dtype == wanted[next(iter(wanted))].dtype
        assert read < path.stat().st_size < read + 20_000, "it reads all of its file, and nothing else"


def test_stored_weights_are_quantized(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The tied table is in the first file as it was, and in the last as a head of its own."""
    shards = cut(model_of("llama_tied"), tmp_path / "shards", QuantizationConfig(method="int4", head="int8"))
    manifest = read_manifest(shards)
    assert manifest is not None
    first, _, last = manifest.stages
    up = "model.layers.0.mlp.up_proj.weight"
    assert first.tensors[f"{up}.integers"].shape == (128, 32)
    assert first.tensors[f"{up}.scale_zero"].shape == (2, 128, 2)
    assert first.tensors["model.layers.0.self_attn.k_proj.weight.integers"].shape == (32, 64), "not held in 8 bits"
    assert first.quantized[up].parts == ("integers", "scale_zero")
    assert {up, HEAD, "model.embed_tokens.weight"} <= manifest.weights.keys()
    assert "model.embed_tokens.weight" in first.tensors
    assert "model.embed_tokens.weight" not in last.tensors
    assert last.tensors[f"{HEAD}.integers"].dtype == "I8"
    assert not list(shards.glob("*.index.json")), "other tools cannot read it"


def test_experts_are_stored_together(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Also those that lay in a tensor each, or turned round; what chooses them stays as it was."""
    for kind, before in (("mixtral", (4, 256, 64)), ("gpt_oss", (4, 64, 256))):
        manifest = read_manifest(cut(model_of(kind), tmp_path / kind, QuantizationConfig(method="int8")))
        assert manifest is not None
        first = manifest.stages[0]
        experts = "model.layers.0.mlp.experts.gate_up_proj"
        assert first.quantized[experts].shape == before
        assert first.tensors[f"{experts}.integers"].shape == (4, 256, 64)
        assert first.tensors[f"{experts}.scale"].shape == (4, 256)
        plain = {name for name, tensor in first.tensors.items() if len(tensor.shape) > 1 and tensor.dtype != "I8"}
        chooses = {name for name in plain if re.search(r"\.(gate|router)\.weight", name)}
        assert len(chooses) == 2
        assert all(name.endswith(("embed_tokens.weight", ".scale", "_bias")) for name in plain - chooses)


@pytest.mark.parametrize("weights", ["own", "push"])
def test_tokens_are_those_of_quantizing_while_loading(
    weights: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantization = QuantizationConfig(method="int4", head="int4")
    shards = cut(model_of("llama_tied"), tmp_path / "shards", quantization, layers=(2, 3))
    prompts = [byte_tokenizer().encode(text) for text in ("abc", "a longer prompt", "z")]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(model_of("llama_tied"), dtype="bfloat16", quantization=quantization) as llm:
        wanted = [each.token_ids for each in llm.generate(prompts, params)]
    with LLM(shards, dtype="bfloat16", workers=2, weights=weights) as llm:
        assert [stage.span.layers for stage in llm.plan.stages] == [2, 3]
        assert [each.token_ids for each in llm.generate(prompts, params)] == wanted
        ranks: Any = llm.stats()["ranks"]
        assert [rank["held_bytes"] for rank in ranks] == [stage.weight_bytes for stage in llm.plan.stages]


def test_with_all_files_another_split_works(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantization = QuantizationConfig(method="int8")
    shards = cut(model_of("llama_tied"), tmp_path / "shards", quantization)
    spans = (Span(0, 5, embed=True, head=True),)
    wanted, _ = state(model_of("llama_tied"), plan_of(spans), 0, quantization)
    found, _ = state(shards, plan_of(spans), 0, quantization)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_some_stages_only(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantization = QuantizationConfig(method="int8", stages=[1])
    shards = cut(model_of("llama"), tmp_path / "shards", quantization)
    checkpoint = Checkpoint(shards)
    assert checkpoint.manifest is not None
    assert [bool(file.quantized) for file in checkpoint.manifest.stages] == [False, True, False]
    spans = checkpoint.manifest.spans
    for rank in range(3):
        wanted, _ = state(model_of("llama"), plan_of(spans), rank, quantization)
        found, _ = state(shards, plan_of(spans), rank, quantization)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert stored_quantization(QuantizationConfig(), checkpoint) == replace(quantization, head="int8")
    with pytest.raises(ValueError, match=r"only some of its stages are quantized, so start 3 ranks without plan"):
        check_stored(plan_of((Span(0, 5, embed=True, head=True),)), checkpoint)


def test_what_cannot_be(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"^quantization=bnb_nf4: bitsandbytes' weights are made while loading"):
        shard_model(model, tmp_path / "none", stages=2, quantization="bnb_nf4")
    with pytest.raises(ValueError, match=r"^quantization\.method=int5: it must be one of none, int8, int4,"):
        shard_model(model, tmp_path / "none", stages=2, quantization="int5")
    with pytest.raises(ValueError, match=r"^quantization\.group=7: it must be 32, 64, 128 or 256"):
        shard_model(model, tmp_path / "none", stages=2, quantization=QuantizationConfig(method="int4", group=7))
    with pytest.raises(ValueError, match=r"^quantization\.stages names stage 2: there are stages 0 to 1$"):
        shard_model(model, tmp_path / "none", stages=2, quantization=QuantizationConfig(method="int8", stages=[1, 2]))
    shards = cut(model, tmp_path / "shards", QuantizationConfig(method="int8"))
    with pytest.raises(ValueError, match=f"^{shards}: its weights were quantized .int8., so the model cannot"):
        reconstruct_model(shards, tmp_path / "none")
    with pytest.raises(ValueError, match=f"^{shards}: its weights are quantized already; cut the checkpoint"):
        shard_model(shards, tmp_path / "none", stages=2)
    with pytest.raises(ValueError, match=r"quantized already, with quantization=int8 .*head=int8 .*group=32;"):
        LLM(shards, quantization="int4")
    assert not (tmp_path / "none").exists()


def _file(found: dict[str, Any]) -> dict[str, Any]:
    file: dict[str, Any] = found["files"][0]
    return file


def _weight(found: dict[str, Any]) -> dict[str, Any]:
    weight: dict[str, Any] = _file(found)["quantized"]["model.layers.0.mlp.up_proj.weight"]
    return weight


def _integers(found: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = _file(found)["tensors"]["model.layers.0.mlp.up_proj.weight.integers"]
    return tensor


BROKEN: dict[str, tuple[Change, str]] = {
    "no such method": (lambda found: found["quantization"].update(method="int5"), "no such quantization"),
    "no such head": (lambda found: found["quantization"].update(head="bnb_nf4"), "no such quantization"),
    "no such group": (lambda found: found["quantization"].update(group=7), "no such quantization"),
    "no stages": (lambda found: found["quantization"].pop("stages"), "is no whole manifest"),
    "no quantization": (
        lambda found: found.pop("quantization"),
        "does not say how the weights of",
    ),
    "no such part": (
        lambda found: _weight(found).update(parts=["integers", "x"]),
        "lacks a part of model.layers.0",
    ),
    "no part": (lambda found: _weight(found).update(parts=[]), "lacks a part of model.layers.0"),
    "one part": (lambda found: _weight(found).update(parts=["scale"]), "model.layers.0.mlp.up_proj.weight"),
    "odd shape": (lambda found: _weight(found).update(shape=[-1]), "has the shape [-1]"),
    "other shape": (lambda found: _weight(found).update(shape=[64, 128]), "has shape (64, 128)"),
    "other method": (lambda found: found["quantization"].update(method="int4"), "lies there as"),
    "odd type": (lambda found: _weight(found).update(dtype="X"), "holds tensors of type X"),
    "other stages": (lambda found: found["quantization"].update(stages=[1]), "does not say how the weights of stage-0"),
    "odd stages": (lambda found: found["quantization"].update(stages=["a"]), "no such quantization"),
    "odd sum": (lambda found: _file(found).update(sha256=None), "sha256 is None"),
    "odd bytes": (lambda found: found["small_files"]["config.json"].update(bytes="x"), "bytes is 'x'"),
    "integers of floats": (lambda found: _integers(found).update(dtype="F8_E4M3"), "lies there as"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_that_does_not_hold_together(case: str, tmp_path: Path, shards8: Path) -> None:
    change, complaint = BROKEN[case]
    found = copy.deepcopy(json.loads((shards8 / MANIFEST).read_text()))
    change(found)
    folder = Path(shutil.copytree(shards8, tmp_path / "shards"))
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        Blueprint(folder, dtype="auto", context_length=None)
    assert str(error.value).startswith(f"{folder}")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def shards8(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(model_of("llama"), tmp_path_factory.mktemp("shards8") / "shards", QuantizationConfig(method="int8"))


def test_the_version_tells_older_ones_to_keep_off(
    shards8: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert json.loads((shards8 / MANIFEST).read_text())["version"] == 3
    plain = cut(model_of("llama"), tmp_path / "plain", QuantizationConfig())
    assert json.loads((plain / MANIFEST).read_text())["version"] == 2
    values = json.loads((plain / MANIFEST).read_text())
    for each in (values, *values["files"]):  # as one that knows nothing of quantization would write it
        each.pop("quantization", None)
        each.pop("quantized", None)
    assert manifests.parse(plain / MANIFEST, values) == read_manifest(plain)
