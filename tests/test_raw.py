"""Files byte by byte: what is written here is what the safetensors library reads, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from distllm.model import raw
from distllm.model.files import ITEM_BYTES, TensorInfo, read_header

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
INFOS = st.builds(TensorInfo, st.just("any.safetensors"), SHAPES, st.sampled_from(sorted(ITEM_BYTES)))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != raw.METADATA
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(NAMES, INFOS, min_size=1, max_size=8))
def test_a_head_is_read_by_others(tensors: dict[str, TensorInfo], tmp_path: Path) -> None:
    head, starts = raw.layout(tensors)
    contents = {name: bytes(i % 251 for i in range(info.nbytes)) for name, info in tensors.items()}
    path = tmp_path / "any.safetensors"
    path.write_bytes(head + b"".join(contents[name] for name in starts))
    assert read_header(path) == tensors
    assert len(head) % 64 == 0
    assert raw.starts(path) == starts
    with path.open("rb") as file:
        assert {name: b"".join(raw.chunks(file, starts[name], tensors[name].nbytes)) for name in starts} == contents
    assert all(start % ITEM_BYTES[tensors[name].dtype] == 0 for name, start in starts.items()), "not aligned"
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, info in tensors.items():
            assert tuple(opened.get_tensor(name).shape) == info.shape


def test_a_name_that_is_no_tensors() -> None:
    with pytest.raises(ValueError, match="a tensor is called __metadata__"):
        raw.layout({raw.METADATA: TensorInfo("any.safetensors", (1,), "F32")})


def test_the_default_model_is_read_alike(smollm2: Path) -> None:
    path = smollm2 / "model.safetensors"
    norm = load_file(path)["model.norm.weight"]
    with path.open("rb") as file:
        found = b"".join(raw.chunks(file, raw.starts(path)["model.norm.weight"], norm.nbytes))
    assert found == norm.view(torch.uint8).numpy().tobytes()


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with path.open("rb") as file, pytest.raises(ValueError, match="short: ends too early"):
        list(raw.chunks(file, 1, 10))
