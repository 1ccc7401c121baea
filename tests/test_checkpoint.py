"""Checkpoint folders: what a whole one tells, and one clear sentence for each way to be broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import tiny_checkpoint
from safetensors.torch import load_file, save_file

from distllm.model.checkpoint import INDEX, SINGLE, Checkpoint, read_json


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded"), shard_size="100KB")


@pytest.fixture
def folder(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "single"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def refusal(path: Path | str) -> str:
    """The one sentence that a broken checkpoint gives, headers and configuration."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the sentence
        _ = Checkpoint(path).config
    assert type(error.value) is ValueError
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# Whole ones


def test_headers_tell_shapes_types_and_files(single: Path) -> None:
    checkpoint = Checkpoint(single)
    weights = load_file(single / SINGLE)
    assert set(checkpoint.tensors) == set(weights)
    for name, info in checkpoint.tensors.items():
        assert (info.file, info.shape, info.dtype) == (SINGLE, tuple(weights[name].shape), "F32")
        assert info.nbytes == weights[name].nbytes


def test_an_index_tells_which_file_holds_a_tensor(single: Path, sharded: Path) -> None:
    assert not (sharded / SINGLE).exists()
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    checkpoint = Checkpoint(sharded)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == index
    assert len(set(index.values())) > 3
    whole = Checkpoint(single).tensors
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {n: t.shape for n, t in whole.items()}


def test_a_path_may_start_at_home(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    assert Checkpoint(f"~/{single.name}").path == single


def test_dtype_is_the_checkpoints_own_or_the_wish(single: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(single)
    assert checkpoint.dtype("auto") == torch.float32
    assert checkpoint.dtype("bfloat16") == torch.bfloat16
    half = Path(shutil.copytree(single, tmp_path / "half"))
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert Checkpoint(half).dtype("auto") == torch.float16
    assert Checkpoint(half).dtype("float32") == torch.float32


# Fingerprints


def test_a_copy_has_the_same_fingerprint(single: Path, folder: Path) -> None:
    fingerprint = Checkpoint(single).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert Checkpoint(folder).fingerprint == fingerprint
    weights = load_file(folder / SINGLE)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / SINGLE, {"format": "pt"})
    assert Checkpoint(folder).fingerprint == fingerprint, "weights are not read"


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 5e5}, {"num_hidden_layers": 4}])
def test_another_configuration_has_another_fingerprint(single: Path, folder: Path, change: dict[str, float]) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "rope_theta" in change:
        change = {"rope_parameters": config["rope_parameters"] | change}  # type: ignore[dict-item]
    assert config.keys() >= change.keys()
    (folder / "config.json").write_text(json.dumps(config | change))
    assert Checkpoint(folder).fingerprint != Checkpoint(single).fingerprint


