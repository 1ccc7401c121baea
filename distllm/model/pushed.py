"""A checkpoint that lies with rank 0, for a rank that has no files of it: tensors come when they are wanted.

Knows no network: whoever makes one says how bytes come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distllm.model import raw
from distllm.model.checkpoint import Checkpoint
from distllm.model.files import ITEM_BYTES, LocalFiles, TensorInfo
from distllm.model.manifest import Manifest
from distllm.model.tensors import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Fetch = Callable[[str, memoryview], None]
"""Fills a buffer with the bytes of the tensor of this name."""


@dataclass(frozen=True, slots=True)
class Told:
    """Of rank 0's checkpoint: its folder, for messages, and the configuration of the whole model."""

    path: Path
    config: PretrainedConfig


class PushedCheckpoint(Checkpoint):
    """What rank 0 has told of its checkpoint.

    Args:
        tensors: what rank 0's headers say.
        manifest: rank 0's, if its files are shards.
        fetch: how to come by the bytes of a tensor; may be called by several threads at once.
    """

    def __init__(
        self,
        told: Told,
        tensors: Mapping[str, TensorInfo],
        manifest: Manifest | None,
        fetch: Fetch,
    ) -> None:
        super().__init__(LocalFiles(told.path), tensors, manifest=manifest)
        self.whole_config = told.config
        self._fetch = fetch

    def fetch(self, names: Iterable[str], alive: Callable[[], None] = lambda: None) -> None:
        """Nothing to be done: rank 0 holds its files against what it knows of them."""

    @contextmanager
    def open(self, places: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        yield {name: PushedTensor(name, self.stored[name], self._fetch) for name in places}


class PushedTensor:
    """Fetched as a whole when it is indexed, into memory of its own."""

    def __init__(self, name: str, info: TensorInfo, fetch: Fetch) -> None:
        self._name = name
        self._info = info
        self._fetch = fetch

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = torch.empty(self._info.shape, dtype=DTYPES[self._info.dtype])
        if tensor.numel():
            self._fetch(self._name, tensor.view(-1).view(torch.uint8).numpy().data)
        part: torch.Tensor = tensor[index]
        return part


def extents(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[Path, int, int, int]]:
    """For rank 0, of each tensor that the files of these names hold: path, first byte, bytes, and bytes of a number."""
    found = {}
    for file in sorted(set(names)):
        path = checkpoint.path / file
        for name, start in raw.starts(path).items():
            if name in checkpoint.stored and file in checkpoint.stored[name].files:
                info = checkpoint.stored[name]
                found[name] = (path, start, info.nbytes, ITEM_BYTES[info.dtype])
    return found
