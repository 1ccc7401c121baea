"""What ranks may use of their hosts, however many come and go."""

from __future__ import annotations

from dataclasses import replace

from test_partition import member

from distllm.core import Member
from distllm.engine.shares import Shares


def on(host: str, rank: int, memory: int, gpus: int = 0) -> Member:
    return replace(member(rank, memory), boot_id=host, cores=8, gpus=gpus)


def test_memory_and_cores_are_shared_by_those_that_are_there() -> None:
    shares = Shares()
    first = [on("a", 0, 1000), on("a", 1, 900), on("b", 2, 500)]
    shares.welcome(first)
    found = shares.of(first, 0.5)
    assert [each.memory_bytes for each in found] == [225, 225, 250], "of the least that was seen free at the beginning"
    assert [each.cores for each in found] == [4, 4, 8]
    late = on("a", 3, 10)
    shares.welcome([late])
    found = shares.of([*first, late], 1.0)
    assert [each.memory_bytes for each in found] == [300, 300, 500, 300], "what the others hold is not free any more"
    shares.dismiss(first[1])
    assert [each.memory_bytes for each in shares.of([first[0], first[2]], 1.0)] == [900, 500]


def test_a_rank_keeps_its_gpu_and_one_that_comes_gets_a_free_one() -> None:
    shares = Shares()
    first = [on("a", rank, 1000, gpus=2) for rank in range(3)]
    other = on("b", 3, 1000, gpus=1)
    shares.welcome([*first, other])
    assert [each.device for each in shares.of([*first, other], 1.0)] == ["cuda:0", "cuda:1", "cpu", "cuda:0"]
    shares.dismiss(first[0])
    again = replace(first[0], life="another")
    shares.welcome([again])
    assert [each.device for each in shares.of([again, *first[1:]], 1.0)] == ["cuda:0", "cuda:1", "cpu"]
