"""The KV storage of one span, and where the rows of a step lie in it.

Shapes: T packed tokens, N tokens of room, G KV heads, K head size. Knows nothing of models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from distllm.core import Step


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps of one token: heads, and the sizes of a key and of a value."""

    heads: int
    key_size: int
    value_size: int

    @property
    def numbers(self) -> int:
        return self.heads * (self.key_size + self.value_size)


class KVCache:
    """Keys (G, N, K) and values (G, N, K) of each layer; memory is touched only when it is written.

    Raises:
        ValueError: the device has no memory for them.
    """

    def __init__(self, shapes: Mapping[int, KVShape], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = tokens
        try:
            self._layers = {
                layer: (
                    torch.empty(shape.heads, tokens, shape.key_size, dtype=dtype, device=device),
                    torch.empty(shape.heads, tokens, shape.value_size, dtype=dtype, device=device),
                )
                for layer, shape in shapes.items()
            }
        except RuntimeError as error:
            nbytes = sum(shape.numbers for shape in shapes.values()) * tokens * dtype.itemsize
            raise ValueError(
                f"{device} has no memory for {nbytes:,} bytes of KV, those of {tokens} tokens; "
                "lower engine.kv_tokens or plan.memory_fraction"
            ) from error

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer]

    def copy(self, copies: Sequence[tuple[int, int, int]], block_tokens: int) -> None:
        """Copies blocks of all layers, one after the other: first blocks from and to, and how many."""
        spans = [
            (source * block_tokens, target * block_tokens, count * block_tokens) for source, target, count in copies
        ]
        for storage_GNK in (storage for layer in self._layers.values() for storage in layer):
            for source, target, count in spans:
                storage_GNK[:, target : target + count] = storage_GNK[:, source : source + count]

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self._layers.values())


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where one row is: its tokens in the packed step, its positions, and its KV as extents of the storage.

    `extents` are (first token of storage, tokens) in order of position and cover positions [0, stop).
    """

    first: int
    start: int
    stop: int
    extents: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def view(self, storage: torch.Tensor, since: int = 0) -> torch.Tensor:
        """Positions [since, stop) of one layer's storage (G, N, K): in place if they are one extent, else gathered."""
        parts = []
        position = 0
        for begin, length in self.extents:
            skip = max(since - position, 0)
            if skip < length:
                parts.append(storage[:, begin + skip : begin + length])
            position += length
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The packed rows of one step as tensors: what a stage needs to know besides the hidden states.

    `positions_T` are positions in each row's sequence, `places_T` where the new keys and values go in the storage.
    `masks` keeps the masks of this step, which all layers of a kind share.
    """

    positions_T: torch.Tensor
    places_T: torch.Tensor
    rows: tuple[RowPlace, ...]
    masks: dict[tuple[int, int | None, int | None], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, block_tokens: int, device: torch.device) -> Layout:
        rows: list[RowPlace] = []
        positions: list[int] = []
        places: list[int] = []
        for row in step.rows:
            extents = _extents(row.runs, block_tokens, row.stop)
            rows.append(RowPlace(len(positions), row.start, row.stop, extents))
            positions.extend(range(row.start, row.stop))
            places.extend(_places(extents, row.start))
        return cls(
            positions_T=torch.tensor(positions, dtype=torch.long, device=device),
            places_T=torch.tensor(places, dtype=torch.long, device=device),
            rows=tuple(rows),
        )


def _extents(runs: tuple[tuple[int, int], ...], block_tokens: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Runs of blocks as extents of tokens, cut at `stop`."""
    extents = []
    left = stop
    for first, blocks in runs:
        length = min(blocks * block_tokens, left)
        if length:
            extents.append((first * block_tokens, length))
        left -= length
    assert left == 0, f"blocks for {stop - left} of {stop} tokens"
    return tuple(extents)


def _places(extents: tuple[tuple[int, int], ...], start: int) -> list[int]:
    """Storage places of the positions from `start` on."""
    places: list[int] = []
    position = 0
    for begin, length in extents:
        skip = max(start - position, 0)
        places.extend(range(begin + skip, begin + length))
        position += length
    return places
