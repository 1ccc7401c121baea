"""Manifests: what is written is what is read, and what does not hold together is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny_checkpoint

from distllm.model.checkpoint import Checkpoint, read_manifest
from distllm.model.manifest import MANIFEST, parse
from distllm.shards import shard_model

Change = Callable[[dict[str, Any]], object]
PATH = Path("folder") / MANIFEST


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    shard_model(tiny_checkpoint(folder / "model", "llama_tied"), folder / "shards", stages=3)
    return folder / "shards"


@pytest.fixture(scope="module")
def values(shards: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((shards / MANIFEST).read_text())
    return found


def test_it_tells_what_the_headers_tell(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert manifest is not None
    for file in manifest.files:
        assert file.infos == Checkpoint(shards).files.header(file.name)
    table = manifest.tensors["model.embed_tokens.weight"]
    assert table.files == ("stage-0.safetensors", "stage-2.safetensors")
    assert all(not info.copies for name, info in manifest.tensors.items() if name != "model.embed_tokens.weight")


def test_of_another_program(values: dict[str, Any]) -> None:
    assert parse(PATH, {}) is None
    assert parse(PATH, values | {"format": "another"}) is None
    assert parse(PATH, values) is not None


def test_of_a_newer_version(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json: is of version 4, but .* reads 2 to 3; update distllm"):
        parse(PATH, values | {"version": 4})


def test_cut_short(shards: Path, tmp_path: Path) -> None:
    content = (shards / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be read as JSON"):
        read_manifest(tmp_path)


def _tensor(found: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = found["files"][0]["tensors"]["model.embed_tokens.weight"]
    return tensor


def _span(found: dict[str, Any], stage: int, **changes: object) -> None:
    found["files"][stage]["span"] |= changes


BROKEN: dict[str, tuple[Change, str]] = {
    "no files": (lambda found: found.pop("files"), "is no whole manifest"),
    "no list": (lambda found: found.update(files=3), "is no whole manifest"),
    "no tensors": (lambda found: found["files"][1].pop("tensors"), "is no whole manifest"),
    "no stages": (lambda found: found.update(files=[]), "stages do not follow"),
    "unknown key": (lambda found: _tensor(found).update(more=1), "is no whole manifest"),
    "odd shape": (
        lambda found: _tensor(found).update(shape=[-1, 64]),
        "tensor model.embed_tokens.weight has the shape",
    ),
    "odd type": (lambda found: _tensor(found).update(dtype="X9"), "holds tensors of type X9"),
    "listed type": (lambda found: _tensor(found).update(dtype=[]), "is no whole manifest"),
    "other bytes": (lambda found: _tensor(found).update(bytes=3), "tensors of stage-0.safetensors do not add up"),
    "other size": (lambda found: found["files"][1].update(bytes=3), "tensors of stage-1.safetensors do not add up"),
    "elsewhere": (lambda found: found["files"][0].update(name="../x"), "names the file '../x', which is outside"),
    "nowhere": (lambda found: found["files"][0].update(name=""), "names the file '', which is outside"),
    "small one": (
        lambda found: found["small_files"].update({"a/b": {"bytes": 1, "sha256": ""}}),
        "names the file 'a/b'",
    ),
    "twice": (lambda found: found["files"].append(found["files"][2] | {"span": None}), "stages do not follow"),
    "gap": (lambda found: _span(found, 1, start=3), "stages do not follow"),
    "backwards": (lambda found: found["files"].reverse(), "stages do not follow"),
    "late": (lambda found: _span(found, 0, start=1), "stages do not follow"),
    "no head": (lambda found: _span(found, 2, head=False), "stages do not follow"),
    "two heads": (lambda found: _span(found, 1, head=True), "stages do not follow"),
    "copies": (
        lambda found: found["files"][2]["tensors"]["model.embed_tokens.weight"].update(dtype="I32"),
        "the copies of model.embed_tokens.weight differ from file to file",
    ),
    "text": (lambda found: _span(found, 2, stop="5"), "stages do not follow"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_hold_together(case: str, values: dict[str, Any]) -> None:
    change, complaint = BROKEN[case]
    found = copy.deepcopy(values)
    change(found)
    with pytest.raises(ValueError, match=r"copy it again$|fetch it again$|cannot read$") as error:
        parse(PATH, found)
    assert str(error.value).startswith(f"{PATH}: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
