"""One rank's part of a step: rows in, hidden states or tokens out.

Knows the shard, its cache and, where the head is, the sampler; knows no network.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from distllm.core import Logprob, Plan, Stage, Step
from distllm.model import families
from distllm.model.cache import KVCache, Layout
from distllm.model.sampler import Sampler
from distllm.model.shard import Shard


@dataclass(frozen=True, slots=True)
class Result:
    """What a stage made of a step: hidden states (T, D), or tokens int64 (rows that sample,) after the head.

    `logprobs` are of the rows that ask for it, by their places among the tokens.
    """

    tensor: torch.Tensor
    body_seconds: float
    head_seconds: float
    logprobs: tuple[tuple[int, Logprob], ...] = ()


class Runner:
    """Runs the steps of one epoch through one shard."""

    def __init__(
        self, shard: Shard, plan: Plan, stage: Stage, *, block_tokens: int, max_requests: int, device: torch.device
    ) -> None:
        self.shard = shard
        self.stage = stage
        self.device = device
        self._block_tokens = block_tokens
        kinds = shard.anatomy.attention
        shapes = {layer: kinds[layer].shape for layer in range(stage.span.start, stage.span.stop)}
        self.cache = KVCache(shapes, plan.kv_tokens, shard.dtype, device)
        shard.use(self.cache)
        vocabulary = int(shard.model.config.vocab_size)
        self._sampler = Sampler(max_requests, vocabulary, device) if stage.span.head else None

    def run(self, step: Step, hidden_TD: torch.Tensor | None) -> Result:
        """
        Args:
            hidden_TD: what the stage before made of the step; None on the first stage.
        """
        with families.defaults:
            return self._run(step, hidden_TD)

    def _run(self, step: Step, hidden_TD: torch.Tensor | None) -> Result:
        began = time.perf_counter()
        self.cache.copy([copy for row in step.rows for copy in row.copies], self._block_tokens)
        layout = Layout.of(step, self._block_tokens, self.device)
        inputs = self._tokens(step) if hidden_TD is None else hidden_TD.to(self.device)
        if self._sampler is None:
            out = self.shard.forward(inputs, layout)
            return Result(out, time.perf_counter() - began, 0.0)
        ends, slots, positions = self._follow(self._sampler, step)
        logits_BV = self.shard.forward(inputs, layout, torch.tensor(ends, device=self.device))
        body_done = self.shard.body_done
        if not ends:
            return Result(torch.empty(0, dtype=torch.long), body_done - began, time.perf_counter() - body_done)
        allowed = [row.allowed for row in step.rows if row.samples]
        tokens = self._sampler.sample(logits_BV, slots, positions, allowed).cpu()
        logprobs = tuple(self._sampler.logprobs(logits_BV, tokens, slots))
        return Result(tokens, body_done - began, time.perf_counter() - body_done, logprobs)

    def _tokens(self, step: Step) -> torch.Tensor:
        return torch.tensor([token for row in step.rows for token in row.tokens], device=self.device)

    def _follow(self, sampler: Sampler, step: Step) -> tuple[list[int], list[int], list[int]]:
        """Shows the sampler every token of the step; of the rows that sample: last place in T, slot, next position."""
        ends, slots, positions, end = [], [], [], 0
        for row in step.rows:
            end += len(row.tokens)
            if row.params is not None:
                sampler.start(row.slot, row.params, row.prompt)
            sampler.see(row.slot, row.tokens, row.start)
            if row.samples:
                ends.append(end - 1)
                slots.append(row.slot)
                positions.append(row.stop)
        return ends, slots, positions
