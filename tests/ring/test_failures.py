"""Dead and hung workers, and a job that is told not to go on: it ends in time, non-zero, and names who it was."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from conftest import Job, agent_per_rank, free_port, one_agent
from fakes import tiny_checkpoint
from faults import strike
from waiting import wait_until

from distllm import LLM, EngineError, SamplingParams
from distllm.config import ClusterConfig
from distllm.engine import epoch, job
from distllm.engine.home import home
from distllm.engine.pipeline import Pipeline

DEADLINE_S = 3
END_S = 10.0

Start = Callable[[Sequence[Sequence[str]]], Job]


def words(model: Path) -> list[str]:
    """A job that writes for longer than any test waits."""
    engine = ["sampling.max_tokens=40000", "sampling.ignore_eos=true", f"cluster.deadline_s={DEADLINE_S}"]
    cluster = ["cluster.threads=1", "cluster.recovery_deadline_s=0"]
    return [f"model.path={model}", *cluster, "engine.max_requests=2", *engine, "prompt=hello"]


@pytest.mark.parametrize(
    ("sign", "within_s", "launch"),
    [
        (signal.SIGKILL, END_S, one_agent),
        (signal.SIGSTOP, END_S + DEADLINE_S, agent_per_rank),
        pytest.param(signal.SIGKILL, END_S, agent_per_rank, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, END_S + DEADLINE_S, one_agent, marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_ends_the_job_by_name(
    start: Start, endless: Path, launch: Callable[..., list[list[str]]], sign: signal.Signals, within_s: float
) -> None:
    job = start(launch(3, *words(endless)))
    job.wait_for_text()
    victim = job.ranks()[1]
    strike(victim, sign)
    codes = job.wait(within_s)
    assert all(codes), codes
    (sentence,) = job.errors()
    found = re.search(r"rank 1 \(host (\S+), pid (\d+)\) is lost.*the last step it finished is (\d+)", sentence)
    assert found, sentence
    assert int(found[2]) == victim.pid
    assert int(found[3]) > 0
    assert not job.alive()


SCRIPT = """
import sys
from distllm import LLM, EngineError, SamplingParams
from distllm.config import ClusterConfig, EngineConfig

cluster = ClusterConfig(threads=1, deadline_s=float(sys.argv[2]), recovery_deadline_s=0)
with LLM(sys.argv[1], workers=4, cluster=cluster, engine=EngineConfig(max_requests=2)) as llm:
    try:
        for piece in llm.stream("hello", SamplingParams(max_tokens=40000, ignore_eos=True)):
            print(piece.text, end="", flush=True)
    except EngineError as error:
        print(error, file=sys.stderr)
        sys.exit(7)
"""


@pytest.mark.parametrize(
    ("sign", "within_s"),
    [
        (signal.SIGKILL, END_S),
        pytest.param(signal.SIGSTOP, END_S + DEADLINE_S, marks=pytest.mark.slow),
    ],
)
def test_lost_workers_of_the_library_are_all_named(
    start: Start, endless: Path, sign: signal.Signals, within_s: float
) -> None:
    job = start([[sys.executable, "-c", SCRIPT, str(endless), str(DEADLINE_S)]])
    job.wait_for_text()
    workers = psutil.Process(job.launchers[0].pid).children()
    job.seen |= {worker.pid: worker for worker in workers}
    victims = [worker for worker in workers if not {"--rank=1", "--rank=3"}.isdisjoint(worker.cmdline())]
    for victim in victims:
        strike(victim, sign)
    assert job.wait(within_s) == [7]
    sentences = job.err.read_text().split(";")
    reason = "killed by SIGKILL" if sign == signal.SIGKILL else "it does not answer, so the master killed it"
    for rank, victim in zip((1, 3), victims, strict=True):
        named = rf"rank {rank} \(host \S+, pid {victim.pid}\) is lost: {reason}"
        assert [each for each in sentences if re.search(named, each)], sentences
    assert not job.alive()


FAULTY_RANK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from faulty import fail
from distllm.config import ClusterConfig
from distllm.engine import worker
from distllm.llm import serve_here
from distllm.model.runner import Runner
from distllm.net import wire
from distllm.net.node import Node

PLACES = {{
    "load": (worker, "load", lambda *_, **__: True),
    "reload": (worker, "load", lambda order, *_: order.epoch > 1),
    "join": (Node, "wire", lambda *_, **__: True),
    "meet": (wire, "_meet", lambda *_, **__: True),
    "timing": (Runner, "run", lambda self, step, hidden: step.id < 0),
    "step": (Runner, "run", lambda self, step, hidden: step.id == 5),
}}

def spoil(kind, place):
    owner, name, strikes = PLACES[place]
    real = getattr(owner, name)
    def faulty(*args, **named):
        if strikes(*args, **named):
            print("the fault happens", file=sys.stderr, flush=True)
            fail(kind)
        return real(*args, **named)
    setattr(owner, name, faulty)

spoil(*sys.argv[2:])
sys.exit(serve_here(ClusterConfig(deadline_s=float(sys.argv[1]))))
"""


