"""Two hosts, made as two network namespaces with process ids of their own: they have a link and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import Job
from sockets import listening

from distllm import LLM, SamplingParams

DEADLINE_S = 3
END_S = 10.0
PORT = 29400

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
    job = start(job_on(hosts, endless, *long, "cluster.recovery_deadline_s=0"))
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
