"""Who broke a ring: what every rank of it says, or does not say, once it has settled."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

from distllm.engine.cluster import POLL_S, VERDICT_TIMEOUT_S, Cluster, Verdict
from distllm.engine.orders import BEFORE_STEPS, Status, finished_in_words, in_words
from distllm.net.control import PeerLost

# A rank that made progress so lately does not hang.
SETTLE_S = 1.0
# Ranks that wait for one that does not join the ring give up at nearly the same time as the master.
JOIN_GRACE_S = 1.0


def verdict(cluster: Cluster, broken: Exception, ring: Sequence[int], last_step: int) -> Verdict:
    """Finds out who broke a ring.

    Args:
        ring: ranks in ring order.
        last_step: the last step that came home; BEFORE_STEPS if the ring did not form.
    """
    others = [rank for rank in ring if rank != 0]
    if last_step == BEFORE_STEPS:
        time.sleep(JOIN_GRACE_S)
    said = _settled(cluster, others)
    gone = {rank: status for rank, status in said.items() if isinstance(status, PeerLost)}
    heard = {rank: status for rank, status in said.items() if isinstance(status, Status)}
    if gone:
        return cluster.lost(gone, _finished(ring, heard, last_step))
    for rank, status in heard.items():
        if failure := cluster.failure(rank, status):
            return failure
    busy = {rank: status for rank, status in heard.items() if not status.done and status.received > status.finished}
    if last_step == BEFORE_STEPS:
        busy |= {rank: status for rank, status in heard.items() if not status.done}
    if busy:
        # Those before it are busy too, with later steps that they cannot hand on.
        rank, status = min(busy.items(), key=lambda item: item[1].received)
        return Verdict(
            f"{cluster.members[rank]} hangs in {in_words(status.received)} for {status.still_s:.0f} s; "
            f"{finished_in_words(status.finished)}",
            "hung",
            lost=[rank],
        )
    return Verdict(
        f"the ring broke although every rank answers: {broken}; "
        "was rank 0 busy for longer than cluster.deadline_s, or is a link between two hosts down?",
        "link",
    )


def _settled(cluster: Cluster, ranks: list[int]) -> dict[int, Status | PeerLost]:
    """What ranks say once those that have just worked are through with it, unless one is lost.

    One that fails leaves the ring before it can say so.
    """
    until = time.monotonic() + 2 * SETTLE_S
    while True:
        said = cluster.statuses(ranks, VERDICT_TIMEOUT_S)
        heard = [status for status in said.values() if isinstance(status, Status)]
        working = any(not status.done and status.still_s < SETTLE_S for status in heard)
        if not working or len(heard) < len(said) or time.monotonic() > until:
            return said
        time.sleep(POLL_S)


def _finished(ring: Sequence[int], heard: Mapping[int, Status], last_step: int) -> dict[int, int]:
    """The last step that each rank of a ring has surely finished: its successor has received it."""
    after = dict(pairwise(ring))
    return {
        rank: max(last_step, heard[after[rank]].received if after.get(rank) in heard else -1)
        for rank in ring
        if rank != 0
    }
