"""A checkpoint of which only bytes by name can be had: the same weights, from no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import tiny_checkpoint
from safetensors.torch import load_file, save_file

from distllm.core import Span
from distllm.model import weights
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import Checkpoint
from distllm.model.files import ITEM_BYTES, TensorInfo
from distllm.model.pushed import PushedCheckpoint, PushedTensor, Told, extents
from distllm.model.shard import Shard
from distllm.model.tensors import DTYPES
from distllm.shards import shard_model

CPU = torch.device("cpu")
SPANS = (Span(0, 2, embed=True), Span(2, 4), Span(4, 5, head=True))


def reader(checkpoint: Checkpoint, fetched: list[str]) -> Callable[[str, memoryview], None]:
    """What stands for the network: bytes of rank 0's files, by their extents."""
    places = extents(checkpoint, {file for info in checkpoint.tensors.values() for file in info.files})

    def fetch(name: str, into: memoryview) -> None:
        path, start, nbytes, _ = places[name]
        fetched.append(name)
        assert len(into) == nbytes
        into[:] = path.read_bytes()[start : start + nbytes]

    return fetch


def pushed(checkpoint: Checkpoint, fetched: list[str]) -> PushedCheckpoint:
    told = Told(Path("/nowhere/here"), checkpoint.whole_config)
    return PushedCheckpoint(told, checkpoint.tensors, checkpoint.manifest, reader(checkpoint, fetched))


def state(checkpoint: Checkpoint, span: Span, dtype: str) -> dict[str, torch.Tensor]:
    blueprint = Blueprint(checkpoint, dtype=dtype, context_length=None)
    shard = Shard(blueprint.config, blueprint.anatomy, span, blueprint.dtype)
    weights.load(shard, blueprint.tensors, CPU)
    return {name: each for name, each in shard.model.state_dict().items() if not each.is_meta}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama_tied", "mixtral", "gpt2"])
def test_the_same_weights_as_from_files(tmp_path: Path, kind: str, dtype: str) -> None:
    here = Checkpoint(tiny_checkpoint(tmp_path, kind, shard_size="100KB"))
    assert pushed(here, []).fingerprint == here.fingerprint
    every = []
    for span in SPANS:
        fetched: list[str] = []
        there, own = state(pushed(here, fetched), span, dtype), state(here, span, dtype)
        assert there.keys() == own.keys()
        assert all(torch.equal(there[name], own[name]) for name in own)
        assert len(set(fetched)) == len(fetched), "a tensor came twice"
        assert len(fetched) < 0.7 * len(here.tensors)
        every += fetched
    assert set(every) >= {name for name in here.tensors if not name.endswith("lm_head.weight")}


def test_of_shards_on_disk(tmp_path: Path) -> None:
    """A tied table lies in two files; either is good for it."""
    whole = tiny_checkpoint(tmp_path / "model", "llama_tied")
    shard_model(whole, tmp_path / "shards", stages=2)
    here = Checkpoint(tmp_path / "shards")
    assert pushed(here, []).fingerprint == here.fingerprint
    last = Span(3, 5, head=True)
    there, own = state(pushed(here, []), last, "auto"), state(here, last, "auto")
    assert "model.embed_tokens.weight" in own
    assert all(torch.equal(there[name], own[name]) for name in own)


def test_every_type_of_number(tmp_path: Path) -> None:
    assert DTYPES.keys() == ITEM_BYTES.keys()
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "all.safetensors")
    content = {
        name: each.contiguous().view(-1).view(torch.uint8)
        for name, each in load_file(tmp_path / "all.safetensors").items()
    }

    def fetch(name: str, into: memoryview) -> None:
        into[:] = content[name].numpy().data

    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        came = PushedTensor(name, TensorInfo("f", tuple(tensor.shape), names[tensor.dtype]), fetch)[...]
        assert came.dtype == tensor.dtype
        assert came.shape == tensor.shape
        assert torch.equal(
            came.view(torch.uint8) if came.dtype.itemsize == 1 else came,
            tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor,
        )


def test_a_part_of_a_tensor() -> None:
    content = torch.arange(12, dtype=torch.float32)

    def fetch(_: str, into: memoryview) -> None:
        into[:] = content.view(torch.uint8).numpy().data

    tensor = PushedTensor("t", TensorInfo("f", (3, 4), "F32"), fetch)
    assert torch.equal(tensor[1:3, :2], content.reshape(3, 4)[1:3, :2])
