"""Where shards and models are written: whole or not at all, and only where there is room."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import tiny_checkpoint

from distllm.model import raw
from distllm.model.checkpoint import SINGLE, Checkpoint
from distllm.shards import get_shard_paths, reconstruct_model, shard_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def sentence(action: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_not_empty(model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    for make in (
        lambda: shard_model(model, tmp_path / "full", stages=2),
        lambda: reconstruct_model(model, tmp_path / "full"),
    ):
        wanted = f"shard.output={tmp_path / 'full'}: is not empty; give a folder that is not there yet"
        assert sentence(make) == wanted
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]
    assert "is a file" in sentence(lambda: shard_model(model, tmp_path / "full" / "kept", stages=2))
    assert "there is no folder" in sentence(lambda: shard_model(model, tmp_path / "no" / "x", stages=2))
    (tmp_path / "empty").mkdir()
    assert shard_model(model, tmp_path / "empty", stages=2)


def test_nothing_is_seen_before_it_is_whole_and_nothing_left_if_it_is_not(model: Path, tmp_path: Path) -> None:
    seen = []

    def look(done: int, total: int) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard_model(model, tmp_path / "s", stages=3, progress=look)
    assert all(len(names) == 1 and names[0].startswith(".s.part-") for names in seen)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from distllm.shards import shard_model
shard_model(sys.argv[1], sys.argv[2], stages=2, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_process_left_is_removed_by_the_next(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "s")]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".s.part-")
    at_work: list[int] = []

    def meanwhile(*_: int) -> None:
        if not at_work:
            at_work.append(1)
            shard_model(model, tmp_path / "s", stages=2)  # another process's folder is left alone

    said = sentence(lambda: shard_model(model, tmp_path / "s", stages=3, progress=meanwhile))
    assert said.startswith(f"shard.output={tmp_path / 's'}: Directory not empty; nothing was written there")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(get_shard_paths(tmp_path / "s")) == 2


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up(model: Path, tmp_path: Path) -> None:
    shard_model(model, tmp_path / "shards", stages=2)
    makes: list[Callable[[], object]] = [
        lambda: shard_model(model, tmp_path / "x", stages=2),
        lambda: reconstruct_model(tmp_path / "shards", tmp_path / "x"),
    ]
    for make in makes:
        with largest_file(100_000):
            said = sentence(make)
        assert said == f"shard.output={tmp_path / 'x'}: File too large; nothing was written there"
        assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_model_that_is_larger_than_the_disk_is_refused_before(tmp_path: Path) -> None:
    """A file with holes: it takes no room until it is copied."""
    disk = min((tmp_path, Path("/dev/shm")), key=lambda folder: shutil.disk_usage(folder).free)
    width = shutil.disk_usage(disk).free // (15 * 64 * 4) + 10_000
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))
    tensors = {
        name: replace(info, shape=tuple(width if size == 128 else size for size in info.shape))
        for name, info in Checkpoint(folder).tensors.items()
    }
    head, _ = raw.layout(tensors)
    (folder / SINGLE).write_bytes(head)
    os.truncate(folder / SINGLE, len(head) + sum(info.nbytes for info in tensors.values()))
    output = disk / f"{tmp_path.name}-{os.getpid()}"
    said = sentence(lambda: shard_model(folder, output, stages=2))
    assert re.match(rf"shard\.output={re.escape(str(output))}: takes [\d,]+ bytes, but {disk} has [\d,]+ free", said)
    assert not list(disk.glob(f"*{output.name}*"))


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", intermediate_size=131_072, num_hidden_layers=1)
    largest = 131_072 * 64 * 4
    peaks = []

    def measure(done: int, total: int) -> None:
        if done <= total // 50:
            tracemalloc.reset_peak()
        peaks.append(tracemalloc.get_traced_memory()[1])

    tracemalloc.start()
    try:
        shard_model(folder, tmp_path / "s", stages=1, progress=measure)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        reconstruct_model(tmp_path / "s", tmp_path / "one")
        assert tracemalloc.get_traced_memory()[1] - before < largest / 2
    finally:
        tracemalloc.stop()
    assert max(peaks) - peaks[0] < largest / 2
