"""What this process and its host have to offer."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from distllm.core import Member
from distllm.net import address

PACKAGES = ("distllm", "torch", "transformers")


def describe(rank: int) -> Member:
    """This process as a member of the job."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Member(
        life=uuid.uuid4().hex[:12],
        rank=rank,
        host=socket.gethostname(),
        boot_id=address.boot_id(),
        pid=os.getpid(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        started=psutil.Process().create_time(),
        gpus=gpus,
        memory_bytes=free_memory(),
        cores=len(os.sched_getaffinity(0)),
        versions=tuple((package, version(package)) for package in PACKAGES),
    )


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the host has free, within the limits of its control groups.

    Args:
        root: the folder that /proc/self/cgroup and /sys/fs/cgroup are read under.
    """
    left = [room_left(group) for group in control_groups(root)]
    return max(0, min([psutil.virtual_memory().available, *(room for room in left if room is not None)]))


def control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's memory control group and of all above it; in a container some are not there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        parts = own.strip("/").split("/")
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def room_left(group: Path) -> int | None:
    """Bytes below a control group's limit, the page cache counting as free; None if it has no limit."""
    for limit_name, used_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit, used = (group / limit_name).read_text().strip(), int((group / used_name).read_text())
        except OSError:
            continue
        return None if limit == "max" else int(limit) - used + page_cache(group, prefix)
    return None


def page_cache(group: Path, prefix: str) -> int:
    """Bytes of files that a control group is charged for, which the kernel drops when a process needs the room."""
    try:
        words = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(size) for name, size in words if name in (f"{prefix}inactive_file", f"{prefix}active_file"))


def peak_memory() -> int:
    """The most bytes that this process has held at once; mapped files count as far as they were read.

    Not getrusage's figure: that begins with what the parent held when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
