"""A grammar is read in a process of its own first: one that would take rank 0 down, or its time, goes no further.

`python -m distllm.serve.trial` is that process: grammars in, as JSON, one a line; why each cannot be followed out.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
import threading
from collections import OrderedDict

from llguidance import LLMatcher, LLParserLimits

from distllm.core import GRAMMAR_LIMITS
from distllm.serve.calls import Call, Refusal, Unavailable
from distllm.serve.turns import Turns

# What a grammar may take at its reading. The stack is small beside that of rank 0's threads, in which it is read again.
CPU_S = 1.0
MEMORY_BYTES = 2**30
STACK_BYTES = 2**20
DEADLY = (-signal.SIGPROF, -signal.SIGSEGV, -signal.SIGABRT)  # of time, stack and memory
LONGEST_WHY = 300
REMEMBERED = 256


class Trials:
    """Tries grammars, one of each client in turn; those that have passed are not tried again."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turns: Turns[asyncio.Future[None]] = Turns()
        self._busy = False
        self._passed: OrderedDict[str, None] = OrderedDict()

    async def attempt(self, call: Call) -> None:
        """
        Raises:
            Refusal: the grammar of its answer is none, or takes too much to read.
            Unavailable: it cannot be tried.
        """
        grammar = call.params.grammar
        if not grammar or self._known(grammar):
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.add(call.client, turn)
        self._let_in()
        try:
            await turn
            if self._known(grammar):  # meanwhile
                return
            if why := await self._tried(grammar):
                raise Refusal(f"the grammar cannot be followed: {why}")
            self._passed[grammar] = None
            if len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)
        finally:
            if not self._turns.remove(call.client, turn):
                self._busy = False
                self._let_in()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _known(self, grammar: str) -> bool:
        if known := grammar in self._passed:
            self._passed.move_to_end(grammar)
        return known

    def _let_in(self) -> None:
        while not self._busy and len(self._turns):
            turn = self._turns.next()
            if not turn.done():  # else whoever waited has gone
                self._busy = True
                turn.set_result(None)

    async def _tried(self, grammar: str) -> str:
        """Why it cannot be followed; nothing if it can."""
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            await process.stdin.drain()
            said = await process.stdout.readline()
        except ConnectionError:
            pass  # it has died of it
        except asyncio.CancelledError:
            self.close()
            self._process = None
            raise
        if not said.endswith(b"\n"):
            self._process = None
            if await process.wait() not in DEADLY:
                raise Unavailable("the process that tries grammars has ended")
            return f"reading it takes more than {CPU_S:.0f} s, or more memory than a grammar may"
        return str(json.loads(said))

    async def _started(self) -> asyncio.subprocess.Process:
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "distllm.serve.trial"),
                stdin=pipe,
                stdout=pipe,
                stderr=nothing,
                process_group=0,  # out of the terminal's, as rank 0
            )
        except OSError as error:
            raise Unavailable(f"grammars cannot be tried now: {error}") from error


def main() -> None:
    """Reads grammars until there are no more; dies of one that takes too much."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_read_all)
    thread.start()
    thread.join()


def _read_all() -> None:
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
        why = LLMatcher.validate_grammar(json.loads(line), limits=LLParserLimits(**GRAMMAR_LIMITS))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(why.strip().partition("\n")[0][:LONGEST_WHY]), flush=True)


if __name__ == "__main__":
    main()
