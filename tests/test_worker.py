"""What a worker says of itself while orders come and go."""

from __future__ import annotations

from distllm.engine.worker import Snapshot


def test_the_end_of_one_order_is_not_the_end_of_the_next() -> None:
    snapshot = Snapshot()
    assert snapshot.read().done
    assert snapshot.take(1)
    assert snapshot.take(2)
    snapshot.carried_out("the first failed")
    between = snapshot.read()
    assert (between.epoch, between.done, between.failure) == (2, False, None)
    snapshot.carried_out()
    after = snapshot.read()
    assert (after.epoch, after.done, after.failure) == (2, True, None)


def test_a_failure_is_told_until_the_next_order() -> None:
    snapshot = Snapshot()
    snapshot.take(1)
    snapshot.carried_out("no such file", ring_broke=True)
    assert (snapshot.read().failure, snapshot.read().ring_broke) == ("no such file", True)
    snapshot.take(1)
    assert (snapshot.read().failure, snapshot.read().ring_broke) == (None, False)


def test_orders_of_an_older_epoch_are_refused() -> None:
    snapshot = Snapshot()
    assert snapshot.take(3)
    assert not snapshot.take(2)
    snapshot.carried_out()
    assert (snapshot.read().epoch, snapshot.read().done) == (3, True)