FORMING_S = 60  # a death is noticed at once, however long the ring may take


@pytest.mark.parametrize(
    ("kind", "place", "verdict"),
    [
        ("raise", "load", ": RuntimeError: no such kernel"),
        pytest.param("hang", "load", r" stands still while loading for \d s", marks=pytest.mark.slow),
        ("kill", "load", " is lost: its connection is closed$"),
        ("raise", "join", " failed in the forming of the ring: RuntimeError: no such kernel"),
        pytest.param(
            "hang",
            "join",
            r" hangs in the forming of the ring for \d s; it finished no step of a request",
            marks=pytest.mark.slow,
        ),
        pytest.param("kill", "join", " is lost: its connection is closed$", marks=pytest.mark.slow),
        pytest.param(
            "hang",
            "timing",
            r" hangs in a step that times the stages for \d s; it finished no step of a request",
            marks=pytest.mark.slow,
        ),
        ("kill", "timing", " is lost: its connection is closed; it finished no step of a request"),
        ("raise", "step", " failed in step 5: RuntimeError: no such kernel"),
        ("hang", "step", r" hangs in step 5 for \d s; the last step it finished is 4"),
    ],
)
def test_a_fault_is_told_wherever_it_strikes(start: Start, endless: Path, kind: str, place: str, verdict: str) -> None:
    launcher = ["WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    options = [f"plan.calibrate={'true' if place == 'timing' else 'false'}", f"cluster.load_timeout_s={DEADLINE_S}"]
    if kind == "kill":
        options.append(f"cluster.deadline_s={FORMING_S}")
    rank0 = [sys.executable, "-m", "distllm.run", *words(endless), *options]
    rank1 = [sys.executable, "-c", FAULTY_RANK, str(DEADLINE_S), kind, place]
    job = start([["env", f"RANK={rank}", *launcher, *command] for rank, command in enumerate((rank0, rank1))])
    job.wait_for_error("the fault happens")
    began = time.monotonic()
    assert all(job.wait(END_S + (DEADLINE_S if kind == "hang" else 0))), f"over after {time.monotonic() - began:.1f} s"
    (sentence,) = job.errors()
    assert re.search(rf"rank 1 \(host \S+, pid {job.launchers[1].pid}\){verdict}", sentence), sentence


def test_a_death_in_an_idle_ring_is_noticed_before_a_long_deadline(tmp_path: Path) -> None:
    cluster = ClusterConfig(workers=2, threads=1, deadline_s=600, recovery_deadline_s=0)
    with LLM(tiny_checkpoint(tmp_path), cluster=cluster) as llm:
        (worker,) = psutil.Process().children()
        strike(worker, signal.SIGKILL)
        wait_until(noticed, "it was not noticed", END_S)
        with pytest.raises(EngineError, match=rf"rank 1 \(host \S+, pid {worker.pid}\) is lost: killed by SIGKILL"):
            llm.generate("hello")


def noticed() -> bool:
    return not any(thread.name == "distllm-master" for thread in threading.enumerate())


def test_a_verdict_that_fails_still_ends_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(*_: object) -> EngineError:
        raise RuntimeError("no idea")

    monkeypatch.setattr(Pipeline, "verdict", verdict)
    cluster = ClusterConfig(workers=2, threads=1, recovery_deadline_s=0)
    with LLM(tiny_checkpoint(tmp_path), cluster=cluster) as llm:
        stream = llm.stream("hello", SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        (worker,) = psutil.Process().children()
        strike(worker, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"^rank 0 failed: RuntimeError: no idea$"):
            list(stream)


@pytest.mark.parametrize(
    ("module", "part", "doing"), [(epoch, "load", "loading"), (job, "time_stages", "timing the stages")]
)
def test_a_master_that_fails_while_it_starts_says_why(
    module: ModuleType, part: str, doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, part, fail)
    folder = tiny_checkpoint(tmp_path)
    with pytest.raises(EngineError, match=rf"^rank 0 failed while {doing}: RuntimeError: no such kernel$"):
        LLM(folder, cluster=ClusterConfig(workers=2, threads=1))
    assert not psutil.Process().children()


def test_an_order_of_an_older_epoch_is_refused_aloud() -> None:
    cluster = home.start(ClusterConfig(workers=2))
    try:
        cluster.order("unload", {1: 5})
        with pytest.raises(EngineError, match=r"^rank 1 .* does not unload: it has an order of a newer epoch$"):
            cluster.order("unload", {1: 4})
    finally:
        cluster.stop(0)
        home.release()


LED_TWICE = """
import sys
from distllm.config import ClusterConfig
from distllm.core import EngineError
from distllm.engine import home
from distllm.net.store import Rendezvous

where = Rendezvous(rank=0, world_size=1, host="127.0.0.1", port=int(sys.argv[1]), job="t", hosts_store=True)
make = home.Cluster

def fail(*_, **__):
    raise EngineError("ranks did not register")

home.Cluster = fail
for _ in range(2):
    try:
        home.home.lead(where, ClusterConfig())
    except EngineError as error:
        print(error)
    home.Cluster = make
"""


def test_ranks_that_did_not_come_up_are_not_led_again() -> None:
    command = [sys.executable, "-c", LED_TWICE, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    again = "the ranks of the launcher did not come up the first time; start the job again"
    assert done.stdout.splitlines() == ["ranks did not register", again]


REGISTERED = """
import os, signal, sys, time
from distllm.engine.registrar import Registrar
from distllm.engine.home import home
from distllm.core import EngineError
from distllm.config import ClusterConfig
from distllm.engine import local

register = Registrar.register

def register_and_kill(self, registration):
    answer = register(self, registration)
    os.kill(registration.member.pid, signal.SIGKILL)
    print("killed", registration.member, flush=True)
    return answer

Registrar.register = register_and_kill
local.sys.executable = sys.argv[1]
try:
    home.start(ClusterConfig(workers=3))
except EngineError as error:
    print(error)
"""


def test_a_registered_rank_that_dies_while_others_start_is_named(tmp_path: Path) -> None:
    done = run_with_faulty_python(REGISTERED, "sleep 10", tmp_path)
    killed, sentence = done.stdout.splitlines()
    assert killed.startswith("killed rank 1 ")
    assert sentence == "rank 1 killed by SIGKILL before all registered"


def test_a_killed_master_leaves_no_worker(start: Start, endless: Path) -> None:
    job = start(agent_per_rank(2, *words(endless)))
    job.wait_for_text()
    strike(job.ranks()[0], signal.SIGKILL)
    assert all(job.wait(END_S + DEADLINE_S))
    assert not job.alive()


def test_a_killed_launcher_leaves_no_rank(start: Start, endless: Path) -> None:
    job = start(one_agent(2, *words(endless)))
    job.wait_for_text()
    assert len(job.ranks()) == 2
    strike(psutil.Process(job.launchers[0].pid), signal.SIGKILL)
    _, left = psutil.wait_procs(job.seen.values(), timeout=END_S)
    assert not left
    assert "Traceback" not in job.err.read_text()


def test_workers_end_with_the_program_that_started_them(start: Start, endless: Path) -> None:
    job = start([[sys.executable, "-c", SCRIPT, str(endless), str(DEADLINE_S)]])
    job.wait_for_text()
    workers = psutil.Process(job.launchers[0].pid).children()
    assert len(workers) == 3
    strike(psutil.Process(job.launchers[0].pid), signal.SIGKILL)
    _, left = psutil.wait_procs(workers, timeout=END_S)
    assert not left


@pytest.mark.parametrize("early", [False, True])
def test_ctrl_c_ends_every_rank(start: Start, endless: Path, early: bool) -> None:
    job = start(one_agent(2, *words(endless)))
    job.wait_for_error("holds layers") if early else job.wait_for_text()
    ranks = job.ranks()
    # A terminal sends it to everybody in the foreground.
    for process in (*ranks.values(), psutil.Process(job.launchers[0].pid)):
        process.send_signal(signal.SIGINT)
    assert job.wait(END_S) != [0]
    assert job.errors() == ["distllm: error: interrupted"]
    assert not job.alive()


def test_a_worker_that_dies_while_it_starts_is_named() -> None:
    script = (
        "import sys\nfrom distllm.config import ClusterConfig\nfrom distllm.core import EngineError\n"
        "from distllm.engine import local\nfrom distllm.engine.home import home\n"
        "local.sys.executable = '/bin/false'\n"
        "try:\n    home.start(ClusterConfig(workers=2))\nexcept EngineError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "rank 1 exited with code 1 before it registered\n"


HALF_STARTED = """
import sys
from distllm.config import ClusterConfig
from distllm.core import EngineError
from distllm.engine import local
from distllm.engine.home import home

python, local.sys.executable = sys.executable, sys.argv[1]
try:
    home.start(ClusterConfig(workers=3))
except EngineError as error:
    print(error)
local.sys.executable = python
cluster = home.start(ClusterConfig(workers=2))
print(sorted(cluster.members))
cluster.stop(0)
"""


def run_with_faulty_python(script: str, fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with a Python, its first word, that does this in the shell before it becomes rank 2."""
    (python := folder / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *--rank=2*) {fault};; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o700)
    command = [sys.executable, "-c", script, str(python)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.slow
def test_ranks_start_after_others_have_died_half_started(tmp_path: Path) -> None:
    """Rank 1 has joined the group when rank 2 ends without a word; the next ranks find nobody to wait for."""
    done = run_with_faulty_python(HALF_STARTED, "sleep 8; exit 3", tmp_path)
    assert done.stdout.splitlines() == ["rank 2 exited with code 3 before it registered", "[0, 1]"], done.stderr


ONE_AT_A_TIME = """
import sys
from distllm import LLM, SamplingParams

short = SamplingParams(max_tokens=3, ignore_eos=True)
with LLM(sys.argv[1]) as llm:
    try:
        LLM(sys.argv[1])
    except ValueError as error:
        print(error)
    print(len(llm.generate("hello", short)[0].token_ids))
with LLM(sys.argv[1]) as llm:
    print(len(llm.generate("hello", short)[0].token_ids))
"""


def test_the_ranks_of_a_launcher_serve_one_model_at_a_time(start: Start, endless: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ONE_AT_A_TIME)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}", "--nproc-per-node=2"]
    job = start([[*torchrun, str(tmp_path / "script.py"), str(endless)]])
    assert job.wait(60) == [0], job.err.read_text()
    refusal = "an LLM of this process has its ranks open; close it before another one is opened"
    assert job.out.read_text().splitlines() == [refusal, "3", "3"]


@pytest.mark.slow
def test_more_ranks_than_parts_is_legal_and_told(start: Start, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    job = start(one_agent(5, f"model.path={model}", "prompt=hello", "sampling.max_tokens=4"))
    assert job.wait(120) == [0], job.err.read_text()
    assert job.out.read_text().strip()
    assert len(re.findall(r"rank \d .*holds nothing: the model has fewer parts", job.err.read_text())) >= 2


def run_alone(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distllm.run", "cluster.threads=1", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environ)


def test_a_model_that_does_not_fit_names_the_bytes(endless: Path) -> None:
    done = run_alone(f"model.path={endless}", "plan.memory_fraction=0.00001", "prompt=hello")
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert re.search(r"does not fit.*rank 0 .*\d B|does not fit.*rank 0 .* [kM]B", sentence), sentence


def test_a_port_in_use_is_one_sentence(endless: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_alone(f"model.path={endless}", "prompt=hello", **ranks)
    assert done.returncode == 2
    assert done.stderr == (
        f"distllm: error: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "set MASTER_ADDR and MASTER_PORT to a free port\n"
    )


def test_a_launcher_that_talks_nonsense_is_told(endless: Path) -> None:
    done = run_alone(f"model.path={endless}", "prompt=hello", RANK="abc", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "RANK" in done.stderr
    assert len(done.stderr.splitlines()) == 1
