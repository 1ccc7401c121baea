"""What is counted, and how counts outlive those that count."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from distllm.core import SamplingParams
from distllm.serve.calls import Call
from distllm.serve.messages import Grown
from distllm.serve.metrics import Growth, Metrics


def series(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Values of one series by the values of its labels."""
    return {
        tuple(each.labels.values()): each.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for each in family.samples
        if each.name == f"distllm_{name}"
    }


def stats(*spent: tuple[int, float], host: str = "a", **counts: Any) -> dict[str, Any]:
    """What rank 0 tells: the busy seconds of ranks, where all of them are, and what else it counts."""
    told = [{"rank": rank, "busy_s": busy, "wait_s": 1.0, "sent_bytes": 10} for rank, busy in spent]
    ranks = [{"rank": rank, "host": host} for rank, _ in spent]
    return {"ranks": ranks, "spent": told, "faults": {}, "steps": 0} | counts


def test_growth_is_counted_from_nothing_in_every_life() -> None:
    growth: Growth[str] = Growth()
    assert [growth.of("a", count) for count in (2, 2, 5)] == [2, 0, 3]
    assert growth.of("b", 1) == 1
    growth.new_life()
    assert growth.of("a", 7) == 7, "though it is more than before"
    assert growth.of("a", 6) == 0, "it never falls"


def test_counts_of_rank_0_add_up_over_its_lives() -> None:
    metrics = Metrics()
    for steps in ((3, 8), (9,), (1, 2)):
        metrics.rank0_came()
        for count in steps:
            metrics.rank0_told(stats((0, count / 2), steps=count, prefix_hits=count, faults={"hung": count}))
    assert series(metrics, "steps_total") == {(): 19}
    assert series(metrics, "prefix_hits_total") == {(): 19}
    assert series(metrics, "prefix_tokens_total") == {(): 0}, "it was not told"
    assert series(metrics, "stage_busy_seconds_total") == {("a", "0"): 9.5}
    assert series(metrics, "stage_sent_bytes_total") == {("a", "0"): 30}
    assert series(metrics, "rank0_comings_total") == {(): 3}
    metrics.rank0_ended(-9)
    metrics.rank0_ended(1)
    faults = series(metrics, "faults_total")
    assert {kind for (kind,), count in faults.items() if count} == {"hung", "killed", "exited"}
    assert faults[("hung",)] == 19


def test_a_rank_that_is_gone_keeps_its_series_and_one_that_moves_has_one() -> None:
    metrics = Metrics()
    metrics.rank0_came()
    metrics.rank0_told(stats((0, 1.0), (1, 2.0)))
    metrics.rank0_told(stats((0, 1.5)))
    assert series(metrics, "stage_busy_seconds_total") == {("a", "0"): 1.5, ("a", "1"): 2.0}
    for host in "bcd":
        metrics.rank0_told(stats((1, 2.5), host=host))
    assert series(metrics, "stage_busy_seconds_total") == {("a", "0"): 1.5, ("d", "1"): 0.0}
    metrics.rank0_told(stats((1, 4.0), host="d"))
    assert series(metrics, "stage_busy_seconds_total") == {("a", "0"): 1.5, ("d", "1"): 1.5}


@pytest.mark.parametrize("again", [False, True], ids=["new", "begun by another process"])
def test_times_are_of_answers_that_were_seen_from_the_beginning(again: bool) -> None:
    async def grown() -> Metrics:
        metrics = Metrics()
        call = Call("x/0", "me", "Hi", SamplingParams())
        if not again:
            metrics.begun([call])
        for tokens, reason in ([1], None), ([2, 3], None), ([4], "length"):
            piece = Grown("x/0", "", tokens, reason)  # type: ignore[arg-type]
            metrics.grown([(call, piece)])
            call.hear(piece)
        metrics.ended([call], "left")
        return metrics

    metrics = asyncio.run(grown())
    assert series(metrics, "completion_tokens_total") == {(): 4}
    assert series(metrics, "time_to_first_token_seconds_count") == {(): 0 if again else 1}
    assert series(metrics, "time_per_output_token_seconds_count") == {(): 0 if again else 1}
    assert series(metrics, "answers_total")["length",] == 1


def test_two_servers_of_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.stream_events.inc()
    assert (series(one, "stream_events_total"), series(other, "stream_events_total")) == ({(): 1}, {(): 0})
