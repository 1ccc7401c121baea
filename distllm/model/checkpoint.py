"""A checkpoint folder: its configuration, and which file holds which tensor. Reads headers, never a weight.

Knows nothing of ranks and spans.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, from its file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Checkpoint:
    """A local folder with config.json and safetensors files.

    Raises:
        ValueError: something is missing, cut short or not readable; the sentence names the file and the fix.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.tensors: Mapping[str, TensorInfo] = _read_headers(self.path)

    @cached_property
    def config(self) -> PretrainedConfig:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        read_json(self.path / "config.json")
        try:
            config = AutoConfig.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
            raise ValueError(
                f"{self.path / 'config.json'}: transformers does not know this model: {_first_line(error)}"
            ) from error
        if method := getattr(config, "quantization_config", None):
            kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
            raise ValueError(
                f"{self.path / 'config.json'}: the weights are quantized ({kind}), which distllm cannot read yet; "
                "give the checkpoint in bfloat16, float16 or float32"
            )
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def dtype(self, wish: str) -> torch.dtype:
        """The dtype to hold weights in: `auto` is the checkpoint's own."""
        import torch

        if wish != "auto":
            chosen: torch.dtype = getattr(torch, wish)
            return chosen
        declared = getattr(self.config, "dtype", None)
        return declared if isinstance(declared, torch.dtype) else torch.float32

    @property
    def fingerprint(self) -> str:
        """The same on two hosts if configuration, tensor names, shapes, types and files are the same."""
        digest = hashlib.sha256(json.dumps(self.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name}{info}".encode())
        return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file, or it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; a checkpoint folder needs config.json, a tokenizer and {SINGLE}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: should hold a JSON object")
    return found


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    if folder.suffix == ".gguf":
        raise ValueError(f"model.path={folder}: GGUF files cannot be read yet; give a folder with {SINGLE}")
    if not folder.exists():
        raise ValueError(
            f"model.path={folder}: no such folder; download the model there first (hub names are not looked up)"
        )
    if not folder.is_dir():
        raise ValueError(f"model.path={folder}: is not a folder; give the folder that holds config.json")
    if (folder / INDEX).exists():
        return _read_index(folder)
    if not (folder / SINGLE).exists():
        raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}{_other_weights(folder)}")
    return _read_file(folder / SINGLE)


def _read_index(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: has no weight_map from tensor names to files")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{folder / INDEX}: names the file {file!r}, which is outside of the folder")
        if not (folder / file).exists():
            raise ValueError(f"{folder / file}: no such file, but {INDEX} names it; fetch it again")
        held = _read_file(folder / file)
        found |= {name: info for name, info in held.items() if weight_map.get(name, file) == file}
    missing = [name for name in weight_map if name not in found]
    if missing:
        raise ValueError(
            f"{folder / weight_map[missing[0]]}: has no tensor {missing[0]}, but {INDEX} says so; fetch it again"
        )
    return found


def _read_file(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            infos = {name: TensorInfo(path.name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: is not a whole safetensors file ({size:,} bytes; {error}); fetch it again"
        ) from error
    odd = next((info.dtype for info in infos.values() if info.dtype not in ITEM_BYTES), None)
    if odd:
        raise ValueError(f"{path}: holds tensors of type {odd}, which distllm cannot read")
    return infos


def _other_weights(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    return f" (it has {names[0]}, which distllm does not read)" if names else "; is this the folder of the model?"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().split("\n")
    first = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
    return first or type(error).__name__
