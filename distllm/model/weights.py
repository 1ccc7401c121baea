"""Exactly the tensors of one span, out of a checkpoint's mapped files into a shard.

Names, renamings and fused tensors are transformers' own business: this asks its checkpoint loader and hands it lazy
slices, of which it reads those that the shard owns. Knows nothing of ranks.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Collection, Container, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distllm.core import ModelSizes
from distllm.model import conversion, families
from distllm.model.checkpoint import Checkpoint
from distllm.model.conversion import Converted, Target
from distllm.model.families import Anatomy
from distllm.model.files import TensorInfo
from distllm.model.quantize import Recipe
from distllm.model.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]

# A step of few rows takes as long as reading the weights, and a layer besides as long as its many small operations:
# about 0.3 ms on a CPU that reads 30 GB/s. Only a first guess: the times of the stages replace it.
LAYER_OVERHEAD_BYTES = 8 * 10**6

# What files call the types that models run in.
HELD = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class LazyTensor:
    """What transformers' loader takes for a tensor: read when it is sliced, and counted then."""

    def __init__(self, slice_: Any, see: Callable[[torch.Tensor], None]) -> None:
        self._slice = slice_
        self._see = see

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._slice[index]
        self._see(tensor)
        return tensor


class Tally:
    """Counts what is read, in several threads, and looks at every number.

    The look costs a twentieth of a second a GB, and the pages that it touches are read soon after anyway.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._broken: list[str] = []
        self.read_bytes = 0

    def see(self, name: str, held_bytes: int, tensor: torch.Tensor) -> None:
        """
        Args:
            name: what to call the tensor in a warning.
            held_bytes: what it takes in the shard.
        """
        broken = has_nan(tensor)
        with self._lock:
            self.read_bytes += tensor.nbytes
            self._broken += [name] * broken
        self._progress(held_bytes)

    def warn(self) -> None:
        """Tells of tensors that no answer with sense can come of."""
        if self._broken:
            more = f" and {len(self._broken) - 1} more" if len(self._broken) > 1 else ""
            logger.warning(
                "%s%s: holds NaN, so the answers will make no sense; fetch the checkpoint again",
                min(self._broken),
                more,
            )


def has_nan(tensor: torch.Tensor) -> bool:
    """Whether one of its numbers is none; types that cannot be asked, such as those of 8 bits, have none."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not tensor.numel():
        return False
    return bool(tensor.aminmax().max.isnan())


