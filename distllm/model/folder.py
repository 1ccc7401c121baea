"""A folder that appears under its name only when it is whole, however its making ends."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_target(output: str | Path) -> Path:
    """The folder that is to be made, through links.

    Raises:
        ValueError: it is there already and not empty, or cannot be made where it is wanted.
    """
    try:
        target = Path(output).expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"shard.output={output}: {error}") from error
    if not target.parent.is_dir():
        raise ValueError(f"shard.output={output}: there is no folder {target.parent}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"shard.output={output}: is a file; give a folder that is not there yet")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"shard.output={output}: is not empty; give a folder that is not there yet")
    return target


@contextmanager
def whole_folder(output: str | Path, nbytes: int) -> Iterator[Path]:
    """A folder to write to, beside the one that is wanted, which it becomes at the end.

    Args:
        nbytes: what will be written.

    Raises:
        ValueError: as `check_target`, or the disk has too little room.
        OSError: it cannot be written; nothing is left of it.
    """
    target = check_target(output)
    prefix = f".{target.name}.part-"
    _remove_left_over(target.parent, prefix)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise ValueError(f"shard.output={output}: takes {nbytes:,} bytes, but {target.parent} has {free:,} free")
    part = target.with_name(prefix + secrets.token_hex(4))
    try:
        part.mkdir()
        with _held(part):
            yield part
        part.rename(target)
    except OSError as error:
        raise OSError(f"shard.output={output}: {error.strerror or error}; nothing was written there") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _held(part: Path) -> Iterator[bool]:
    """Tells others that this folder is being written to, for as long as the process lives.

    Gives False if another process holds it, or the disk cannot tell.
    """
    handle = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def _remove_left_over(parent: Path, prefix: str) -> None:
    """Of processes that were killed before the end."""
    for path in parent.iterdir():
        if path.name.startswith(prefix):
            with suppress(OSError), _held(path) as left_over:
                if left_over:
                    shutil.rmtree(path, ignore_errors=True)
