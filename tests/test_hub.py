"""Models of the Hub: what is looked at before weights come, and a sentence for each way in which they do not.

The Hub's client reads its settings once, so each case is a process of its own, which asks a stand-in over real HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import tiny_checkpoint
from hub import COMMIT, FakeHub, fake_hub

from distllm.model.checkpoint import Checkpoint
from distllm.shards import shard_model

# Prints what a checkpoint tells, then downloads the files named on the command line.
SCRIPT = """
import json, sys
from distllm.config import ModelConfig
from distllm.model import source
from distllm.model.checkpoint import Checkpoint
try:
    checkpoint = Checkpoint(source.files(ModelConfig(path=sys.argv[1], revision=sys.argv[2] or None)))
    alive = []
    checkpoint.fetch(sys.argv[3:], alive=lambda: alive.append(1))
    tensors = {name: [info.file, info.shape, info.dtype] for name, info in checkpoint.tensors.items()}
    print(json.dumps({"tensors": tensors, "commit": checkpoint.files.commit, "alive": len(alive)}))
except ValueError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "repository", shard_size="200KB")


@pytest.fixture
def hub(folder: Path) -> Iterator[FakeHub]:
    with fake_hub(folder) as served:
        yield served


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def look(
    hub: FakeHub, home: Path, *words: str, repository: str = FakeHub.repository, **environ: str
) -> dict[str, object]:
    """What a process says of a repository; words are a revision and files to download."""
    usual = {"HF_ENDPOINT": hub.endpoint("someone"), "HF_HOME": str(home), "DISTLLM_CACHE": str(home)}
    environ = usual | {"HF_HUB_OFFLINE": "0"} | environ
    command = [sys.executable, "-c", SCRIPT, repository, *(words or ("",))]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, object] = json.loads(done.stdout)
    return said


def cached(home: Path) -> list[str]:
    return sorted(file.name for file in home.glob("hub/*/snapshots/*/*.safetensors"))


def test_headers_come_without_the_weights(hub: FakeHub, home: Path, folder: Path) -> None:
    said = look(hub, home)
    expected = Checkpoint(folder).tensors
    assert said["tensors"] == {name: [t.file, list(t.shape), t.dtype] for name, t in expected.items()}
    assert said["commit"] == COMMIT
    assert cached(home) == []


def test_only_what_is_wanted_is_downloaded(hub: FakeHub, home: Path, folder: Path) -> None:
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) > 2
    said = look(hub, home, "main", names[1])
    assert said["alive"]
    assert cached(home) == [names[1]]
    assert {file for (_, file), count in hub.bytes_of.items() if count > 110_000} == {names[1]}


def test_offline_what_is_in_the_cache_is_enough(hub: FakeHub, home: Path, folder: Path) -> None:
    name = min(file.name for file in folder.glob("*.safetensors"))
    before = look(hub, home, "", name)
    served = sum(hub.bytes_of.values())
    assert look(hub, home, "", name, HF_HUB_OFFLINE="1")["tensors"] == before["tensors"]
    hub.server.shutdown()
    hub.server.server_close()
    assert look(hub, home, "", name)["tensors"] == before["tensors"], "a Hub that is down is as good as offline"
    assert sum(hub.bytes_of.values()) == served


def test_offline_what_is_not_in_the_cache_is_missed(hub: FakeHub, home: Path, folder: Path) -> None:
    sentence = f"{FakeHub.repository}: no such folder here, not whole in the Hub's cache, and the Hub cannot be reached"
    assert str(look(hub, home, HF_HUB_OFFLINE="1")["error"]).startswith(sentence)
    look(hub, home)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert "not whole in the Hub's cache" in str(look(hub, home, "", names[0], HF_HUB_OFFLINE="1")["error"])


def test_a_single_file(hub: FakeHub, home: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_checkpoint(folder)
    said = look(hub, home)
    assert set(said["tensors"]) == set(Checkpoint(folder).tensors)  # type: ignore[call-overload]
    assert cached(home) == []


def test_of_shards_the_manifest_tells_all(hub: FakeHub, home: Path, folder: Path) -> None:
    shard_model(folder, folder.parent / "shards", stages=3)
    shutil.rmtree(folder)
    (folder.parent / "shards").rename(folder)
    said = look(hub, home)
    assert said["tensors"].keys() == Checkpoint(folder).tensors.keys()  # type: ignore[attr-defined]
    assert not hub.bytes_of, "no header is asked for"
    look(hub, home, "main", "stage-1.safetensors")
    assert cached(home) == ["stage-1.safetensors"]


def test_no_such_repository(hub: FakeHub, home: Path) -> None:
    error = look(hub, home, repository="someone/else")["error"]
    assert str(error).startswith("someone/else: is neither a folder here nor a model of the Hub that you may see")


def test_no_such_revision(hub: FakeHub, home: Path) -> None:
    assert look(hub, home, "nonesuch")["error"] == f"{FakeHub.repository}: has no revision nonesuch"


def test_a_model_for_which_one_must_ask(hub: FakeHub, home: Path) -> None:
    hub.gated = True
    error = str(look(hub, home)["error"])
    assert error.startswith(f"{FakeHub.repository}: its owner lets in only those who asked")
    assert "hf auth login" in error


def test_weights_of_another_kind(hub: FakeHub, home: Path, folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "has neither model.safetensors nor model.safetensors.index.json" in str(look(hub, home)["error"])


def test_an_index_that_names_a_missing_file(hub: FakeHub, home: Path, folder: Path) -> None:
    gone = max(file for file in folder.glob("*.safetensors"))
    gone.unlink()
    assert f"{gone.name}: no such file, but model.safetensors.index.json names it" in str(look(hub, home)["error"])


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00not json, is it"])
def test_a_file_that_is_not_safetensors(garbage: bytes, hub: FakeHub, home: Path, folder: Path) -> None:
    broken = min(file for file in folder.glob("*.safetensors"))
    broken.write_bytes(garbage)
    error = str(look(hub, home)["error"])
    assert error.startswith(FakeHub.repository)
    assert broken.name in error
    assert "\n" not in error


def test_a_shape_that_is_none(hub: FakeHub, home: Path, folder: Path) -> None:
    """The header of a file that was not downloaded has nobody to check it but us."""
    broken = min(file for file in folder.glob("*.safetensors"))
    tensors = {
        name: {"dtype": t.dtype, "shape": [-1, 4], "data_offsets": [0, 16]}
        for name, t in Checkpoint(folder).tensors.items()
        if t.file == broken.name
    }
    header = json.dumps(tensors).encode()
    broken.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    error = str(look(hub, home)["error"])
    assert f"{broken.name}: tensor {next(iter(tensors))} has the shape [-1, 4], which is none" in error
