"""A rank that fails when it is told to: `python faulty.py FOLDER --rank=...`, as `python -m distllm.engine` otherwise;
under torchrun `faulty.py FOLDER key=value ...`, as `-m distllm.run` otherwise.

A file FOLDER/RANK-PLACE with the name of a fault makes it happen at the next time that the rank is in that place; the
file is renamed to one that ends with .happened, which proves it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distllm import batch, run
from distllm.engine import allegiance, epoch, process, worker
from distllm.model.runner import Runner
from distllm.net import wire
from distllm.net.node import Node

CGROUPS = Path("/sys/fs/cgroup/memory")
# How much more memory a rank gets that is to run out of it.
ROOM = 20 * 2**20


def is_prompt(*given: Any) -> bool:
    return bool(given[1].has_prompt)


def always(*_: Any, **__: Any) -> bool:
    return True


PLACES: dict[str, list[tuple[Any, str, Callable[..., bool]]]] = {
    "load": [(worker, "load", always), (epoch, "load", always)],
    "join": [(Node, "wire", always)],
    "meet": [(wire, "_meet", always)],
    "prompt": [(Runner, "run", is_prompt)],
    "decode": [(Runner, "run", lambda *given: not is_prompt(*given))],
    "arrive": [(allegiance, "call_by_name", lambda *given, **_: given[2] == "register")],
    "end": [(batch, "_whole_file", always)],
}


def fail(kind: str) -> None:
    """One of raise, exit, kill, segfault, stop (which may be woken), hang, reset, half-open and memory."""
    if kind == "raise":
        raise RuntimeError("no such kernel")
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        time.sleep(1000)
    if kind == "reset":
        reset_connections()
        return
    if kind == "half-open":
        drop_packets()
        return
    if kind == "memory":
        run_out_of_memory()
    signals = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}
    os.kill(os.getpid(), signals[kind])


def connections() -> Iterator[int]:
    """Descriptors of this process's TCP connections."""
    for each in psutil.Process().net_connections("tcp"):
        if each.status == psutil.CONN_ESTABLISHED and each.fd >= 0:
            yield each.fd


def reset_connections() -> None:
    """As a firewall or a router does: both ends are told that the connection is no more."""
    unspecified = struct.pack("H14x", socket.AF_UNSPEC)
    for fd in connections():
        if ctypes.CDLL(None, use_errno=True).connect(fd, unspecified, len(unspecified)) != 0:
            assert ctypes.get_errno() == errno.EBADF, "it may have been closed meanwhile"


def drop_packets() -> None:
    """As a cable that is cut: whatever is sent to this process's connections is lost, and nobody is told."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: keep no byte
    for fd in connections():
        with socket.socket(fileno=os.dup(fd)) as each:
            each.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(program)))  # SO_ATTACH_FILTER


def run_out_of_memory() -> None:
    """In a control group with little room, until the kernel kills this process."""
    group = CGROUPS / f"distllm-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(ROOM))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    held = [bytearray(os.urandom(1024)) * 1024 for _ in range(ROOM // 2**18)]
    raise AssertionError(f"{len(held)} MB fit")


def killed_for_memory(pid: int) -> bool:
    """Whether the kernel has killed a process in the group that it made for that; removes the group."""
    group = CGROUPS / f"distllm-test-{pid}"
    words = (group / "memory.oom_control").read_text().split()
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:  # until whoever started the process has heard of its end
        with suppress(OSError):
            group.rmdir()
        time.sleep(0.01)
    return int(words[words.index("oom_kill") + 1]) > 0


def order(folder: Path, rank: int, place: str, kind: str) -> Path:
    """Has a rank fail at the next time that it is in a place; returns the file that is there when it has happened."""
    wanted = folder / f"{rank}-{place}"
    happened = wanted.with_suffix(".happened")
    happened.unlink(missing_ok=True)
    draft = wanted.with_suffix(".draft")
    draft.write_text(kind)
    draft.rename(wanted)  # whole as soon as it is there
    return happened


def spoil(folder: Path, rank: int, place: str, owner: Any, name: str, here: Callable[..., bool]) -> None:
    real = getattr(owner, name)
    wanted = folder / f"{rank}-{place}"

    def faulty(*given: Any, **named: Any) -> Any:
        if wanted.exists() and here(*given, **named):
            kind = wanted.read_text()
            wanted.rename(wanted.with_suffix(".happened"))
            fail(kind)
        return real(*given, **named)

    setattr(owner, name, faulty)


def main() -> None:
    folder = Path(sys.argv.pop(1))
    by_torchrun = "RANK" in os.environ
    rank = next((word.removeprefix("--rank=") for word in sys.argv if word.startswith("--rank=")), None)
    for place, spots in PLACES.items():
        for spot in spots:
            spoil(folder, int(os.environ["RANK"] if rank is None else rank), place, *spot)
    run.main() if by_torchrun else process.main()


if __name__ == "__main__":
    main()
