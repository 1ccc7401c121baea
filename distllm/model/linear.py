"""Linear layers on CPUs without fast kernels for half precision: bf16 or fp16 weights, fp32 arithmetic.

A CPU without AVX-512 multiplies bf16 matrices up to ten times slower than fp32 ones. There, with more than a few rows,
it pays to widen the weights a block at a time, while the block is in the cache. The weights stay as they are; results
are rounded once. A pass over a built shard, which knows nothing of it.

Shapes: T packed tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Below so many rows the plain kernel wins, which reads the weights once and is bound by that.
FEW_ROWS = 4
# Numbers in a block; in fp32 they fit into a core's share of the cache.
BLOCK = 2**18
FAST = ("AVX512", "AMX")


def has_fast_half_precision() -> bool:
    """Whether this CPU multiplies matrices of 16-bit numbers by kernels of their own."""
    return torch.backends.cpu.get_cpu_capability().startswith(FAST)


class WideningLinear(nn.Module):
    """An nn.Linear that widens its weight by blocks of outputs when there are many rows."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = plain.weight
        self.bias = plain.bias
        self._outputs = max(1, BLOCK // plain.in_features)

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        if input_TI.numel() // input_TI.shape[-1] < FEW_ROWS:
            return F.linear(input_TI, self.weight, self.bias)
        wide_TI = input_TI.float()
        out = input_TI.new_empty(*input_TI.shape[:-1], self.weight.shape[0])
        for start in range(0, self.weight.shape[0], self._outputs):
            block_OI = self.weight[start : start + self._outputs].float()
            bias_O = None if self.bias is None else self.bias[start : start + self._outputs].float()
            out[..., start : start + self._outputs] = F.linear(wide_TI, block_OI, bias_O)
        return out


def widen(model: nn.Module) -> None:
    """Replaces the linear layers of a model; its parameters stay the same objects."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, WideningLinear(child))
