"""Pages under a tensor: bringing and giving back change no number, and touch nobody else's."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distllm.model import pages


def resident_kb(path: Path) -> int:
    """How much of a mapped file this process has in its page tables."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:
            inside = line.endswith(str(path))
        elif inside and name == "Rss":
            found += int(value.split()[0])
    return found


def test_pages_come_and_go(tmp_path: Path) -> None:
    content = torch.arange(2_000_000, dtype=torch.int32)
    path = tmp_path / "one.safetensors"
    save_file({"one": content}, path)
    with safe_open(path, "pt") as file:
        tensor = file.get_slice("one")[...]
    before = resident_kb(path)
    pages.bring(tensor)
    assert resident_kb(path) >= tensor.nbytes // 1024 > before
    assert torch.equal(tensor, content)
    pages.give_back(tensor)
    assert resident_kb(path) < 100
    assert torch.equal(tensor, content), "the file is still there"


def test_a_whole_file_comes_and_goes(tmp_path: Path) -> None:
    tensors = {name: torch.arange(1_000_000, dtype=torch.int32) for name in ("one", "two")}
    folder = tmp_path / "blobs"
    folder.mkdir()
    save_file(tensors, folder / "blob")
    path = tmp_path / "one.safetensors"  # as in the Hub's cache
    path.symlink_to(folder / "blob")
    with safe_open(path, "pt") as file:
        mapped = {name: file.get_slice(name)[...] for name in tensors}
    for tensor in mapped.values():
        pages.bring(tensor)
    assert resident_kb(folder / "blob") >= 2 * tensors["one"].nbytes // 1024
    pages.give_back_files([path])
    assert resident_kb(folder / "blob") == 0
    assert all(torch.equal(mapped[name], tensors[name]) for name in tensors)


def test_the_neighbours_of_what_is_given_back_stay() -> None:
    whole = torch.ones(10 * mmap.PAGESIZE, dtype=torch.uint8)
    middle = whole[mmap.PAGESIZE + 5 : 8 * mmap.PAGESIZE + 7]
    pages.give_back(middle)
    assert whole[: mmap.PAGESIZE + 5].all()
    assert whole[8 * mmap.PAGESIZE + 7 :].all()
    assert not middle.all(), "nothing was given back"


def test_small_and_scattered_tensors_are_left_alone() -> None:
    small, scattered = torch.ones(3), torch.ones(5000, 14)[:, ::2]
    for tensor in (small, scattered):
        pages.bring(tensor)
        pages.give_back(tensor)
        assert tensor.all()


HEAPS = """
import sys, threading
from distllm.model import pages

if sys.argv[1] == "shared":
    pages.share_one_heap()
held, all_hold = [], threading.Barrier(9)
def hold():
    held.append(bytes(100_000))
    all_hold.wait(30)
for _ in range(8):
    threading.Thread(target=hold).start()
all_hold.wait(30)
libc = pages._libc
libc.fdopen.restype = pages.ctypes.c_void_p
libc.malloc_info(0, pages.ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.parametrize(("how", "heaps"), [("shared", 1), ("by themselves", 2)])
def test_threads_share_one_heap(how: str, heaps: int) -> None:
    told = subprocess.run([sys.executable, "-c", HEAPS, how], capture_output=True, text=True, timeout=60, check=True)
    found = told.stdout.count("<heap nr=")
    assert found == 1 if heaps == 1 else found >= heaps, told.stdout[-2000:]
