"""Writes a checkpoint anew, tensor by tensor and bit for bit: as one file a stage, or back as an ordinary one.

Names and types of the tensors stay as they are, and nothing of a file is held but a few megabytes. Knows no plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch

from distllm.core import Span
from distllm.model import manifest, raw
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import INDEX, SINGLE
from distllm.model.files import Headers, small_files
from distllm.model.manifest import FIRST_BYTES, MANIFEST, Manifest, SmallFile, StoredFile, StoredTensor
from distllm.model.shard import Shard

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Plot:
    """A file that is to be written; `span` is None if no stage needs its tensors."""

    name: str
    span: Span | None
    tensors: Headers

    @property
    def nbytes(self) -> int:
        return len(raw.layout(self.tensors)[0]) + sum(info.nbytes for info in self.tensors.values())


def plots(blueprint: Blueprint, spans: Sequence[Span]) -> list[Plot]:
    """One file for each span, of the tensors that a rank with this span reads, and one for those that none reads."""
    tensors = blueprint.checkpoint.tensors
    width = len(str(len(spans) - 1))
    left, found = dict(tensors), []
    for stage, span in enumerate(spans):
        with torch.device("meta"):
            shard = Shard(blueprint.config, blueprint.anatomy, span, blueprint.dtype)
        mine = {name: tensors[name] for name in blueprint.tensors.owned(shard)}
        found.append(Plot(f"stage-{stage:0{width}}.safetensors", span, mine))
        for name in mine:
            left.pop(name, None)
    return [*found, Plot("no-stage.safetensors", None, left)] if left else found


def taken_along(folder: Path) -> list[Path]:
    """The small files, but for the manifest of shards that are cut anew."""
    return [path for path in small_files(folder) if path.name != MANIFEST]


def carve(blueprint: Blueprint, files: Sequence[Plot], target: Path, progress: Progress) -> Manifest:
    """Writes files of stages, the small files, the manifest, and an index by which other tools read the folder.

    Args:
        files: from `plots`.
        target: an empty folder.
        progress: called with the bytes of tensors that are written.
    """
    source = blueprint.checkpoint.path
    with ExitStack() as opened:
        reader = Source(source, opened)
        written = tuple(_write(target, plot, reader, progress) for plot in files)
    copied = {path.name: _copy(path, target / path.name) for path in taken_along(source)}
    made = Manifest(blueprint.config.model_type, written, copied)
    _write_index(target, made.tensors)
    marks = {"format": manifest.FORMAT, "version": manifest.VERSION}
    write_json(target / MANIFEST, marks | asdict(made))
    return made


class Source:
    """The files of a checkpoint, open for as long as tensors are read from them."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder = folder
        self._opened = opened
        self._files: dict[str, tuple[BinaryIO, dict[str, int]]] = {}

    def chunks(self, tensor: str, file: str, nbytes: int) -> Iterator[bytes]:
        """The bytes of a tensor, few at a time."""
        if file not in self._files:
            path = self._folder / file
            self._files[file] = self._opened.enter_context(path.open("rb")), raw.starts(path)
        reader, starts = self._files[file]
        return raw.chunks(reader, starts[tensor], nbytes)


def _write(folder: Path, plot: Plot, source: Source, progress: Progress) -> StoredFile:
    head, starts = raw.layout(plot.tensors)
    whole = hashlib.sha256(head)
    tensors = {}
    with (folder / plot.name).open("xb") as target:
        target.write(head)
        for name in starts:
            info = plot.tensors[name]
            digest, first = hashlib.sha256(), b""
            for chunk in source.chunks(name, info.file, info.nbytes):
                target.write(chunk)
                whole.update(chunk)
                digest.update(chunk)
                first = first or chunk[:FIRST_BYTES]
                progress(len(chunk))
            tensors[name] = StoredTensor(info.shape, info.dtype, info.nbytes, digest.hexdigest(), first.hex())
        keep(target)
    return StoredFile(plot.name, plot.span, plot.nbytes, whole.hexdigest(), tensors)


def _copy(source: Path, target: Path) -> SmallFile:
    content = source.read_bytes()
    with target.open("xb") as file:
        file.write(content)
        keep(file)
    return SmallFile(len(content), hashlib.sha256(content).hexdigest())


def keep(file: BinaryIO) -> None:
    """Waits until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    with path.open("xb") as file:
        file.write(json.dumps(value, indent=1).encode())
        keep(file)


def _write_index(folder: Path, tensors: Headers) -> None:
    """For tools that know checkpoints in several files, but no stages."""
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: info.file for name, info in sorted(tensors.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_all(made: Manifest, folder: Path) -> None:
    """
    Raises:
        ValueError: a file of the manifest is missing, cut short or another one.
    """
    for name in (*(file.name for file in made.files), *made.small_files):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {MANIFEST} names it; copy it here")
    made.check(folder, [file.name for file in made.files])


def join(made: Manifest, source: Path, target: Path, file_bytes: int, progress: Progress) -> None:
    """Writes the tensors of shards as an ordinary checkpoint, checking every sha256.

    Args:
        target: an empty folder.
        file_bytes: about how large a file may get.
        progress: called with the bytes that are read.

    Raises:
        ValueError: a file is not that of the manifest; names it and the tensor.
    """
    files = _groups(made.tensors, file_bytes)
    with ExitStack() as opened:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for name, tensors in files.items():
            file: BinaryIO = opened.enter_context((target / name).open("xb"))
            opened.callback(keep, file)
            head, starts = raw.layout(tensors)
            file.write(head)
            places |= {tensor: (file, start) for tensor, start in starts.items()}
        for stored in made.files:
            for name, at, chunk in manifest.verified(source / stored.name, stored):
                if made.tensors[name].file == stored.name:
                    file, start = places[name]
                    file.seek(start + at)
                    file.write(chunk)
                progress(len(chunk))
    for name, small in made.small_files.items():
        if _copy(source / name, target / name) != small:
            raise ValueError(f"{source / name}: is not as {MANIFEST} says; copy it again")
    if len(files) > 1:
        _write_index(
            target, {name: replace(info, file=file) for file, held in files.items() for name, info in held.items()}
        )


def _groups(tensors: Headers, file_bytes: int) -> dict[str, Headers]:
    """The tensors of each file of an ordinary checkpoint, in order."""
    groups: list[Headers] = [{}]
    room = file_bytes
    for name, info in tensors.items():
        if groups[-1] and info.nbytes > room:
            groups.append({})
            room = file_bytes
        groups[-1][name] = info
        room -= info.nbytes
    count = len(groups)
    if count == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, 1)}
