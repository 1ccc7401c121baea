"""The files of a checkpoint, wherever they are: headers tell which tensor is where, weights come when they are wanted.

Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")

Headers = dict[str, "TensorInfo"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header; `copies` are other files that hold the same one."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    copies: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that holds it."""
        return (self.file, *self.copies)

    def is_like(self, other: TensorInfo | None) -> bool:
        """Whether another file's tensor has the same shape and type."""
        return other is not None and (self.shape, self.dtype) == (other.shape, other.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class LocalFiles:
    """A folder of this host.

    `commit` pins what the other ranks must take; None if there is nothing to choose.
    """

    commit: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether there is a file of this name in the folder."""
        return (self.folder / name).exists()

    def header(self, name: str) -> Headers:
        """The tensors of a safetensors file.

        Raises:
            ValueError: it is not a whole safetensors file.
        """
        return read_header(self.folder / name)

    def fetch(self, names: Iterable[str], alive: Callable[[], None]) -> None:
        """Makes sure that these files are in the folder; here they are.

        Args:
            alive: called while it goes on.
        """


def small_files(folder: Path) -> list[Path]:
    """What a host needs besides weights and their index: configuration, tokenizer and chat template."""
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def read_header(path: Path) -> Headers:
    """
    Raises:
        ValueError: it is not a whole safetensors file, or holds numbers of a type that torch does not know.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            infos = {name: TensorInfo(path.name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: is not a whole safetensors file ({size:,} bytes; {error}); fetch it again"
        ) from error
    check_infos(path, infos)
    return infos


def check_infos(path: Path, infos: Headers) -> None:
    """
    Raises:
        ValueError: some numbers are of a type that cannot be read, or a shape is none.
    """
    for name, info in infos.items():
        if not all(isinstance(size, int) and size >= 0 for size in info.shape):
            raise ValueError(f"{path}: tensor {name} has the shape {list(info.shape)}, which is none; fetch it again")
    odd = next((info.dtype for info in infos.values() if info.dtype not in ITEM_BYTES), None)
    if odd:
        raise ValueError(f"{path}: holds tensors of type {odd}, which distllm cannot read")
