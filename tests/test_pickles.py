"""Pickled checkpoints: read if the user says so, tensors and nothing else, and never run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import reference, tiny_checkpoint
from safetensors.torch import load_file

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, ModelConfig
from distllm.model import source
from distllm.model.checkpoint import INDEX, SINGLE
from distllm.model.pickles import PICKLE_INDEX, pickles_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pickled(folder: Path, files: int = 1) -> dict[str, torch.Tensor]:
    """A tiny checkpoint whose weights are in pickles; gives the weights."""
    tensors = stored(tiny_checkpoint(folder))
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    weight_map = {name: f"pytorch_model-{place % files}.bin" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def read(folder: Path) -> Path:
    return source.files(ModelConfig(path=str(folder), allow_pickle=True)).folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=str(folder)) as error:
        read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("files", [1, 3])
def test_the_model_is_that_of_its_pickles(files: int, tmp_path: Path) -> None:
    tensors = pickled(tmp_path / "model", files)
    folder = read(tmp_path / "model")
    assert (folder / INDEX).exists() == (files > 1)
    made = stored(folder)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())
    assert not list(folder.glob("*.bin*"))
    wanted = reference(folder, [5, 6, 7], 8)
    model = ModelConfig(path=str(tmp_path / "model"), allow_pickle=True)
    with LLM(model, cluster=ClusterConfig(threads=1), engine=EngineConfig(kv_tokens=64)) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert list(output.token_ids) == wanted


def test_it_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    first = read(tmp_path / "model")
    seen = (first / SINGLE).stat().st_mtime_ns
    assert read(tmp_path / "model") == first
    assert (first / SINGLE).stat().st_mtime_ns == seen
    os.utime(tmp_path / "model" / "pytorch_model.bin", ns=(1, 1))
    assert read(tmp_path / "model") != first


def test_a_tied_table_may_share_its_memory(tmp_path: Path) -> None:
    tensors = pickled(tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    made = stored(read(tmp_path / "model"))
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


class Harm:
    """Unpickled without care, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._mark),))


def test_nothing_is_run(tmp_path: Path, cache: Path) -> None:
    tensors: dict[str, Any] = dict(pickled(tmp_path / "model"))
    file, mark = tmp_path / "model" / "pytorch_model.bin", tmp_path / "harmed"
    torch.save(tensors | {"extra": Harm(mark)}, file)
    assert f"{file}: holds more than tensors, which is never run" in refusal(tmp_path / "model")
    assert not mark.exists()
    assert not list((cache / "pickles").glob("*part*"))
    torch.load(file, weights_only=False)
    assert mark.exists(), "the file was harmless"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_file_cut_short(keep: float, tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    assert f"{file}: cannot be read" in refusal(tmp_path / "model")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes(legacy: bool, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(8.0), "b": torch.ones(3)}
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    content, chance = file.read_bytes(), random.Random(0)
    refused = read_whole = 0  # a flipped bit of a number is no fault that can be seen
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 5)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            read(tmp_path / "model")
        except ValueError as error:
            refused += str(error).startswith(f"{file}: ")
        else:
            read_whole += 1
    assert refused + read_whole == 300
    assert refused > 10


def test_a_sparse_tensor(tmp_path: Path) -> None:
    tensors = pickled(tmp_path / "model")
    name = "model.embed_tokens.weight"
    torch.save(tensors | {name: tensors[name].to_sparse()}, tmp_path / "model" / "pytorch_model.bin")
    assert f"tensor {name} is sparse" in refusal(tmp_path / "model")


def test_several_pickles_without_an_index(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").rename(tmp_path / "model" / "consolidated.00.pth")
    shutil.copy(tmp_path / "model" / "consolidated.00.pth", tmp_path / "model" / "consolidated.01.pth")
    assert "has consolidated.00.pth, consolidated.01.pth and no index" in refusal(tmp_path / "model")


def test_only_small_files_go_along_and_their_changes_count(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    (tmp_path / "model" / "tf_model.h5").write_bytes(b"the same weights once more")
    first = read(tmp_path / "model")
    assert not (first / "tf_model.h5").exists()
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert '"rms_norm_eps": 1e-05' in (read(tmp_path / "model") / "config.json").read_text()


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model.bin"
    torch.save([torch.zeros(2)], file)
    assert f"{file}: holds no dictionary of tensors" in refusal(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model-9.bin", "../outside.bin"])
def test_an_index_that_names_another_file(name: str, tmp_path: Path) -> None:
    pickled(tmp_path / "model", 2)
    index = tmp_path / "model" / PICKLE_INDEX
    index.write_text(index.read_text().replace("pytorch_model-1.bin", name))
    shutil.copy(tmp_path / "model" / "pytorch_model-1.bin", tmp_path / "outside.bin")
    assert f"no such file, but {PICKLE_INDEX} names it" in refusal(tmp_path / "model")


def test_an_index_of_nothing(tmp_path: Path) -> None:
    pickled(tmp_path / "model", 2)
    (tmp_path / "model" / PICKLE_INDEX).write_text("{}")
    assert "has no weight_map" in refusal(tmp_path / "model")


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    assert pickles_of(folder) == []
    assert read(folder) == folder


def test_unless_the_user_says_so_they_are_refused(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    with pytest.raises(ValueError, match=r"a pickle, which can hide code: model\.allow_pickle=true"):
        LLM(tmp_path / "model")
