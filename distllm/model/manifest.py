"""The manifest of a checkpoint in shards: which stage's file holds which tensors, and how to tell that it is the file.

Knows no plan: the spans are those that the files were cut for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from distllm.core import Span
from distllm.model import raw
from distllm.model.files import Headers, TensorInfo, check_infos

MANIFEST = "manifest.json"
FORMAT = "distllm-shards"
# The later one is of shards with quantized weights. Files of version 1 had shorter heads.
VERSIONS = (2, 3)
# How weights that lie in files may be quantized.
STORABLE, GROUPS = ("int8", "int4"), (32, 64, 128, 256)
# Of each tensor so many bytes are in the manifest itself: they tell another model's file without reading it.
FIRST_BYTES = 16


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a stage's file; `first` are its first bytes, as hexadecimal digits."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str
    first: str


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight that is stored as several tensors, named by its own name and one of `parts` each."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of tensors; `span` is None if no stage needs them. `quantized` are weights that some of them make up."""

    name: str
    span: Span | None
    bytes: int
    sha256: str
    tensors: Mapping[str, StoredTensor]
    quantized: Mapping[str, QuantizedTensor]

    @property
    def infos(self) -> Headers:
        """As the file's header tells it."""
        return {name: TensorInfo(self.name, each.shape, each.dtype) for name, each in self.tensors.items()}

    @property
    def weights(self) -> Headers:
        """The same, each quantized weight being one tensor, as it was before."""
        parts = {f"{name}.{part}" for name, each in self.quantized.items() for part in each.parts}
        plain = {name: info for name, info in self.infos.items() if name not in parts}
        return plain | {name: TensorInfo(self.name, each.shape, each.dtype) for name, each in self.quantized.items()}


