"""All that is known of a model before a weight is read, and the way from there to a rank's runner."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from distllm.config import QuantizationConfig
from distllm.core import ModelSizes, Plan, Span
from distllm.model import attention, families, linear, pages, weights
from distllm.model.checkpoint import Checkpoint
from distllm.model.families import Anatomy
from distllm.model.files import LocalFiles
from distllm.model.quantize import Ready, Recipe, quantize
from distllm.model.runner import Runner
from distllm.model.shard import Shard, check_passes_through
from distllm.model.tensors import TensorMap
from distllm.model.unfold import unfold
from distllm.model.weights import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def preload() -> None:
    """Imports what opening a model needs. It takes seconds, which a rank has while rank 0 gets ready."""
    for module in ("modeling_utils", "models.auto.modeling_auto", "conversion_mapping"):
        importlib.import_module(f"transformers.{module}")


def look_through(config: PretrainedConfig) -> Anatomy:
    """
    Raises:
        ValueError: the architecture cannot be cut into stages; the sentence says why.
    """
    anatomy = families.inspect(config)
    check_passes_through(config, anatomy)
    return anatomy


class Blueprint:
    """A checkpoint whose architecture fits and whose tensors are all there, by name and shape.

    Args:
        dtype: a torch dtype's name, or `auto` for the checkpoint's own.
        context_length: longest sequence, in tokens; None takes what the model allows.
        anatomy: what another rank found out about the same model; None looks it through here.

    Raises:
        ValueError: the checkpoint or its architecture cannot be used; the sentence says why.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | LocalFiles | Path,
        *,
        dtype: str,
        context_length: int | None,
        anatomy: Anatomy | None = None,
    ) -> None:
        attention.register()
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.config = self.checkpoint.config
        self.anatomy = anatomy or look_through(self.config)
        self.tensors = TensorMap(self.checkpoint, self.anatomy)
        if (stored := self.checkpoint.quantization) is not None:
            self.tensors.check_ready(Recipe.of(stored))
        self.dtype = self.checkpoint.dtype(dtype)
        allowed = self.anatomy.context_length
        if context_length is not None and context_length > allowed:
            raise ValueError(f"model.context_length={context_length}: the model allows {allowed} tokens")
        self.sizes: ModelSizes = self.tensors.sizes(self.dtype, context_length or allowed)

    def sizes_with(self, quantization: QuantizationConfig) -> ModelSizes:
        """The sizes, with those on ranks that quantize."""
        if quantization.method == "none":
            return self.sizes
        recipe = Recipe.of(quantization)
        return replace(self.sizes, quantized=self.tensors.sizes(self.dtype, self.sizes.context_length, recipe))

    def files_of(self, plan: Plan, rank: int) -> set[str]:
        """Names of the files that hold a rank's weights."""
        stage = plan.stage_of(rank)
        return set() if stage is None else self.tensors.files(self.shard(stage.span))

    def shard(self, span: Span) -> Shard:
        """The part of the model that a span is, without weights."""
        shard = Shard(self.config, self.anatomy, span, self.dtype)
        if self.tensors.head_is_ready:
            shard.drop_table()
        return shard

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    def load(
        self,
        plan: Plan,
        rank: int,
        *,
        block_tokens: int,
        max_requests: int,
        device: torch.device,
        recipe: Recipe | None = None,
        pack_weights: bool = True,
        progress: Progress = lambda _: None,
        before: Sequence[Shard] = (),
    ) -> Runner | None:
        """Reads what the plan gives to a rank; None if that is nothing.

        Args:
            before: of the same model and recipe; what they have is taken from them and not read again.
            recipe: for weights in fewer bits.
            pack_weights: lay the other weights out for the CPU's kernels, if it has some for this dtype.
            progress: called with bytes of the checkpoint that are done, from any thread; reading a weight, and packing
                or quantizing it, are half of the work each.

        Raises:
            ValueError: a file cannot be read, or there is no memory for the KV.
        """
        stage = plan.stage_of(rank)
        if stage is None:
            return None
        finish = Finish(recipe, self.dtype if device.type == "cpu" else None, pack_weights, progress)
        shard = next((each for each in before if each.span.covers(stage.span)), None)
        ready: Ready = {}
        if shard is None:
            shard = self.shard(stage.span)
            for each in before:
                shard.take(each)
                pages.give_back_memory()
            layer = finish.layer if finish.by_layer else None
            ready = weights.load(shard, self.tensors, device, finish.progress, layer)
        elif shard.span != stage.span:
            shard.narrow(stage.span)
            pages.give_back_memory()
        else:
            shard.read_bytes = 0
        shard.drop_table()
        finish.rest(shard.model, ready)
        return Runner(shard, plan, stage, block_tokens=block_tokens, max_requests=max_requests, device=device)


class Finish:
    """What becomes of linear layers once their weights are read: quantized, packed, widened, or left as they are.

    Args:
        dtype: of the weights; None where they are on no CPU.
        progress: told of all bytes when they are read, or of half if there is something to be done besides.

    Attributes:
        by_layer: whether that takes memory, so that layers should be finished one by one.
    """

    def __init__(
        self, recipe: Recipe | None, dtype: torch.dtype | None, pack_weights: bool, progress: Progress
    ) -> None:
        halves = dtype is not None and dtype.itemsize == 2
        has_kernels = dtype is not None and linear.has_kernels(dtype)
        self._recipe = recipe
        self._packs = halves and pack_weights and has_kernels
        self._widens = halves and not has_kernels
        self.by_layer = self._packs or recipe is not None
        self.progress: Progress = (lambda nbytes: progress(nbytes // 2)) if self.by_layer else progress

    def layer(self, layer: nn.Module, ready: Ready) -> None:
        """One layer, as soon as it is filled."""
        unfold(layer)
        if self._recipe is not None:
            quantize(layer, self._recipe.of_layer(layer), self.progress, ready)
        self._lay_out(layer)

    def rest(self, model: PreTrainedModel, ready: Ready) -> None:
        """The head, and what else is outside of the layers."""
        assert self._recipe is not None or not ready, "weights that lie quantized in files need their recipe"
        if self.by_layer or self._widens:
            unfold(model)
        if self._recipe is not None:
            quantize(model, self._recipe.of_head(model), self.progress, ready)
        self._lay_out(model)

    def _lay_out(self, module: nn.Module) -> None:
        if self._packs:
            linear.pack(module, self.progress)
        elif self._widens:
            linear.widen(module)