def test_headers_of_another_copy_are_held_against_the_files(shards: Path) -> None:
    """What a rank is told of the master's files must be true of its own, and it looks into no others."""
    told = Checkpoint(shards).tensors
    first, *others = sorted({info.file for info in told.values()})
    for other in others:
        (shards / other).unlink()
    copy = Checkpoint(shards, told)
    assert copy.tensors == told
    copy.fetch([first])
    with pytest.raises(ValueError, match=f"{others[0]}: no such file, but weights that are wanted lie in it"):
        copy.fetch([first, others[0]])
    name = next(name for name, info in told.items() if info.file == first)
    changed = Checkpoint(shards, {**told, name: replace(told[name], shape=(3, 3))})
    with pytest.raises(ValueError, match=f"{first}: tensor {name} is not as rank 0 has found it; copy the file again"):
        changed.fetch([first])
    (shards / first).write_bytes((shards / first).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{first}: is not a whole safetensors file"):
        copy.fetch([first])


def test_other_shapes_types_or_files_have_another_fingerprint(single: Path, sharded: Path, folder: Path) -> None:
    original = Checkpoint(single).fingerprint
    assert Checkpoint(sharded).fingerprint != original
    weights = load_file(folder / SINGLE)
    save_file(weights | {"model.norm.weight": torch.ones(63)}, folder / SINGLE, {"format": "pt"})
    other_shape = Checkpoint(folder).fingerprint
    save_file(weights | {"model.norm.weight": torch.ones(64).half()}, folder / SINGLE, {"format": "pt"})
    other_type = Checkpoint(folder).fingerprint
    assert len({original, other_shape, other_type}) == 3


# Broken ones


def test_no_folder(tmp_path: Path) -> None:
    sentence = refusal(tmp_path / "nothing")
    assert f"model.path={tmp_path / 'nothing'}: no such folder" in sentence
    assert "the id of a model of the Hub" in sentence


def test_a_file_instead_of_the_folder(folder: Path) -> None:
    sentence = refusal(folder / SINGLE)
    assert f"{folder / SINGLE}: is not a folder" in sentence
    assert "config.json" in sentence


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    sentence = refusal(folder)
    assert f"{folder}: has neither {SINGLE} nor {INDEX}" in sentence
    assert "is this the folder of the model?" in sentence


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_only_pickles(folder: Path, name: str) -> None:
    (folder / SINGLE).rename(folder / name)
    assert f"it has {name}, a pickle, which can hide code: model.allow_pickle=true reads" in refusal(folder)


def test_a_gguf_file_in_the_folder(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-Q4.gguf")
    assert refusal(folder).endswith(f"; say model.path={folder / 'model-Q4.gguf'}")


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.001, 0.0])
def test_a_file_cut_short(folder: Path, keep: float) -> None:
    whole = (folder / SINGLE).read_bytes()
    size = int(len(whole) * keep)
    (folder / SINGLE).write_bytes(whole[:size])
    sentence = refusal(folder)
    assert f"{folder / SINGLE}: is not a whole safetensors file ({size:,} bytes" in sentence
    assert "fetch it again" in sentence


@pytest.mark.parametrize(
    "garbage",
    [b"<html>404</html>" * 100, b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json at all!!!}" + b"\0" * 64],
    ids=["web page", "ones", "header"],
)
def test_garbage_instead_of_a_header(folder: Path, garbage: bytes) -> None:
    (folder / SINGLE).write_bytes(garbage)
    assert f"{folder / SINGLE}: is not a whole safetensors file" in refusal(folder)


def test_a_folder_instead_of_a_file(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    assert f"{folder / SINGLE}: is not a whole safetensors file" in refusal(folder)


def test_types_that_nothing_can_hold(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4, dtype=torch.complex64)}, folder / SINGLE)
    sentence = refusal(folder)
    assert f"{folder / SINGLE}: holds tensors of type C64, which distllm cannot read" in sentence


def test_one_shard_cut_short(shards: Path) -> None:
    victim = sorted(shards.glob("model-*.safetensors"))[2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    assert f"{victim}: is not a whole safetensors file" in refusal(shards)


def test_an_index_that_names_a_missing_file(shards: Path) -> None:
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    sentence = refusal(shards)
    assert f"{victim}: no such file, but {INDEX} names it" in sentence
    assert "fetch it again" in sentence


def test_an_index_that_names_a_tensor_that_is_not_there(shards: Path) -> None:
    file = sorted(shards.glob("model-*.safetensors"))[0].name
    change_index(shards, lambda weight_map: weight_map.update({"model.layers.9.ghost": file}))
    sentence = refusal(shards)
    assert f"{shards / file}: has no tensor model.layers.9.ghost, but {INDEX} says so" in sentence


def test_an_index_that_looks_for_a_tensor_in_the_wrong_file(shards: Path) -> None:
    """The name is in another shard: a mix of two downloads."""
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    wrong = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    change_index(shards, lambda mapping: mapping.update({"model.norm.weight": wrong}))
    sentence = refusal(shards)
    assert f"{shards / wrong}: has no tensor model.norm.weight, but {INDEX} says so" in sentence


@pytest.mark.parametrize("outside", ["../single/model.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".."])
def test_an_index_that_leads_out_of_the_folder(shards: Path, single: Path, outside: str) -> None:
    shutil.copytree(single, shards.parent / "single")
    change_index(shards, lambda weight_map: weight_map.update({"model.norm.weight": outside}))
    sentence = refusal(shards)
    assert f"{shards / INDEX}: names the file {outside!r}, which is outside of the folder" in sentence


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_an_index_without_a_map(shards: Path, index: dict[str, object]) -> None:
    (shards / INDEX).write_text(json.dumps(index))
    assert f"{shards / INDEX}: has no weight_map" in refusal(shards)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1, 2]", "should hold a JSON object"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_files_that_should_be_json(folder: Path, name: str, content: bytes, complaint: str) -> None:
    (folder / name).write_bytes(content)
    assert f"{folder / name}: {complaint}" in refusal(folder)


def test_no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}: no such file; a checkpoint folder needs config.json" in refusal(folder)


@pytest.mark.parametrize("kind", [{"model_type": "nonesuch"}, {"model_type": None}, {}])
def test_a_model_that_transformers_does_not_know(folder: Path, kind: dict[str, str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | kind))
    assert f"{folder / 'config.json'}: transformers does not know this model" in refusal(folder)


def test_a_configuration_with_values_of_the_wrong_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "sixty-four"}))
    sentence = refusal(folder)
    assert str(folder / "config.json") in sentence
    assert "'hidden_size' expected int" in sentence