class TensorMap:
    """Which tensor of a checkpoint fills which parameter of the whole model.

    Raises:
        ValueError: a tensor is missing or has the wrong shape; the sentence names file and tensor.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        with torch.device("meta"):
            model = families.build(checkpoint.config, torch.float32)
        self._model = model
        self._parameters: dict[str, torch.Tensor] = model.state_dict()
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._head = families.name_of(model, model.get_output_embeddings())
        base = families.name_of(model, families.base_of(model))
        self._base = f"{base}." if base else ""
        targets = conversion.targets(model, checkpoint.tensors, self._parameters)
        sources = {target.parameter for target in targets.values()}
        self.targets: dict[str, Target] = {}
        for name, target in targets.items():
            table = self._tied.get(target.parameter)
            if table is None:
                self.targets[name] = target
            elif table not in sources:
                self.targets[name] = Target(table, pattern=None, alias=table)
            # Else a tied head is stored all the same: a second copy of the table, and not read.
        self._check(model, known=targets)

    def _check(self, model: PreTrainedModel, known: Container[str]) -> None:
        filled = set(conversion.filled(model, self.targets))
        filled |= {target for target, source in self._tied.items() if source in filled}
        missing = [name for name in self._parameters if name not in filled]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self.checkpoint.path}: no tensor for {missing[0]}{more}; is the checkpoint whole?")
        others = (name for name in self.checkpoint.tensors if name not in known)
        if name := next(conversion.surplus(model, others, is_part=self.checkpoint.is_part), None):
            file = self.checkpoint.path / self.checkpoint.tensors[name].file
            kind = self.checkpoint.config.model_type
            raise ValueError(f"{file}: tensor {name} has no place in this {kind} model; is config.json another's?")
        for name, target in self.targets.items():
            self._check_tensor(name, target)
        Converted(model, self.checkpoint, self.targets).check(self._parameters)

    def _check_tensor(self, name: str, target: Target) -> None:
        info, parameter = self.checkpoint.tensors[name], self._parameters[target.parameter]
        where, wanted = f"{self.checkpoint.path / info.file}: tensor {name}", tuple(parameter.shape)
        if target.pattern is None and info.shape != wanted:
            raise ValueError(f"{where} has shape {info.shape}, but config.json asks for {wanted}")
        if parameter.is_floating_point() and not _is_float(info):
            raise ValueError(
                f"{where} holds numbers of type {info.dtype}: quantized weights cannot be read yet; "
                "give the checkpoint in bfloat16, float16 or float32"
            )

    def sizes(self, dtype: torch.dtype, context_length: int, recipe: Recipe | None = None) -> ModelSizes:
        """Bytes of the parts of the model when weights and KV are held in this dtype, and some as in the recipe."""
        quantized = self._quantized_bytes(dtype, recipe) if recipe else {}
        held = {name: _held_bytes(each, dtype) for name, each in self._parameters.items() if name not in self._tied}
        layer_bytes, ends = [0] * len(self.anatomy.attention), {"embed": 0, "head": 0}
        for name, nbytes in (held | quantized).items():
            part = self._part(name)
            if isinstance(part, int):
                layer_bytes[part] += nbytes
            else:
                ends[part] += nbytes
        tied = 0 if f"{self._head}.weight" in quantized else self._tied_bytes(dtype)
        head_bytes = ends["head"] + tied
        numbers = [kind.shape.numbers for kind in self.anatomy.attention]
        return ModelSizes(
            layer_bytes=tuple(layer_bytes),
            embed_bytes=ends["embed"],
            head_bytes=head_bytes,
            tied_bytes=tied,
            kv_bytes=tuple(n * dtype.itemsize for n in numbers),
            layer_work=tuple(float(n + LAYER_OVERHEAD_BYTES) for n in layer_bytes),
            head_work=float(head_bytes),
            context_length=context_length,
        )

    def _quantized_bytes(self, dtype: torch.dtype, recipe: Recipe) -> dict[str, int]:
        """What the weights that the recipe chooses take, by the names of their parameters."""
        names = {id(module): name for name, module in self._model.named_modules()}
        layers = families.base_of(self._model).get_submodule(self.anatomy.layers)
        chosen = [choice for layer in layers.children() for choice in recipe.of_layer(layer)]
        return {
            f"{names[id(each.plain)]}.weight": each.scheme.nbytes(
                each.plain.out_features, each.plain.in_features, dtype
            )
            for each in [*chosen, *recipe.of_head(self._model)]
        }

    def _tied_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the embedding table that a head without embeddings needs a copy of."""
        tied_head = any(name.startswith(f"{self._head}.") for name in self._tied)
        return _held_bytes(self._parameters[f"{self._base}{self.anatomy.embed}.weight"], dtype) if tied_head else 0

    def _part(self, parameter: str) -> int | str:
        """The layer that a parameter belongs to, or `embed` or `head`."""
        found = re.match(rf"{re.escape(self._base + self.anatomy.layers)}\.(\d+)\.", parameter)
        if found:
            return int(found[1])
        after = tuple(f"{self._base}{name}." for name in self.anatomy.after)
        is_table = parameter.startswith(f"{self._base}{self.anatomy.embed}.")
        return "head" if parameter.startswith((f"{self._head}.", *after)) and not is_table else "embed"

    def files(self, shard: Shard) -> set[str]:
        """Names of the files that hold tensors of this shard."""
        return set(self.places(shard).values())

    def places(self, shard: Shard) -> dict[str, str]:
        """The file that each tensor of this shard is read from: of several that hold it, one that is needed anyway."""
        files = {name: self.checkpoint.tensors[name].files for name in self.owned(shard)}
        needed = {each[0] for each in files.values() if len(each) == 1}
        own = 0 if shard.span.embed else -1
        return {name: next((file for file in each if file in needed), each[own]) for name, each in files.items()}

    def owned(self, shard: Shard) -> list[str]:
        """Names, in the checkpoint, of the tensors that this shard needs."""
        parameters = shard.model.state_dict()
        return [name for name, target in self.targets.items() if target.parameter in parameters]

    def used_in_place(self, names: Collection[str], dtype: torch.dtype) -> bool:
        """Whether tensors stay where they lie in mapped files: none is cast, joined with others or cut."""
        infos = [self.checkpoint.tensors[name] for name in names]
        same = all(info.dtype == HELD[dtype] or not _is_float(info) for info in infos)
        return same and all(self.targets[name].pattern is None for name in names)

    def parts(self, shard: Shard) -> list[tuple[int | str, list[str]]]:
        """The same, of each part of the shard: its layers in order, and its ends."""
        parts: dict[int | str, list[str]] = {}
        for name in self.owned(shard):
            parts.setdefault(self._part(self.targets[name].parameter), []).append(name)
        return sorted(parts.items(), key=lambda item: (isinstance(item[0], str), item[0]))


