"""Bytes of numbers made fewer for slow lines: the bytes of equal place in each number together, then zstd.

In 16 bits the exponents of weights, and so their higher bytes, are much alike: 0.7 of the bytes are left. The library
is an extra, and imported when it is needed.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

LEVEL = 1


class Unreadable(Exception):
    """These bytes do not come from `squeeze`, or not whole."""


def library() -> Any:
    """
    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise ValueError("weights.compression=zstd needs zstandard: pip install 'distllm[zstd]'") from error


def squeeze(content: bytes, item_bytes: int) -> bytes:
    """
    Args:
        content: whole numbers of so many bytes each.
    """
    apart = np.frombuffer(content, np.uint8).reshape(-1, item_bytes).T
    squeezed: bytes = library().ZstdCompressor(level=LEVEL).compress(apart.tobytes())
    return squeezed


def unsqueeze(squeezed: bytes, item_bytes: int, into: memoryview) -> None:
    """Fills a buffer with what was squeezed.

    Raises:
        Unreadable: it was something else, or damaged.
    """
    zstd = library()
    try:
        content = zstd.ZstdDecompressor().decompress(squeezed, max_output_size=len(into))
        apart = np.frombuffer(content, np.uint8).reshape(item_bytes, -1)
        np.frombuffer(into, np.uint8).reshape(-1, item_bytes)[:] = apart.T
    except (zstd.ZstdError, ValueError) as error:
        raise Unreadable from error
