"""Two hosts, made as two network namespaces with process ids of their own: they have a link and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import Job
from faults import strike
from sockets import listening

from distllm import LLM, SamplingParams

DEADLINE_S = 3
END_S = 10.0
PORT = 29400
HOST = Path(__file__).parents[2] / "launch" / "host.sh"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


@dataclass(frozen=True)
class Hosts:
    """Names of the two namespaces; each has the interface `wire`, an unused one, and loopback."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.7.1", "10.213.7.2")

    def run(self, host: int, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.names[host], *command], check=True, timeout=10)

    def command(self, host: int, *command: str) -> list[str]:
        """A command on a host that cannot see the other's processes, and takes its own along when it ends."""
        separate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.names[host], *separate, *command]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    tag = uuid.uuid4().hex[:6]
    made = Hosts((f"dl-{tag}-a", f"dl-{tag}-b"))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=10)

    try:
        for name in made.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "name",
            "wire",
            "netns",
            made.names[0],
            *["type", "veth", "peer", "name", "wire", "netns"],
            made.names[1],
        )
        for host, address in enumerate(made.addresses):
            made.run(host, "ip", "address", "add", f"{address}/24", "dev", "wire")
            made.run(host, "ip", "link", "add", "name", "unused", "type", "veth", "peer", "name", "unused-end")
            made.run(host, "ip", "address", "add", f"10.99.{host}.1/24", "dev", "unused")
            for interface in ("lo", "wire", "unused"):
                made.run(host, "ip", "link", "set", interface, "up")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=10)