def change_config(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("num_attention_heads", 0, 1),
        ("num_key_value_heads", 0, 1),
        ("num_hidden_layers", 0, 1),
        ("hidden_size", -64, 1),
        ("vocab_size", 0, 1),
        ("head_dim", 0, 1),
        ("intermediate_size", -1, 0),
        ("max_position_embeddings", -1, 0),
    ],
)
def test_sizes_that_are_too_small(folder: Path, key: str, value: int, least: int) -> None:
    change_config(folder, {key: value})
    assert refusal(folder) == f"{folder / 'config.json'}: {key} is {value}: it must be at least {least}"


def test_a_size_within_a_text_config_that_is_too_small(folder: Path) -> None:
    change_config(folder, {"model_type": "llava", "text_config": {"model_type": "llama", "num_attention_heads": 0}})
    assert "num_attention_heads is 0: it must be at least 1" in refusal(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float31", "nn", "auto", 3, ["float32"]])
def test_a_dtype_that_is_none(folder: Path, key: str, value: object) -> None:
    change_config(folder, {"dtype": None, key: value})
    wanted = f"{folder / 'config.json'}: {key} is {value!r}: it must be bfloat16, float16 or float32"
    assert refusal(folder) == wanted


@pytest.mark.parametrize("name", ["int8", "complex64", "float8_e4m3fn"])
def test_a_dtype_that_no_model_runs_in(folder: Path, name: str) -> None:
    change_config(folder, {"dtype": name})
    checkpoint = Checkpoint(folder)
    with pytest.raises(ValueError, match=f"config.json: dtype is {name}, .* say model.dtype=bfloat16"):
        checkpoint.dtype("auto")
    assert checkpoint.dtype("bfloat16") == torch.bfloat16


@pytest.mark.parametrize("text", ["x", {"model_type": "llama"}])
def test_a_text_config_that_is_none(folder: Path, text: object) -> None:
    change_config(folder, {"text_config": text})
    assert f"{folder / 'config.json'}: text_config of a llama model cannot be read" in refusal(folder)


@pytest.mark.parametrize("method", ["fp8", ["fp8"]])
def test_values_that_transformers_stumbles_over(folder: Path, method: object) -> None:
    change_config(folder, {"quantization_config": method})
    assert f"{folder / 'config.json'}: transformers does not know this model: " in refusal(folder)


def test_more_layers_than_tensors_are_not_looked_through(folder: Path) -> None:
    change_config(folder, {"num_hidden_layers": 10**6})
    assert f"num_hidden_layers is 1000000, but the files hold {len(load_file(folder / SINGLE))} tensors" in refusal(
        folder
    )


def test_a_path_that_is_too_long() -> None:
    assert "model.path=aaa" in (sentence := refusal("a" * 5000))
    assert "File name too long" in sentence


def test_code_of_a_checkpoint_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    code = "mine is a model that transformers knows only by code of the checkpoint's own, which distllm never runs"
    assert refusal(folder) == f"{folder / 'config.json'}: {code}"
    assert not (folder / "ran").exists()


def test_read_json_gives_the_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1]}


def test_quantized_weights_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"config.json: the weights are quantized \(fp8\)"):
        _ = Checkpoint(folder).config