@torch.no_grad()  # or each weight's quantization would be kept for a backward pass
def load(
    shard: Shard,
    tensors: TensorMap,
    device: torch.device,
    progress: Progress = lambda _: None,
    finish: Callable[[nn.Module], None] | None = None,
) -> None:
    """Fills a shard: layer by layer, so that memory is never needed for more than one besides what is kept; or all at
    once, if nothing is to be done to it. On the CPU, tensors of the shard's own dtype stay mapped and are not copied.

    Args:
        progress: called with the bytes that each tensor takes in the shard as it is read, from any thread.
        finish: what to do with each layer once it is filled, before the next one is read.

    Raises:
        ValueError: a file is missing, cut short, or not as its header was when the model was looked through.
    """
    checkpoint = tensors.checkpoint
    places = tensors.places(shard)
    checkpoint.fetch(set(places.values()), alive=lambda: progress(0))
    tally = Tally(progress)
    layers = shard.base.get_submodule(tensors.anatomy.layers)
    fill = _filler(shard, device)
    at_once = finish is None and tensors.used_in_place(places, shard.dtype)
    for part, owned in [("all", list(places))] if at_once else tensors.parts(shard):
        # For each part anew: what was cast from a mapped file would stay in memory.
        with checkpoint.open({name: places[name] for name in owned}) as slices:
            fill(_lazy(slices, tensors, places, shard.dtype, tally))
        if isinstance(part, int) and finish is not None:
            finish(layers[part])
    tally.warn()
    shard.read_bytes = tally.read_bytes
    if shard.span.head:
        shard.model.tie_weights()
    shard.model.requires_grad_(False)
    empty = [name for name, parameter in shard.model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"{checkpoint.path}: nothing fills {empty[0]}")
    _buffers_to(shard.model, device)


def _lazy(
    slices: Mapping[str, Any], tensors: TensorMap, places: Mapping[str, str], dtype: torch.dtype, tally: Tally
) -> dict[str, LazyTensor]:
    """What transformers' loader takes for tensors, by their names in the model."""
    lazy = {}
    for name, each in slices.items():
        info = tensors.checkpoint.tensors[name]
        nbytes = math.prod(info.shape) * dtype.itemsize if _is_float(info) else info.nbytes
        see = partial(tally.see, f"{tensors.checkpoint.path / places[name]}: tensor {name}", nbytes)
        lazy[tensors.targets[name].alias] = LazyTensor(each, see)
    return lazy


def _filler(shard: Shard, device: torch.device) -> Callable[[dict[str, LazyTensor]], None]:
    """Reads some tensors into the parameters that they belong to, as transformers does."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    settings = LoadStateDictConfig(
        device_map={"": str(device)}, dtype=shard.dtype, weight_mapping=conversion.conversions(shard.model)
    )

    def fill(slices: dict[str, LazyTensor]) -> None:
        convert_and_load_state_dict_in_model(shard.model, slices, settings)

    return fill


def _buffers_to(model: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cpu":
        model.to(device)


def _held_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """What a tensor takes when numbers are held in this dtype; integers and truth values stay as they are."""
    return tensor.numel() * dtype.itemsize if tensor.is_floating_point() else tensor.nbytes


def _is_float(info: TensorInfo) -> bool:
    return info.dtype.startswith(("BF", "F"))
