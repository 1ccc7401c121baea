"""Where a model is cut into files, by pure functions: as many stages as are wanted, none of them empty."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from distllm.core import ModelSizes, Span
from distllm.plan.partition import Split, counted, manual_counts, split_of

NONE = (2**127, 2**127, ())
"""What no cut costs: more than any."""


def cut_by_layers(sizes: ModelSizes, stages: int) -> Split:
    """Layers as equal as can be; what remains of the division goes to the first stages, for the last has the head.

    Raises:
        ValueError: there are more stages than layers.
    """
    if stages > sizes.layers:
        raise ValueError(f"shard.stages={stages}: the model has {counted(sizes.layers, 'layer')}; give fewer stages")
    each, more = divmod(sizes.layers, stages)
    return split_of([each + (place < more) for place in range(stages)], head=stages - 1)


def cut_by_bytes(sizes: ModelSizes, stages: int) -> Split:
    """The largest stage is as small as can be, then the others are about equal; an end may stand without layers.

    Raises:
        ValueError: there are more stages than the layers and the two ends give.
    """
    layers = sizes.layers
    if stages > layers + 2:
        raise ValueError(f"shard.stages={stages}: the model has {counted(layers, 'layer')} and two ends; give fewer")

    before = list(accumulate(sizes.layer_bytes, initial=0))

    @cache
    def best(place: int, start: int) -> tuple[int, int, tuple[int, ...]]:
        """Bytes of the largest stage from this one on, the sum of their squares, and their numbers of layers."""
        last = place == stages - 1
        found = []
        for stop in [layers] if last else range(start + (place > 0), layers + 1):
            ends = sizes.weight_bytes(Span(0, 0, embed=place == 0, head=last))
            nbytes = ends + before[stop] - before[start]
            largest, squares, counts = (0, 0, ()) if last else best(place + 1, stop)
            found.append((max(nbytes, largest), nbytes**2 + squares, (stop - start, *counts)))
        return min(found, default=NONE)

    return split_of(best(0, 0)[2], head=stages - 1)


def cut_as_told(sizes: ModelSizes, counts: Sequence[int]) -> Split:
    """One stage for each number of layers.

    Raises:
        ValueError: they do not add up to the model's, or a stage between the ends would be empty.
    """
    split = split_of(manual_counts(tuple(counts), sizes.layers, len(counts)), head=len(counts) - 1)
    if empty := [place for place, span in enumerate(split) if span.is_empty]:
        raise ValueError(f"plan.layers={list(counts)}: stage {empty[0]} would hold nothing; leave its 0 out")
    return split
