"""All that is known of a model before a weight is read, and the way from there to a rank's runner."""

from __future__ import annotations

from pathlib import Path

import torch

from distllm.core import ModelSizes, Plan
from distllm.model import attention, families, weights
from distllm.model.checkpoint import Checkpoint
from distllm.model.runner import Runner
from distllm.model.shard import Shard, check_passes_through
from distllm.model.weights import Progress, TensorMap


class Blueprint:
    """A checkpoint whose architecture fits and whose tensors are all there, by name and shape.

    Args:
        dtype: a torch dtype's name, or `auto` for the checkpoint's own.
        context_length: longest sequence, in tokens; None takes what the model allows.

    Raises:
        ValueError: the checkpoint or its architecture cannot be used; the sentence says why.
    """

    def __init__(self, folder: Path, *, dtype: str, context_length: int | None) -> None:
        attention.register()
        self.checkpoint = Checkpoint(folder)
        self.config = self.checkpoint.config
        self.anatomy = families.inspect(self.config)
        check_passes_through(self.config, self.anatomy)
        self.tensors = TensorMap(self.checkpoint, self.anatomy)
        self.dtype = self.checkpoint.dtype(dtype)
        allowed = self.anatomy.context_length
        if context_length is not None and context_length > allowed:
            raise ValueError(f"model.context_length={context_length}: the model allows {allowed} tokens")
        self.sizes: ModelSizes = self.tensors.sizes(self.dtype, context_length or allowed)

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
        progress: Progress = lambda _: None,
    ) -> Runner | None:
        """Reads what the plan gives to a rank; None if that is nothing.

        Raises:
            ValueError: a file cannot be read.
        """
        stage = plan.stage_of(rank)
        if stage is None:
            return None
        shard = Shard(self.config, self.anatomy, stage.span, self.dtype)
        weights.load(shard, self.tensors, device, progress)
        return Runner(shard, plan, stage, block_tokens=block_tokens, max_requests=max_requests, device=device)
