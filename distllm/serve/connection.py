"""Connections of the HTTP server that do not wait for ever for what a client owes them."""

from __future__ import annotations

import asyncio
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

OWED_S = 10.0


class Connection(H11Protocol):
    """uvicorn's, closed if the head of a request, or what of its body nobody waits for any more, is not whole in time.

    uvicorn has a time limit only for connections on which nothing comes between two requests; a single byte ends it.
    The body that a route waits for is the gate's to limit.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        super().connection_lost(exc)

    @property
    def _is_owed(self) -> bool:
        """Whether the next word is the client's: the rest of a head, or of a body that has been answered."""
        client, answered = self.conn.their_state, self.conn.our_state is h11.DONE
        return client is h11.IDLE or (client is h11.SEND_BODY and answered)

    def _look(self) -> None:
        if not self._is_owed or self.transport.is_closing():
            self._be_patient()
        elif self._late is None:
            self._late = self.loop.call_later(OWED_S, self._give_up)

    def _be_patient(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        logger.debug("a client was too slow with the head or the rest of a request")
        self.transport.close()
