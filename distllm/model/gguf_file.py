"""A GGUF file as a checkpoint of bfloat16 safetensors, tensor by tensor: memory is needed for the largest one alone.

Names, and in what order numbers lie, are transformers' own business: this asks its GGUF loader, tensor by tensor, and
lets it write into the mapped file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tqdm import tqdm

from distllm.model import raw
from distllm.model.checkpoint import SINGLE
from distllm.model.files import Headers, TensorInfo
from distllm.model.tensors import DTYPES, NAMES

SHOW_AFTER_S = 1.0
SLAB_BYTES = 2**20


def convert(source: Path, target: Path) -> None:
    """Writes the weights, the configuration and the tokenizer of a GGUF file into a folder.

    Raises:
        ValueError: a tensor is missing or of another shape than the configuration asks for.
        OSError: there is no room.
        Exception: of a broken file transformers and gguf raise anything.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    named: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    parsed = load_gguf_checkpoint(str(source), return_tensors=False)
    config = CONFIG_MAPPING[parsed["config"]["model_type"]].from_dict(parsed["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: each for name, each in model.state_dict().items() if name not in model.all_tied_weights_keys}
    infos = {name: TensorInfo(SINGLE, tuple(each.shape), NAMES[each.dtype]) for name, each in tensors.items()}
    written = Written(target / SINGLE, infos)
    _fill(written, source, model, parsed)
    if missing := [name for name in infos if name not in written]:
        raise ValueError(f"has no tensor for {missing[0]}")
    written.keep()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(**named).save_pretrained(target)


def _fill(written: Written, source: Path, model: Any, parsed: dict[str, Any]) -> None:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = GGUFReader(str(source))
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(model, processor)
    parsed["tensors"] = written
    for tensor in tqdm(reader.tensors, f"unpacking {source.name}", delay=SHOW_AFTER_S, disable=None, file=sys.stderr):
        done = processor.process(
            weights=_numbers(tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        if done.name in names and names[done.name] in written.infos:
            written[names[done.name]] = torch.from_numpy(done.weights)


def _numbers(tensor: ReaderTensor) -> np.ndarray:
    """A tensor in fp32, a slab at a time: gguf takes several times the memory of what it makes."""
    data = tensor.data
    if data.ndim < 2:
        return np.array(dequantize(data, tensor.tensor_type), dtype=np.float32)
    rows = max(1, SLAB_BYTES // data[0].nbytes)
    first = dequantize(data[:rows], tensor.tensor_type)
    numbers = np.empty((len(data), *first.shape[1:]), dtype=np.float32)
    numbers[:rows] = first
    for start in range(rows, len(data), rows):
        numbers[start : start + rows] = dequantize(data[start : start + rows], tensor.tensor_type)
    return numbers


class Written(MutableMapping[str, torch.Tensor]):
    """The tensors of a safetensors file that is being written; each is there when something was put in.

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(self, path: Path, infos: Headers) -> None:
        self.infos = infos
        head, self._starts = raw.layout(infos)
        nbytes = len(head) + sum(info.nbytes for info in infos.values())
        self._seen: set[str] = set()
        self._file = path.open("x+b")
        os.posix_fallocate(self._file.fileno(), 0, nbytes)  # or a full disk would end the process at a write
        self._file.write(head)
        self._file.flush()
        self._whole = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The room of a tensor in the file: what is written to it is in the file."""
        info = self.infos[name]
        start = self._starts[name]
        return self._whole[start : start + info.nbytes].view(DTYPES[info.dtype]).view(info.shape)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.shape != self.infos[name].shape:
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, not {self.infos[name].shape}")
        self[name].copy_(tensor)
        self._seen.add(name)

    def __contains__(self, name: object) -> bool:
        return name in self._seen

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is in the file for good")

    def keep(self) -> None:
        """Waits until the file is on the disk."""
        del self._whole
        os.fsync(self._file.fileno())
        self._file.close()
