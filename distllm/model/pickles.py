"""Checkpoints that torch wrote as pickles, made into safetensors without running anything that is in them.

torch's `weights_only` builds tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distllm.model.checkpoint import INDEX, SINGLE, first_line, read_json
from distllm.model.files import small_files

if TYPE_CHECKING:
    import torch

PICKLE_INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")


def pickles_of(folder: Path) -> list[Path]:
    """The pickles that are a folder's checkpoint; none if it has safetensors, or is no folder.

    Raises:
        ValueError: an index names a file that is not there or outside of the folder.
    """
    if not folder.is_dir() or (folder / SINGLE).exists() or (folder / INDEX).exists():
        return []
    if (folder / PICKLE_INDEX).exists():
        return _indexed(folder)
    whole = folder / "pytorch_model.bin"
    found = [whole] if whole.exists() else sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) > 1:
        raise ValueError(f"{folder}: has {found[0].name}, {found[1].name} and no index of them; which is the model's?")
    return found


def _indexed(folder: Path) -> list[Path]:
    index = folder / PICKLE_INDEX
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names:
        raise ValueError(f"{index}: has no weight_map from tensor names to files")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {PICKLE_INDEX} names it; fetch it again")
    return [folder / name for name in names]


def convert(files: list[Path], target: Path) -> None:
    """Writes the tensors of pickles, a file at a time in memory, and the small files, as a checkpoint of safetensors.

    Args:
        target: an empty folder.

    Raises:
        ValueError: a file is broken, or holds more than tensors; names it.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = _unshared(_tensors(path))
        save_file(tensors, target / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in small_files(files[0].parent):
        shutil.copy(path, target)


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors, which is never run: {first_line(error)}") from error
    except Exception as error:  # a broken file raises anything here
        raise ValueError(f"{path}: cannot be read: {first_line(error)}; is the file whole?") from error
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors; is it the checkpoint of a model?")
    if sparse := [name for name, tensor in found.items() if tensor.layout != torch.strided]:
        raise ValueError(f"{path}: tensor {sparse[0]} is sparse; weights must be dense")
    return {str(name): tensor for name, tensor in found.items()}


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each with memory of its own, as safetensors wants them: a tied table is stored twice."""
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