@dataclass(frozen=True, slots=True)
class Quantized:
    """How the weights of shards were quantized, in the words of the configuration's section."""

    method: str
    head: str
    group: int
    stages: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file without tensors: the configuration, or a part of the tokenizer."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, or would if all of its files were here."""

    model_type: str
    files: tuple[StoredFile, ...]
    small_files: Mapping[str, SmallFile]
    quantization: Quantized | None = None

    @cached_property
    def tensors(self) -> Headers:
        """As the headers of all files would tell it; a tensor that lies in several belongs to the first one."""
        return _together(file.infos for file in self.files)

    @cached_property
    def weights(self) -> Headers:
        """The same, each quantized weight being one tensor, as it was before."""
        return _together(file.weights for file in self.files)

    @cached_property
    def parts(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """Of each quantized weight in each file, the ends of the names of the tensors that it is stored as."""
        return {(file.name, name): each.parts for file in self.files for name, each in file.quantized.items()}

    @property
    def stages(self) -> tuple[StoredFile, ...]:
        """The files that ranks need, in the order of the pipeline."""
        return tuple(file for file in self.files if file.span is not None)

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(file.span for file in self.files if file.span is not None)

    def check(
        self, folder: Path, names: Iterable[str], *, verify: bool = False, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Holds files of a folder against the manifest: their sizes, and each tensor's first bytes.

        Args:
            verify: read them whole, for the sha256.
            alive: called while that goes on.

        Raises:
            ValueError: a file is cut short or another one; names it and the tensor.
        """
        wanted = set(names)
        for file in self.files:
            if file.name in wanted:
                check_first(folder / file.name, file)
                for _ in verified(folder / file.name, file) if verify else ():
                    alive()


def _together(headers: Iterable[Headers]) -> Headers:
    found: Headers = {}
    for each in headers:
        for name, info in each.items():
            first = found.get(name)
            files = (info.file,) if first is None else (*first.files, info.file)
            found[name] = TensorInfo(files[0], info.shape, info.dtype, files[1:])
    return found


def check_first(path: Path, file: StoredFile) -> None:
    """The cheap part of a check: size, and a few bytes of each tensor.

    Raises:
        ValueError: the file is cut short or another one; names it and the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as opened:
        for name, start in raw.layout(file.infos)[1].items():
            tensor = file.tensors[name]
            if start + tensor.bytes > size:
                raise ValueError(
                    f"{path}: is cut short in tensor {name}: {size:,} of {file.bytes:,} bytes; copy it again"
                )
            opened.seek(start)
            if opened.read(min(FIRST_BYTES, tensor.bytes)).hex() != tensor.first:
                raise ValueError(_another(path, name))
    if size != file.bytes:
        raise ValueError(f"{path}: has {size:,} bytes where {MANIFEST} says {file.bytes:,}; copy it again")


def verified(path: Path, file: StoredFile) -> Iterator[tuple[str, int, bytes]]:
    """Reads a file to its end and gives what is in it: name of a tensor, place in the tensor, bytes.

    Raises:
        ValueError: at the end, if anything was not that of the manifest; names the file and the tensor.
    """
    head, starts = raw.layout(file.infos)
    with path.open("rb") as opened:
        if opened.read(len(head)) != head:
            raise ValueError(f"{path}: its header is not as {MANIFEST} says; copy the file again")
        digest = hashlib.sha256(head)
        for name, start in starts.items():
            at = 0
            for chunk in raw.chunks(opened, start, file.tensors[name].bytes):
                digest.update(chunk)
                yield name, at, chunk
                at += len(chunk)
    if digest.hexdigest() != file.sha256:
        raise ValueError(_blame(path, file))


def _blame(path: Path, file: StoredFile) -> str:
    """Which tensor it is that makes the sha256 of a file another one."""
    with path.open("rb") as opened:
        for name, start in raw.layout(file.infos)[1].items():
            digest = hashlib.sha256()
            for chunk in raw.chunks(opened, start, file.tensors[name].bytes):
                digest.update(chunk)
            if digest.hexdigest() != file.tensors[name].sha256:
                return _another(path, name)
    return f"{path}: its sha256 is not as {MANIFEST} says, though those of its tensors are; copy both again"


def _another(path: Path, tensor: str) -> str:
    return (
        f"{path}: tensor {tensor} is not the one of {MANIFEST}: the file is damaged, or another model's or stage's; "
        "copy it again"
    )


def parse(path: Path, values: Mapping[str, Any]) -> Manifest | None:
    """The manifest that a JSON object tells; None if it is another program's.

    Raises:
        ValueError: it is of a newer distllm, or does not hold together.
    """
    if values.get("format") != FORMAT:
        return None
    if values.get("version") not in VERSIONS:
        raise ValueError(
            f"{path}: is of version {values.get('version')!r}, but this distllm reads {VERSIONS[0]} to {VERSIONS[-1]}; "
            "update distllm or cut the shards anew"
        )
    try:
        manifest = Manifest(
            model_type=str(values["model_type"]),
            files=tuple(_file(each) for each in values["files"]),
            small_files={name: SmallFile(**_typed(each)) for name, each in values["small_files"].items()},
            quantization=_quantization(values.get("quantization")),
        )
        _check(path, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no whole manifest of shards ({error}); copy it again") from error
    return manifest


def _file(values: Mapping[str, Any]) -> StoredFile:
    tensors = {
        name: StoredTensor(**_typed(each) | {"shape": tuple(each["shape"])}) for name, each in values["tensors"].items()
    }
    span = None if values["span"] is None else Span(**values["span"])
    quantized = {
        name: QuantizedTensor(tuple(each["shape"]), each["dtype"], tuple(each["parts"]))
        for name, each in values.get("quantized", {}).items()
    }
    told = _typed({key: values[key] for key in ("name", "bytes", "sha256")})
    return StoredFile(**told, span=span, tensors=tensors, quantized=quantized)


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Raises:
        TypeError: a text or a number is none.
    """
    for key, value in values.items():
        wanted = {"bytes": int, "name": str, "sha256": str, "first": str}.get(key)
        if wanted is not None and type(value) is not wanted:
            raise TypeError(f"{key} is {value!r}")
    return dict(values)


def _quantization(values: Mapping[str, Any] | None) -> Quantized | None:
    if values is None:
        return None
    stages = values["stages"]
    found = Quantized(values["method"], values["head"], values["group"], None if stages is None else tuple(stages))
    ranks = all(type(stage) is int and stage >= 0 for stage in found.stages or ())
    if found.method not in STORABLE or found.head not in ("none", *STORABLE) or found.group not in GROUPS or not ranks:
        raise TypeError(f"no such quantization: {found}")
    return found


def _check(path: Path, manifest: Manifest) -> None:
    """
    Raises:
        ValueError: files, tensors or spans contradict each other.
    """
    for name in (*(file.name for file in manifest.files), *manifest.small_files):
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{path}: names the file {name!r}, which is outside of the folder; copy it again")
    for file in manifest.files:
        check_infos(path, file.infos)
        check_infos(path, file.weights)
        sizes = [info.nbytes for info in file.infos.values()]
        head, _ = raw.layout(file.infos)
        if sizes != [each.bytes for each in file.tensors.values()] or file.bytes != len(head) + sum(sizes):
            raise ValueError(f"{path}: the tensors of {file.name} do not add up to its bytes; copy it again")
    _check_quantized(path, manifest)
    if not _follow(manifest.spans) or len({file.name for file in manifest.files}) < len(manifest.files):
        raise ValueError(f"{path}: its stages do not follow each other; copy it again")


def _check_quantized(path: Path, manifest: Manifest) -> None:
    """
    Raises:
        ValueError: quantized weights lack a part, lie where they should not, or differ from file to file.
    """
    quantization = manifest.quantization
    numbers = {file.name: stage for stage, file in enumerate(manifest.stages)}
    kinds: dict[str, object] = {}
    for file in manifest.files:
        stages = () if quantization is None else quantization.stages
        if file.quantized and not (stages is None or numbers.get(file.name) in stages):
            raise ValueError(f"{path}: does not say how the weights of {file.name} were quantized; copy it again")
        for name, each in file.quantized.items():
            missing = [part for part in each.parts if f"{name}.{part}" not in file.tensors]
            if missing or not each.parts:
                raise ValueError(f"{path}: {file.name} lacks a part of {name}; copy it again")
        for name, info in file.weights.items():
            kind = info.shape, info.dtype, name in file.quantized and file.quantized[name].parts
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"{path}: the copies of {name} differ from file to file; copy it again")


def _follow(spans: Sequence[Span]) -> bool:
    """Whether spans are a pipeline: one after the other, the embeddings in the first and the head in the last."""
    if not spans or not all(type(end) is int for span in spans for end in (span.start, span.stop)):
        return False
    first, last = spans[0], spans[-1]
    between = all(one.stop == other.start and not one.head and not other.embed for one, other in pairwise(spans))
    return between and first.start == 0 and first.embed and last.head and all(span.layers >= 0 for span in spans)
