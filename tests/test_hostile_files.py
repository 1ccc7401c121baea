"""Checkpoint files that somebody made to do harm, or that were damaged: a sentence each, and nothing else."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distllm.model.checkpoint import SINGLE, Checkpoint

CASES = 10_000
DATA = bytes(range(64))
SOUND: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}

Header = dict[str, Any]
Chance = random.Random


def written(folder: Path, header: bytes, *, length: int | None = None, data: bytes = DATA) -> Path:
    size = len(header) if length is None else length
    (folder / SINGLE).write_bytes(struct.pack("<Q", size) + header + data)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=SINGLE) as error:
        Checkpoint(folder)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(**changes: dict[str, Any]) -> bytes:
    return json.dumps({name: info | changes.get(name, {}) for name, info in SOUND.items()}).encode()


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    tensors = Checkpoint(written(tmp_path, changed())).tensors
    assert {name: (info.shape, info.dtype) for name, info in tensors.items()} == {
        "a": ((2, 4), "F32"),
        "b": ((16,), "BF16"),
    }


@pytest.mark.parametrize(
    "header",
    [
        changed(b={"data_offsets": [16, 48]}),
        changed(b={"data_offsets": [32, 96]}),
        changed(b={"data_offsets": [64, 32]}),
        changed(b={"data_offsets": [-32, 0]}),
        changed(a={"shape": [2, 5]}),
        changed(a={"shape": [-2, -4]}),
        changed(a={"shape": [2**40, 2**40]}),
        changed(a={"dtype": "F31"}),
        changed(a={"dtype": "F8_E8M0", "shape": [32]}),
    ],
    ids=["overlap", "beyond", "reversed", "negative", "large", "minus", "overflow", "nonesuch", "unreadable"],
)
def test_headers_that_lie(header: bytes, tmp_path: Path) -> None:
    refusal(written(tmp_path, header))


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    refusal(written(tmp_path, changed(), length=length))


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 50_000, b'{"a": {"shape": [' + b"1," * 100_000])
def test_headers_that_go_deep(header: bytes, tmp_path: Path) -> None:
    refusal(written(tmp_path, header))


def flip(chance: Chance, content: bytes) -> bytes:
    """A few bytes changed anywhere, the length of the header too."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def cut(chance: Chance, content: bytes) -> bytes:
    start, stop = sorted(chance.sample(range(len(content)), 2))
    return content[:start] + content[stop:]


def swell(chance: Chance, content: bytes) -> bytes:
    start, stop = sorted(chance.sample(range(len(content)), 2))
    return content[:stop] + content[start:stop] * chance.randint(1, 50) + content[stop:]


def lie(chance: Chance, content: bytes) -> bytes:
    """A well-formed header that says something else."""
    del content
    strange = [0, 1, -1, 64, 2**31, 2**63, 2**64, 1.5, 1e308, None, True, "x", [], {}, [2**62] * 9, "\ud800", "F32"]
    header = json.loads(json.dumps(SOUND))
    for _ in range(chance.randint(1, 3)):
        info = header[chance.choice(("a", "b"))]
        key = chance.choice(("dtype", "shape", "data_offsets", "more"))
        value = info.get(key)
        if isinstance(value, list) and value and chance.random() < 0.7:
            value[chance.randrange(len(value))] = chance.choice(strange)
        else:
            info[key] = chance.choice(strange)
        if chance.random() < 0.1:
            header[chance.choice(("__metadata__", "", "a/../../b", "c"))] = chance.choice(strange)
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + DATA


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("damage", [flip, cut, swell, lie])
def test_ten_thousand_headers(damage: Callable[[Chance, bytes], bytes], tmp_path: Path) -> None:
    """Each is read or refused; none crashes, hangs or takes memory."""
    chance = random.Random(damage.__name__)
    content = written(tmp_path, changed()).joinpath(SINGLE).read_bytes()
    before, read, refused = peak_bytes(), 0, 0
    for _ in range(CASES // 4):
        (tmp_path / SINGLE).write_bytes(damage(chance, content))
        try:
            tensors = Checkpoint(tmp_path).tensors
        except ValueError as error:
            assert str(error).startswith(str(tmp_path))  # noqa: PT017 - most are refused, some may be sound
            refused += 1
        else:
            assert sum(info.nbytes for info in tensors.values()) <= (tmp_path / SINGLE).stat().st_size
            read += 1
    assert read + refused == CASES // 4
    assert refused > CASES // 20
    assert peak_bytes() - before < 50 * 10**6
