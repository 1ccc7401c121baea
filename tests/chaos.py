"""Faults by the hundred, by a seed that repeats them, and what each cost: `python tests/chaos.py --faults 300`.

One engine of several ranks runs requests all the time, greedy and seeded ones in turn. Fault after fault strikes one of
its ranks, which is started again and joins. Each fault proves that it happened, every request must end once with the
tokens of a run in which nothing failed, and the table tells how soon each kind of fault was noticed and overcome.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import chaos_master
from fakes import tiny_checkpoint
from faults import DEADLINE_S, GREEDY, LONG, PROMPTS, SEEDED, strike, workers
from faulty import killed_for_memory, order
from tolls import OUT_OF_MEMORY, WOKEN, Fault, Toll, table
from waiting import WAIT_S, wait_until

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, PlanConfig
from distllm.engine import local
from distllm.engine.home import home
from distllm.plan import membership

RANKS = 4
LATEST = 20_000  # tokens, of which it is known when they came
FAULTY = Path(__file__).parent / "faulty.py"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGSEGV": signal.SIGSEGV}
INSIDE = {"SIGKILL": "kill", "SIGSEGV": "segfault", "exception": "raise", "_exit": "exit", "hang": "hang"}
ON_THE_NET = {"reset": "reset", "half-open": "half-open"}
IN_A_STEP = INSIDE | ON_THE_NET | OUT_OF_MEMORY | {"SIGSTOP": "stop", WOKEN: "stop"}
TARGETS = {"second": 1, "middle": 2, "last": RANKS - 1}
SPARE = "spare"
SURVIVOR = 1
BY_SIGNAL = ("idle", "recovery")
PLACES = {"prompt": "prompt", "decode": "decode", "forming": "join", "meeting": "meet", "loading": "load"}
CHANGING = ("forming", "meeting", "loading")
COMING = {"joining": "load", "arriving": "arrive"}


def matrix(spares: int) -> list[Fault]:
    """Every fault that makes sense: signals from outside, or what the rank does to itself in a certain place."""
    idle = itertools.product((*SIGNALS, WOKEN), ("idle", "decode"), (SPARE,) * min(spares, 1))
    outside = itertools.product((*SIGNALS, WOKEN), BY_SIGNAL, TARGETS)
    steps = itertools.product(IN_A_STEP, ("prompt", "decode"), TARGETS)
    places = itertools.product(INSIDE, (*CHANGING, *COMING), TARGETS)
    return [Fault(*each) for each in itertools.chain(outside, steps, places, idle)]


class Verdicts(logging.Handler):
    """When the master said what."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((time.monotonic(), record.getMessage()))

    def first_after(self, when: float, *words: str) -> float | None:
        return next((at for at, text in list(self.said) if at >= when and any(word in text for word in words)), None)


class Requests:
    """Batches of requests, one after the other, for as long as they are wanted; when tokens came is noted."""

    def __init__(self, llm: LLM, wanted: dict[SamplingParams, list[tuple[int, ...]]]) -> None:
        self._llm = llm
        self._wanted = wanted
        self._over = threading.Event()
        self._pause = threading.Event()
        self.paused = threading.Event()
        self.came = 0
        self._came_at: deque[float] = deque(maxlen=LATEST)
        self._lock = threading.Lock()
        self.ended = self.lost = self.different = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for params in itertools.cycle((GREEDY, SEEDED)):
            while self._pause.is_set() and not self._over.is_set():
                self.paused.set()
                time.sleep(0.01)
            self.paused.clear()
            if self._over.is_set():
                return
            self._batch(params)

    def _batch(self, params: SamplingParams) -> None:
        prompts = [*PROMPTS, LONG]
        streams = [self._stream(prompt, params, index) for index, prompt in enumerate(prompts)]
        for stream in streams:
            stream.start()
        for stream in streams:
            stream.join()

    def _stream(self, prompt: str, params: SamplingParams, index: int) -> threading.Thread:
        def follow() -> None:
            tokens: list[int] = []
            try:
                for piece in self._llm.stream(prompt, params):
                    tokens += piece.token_ids
                    with self._lock:
                        self.came += 1
                        self._came_at.append(time.monotonic())
            except Exception as error:  # noqa: BLE001 - whatever ends a request early loses it
                if not self._over.is_set():
                    print(f"lost: {error}", file=sys.stderr)
                self.lost += 1
                return
            self.ended += 1
            self.different += tuple(tokens) != self._wanted[params][index]

        return threading.Thread(target=follow, daemon=True)

    def pause(self) -> None:
        self._pause.set()
        assert self.paused.wait(WAIT_S), "requests hang"

    def go_on(self) -> None:
        self._pause.clear()

    def cancel(self) -> None:
        """No more batches, whatever becomes of the one that runs."""
        self._over.set()

    def end(self) -> None:
        self._over.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "requests hang"

    def wait_for(self, more: int) -> None:
        goal = self.came + more
        wait_until(lambda: self.came >= goal, "no token came")

    def first_after(self, when: float) -> float | None:
        """When the first token came, of the latest, since then."""
        with self._lock:
            return next((at for at in self._came_at if at >= when), None)


