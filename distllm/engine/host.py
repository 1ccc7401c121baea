"""What this process and its host have to offer."""

from __future__ import annotations

import os
import socket
import uuid
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from distllm.core import Member

CGROUP = Path("/sys/fs/cgroup")
PACKAGES = ("distllm", "torch", "transformers")


def describe(rank: int) -> Member:
    """This process as a member of the job."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Member(
        life=uuid.uuid4().hex[:12],
        rank=rank,
        host=socket.gethostname(),
        boot_id=boot_id,
        pid=os.getpid(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        started=psutil.Process().create_time(),
        gpus=gpus,
        memory_bytes=free_memory(),
        cores=len(os.sched_getaffinity(0)),
        versions=tuple((package, version(package)) for package in PACKAGES),
    )


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: what the host has free, within the limit of its control group."""
    free = psutil.virtual_memory().available
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (cgroup / limit_name).read_text().strip(), (cgroup / used_name).read_text().strip()
        except OSError:
            continue
        if limit != "max":
            free = min(free, int(limit) - int(used))
    return max(free, 0)


def peak_memory() -> int:
    """The most bytes that this process has held at once; mapped files count as far as they were read.

    Not getrusage's figure: that begins with what the parent held when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