def job_on(hosts: Hosts, model: Path, *words: str) -> list[list[str]]:
    """The README's way to run on several hosts."""
    common = [f"model.path={model}", "cluster.threads=1", f"cluster.deadline_s={DEADLINE_S}", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--master-addr={hosts.addresses[0]}", f"--master-port={PORT}"]
    return [hosts.command(host, *torchrun, f"--node-rank={host}", "-m", "distllm.run", *common) for host in range(2)]


Start = Callable[[Sequence[Sequence[str]]], Job]


def test_two_hosts_answer(start: Start, hosts: Hosts, endless: Path) -> None:
    job = start(job_on(hosts, endless, "prompt=hello", "sampling.max_tokens=8"))
    assert job.wait(120) == [0, 0], job.err.read_text()
    assert job.out.read_text().strip()


def test_two_hosts_listen_on_their_link_only_and_end_when_it_goes_down(
    start: Start, hosts: Hosts, endless: Path
) -> None:
    long = ["sampling.max_tokens=40000", "sampling.ignore_eos=true", "engine.max_requests=2", "prompt=hello"]
    at_once = ["cluster.recovery_deadline_s=0", "cluster.orphan_deadline_s=0"]
    job = start(job_on(hosts, endless, *long, *at_once))
    job.wait_for_text()
    ranks = job.ranks()
    assert set(ranks) == {0, 1}
    for rank, process in ranks.items():
        assert listening(process.pid) == {hosts.addresses[rank]}, f"rank {rank}"
    hosts.run(0, "ip", "link", "set", "wire", "down")
    with pytest.raises(subprocess.CalledProcessError):
        hosts.run(1, "sh", "-c", "grep -q 1 /sys/class/net/wire/carrier")
    assert all(job.wait(END_S + DEADLINE_S))
    (sentence,) = job.errors()
    assert re.search(r"rank 1 \(host \S+, pid \d+\) is lost: it does not answer; the last step", sentence), sentence
    psutil.wait_procs(list(job.seen.values()), timeout=END_S)
    assert not job.alive()


@pytest.mark.slow
def test_a_host_that_is_cut_off_and_comes_back_costs_nothing(start: Start, hosts: Hosts, model: Path) -> None:
    asked = SamplingParams(max_tokens=3500, ignore_eos=True)
    with LLM(model, dtype="float32") as llm:
        answer = llm.generate("hello", asked)[0].text
    words = ["model.dtype=float32", "sampling.max_tokens=3500", "sampling.ignore_eos=true", "engine.kv_tokens=4096"]
    commands = job_on(hosts, model, *words, "plan.calibrate=false", "prompt=hello")
    for command in commands:
        command.insert(command.index("--nnodes=2"), "--max-restarts=5")
    job = start(commands)
    job.wait_for_text()
    cut_off = job.ranks()[1]
    hosts.run(0, "ip", "link", "set", "wire", "down")
    with pytest.raises(subprocess.CalledProcessError):
        hosts.run(1, "sh", "-c", "grep -q 1 /sys/class/net/wire/carrier")
    job.wait_for_error("going on with 1 request")
    hosts.run(0, "ip", "link", "set", "wire", "up")
    job.wait_for_error(" has come")
    assert job.wait(120) == [0, 0], job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    said = job.err.read_text()
    assert re.search(r"rank 1 \(host \S+, pid \d+\) is lost: it does not answer", said), said
    assert len(re.findall(r"rank 1 \(host \S+, pid \d+\) holds layers", said)) == 2, "it has a part again"
    assert not cut_off.is_running()


@pytest.mark.slow
def test_a_slow_link_is_waited_for(start: Start, hosts: Hosts, model: Path) -> None:
    """Slower than what the ring sends, for longer than the deadline: nobody is given up."""
    asked = SamplingParams(max_tokens=2500, ignore_eos=True)
    with LLM(model, dtype="float32") as llm:
        answer = llm.generate("hello", asked)[0].text
    words = ["model.dtype=float32", "sampling.max_tokens=2500", "sampling.ignore_eos=true", "engine.kv_tokens=4096"]
    job = start(job_on(hosts, model, *words, "plan.calibrate=false", "prompt=hello"))
    job.wait_for_text()
    slow = ["rate", "64kbit", "burst", "2kb", "latency", "5s"]
    for host in range(2):
        hosts.run(host, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", *slow)
    before = job.out.stat().st_size
    time.sleep(2 * DEADLINE_S)
    assert job.out.stat().st_size > before, "it goes on"
    show = ["ip", "netns", "exec", hosts.names[0], "tc", "-s", "qdisc", "show", "dev", "wire"]
    told = subprocess.run(show, capture_output=True, text=True, check=True, timeout=10).stdout
    assert int(re.findall(r"overlimits (\d+)", told)[0]) > 0, f"the link was never too slow: {told}"
    for host in range(2):
        hosts.run(host, "tc", "qdisc", "del", "dev", "wire", "root")
    assert job.wait(120) == [0, 0], job.err.read_text()
    assert job.out.read_text() == f"{answer}\n"
    assert "is lost" not in job.err.read_text()


@pytest.mark.slow
def test_rank_0_of_another_host_comes_again(start: Start, hosts: Hosts, model: Path, tmp_path: Path) -> None:
    """By the script for hosts."""
    asked = SamplingParams(max_tokens=3000, ignore_eos=True)
    prompts = ["hello", "some words"]
    with LLM(model, dtype="float32") as llm:
        answers = [each.text for each in llm.generate(prompts, asked)]
    (tmp_path / "prompts").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    words = [f"model.path={model}", "model.dtype=float32", "sampling.max_tokens=3000", "sampling.ignore_eos=true"]
    words += ["engine.kv_tokens=8192", "cluster.threads=1", "plan.calibrate=false", f"cluster.deadline_s={DEADLINE_S}"]
    words += [f"prompts={tmp_path / 'prompts'}", f"output={tmp_path / 'out'}"]
    script, master = str(HOST), f"{hosts.addresses[0]}:{PORT}"
    job = start([hosts.command(host, script, str(host), "2", master, *words) for host in range(2)])
    wal = tmp_path / "out.journal-wal"
    job.wait_until(lambda: wal.exists() and wal.stat().st_size > 2**15)
    before = job.ranks()
    strike(before[0], signal.SIGKILL)
    job.wait_for_error("has a master again")
    assert job.ranks()[1] == before[1]
    assert job.wait(120) == [0, 0], job.err.read_text()
    found = [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()]
    assert found == answers
