"""One epoch's ring: frames from each stage to the next, and from the last one home.

A ring is formed once and never mended. Any error of it is WireBroken, and then all of it is gone. Knows nothing of what
the frames say.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from distllm.net.address import Interface
from distllm.net.threads import in_thread

logger = logging.getLogger(__name__)

_CALLED_OFF = "called off"
_POLL_S = 0.005
_TAG = 1


class WireBroken(Exception):
    """The ring cannot go on: a neighbour is silent or gone."""


def call_off(store: Store, epoch: int) -> None:
    """Lets the ranks that wait for others to form the ring of an epoch wait no longer."""
    PrefixStore(f"wire/{epoch}", store).set(_CALLED_OFF, "")


def _assemble(store: Store, position: int, size: int, deadline_s: float) -> None:
    """Waits until all ranks of a ring are there.

    Raises:
        WireBroken: one did not come in time, the ring was called off, or the store is gone.
    """
    until = time.monotonic() + deadline_s
    everybody = [f"place/{each}" for each in range(size)]
    try:
        store.set(everybody[position], "")
        while not store.check(everybody):
            _check_wanted(store)
            if time.monotonic() > until:
                missing = [place for place, key in enumerate(everybody) if not store.check([key])]
                raise WireBroken(f"the ring did not form within {deadline_s:g} s: nobody at {missing} of it")
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise WireBroken(f"the ring did not form: {error}") from error


def _check_wanted(store: Store) -> None:
    if store.check([_CALLED_OFF]):
        raise WireBroken("the ring was called off")


def _meet(store: Store, position: int, size: int, options: Any) -> Any:
    """The group of a ring whose ranks are all there.

    Gloo waits until the deadline for a rank that has died since, and nothing can stop it. If the ring is called off, it
    is left alone with that.

    Raises:
        WireBroken: the ring was called off.
        RuntimeError: a rank did not come, or the store is gone.
    """
    meeting = in_thread(partial(ProcessGroupGloo, store.clone(), position, size, options))
    while not wait([meeting], timeout=_POLL_S).done:
        _check_wanted(store)
    return meeting.result()


def backend_between(sender: str, receiver: str) -> str:
    """The library that should carry tensors between two devices: NCCL joins two GPUs, Gloo everything else."""
    return "nccl" if sender.startswith("cuda") and receiver.startswith("cuda") else "gloo"


class Wire:
    """This rank's place in the ring of an epoch.

    Args:
        position: of this rank in the ring.
        devices: of all ranks of the ring, in its order.
        receive_bytes: the largest frame of the epoch; a shorter one may come, a longer one never.
        deadline_s: a neighbour that is silent for so long breaks the ring.

    Raises:
        WireBroken: the ring did not form in time, or was called off.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        interface: Interface,
        *,
        position: int,
        devices: Sequence[str],
        receive_bytes: int,
        deadline_s: float,
    ) -> None:
        size = len(devices)
        self._before = (position - 1) % size
        self._after = (position + 1) % size
        # Which library carries a link is decided here and nowhere else. Frames of links that NCCL should carry pass
        # through host memory as all others do: it wants both ends to know the length, which only a frame's head tells.
        if backend_between(devices[position], devices[self._after]) == "nccl":
            logger.warning("rank at %d of the ring: frames to the next GPU go through host memory", position)
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=deadline_s)
        store = PrefixStore(f"wire/{epoch}", store)
        _assemble(store, position, size, deadline_s)
        try:
            options._devices = [ProcessGroupGloo.create_device(hostname=interface.address)]
            self._group = _meet(store, position, size, options)
        except RuntimeError as error:
            logger.debug("the ring of epoch %d: %s", epoch, error)
            raise WireBroken(f"the ring did not form within {deadline_s:g} s") from error
        # Two buffers: one is read while the next frame already comes in.
        self._buffers = deque(torch.empty(receive_bytes, dtype=torch.uint8) for _ in range(2))
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()
        self._sent = 0
        self._expect()

    def _expect(self) -> None:
        """Has the next frame received. Whoever has sent its last one may be gone; that is told when one is missed."""
        try:
            self._receiving = self._group.recv([self._buffers[0]], self._before, _TAG)
        except RuntimeError as error:
            logger.debug("the stage before: %s", error)
            self._receiving = None

    def receive(self) -> torch.Tensor:
        """The next frame, uint8; its memory is used again by the receive after the next one.

        Raises:
            WireBroken: the neighbour is gone or silent for the deadline.
        """
        if self._receiving is None:
            raise WireBroken("the stage before has closed its connection")
        try:
            self._receiving.wait()
        except RuntimeError as error:
            raise _broken("the stage before", error) from error
        frame = self._buffers[0]
        self._buffers.rotate(-1)
        self._expect()
        return frame

    def send(self, frame: torch.Tensor) -> None:
        """Sends a frame, uint8; its memory must not change until the second send after this one returns.

        Raises:
            WireBroken: the neighbour is gone or takes nothing for the deadline.
        """
        try:
            while len(self._sending) > 1:
                self._sending.popleft()[0].wait()
            self._sending.append((self._group.send([frame], self._after, _TAG), frame))
        except RuntimeError as error:
            raise _broken("the stage after", error) from error
        self._sent += frame.nbytes

    def take_sent(self) -> int:
        """Bytes of the frames that were sent since this was asked last."""
        sent, self._sent = self._sent, 0
        return sent

    def flush(self) -> None:
        """Waits until all that was sent has left.

        Raises:
            WireBroken: as `send`.
        """
        try:
            while self._sending:
                self._sending.popleft()[0].wait()
        except RuntimeError as error:
            raise _broken("the stage after", error) from error

    def close(self) -> None:
        """Closes the connections; the neighbours' receives end at once."""
        self._sending.clear()
        self._receiving = None
        self._group = None


def _broken(what: str, error: RuntimeError) -> WireBroken:
    logger.debug("%s: %s", what, error)
    silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    return WireBroken(f"{what} {'is silent' if silent else 'has closed its connection'}")