class Chaos:
    """One engine, and the faults that it lives through."""

    def __init__(
        self, llm: LLM, spares: int, requests: Requests, verdicts: Verdicts, folder: Path, chance: random.Random
    ) -> None:
        self._llm = llm
        self._spares = spares
        self._requests = requests
        self.verdicts = verdicts
        self._folder = folder
        self._chance = chance
        self.tolls: dict[Fault, Toll] = {}

    def give_up(self) -> None:
        self._requests.cancel()

    def whole(self) -> bool:
        """Every rank has come back; the ring is as long as it was, and spares stand by."""
        ring = {stage.rank for stage in self._llm.plan.stages}
        return len(ring) == RANKS and len(self._here(ring)) == self._spares

    def _here(self, ring: Collection[int]) -> list[int]:
        """Spares that have loaded what they may have to take over."""
        crew, epochs = self._llm._engine.job.crew, self._llm._engine.job._epochs
        return [rank for rank in epochs.holdings.of(crew.everybody()) if rank not in ring]

    def strike(self, fault: Fault) -> None:
        """One fault, and what it cost, until the ring is whole again."""
        wait_until(self.whole, f"the ring is not whole before {fault}")
        lost, different = self._requests.lost, self._requests.different
        if fault.phase == "idle":
            self._requests.pause()
        else:
            self._requests.go_on()
            self._requests.wait_for(self._chance.choice([0, 1, 5, 50]))
        began = self._happens(fault)
        if fault.phase == "idle":
            self._requests.go_on()
        toll = self.tolls.setdefault(fault, Toll())
        toll.faults += 1
        if fault.target == SPARE and fault.kind != WOKEN:
            self._noticed(began)  # until then it counts as here
        if fault.kind == WOKEN or fault.phase in COMING or fault.target == SPARE:
            self._requests.wait_for(50)  # no ring breaks
        else:
            self._measure(toll, began)
        wait_until(self.whole, f"the ring is not whole after {fault}")
        toll.lost += self._requests.lost - lost
        toll.different += self._requests.different - different

    def soak(self, minutes: float, every_s: float, newcomers: Newcomers) -> list[float]:
        """A random fault every few seconds, whether the ring is whole again or not; returns when they were.

        New ranks come and go meanwhile; rank 0 and another one are left in peace, to see what they hold in the end.
        """
        end = time.monotonic() + 60 * minutes
        struck: list[float] = []
        while time.monotonic() < end:
            time.sleep(every_s)
            newcomers.turn(every_s)
            ring = [stage.rank for stage in self._llm.plan.stages if stage.rank in workers()]
            others = [rank for rank in ring if rank not in (0, SURVIVOR)]
            if others:
                kind = self._chance.choice(["SIGKILL", "SIGKILL", "SIGSEGV", "SIGSTOP", WOKEN])
                struck.append(self._signal(self._chance.choice(others), kind))
        newcomers.end()
        return struck

    def _noticed(self, began: float) -> float:
        words = ("is lost", "hangs in", "failed in", "stands still", "no such kernel", "the ring broke although")
        wait_until(lambda: self.verdicts.first_after(began, *words), "the fault was not noticed")
        noticed = self.verdicts.first_after(began, *words)
        assert noticed is not None
        return noticed

    def _measure(self, toll: Toll, began: float) -> None:
        noticed = self._noticed(began)
        wait_until(lambda: self._requests.first_after(noticed), "no token came after the fault")
        came = self._requests.first_after(noticed)
        assert came is not None
        toll.noticed_s.append(noticed - began)
        toll.next_token_s.append(came - began)

    def _happens(self, fault: Fault) -> float:
        """Makes it happen, and proves it; returns when it did."""
        ring = [stage.rank for stage in self._llm.plan.stages]
        if fault.target == SPARE:
            return self._signal(next(rank for rank in workers() if rank not in ring), fault.kind)
        victim = ring[TARGETS[fault.target]]
        other = next(rank for rank in ring[1:] if rank != victim)
        if fault.phase in BY_SIGNAL:
            if fault.phase == "recovery":
                first = time.monotonic()
                strike(workers()[other], signal.SIGKILL)
                wait_until(lambda: self.verdicts.first_after(first, "is lost"), "the first fault was not noticed")
            return self._signal(victim, fault.kind)
        if fault.phase in COMING:
            first = time.monotonic()
            strike(workers()[victim], signal.SIGKILL)
            wait_until(lambda: self.verdicts.first_after(first, "is started again"), "it was not started again")
            return self._inside(victim, COMING[fault.phase], fault.kind)
        process = workers()[victim]
        happened = self._order(victim, PLACES[fault.phase], fault.kind)
        if fault.phase in CHANGING:
            strike(workers()[other], signal.SIGKILL)
        began = self._proven(happened)
        if fault.kind in OUT_OF_MEMORY:
            wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, "it is not killed")
            assert killed_for_memory(process.pid), "it was not for its memory"
        if IN_A_STEP[fault.kind] == "stop":
            wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it does not stop")
        if fault.kind == WOKEN:
            self._wake(process)
        return began

    def _order(self, rank: int, place: str, kind: str) -> Path:
        return order(self._folder, rank, place, IN_A_STEP[kind])

    def _proven(self, happened: Path) -> float:
        wait_until(happened.exists, f"no {happened.name}")
        return time.monotonic()

    def _inside(self, rank: int, place: str, kind: str) -> float:
        return self._proven(self._order(rank, place, kind))

    def _wake(self, process: psutil.Process) -> None:
        time.sleep(DEADLINE_S / 2 * self._chance.random())
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: process.status() != psutil.STATUS_STOPPED, "it does not wake up")

    def _signal(self, rank: int, kind: str) -> float:
        process = workers()[rank]
        began = time.monotonic()
        if kind == WOKEN:
            strike(process, signal.SIGSTOP)
            self._wake(process)
        elif kind == "SIGSEGV":
            process.send_signal(signal.SIGSEGV)
            wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it lives")
        else:
            strike(process, SIGNALS[kind])
        return began


