"""One life of rank 0: its process, and the socket that it and the front have."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence

from distllm.serve.messages import WAKE, Message, Role, decode, encode

logger = logging.getLogger(__name__)

PROGRAM = ("-m", "distllm.serve")
READ_BYTES = 2**20
END_TIMEOUT_S = 12.0  # with serve.drain_s less than the 30 s after which launchers kill


class Life:
    """A process that may have ended."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, words: Sequence[str], role: Role) -> Life:
        """
        Args:
            words: the command line of the front, which the process gets too.

        Raises:
            OSError: there is no room for another process.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, *PROGRAM, str(theirs.fileno()), role, *words),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # out of the terminal's, whose Ctrl-C is the front's to answer
                    env={"OMP_NUM_THREADS": "1"} | os.environ,
                )
            except OSError:
                ours.close()
                raise
        return cls(process, *await asyncio.open_connection(sock=ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, as soon as there is one; that of a signal is below 0."""
        return self._process.returncode

    def wake(self) -> None:
        """Lets a process that stands by go on."""
        self._writer.write(WAKE)

    def send(self, message: Message) -> None:
        self._writer.write(encode(message))

    async def heard(self) -> AsyncIterator[list[Message]]:
        """What it says, until it hangs up."""
        rest = b""
        try:
            while data := await self._reader.read(READ_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                yield [decode(line) for line in lines]  # a last word that is not whole was that of a dying process
        except ConnectionError as error:
            logger.debug("rank 0: %s", error)

    def hang_up(self) -> None:
        self._writer.close()

    def terminate(self) -> None:
        self._process.terminate()

    async def ended(self) -> int:
        """Its exit code; one that has hung up and does not end is killed."""
        try:
            return await asyncio.wait_for(self._process.wait(), END_TIMEOUT_S)
        except TimeoutError:
            logger.warning("rank 0 (pid %d) does not end; killing it", self.pid)
            return await self.killed()

    async def killed(self) -> int:
        """Ends it at once."""
        if self.code is None:
            self._process.kill()
        return await self._process.wait()
