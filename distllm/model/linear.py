"""Linear layers of 16-bit weights on CPUs, by passes over a built shard that knows nothing of them.

Where the CPU multiplies matrices of such numbers by instructions of its own, weights are packed: laid out once, as
oneDNN's kernels read them, where the plain kernel does it in every step anew. Of one row, a step is then bound by
reading memory: 2.0 to 2.4 times faster than plain; of 16 rows 1.4 to 1.6 times; the results without a bias are the
same to the bit. Packing copies, so the pages of the plain weight are given back at once.

Elsewhere such a matrix is multiplied up to ten times slower than one of fp32. There weights stay as they are, and
with more than a few rows they are widened a block at a time, while the block is in the cache.

Shapes: T packed tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from distllm.model.pages import give_back
from distllm.model.unfold import Unfolded

# Below so many rows the plain kernel wins, which reads the weights once and is bound by that.
FEW_ROWS = 4
# Numbers in a block; in fp32 they fit into a core's share of the cache.
BLOCK = 2**18

# Layers that choose experts: they are small, a wrong choice costs more than a rounded weight, and some models look into
# their weights.
EXACT = ("gate", "router", "shared_expert_gate", "wg")

# What `torch.compile` makes of linear layers with constant weights; names of the pinned range of torch.
_onednn = torch.ops.mkldnn


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this 16-bit type by instructions of its own."""
    supported = {torch.bfloat16: _onednn._is_mkldnn_bf16_supported, torch.float16: _onednn._is_mkldnn_fp16_supported}
    return dtype in supported and bool(supported[dtype]())


class PackedLinear(nn.Module):
    """An nn.Linear whose weight only oneDNN can read: of type bfloat16, or float16 where the CPU has it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.bias = plain.bias
        self.packed = _onednn._reorder_linear_weight(plain.weight.contiguous())

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        out_TO: torch.Tensor = _onednn._linear_pointwise(input_TI, self.packed, self.bias, "none", [], "")
        return out_TO


class WideningLinear(nn.Module):
    """An nn.Linear that widens its weight by blocks of outputs when there are many rows; results are rounded once."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = plain.weight
        self.bias = plain.bias

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        if input_TI.numel() // input_TI.shape[-1] < FEW_ROWS:
            return F.linear(input_TI, self.weight, self.bias)
        return by_blocks(input_TI, self.weight.shape, self._of_rows)

    def _of_rows(self, wide_TI: torch.Tensor, rows: slice) -> torch.Tensor:
        bias_O = None if self.bias is None else self.bias[rows].to(wide_TI.dtype)
        return F.linear(wide_TI, self.weight[rows].to(wide_TI.dtype), bias_O)


def by_blocks(
    input_TI: torch.Tensor,
    shape: Sequence[int],
    of_rows: Callable[[torch.Tensor, slice], torch.Tensor],
    multiple: int = 1,
) -> torch.Tensor:
    """A linear layer whose weight (O, I) is widened by blocks of outputs, to the type that this CPU multiplies fast.

    Args:
        of_rows: takes inputs of that type and gives the outputs of some rows of the weight.
        multiple: of outputs that make a block.
    """
    wide_TI = input_TI.to(input_TI.dtype if has_kernels(input_TI.dtype) else torch.float32)
    outputs, inputs = shape
    out = input_TI.new_empty(*input_TI.shape[:-1], outputs)
    step = max(1, BLOCK // inputs // multiple) * multiple
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        out[..., rows] = of_rows(wide_TI, rows)
    return out


def pack(model: nn.Module, progress: Callable[[int], None] = lambda _: None) -> None:
    """Replaces the linear layers of a model; a weight that is used elsewhere too, such as a tied table, stays.

    Args:
        progress: called with the bytes of each weight as it is packed.
    """
    shared = shared_weights(model)
    for parent, name, plain in plain_layers(model):
        if plain.weight.data_ptr() not in shared:
            setattr(parent, name, PackedLinear(plain))
            give_back(plain.weight)
            progress(plain.weight.nbytes)


def widen(model: nn.Module) -> None:
    """Replaces the linear layers of a model; its parameters stay the same objects."""
    for parent, name, plain in plain_layers(model):
        setattr(parent, name, WideningLinear(plain))


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed weights of a model, which are no parameters of it any more."""
    packed = (module.packed for module in model.modules() if isinstance(module, PackedLinear))
    return sum(weight.numel() * weight.itemsize for weight in packed)


def plain_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Plain linear layers, each with the module that holds it and its name there; not those that choose experts."""
    held = ((parent, *child) for parent in list(model.modules()) for child in list(parent.named_children()))
    for parent, name, child in held:
        if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Unfolded) and name not in EXACT:
            yield parent, name, child


def shared_weights(model: nn.Module) -> set[int]:
    """Where weights lie that are used in more than one place, and may not be given back by one of them."""
    places = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(each.data_ptr() for module in places for each in module.parameters(recurse=False))
    return {where for where, count in uses.items() if count > 1}
