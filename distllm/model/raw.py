"""Safetensors files byte by byte: where a tensor lies in one, and how a new one begins. Never makes a number of them.

The format: the length of the header in 8 bytes, the header as JSON, then the numbers of the tensors, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from distllm.model.files import ITEM_BYTES, TensorInfo

CHUNK_BYTES = 4 * 2**20
LENGTH_BYTES = 8
# What is used where it lies in a mapped file had better begin where the CPU's wide registers want it.
ALIGNED_BYTES = 64
# The one name of a header that is no tensor.
METADATA = "__metadata__"


def layout(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The head of a file of these tensors, and where in the file each begins, in the order in which they lie.

    Wide numbers come first, so that every tensor begins at a multiple of its numbers' size; else names tell the order.

    Raises:
        ValueError: a tensor has the one name that such a file has no room for.
    """
    if METADATA in tensors:
        raise ValueError(f"a tensor is called {METADATA}, which safetensors files use for something else")
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        info = tensors[name]
        offsets[name], end = end, end + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNED_BYTES)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def starts(path: Path) -> dict[str, int]:
    """Where in a whole safetensors file each tensor begins, in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    data = LENGTH_BYTES + length
    return {name: data + entry["data_offsets"][0] for name, entry in header.items() if name != METADATA}


def chunks(file: BinaryIO, start: int, nbytes: int) -> Iterator[bytes]:
    """Bytes of a file, few at a time.

    Raises:
        ValueError: the file ends before.
    """
    file.seek(start)
    while nbytes > 0:
        chunk = file.read(min(nbytes, CHUNK_BYTES))
        if not chunk:
            raise ValueError(f"{file.name}: ends too early; fetch it again")
        nbytes -= len(chunk)
        yield chunk
