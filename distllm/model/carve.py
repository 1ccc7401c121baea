"""Writes a checkpoint anew, tensor by tensor: as one file a stage, or back as an ordinary one.

Names, types and bits of the tensors stay as they are, but for those that are to be quantized, and nothing of a file is
held but a few megabytes, or the weight that is quantized. Knows no plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO

import torch

from distllm.config import QuantizationConfig
from distllm.core import Span
from distllm.model import manifest, raw
from distllm.model.blueprint import Blueprint
from distllm.model.checkpoint import INDEX, SINGLE, Checkpoint
from distllm.model.files import Headers, TensorInfo, small_files
from distllm.model.manifest import (
    FIRST_BYTES,
    MANIFEST,
    Manifest,
    Quantized,
    QuantizedTensor,
    SmallFile,
    StoredFile,
    StoredTensor,
)
from distllm.model.quantize import ParameterChoice, Recipe, Stored
from distllm.model.shard import Shard
from distllm.model.tensors import NAMES
from distllm.model.weights import Filling

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Making:
    """A parameter that is quantized on the way: the tensors that it is made of, and how.

    `is_copy` if it is a tied head, which the table is copied for.
    """

    sources: tuple[str, ...]
    chosen: ParameterChoice
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_copy: bool

    @property
    def parts(self) -> Headers:
        """What it is stored as, by the ends of the names."""
        layout = self.chosen.layout(self.dtype)
        return {part: TensorInfo("", shape, NAMES[dtype]) for part, (shape, dtype) in layout.items()}


@dataclass(frozen=True, slots=True)
class Plot:
    """A file that is to be written; `span` is None if no stage needs its tensors.

    `tensors` are all that it will hold; `made`, by name, the weights that some of them make up.
    """

    name: str
    span: Span | None
    tensors: Headers
    made: Mapping[str, Making]

    @property
    def nbytes(self) -> int:
        return len(raw.layout(self.tensors)[0]) + sum(info.nbytes for info in self.tensors.values())


def check_storable(quantization: QuantizationConfig) -> None:
    """
    Raises:
        ValueError: weights of this method cannot be kept in files.
    """
    if quantization.method.startswith("bnb"):
        raise ValueError(
            f"quantization={quantization.method}: bitsandbytes' weights are made while loading and cannot be stored; "
            "say int8 or int4"
        )


def plots(blueprint: Blueprint, spans: Sequence[Span], quantization: QuantizationConfig) -> list[Plot]:
    """One file for each span, of the tensors that a rank with this span reads, and one for those that none reads."""
    tensors = blueprint.checkpoint.tensors
    width = len(str(len(spans) - 1))
    left, found = dict(tensors), []
    for stage, span in enumerate(spans):
        with torch.device("meta"):
            shard = Shard(blueprint.config, blueprint.anatomy, span, blueprint.dtype)
        mine = {name: tensors[name] for name in blueprint.tensors.owned(shard)}
        made = _made(blueprint, shard, Recipe.of(quantization)) if quantization.on(stage) else {}
        for name in mine:
            left.pop(name, None)
        used = {name for each in made.values() if not (each.is_copy and span.embed) for name in each.sources}
        plain = {name: info for name, info in mine.items() if name not in used}
        parts = {f"{name}.{part}": info for name, each in made.items() for part, info in each.parts.items()}
        found.append(Plot(f"stage-{stage:0{width}}.safetensors", span, plain | parts, made))
    return [*found, Plot("no-stage.safetensors", None, left, {})] if left else found


def _made(blueprint: Blueprint, shard: Shard, recipe: Recipe) -> dict[str, Making]:
    """What of a shard can be stored quantized, by name: that of the tensor, or of the parameter if several make it, or
    if it is a tied head, which gets one of its own.
    """
    tensors, found = blueprint.tensors, {}
    for parameter, chosen in tensors.chosen(shard.model, recipe).items():
        sources = tensors.sources(parameter)
        if not sources or not chosen.layout(blueprint.dtype):
            continue
        target = tensors.targets[sources[0]]
        is_copy = target.parameter != parameter
        name = sources[0] if target.pattern is None and not is_copy else parameter
        shape = tensors.shape(parameter)
        found[name] = Making(tuple(sources), chosen, shape, blueprint.dtype, is_copy)
    return found


def taken_along(folder: Path) -> list[Path]:
    """The small files, but for the manifest of shards that are cut anew."""
    return [path for path in small_files(folder) if path.name != MANIFEST]


def carve(
    blueprint: Blueprint, files: Sequence[Plot], quantization: QuantizationConfig, target: Path, progress: Progress
) -> Manifest:
    """Writes files of stages, the small files, the manifest, and an index by which other tools read the folder, if they
    can.

    Args:
        files: from `plots`.
        target: an empty folder.
        progress: called with the bytes of tensors that are written.
    """
    source = blueprint.checkpoint.path
    with ExitStack() as opened:
        reader = Source(blueprint.checkpoint, opened)
        written = tuple(_write(target, plot, reader, blueprint, progress) for plot in files)
    copied = {path.name: _copy(path, target / path.name) for path in taken_along(source)}
    quantized = None
    if quantization.method != "none":
        stages = None if quantization.stages is None else tuple(quantization.stages)
        quantized = Quantized(quantization.method, quantization.head_method, quantization.group, stages)
    made = Manifest(blueprint.config.model_type, written, copied, quantized)
    if quantized is None:
        _write_index(target, made.tensors)
    marks = {"format": manifest.FORMAT, "version": manifest.VERSIONS[quantized is not None]}
    write_json(target / MANIFEST, marks | asdict(made))
    return made


class Source:
    """The files of a checkpoint, open for as long as tensors are read from them."""

    def __init__(self, checkpoint: Checkpoint, opened: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._opened = opened
        self._files: dict[str, tuple[BinaryIO, dict[str, int]]] = {}

    def chunks(self, tensor: str, file: str, nbytes: int) -> Iterator[bytes]:
        """The bytes of a tensor, few at a time."""
        if file not in self._files:
            path = self._checkpoint.path / file
            self._files[file] = self._opened.enter_context(path.open("rb")), raw.starts(path)
        reader, starts = self._files[file]
        return raw.chunks(reader, starts[tensor], nbytes)


def _quantized(blueprint: Blueprint, plot: Plot) -> Iterator[tuple[str, Stored]]:
    """What each weight is stored as, by name; in memory is one of them."""
    if plot.span is None or not plot.made:
        return
    with torch.device("meta"):
        shard = Shard(blueprint.config, blueprint.anatomy, plot.span, blueprint.dtype)
    tensors = blueprint.tensors
    filling = Filling(shard, tensors, tensors.places(shard), torch.device("cpu"))
    for name, making in plot.made.items():
        filling.fill(making.sources)
        parameter = shard.model.get_parameter(tensors.targets[making.sources[0]].parameter)
        yield name, making.chosen.store(parameter.detach())
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _write(folder: Path, plot: Plot, source: Source, blueprint: Blueprint, progress: Progress) -> StoredFile:
    with (folder / plot.name).open("x+b") as file:
        target = Target(file, plot, progress)
        made = {f"{name}.{part}" for name, making in plot.made.items() for part in making.parts}
        for name in target.starts:
            if name not in made:
                target.write(name, source.chunks(name, plot.tensors[name].file, plot.tensors[name].nbytes))
        for name, stored in _quantized(blueprint, plot):
            for part, tensor in stored.items():
                target.write(f"{name}.{part}", [tensor.view(torch.uint8).numpy().data.cast("B")])
        return target.done()


class Target:
    """A file of tensors that is being written, in any order."""

    def __init__(self, file: BufferedRandom, plot: Plot, progress: Progress) -> None:
        self._file = file
        self._plot = plot
        self._progress = progress
        self._told: dict[str, StoredTensor] = {}
        head, self.starts = raw.layout(plot.tensors)
        file.write(head)

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """The bytes of one tensor."""
        info = self._plot.tensors[name]
        digest, first = hashlib.sha256(), b""
        self._file.seek(self.starts[name])
        for chunk in chunks:
            self._file.write(chunk)
            digest.update(chunk)
            first = first or bytes(chunk[:FIRST_BYTES])
            self._progress(len(chunk))
        self._told[name] = StoredTensor(info.shape, info.dtype, info.nbytes, digest.hexdigest(), first.hex())

    def done(self) -> StoredFile:
        """When all tensors are written: what the manifest tells of the file."""
        self._file.seek(0)
        whole = hashlib.file_digest(self._file, "sha256").hexdigest()
        keep(self._file)
        plot = self._plot
        tensors = {name: self._told[name] for name in self.starts}
        quantized = {
            name: QuantizedTensor(making.shape, NAMES[making.dtype], tuple(making.parts))
            for name, making in plot.made.items()
        }
        return StoredFile(plot.name, plot.span, plot.nbytes, whole, tensors, quantized)


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
        ValueError: a file of the manifest is missing, cut short or another one, or the weights are quantized.
    """
    if made.quantization is not None:
        raise ValueError(
            f"{folder}: its weights were quantized ({made.quantization.method}), so the model cannot be made of them "
            "again; use the checkpoint that they were cut from"
        )
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