class Newcomers:
    """Brand-new ranks, one after the other: each joins, works in the ring for a while, and leaves or is killed."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self._llm = llm
        self._folder = folder
        self._now: subprocess.Popen[bytes] | None = None
        self._worked_since: float | None = None
        self.worked = 0

    def turn(self, stay_s: float) -> None:
        """Lets one come if none is there; ends the one that has worked for so long."""
        if self._now is None or (self._worked_since is None and self._now.poll() is not None):
            self._start()  # the one before may have met a rank that died just then, and given up
            return
        assert self._now.poll() is None, "a rank that was well has ended by itself"
        if self._worked_since is None:
            job, pid = self._llm._engine.job, self._now.pid
            if any(member.pid == pid and job.plan.stage_of(member.rank) for member in job.members):
                self._worked_since = time.monotonic()
        elif time.monotonic() - self._worked_since > stay_s:
            self.end()

    def _start(self) -> None:
        assert home._node is not None
        port = home._node.rendezvous.port
        command = [sys.executable, "-m", "distllm.run", f"cluster.join=127.0.0.1:{port}"]
        with (self._folder / "newcomers").open("ab") as log:
            self._now = subprocess.Popen(command, stdout=log, stderr=log)

    def end(self) -> None:
        """The one that is there is killed or asked to leave, in turn."""
        if self._now is None:
            return
        self._now.send_signal((signal.SIGTERM, signal.SIGKILL)[self.worked % 2])
        code = self._now.wait(WAIT_S)
        if self._worked_since is not None:
            assert code == (0, -signal.SIGKILL)[self.worked % 2], f"a newcomer ended with {code}"
            self.worked += 1
        self._now = self._worked_since = None


class Gauge:
    """Memory of the ranks that nothing strikes, and of all others, and tokens that came, once a second."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._survivors = {"rank 0": psutil.Process().pid, f"rank {SURVIVOR}": workers()[SURVIVOR].pid}
        self._over = threading.Event()
        self.began = time.monotonic()
        self.samples: list[tuple[float, int, dict[int, int]]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(1.0):
            held = {me.pid: me.memory_info().rss}
            for process in workers().values():
                with suppress(psutil.Error):
                    held[process.pid] = process.memory_info().rss
            self.samples.append((time.monotonic() - self.began, self._requests.came, held))

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def plot(self, file: str, faults: Sequence[float]) -> None:
        """Tokens a second over time, with the faults, and the memory of each process."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 7))
        above, below = figure.subplots(2, sharex=True)
        seconds = [(first[0], second[1] - first[1]) for first, second in itertools.pairwise(self.samples)]
        above.plot(*zip(*seconds, strict=True), linewidth=0.8)
        above.set_ylabel("tokens/s")
        for fault in faults:
            above.axvline(fault - self.began, color="red", linewidth=0.3)
        for pid in {pid for _, _, held in self.samples for pid in held}:
            line = [(at, held[pid] / 10**6) for at, _, held in self.samples if pid in held]
            survives = pid in self._survivors.values()
            below.plot(*zip(*line, strict=True), linewidth=1.5 if survives else 0.5, alpha=1.0 if survives else 0.4)
        below.set_ylabel("memory of each process, MB (survivors thick)")
        below.set_xlabel("seconds; a red line is a fault")
        figure.savefig(file, dpi=120)

    def growth(self) -> str:
        """What the survivors hold after the first tenth of the time, and at the end."""
        said = []
        for name, pid in self._survivors.items():
            mine = [held[pid] / 10**6 for _, _, held in self.samples]
            early, late = statistics.median(mine[len(mine) // 10 :][:10]), statistics.median(mine[-10:])
            said.append(f"{name} holds {early:.0f} MB, then {late:.0f}")
        return "; ".join(said)


def run(given: argparse.Namespace, folder: Path) -> int:
    verdicts = Verdicts()
    logger = logging.getLogger("distllm")
    logger.setLevel(logging.INFO)
    logger.addHandler(verdicts)
    logger.propagate = False
    membership.FIRST_S = 0.0  # a fault every few seconds is what is wanted here
    model = tiny_checkpoint(folder / "model", "llama", max_position_embeddings=4096, num_hidden_layers=12)
    wanted: dict[SamplingParams, list[tuple[int, ...]]] = {}
    with LLM(model, dtype="float32") as llm:
        for params in (GREEDY, SEEDED):
            wanted[params] = [output.token_ids for output in llm.generate([*PROMPTS, LONG], params)]
    local.LocalRanks.program = (str(FAULTY), str(folder))
    deadlines = {"deadline_s": DEADLINE_S, "load_timeout_s": DEADLINE_S, "join_timeout_s": 20.0}
    spares = given.spares
    cluster = ClusterConfig(workers=RANKS + spares, spares=spares, threads=1, restarts=10**6, **deadlines)
    engine = EngineConfig(kv_tokens=8192, prompt_chunk=32)
    with LLM(model, dtype="float32", cluster=cluster, engine=engine, plan=PlanConfig(calibrate=False)) as llm:
        requests = Requests(llm, wanted)
        chaos = Chaos(llm, spares, requests, verdicts, folder, random.Random(given.seed))
        if given.minutes:
            gauge = Gauge(requests)
            newcomers = Newcomers(llm, folder)
            struck = chaos.soak(given.minutes, given.every, newcomers)
            gauge.end()
            if given.plot:
                gauge.plot(given.plot, struck)
            faults = len(struck)
            print(f"{given.minutes:g} minutes; {newcomers.worked} new ranks joined and left; {gauge.growth()}")
        else:
            faults = every_fault(chaos, given)
        requests.end()
    print("\n".join(table(chaos.tolls)))
    print(f"\n{faults} faults, {requests.ended} requests ended, {requests.lost} lost, {requests.different} different")
    return int(requests.lost + requests.different > 0)


def every_fault(chaos: Chaos, given: argparse.Namespace) -> int:
    """As many as are wanted of each in turn, in an order by chance."""
    chance = random.Random(given.seed)
    faults = [each for each in matrix(given.spares) if given.only in f"{each.kind} {each.phase} {each.target}"]
    schedule: list[Fault] = []
    while len(schedule) < given.faults:
        schedule += chance.sample(faults, len(faults))
    for number, fault in enumerate(schedule[: given.faults]):
        print(f"{number} {fault.kind}, {fault.phase}, {fault.target}", file=sys.stderr, flush=True)
        try:
            chaos.strike(fault)
        except (AssertionError, psutil.Error) as error:
            for at, text in chaos.verdicts.said[-30:]:
                print(f"  {at:.2f} {text}", file=sys.stderr)
            chaos.give_up()
            raise SystemExit(f"{fault}: {error}") from error
    return given.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose kind, phase and target contain this")
    parser.add_argument("--torchrun", action="store_true", help="strike jobs under torchrun, rank 0 too")
    parser.add_argument("--spares", type=int, default=0, help="ranks that stand by; faults strike them too")
    parser.add_argument("--minutes", type=float, default=0, help="a soak in place of the faults by turns")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two faults of a soak")
    parser.add_argument("--plot", help="file for a picture of a soak, .png")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(relativeCreated)d %(message)s")
    with tempfile.TemporaryDirectory() as name:
        sys.exit(run_jobs(given, Path(name)) if given.torchrun else run(given, Path(name)))


def run_jobs(given: argparse.Namespace, folder: Path) -> int:
    tolls, requests = chaos_master.run(given, folder)
    lost, different = (sum(getattr(toll, name) for toll in tolls.values()) for name in ("lost", "different"))
    print("\n".join(table(tolls)))
    print(f"\n{given.faults} faults, {requests} requests, {lost} lost, {different} different")
    return int(lost + different > 0)


if __name__ == "__main__":
    main()
