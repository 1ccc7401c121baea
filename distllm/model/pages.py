"""Memory pages, under a tensor or of a mapped file, come and go. Knows no models."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch

# Linux 5.14; an older one refuses it, and pages come when they are touched.
MADV_POPULATE_READ = 22
# glibc's number for mallopt.
M_ARENA_MAX = -8

_libc = ctypes.CDLL(None)


def bring(tensor: torch.Tensor) -> None:
    """Has the system map all pages of a tensor at once: one by one, as they are touched, takes twice as long."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= mmap.PAGESIZE:
        _advise(*_pages(tensor, outer=True), MADV_POPULATE_READ)


def give_back(tensor: torch.Tensor) -> None:
    """Tells the system that a tensor is not needed any more: its file may stay mapped for the sake of others."""
    if tensor.is_contiguous() or tensor.mT.is_contiguous():
        _advise(*_pages(tensor, outer=False), mmap.MADV_DONTNEED)


def give_back_files(paths: Iterable[Path]) -> None:
    """Does so with all pages of mapped files; what is still needed comes back from the cache when it is touched."""
    names = {os.path.realpath(path) for path in paths}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name in names:
            start, stop = (int(each, 16) for each in addresses.split("-"))
            _advise(start, stop, mmap.MADV_DONTNEED)


def give_back_memory() -> None:
    """Returns to the system what a forgotten shard has held; two shards at once might not fit.

    Modules refer to each other in circles, which only the collector finds. With what malloc kept besides, a second
    shard doubled what a rank held.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Returns freed blocks to the system: malloc keeps large ones for the next, whose sizes may not suit them."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:  # glibc's; other libraries give back by themselves
        trim(ctypes.c_size_t(0))


def share_one_heap() -> None:
    """Has all threads of this process allocate from one heap, as far as they have not begun with others.

    glibc gives threads heaps of their own, up to eight for each core, and keeps the free end of each. New threads load
    each epoch's parts: with every rank that was lost, rank 0 grew by 0.2 MB.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _pages(tensor: torch.Tensor, *, outer: bool) -> tuple[int, int]:
    """From where to where the pages of a tensor go: all that it touches, or those that it fills."""
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    more = 0 if outer else mmap.PAGESIZE - 1
    return (start + more) // mmap.PAGESIZE * mmap.PAGESIZE, -(-(stop - more) // mmap.PAGESIZE) * mmap.PAGESIZE


def _advise(start: int, stop: int, advice: int) -> None:
    if start < stop:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
