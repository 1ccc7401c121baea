"""Exactly the tensors of one span, out of a checkpoint's mapped files into a shard.

Fused and renamed tensors are transformers' own business: its checkpoint loader is handed lazy slices, of which it reads
those that the shard owns. Knows nothing of ranks.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distllm.model import conversion, pages
from distllm.model.quantize import Ready
from distllm.model.shard import Shard
from distllm.model.tensors import TensorMap, is_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


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

    The look costs a tenth of a second a GB, most of it for bringing pages that are read soon after anyway.
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
        pages.bring(tensor)
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
    # Their sum would not be finite; it takes half of the time, but may be infinite without.
    return not tensor.sum().isfinite() and bool(tensor.aminmax().max.isnan())


@torch.no_grad()  # or each weight's quantization would be kept for a backward pass
def load(
    shard: Shard,
    tensors: TensorMap,
    device: torch.device,
    progress: Progress = lambda _: None,
    finish: Callable[[nn.Module, Ready], None] | None = None,
) -> Ready:
    """Fills a shard: layer by layer, so that memory is never needed for more than one besides what is kept; or all at
    once, if nothing is to be done to it. On the CPU, tensors of the shard's own dtype stay mapped and are not copied.

    Args:
        progress: called with the bytes that each tensor takes in the shard as it is read, from any thread.
        finish: what to do with each layer once it is filled, before the next one is read; it is given the layer's
            weights that lie quantized in the files, too.

    Returns:
        what lies quantized outside of the layers; these weights are still to be filled.

    Raises:
        ValueError: a file is missing, cut short, or not as its header was when the model was looked through.
    """
    places = tensors.places(shard)
    tensors.checkpoint.fetch(set(places.values()), alive=lambda: progress(0))
    filling = Filling(shard, tensors, places, device, progress)
    layers = shard.base.get_submodule(tensors.anatomy.layers)
    at_once = finish is None and tensors.used_in_place(places, shard.dtype)
    ends: Ready = {}
    for part, names in [("all", list(places))] if at_once else tensors.parts(shard):
        ready = filling.fill(names)
        if isinstance(part, int) and finish is not None:
            finish(layers[part], ready)
            pages.trim_heap()
            pages.give_back_files(tensors.checkpoint.path / file for file in {places[name] for name in names})
        else:
            ends |= ready
    shard.read_bytes = filling.done()
    if shard.span.head and "head" not in shard.kept and shard.model.get_output_embeddings().weight not in ends:
        shard.model.tie_weights()
    shard.model.requires_grad_(False)
    empty = [name for name, each in shard.model.named_parameters() if each.is_meta and each not in ends]
    if empty:
        raise ValueError(f"{tensors.checkpoint.path}: nothing fills {empty[0]}")
    _buffers_to(shard.model, device)
    return ends


class Filling:
    """A shard that is being filled.

    Args:
        places: the file of each of its tensors.
    """

    def __init__(
        self,
        shard: Shard,
        tensors: TensorMap,
        places: Mapping[str, str],
        device: torch.device,
        progress: Progress = lambda _: None,
    ) -> None:
        self._shard = shard
        self._tensors = tensors
        self._places = places
        self._tally = Tally(progress)
        self._fill = _filler(shard, device)

    def fill(self, names: Collection[str]) -> Ready:
        """Reads tensors into the parameters that they belong to; gives those that lie quantized in the files."""
        checkpoint, targets = self._tensors.checkpoint, self._tensors.targets
        stored = {name: checkpoint.stored_as(name, self._places[name]) for name in names}
        wanted = {each: self._places[name] for name, several in stored.items() for each in several.values()}
        # Opened anew for each part of a shard: what was cast from a mapped file would stay in memory.
        with checkpoint.open(wanted) as slices:
            lazy = {
                name: {part: self._lazy(name, each, slices[each], len(several)) for part, each in several.items()}
                for name, several in stored.items()
            }
            plain = [name for name in names if not self._tensors.is_ready(name)]
            self._fill({targets[name].alias: lazy[name][""] for name in plain})
            return {
                self._parameter(name): {part: each[...] for part, each in lazy[name].items()}
                for name in names
                if name not in plain
            }

    def _lazy(self, name: str, stored: str, slice_: Any, parts: int) -> LazyTensor:
        info = self._tensors.checkpoint.tensors[name]
        nbytes = math.prod(info.shape) * self._shard.dtype.itemsize if is_float(info) else info.nbytes
        where = f"{self._tensors.checkpoint.path / self._places[name]}: tensor {stored}"
        return LazyTensor(slice_, partial(self._tally.see, where, nbytes // parts))

    def _parameter(self, name: str) -> nn.Parameter:
        parameter: nn.Parameter = self._shard.model.get_parameter(self._tensors.targets[name].parameter)
        return parameter

    def done(self) -> int:
        """Warns of what was strange; returns the bytes that were read."""
        self._tally.warn()
        return self._tally.read_bytes


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
