"""Linear layers of 8- and 4-bit integers, and how weights become integers.

Of a few rows a step is bound by reading the weights, which torch's weight-only kernels do at a half or a quarter of
the bytes. Of many rows those kernels lose to the plain one, so weights are then widened a block at a time, while the
block is in the cache: each weight once a step, however many the rows.

Integers as they are stored are laid out row by row; of 4 bits the kernel has a layout of its own, which is this CPU's.

Shapes: T packed tokens, I inputs, O outputs; G groups of i inputs; B blocks of o outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from distllm.model.linear import by_blocks

# Rows from which a block of widened weights is faster than the kernel for few.
MANY_ROWS_8, MANY_ROWS_4 = 28, 128
# Numbers that are quantized at once, so that a head does not need another of itself in fp32.
SLAB = 2**20
# The 8-bit kernel reads so many inputs at a time, and beyond the end of those that are fewer.
KERNEL_INPUTS = 16
# The 8-bit kernel reads weights only from where its registers want them, and crashes elsewhere.
KERNEL_ALIGNED_BYTES = 16
# How often the integers and the scales of 4 bits are fitted to each other; then little is left to gain.
TURNS = 2
# In place of a scale of 0, to divide by.
TINY = 1e-8
# Outputs that the 4-bit kernel lays side by side; its private layout of the pinned range of torch.
SIDE_BY_SIDE = 64


class Int8Linear(nn.Module):
    """An nn.Linear of 8-bit integers: `integers` (O, I) and `scale` (O,) as by `store_int8`."""

    integers: torch.Tensor
    scale: torch.Tensor

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        # In a mapped file they may lie anywhere.
        self.register_buffer("integers", integers.clone() if integers.data_ptr() % KERNEL_ALIGNED_BYTES else integers)
        self.register_buffer("scale", scale)

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        flat_TI = input_TI.reshape(-1, input_TI.shape[-1])
        if flat_TI.shape[0] < MANY_ROWS_8 and flat_TI.shape[1] % KERNEL_INPUTS == 0:
            out_TO = torch._weight_int8pack_mm(flat_TI, self.integers, self.scale)
        else:
            out_TO = by_blocks(flat_TI, self.integers.shape, self._of_rows)
        return _finished(out_TO, self.bias, input_TI)

    def _of_rows(self, wide_TI: torch.Tensor, rows: slice) -> torch.Tensor:
        weight_OI = self.integers[rows].to(wide_TI.dtype)
        if wide_TI.dtype == torch.float16:  # sums of products with whole numbers would be beyond its largest
            return F.linear(wide_TI, weight_OI * self.scale[rows, None])
        return F.linear(wide_TI, weight_OI) * self.scale[rows]


class Int4Linear(nn.Module):
    """An nn.Linear of 4-bit integers: two to a byte as torch's kernel reads them, made of those by `store_int4`."""

    integers: torch.Tensor
    scale_zero: torch.Tensor

    def __init__(self, integers: torch.Tensor, scale_zero: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.group = 2 * integers.shape[1] // len(scale_zero)
        packed = torch.empty_like(integers)
        for rows in slabs(packed):
            packed[rows] = torch._convert_weight_to_int4pack_for_cpu(two_of_each(integers[rows]), 1)
        self.register_buffer("integers", packed)
        self.register_buffer("scale_zero", scale_zero)

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        flat_TI = input_TI.reshape(-1, input_TI.shape[-1]).contiguous()
        if flat_TI.shape[0] < MANY_ROWS_4 or not layout_is_known():
            out_TO = torch._weight_int4pack_mm_for_cpu(flat_TI, self.integers, self.group, self.scale_zero)
        else:
            out_TO = by_blocks(flat_TI, (len(self.integers), flat_TI.shape[1]), self._of_rows, multiple=SIDE_BY_SIDE)
        return _finished(out_TO, self.bias, input_TI)

    def _of_rows(self, wide_TI: torch.Tensor, rows: slice) -> torch.Tensor:
        integer_BIo = unpacked(self.integers[rows], wide_TI.dtype)
        blocks, inputs, side = integer_BIo.shape
        groups = inputs // self.group
        scale_GBo, zero_GBo = self.scale_zero[:, rows].float().view(groups, blocks, side, 2).unbind(-1)
        scale_BG1o, least_BG1o = (
            each_GBo.transpose(0, 1)[:, :, None].to(wide_TI.dtype, memory_format=torch.contiguous_format)
            for each_GBo in (scale_GBo, zero_GBo - 8 * scale_GBo)
        )
        integer_BGio = integer_BIo.view(blocks, groups, self.group, side)
        weight_BGio = torch.addcmul(least_BG1o, integer_BGio, scale_BG1o, out=torch.empty_like(integer_BGio))
        out_BTo = wide_TI @ weight_BGio.view(blocks, inputs, side)
        return out_BTo.transpose(0, 1).flatten(1)


def _finished(out_TO: torch.Tensor, bias_O: torch.Tensor | None, input_TI: torch.Tensor) -> torch.Tensor:
    out_TO = out_TO if bias_O is None else out_TO + bias_O
    return out_TO.view(*input_TI.shape[:-1], out_TO.shape[-1])


def store_int8(weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Returns:
        integers int8 (O, I) and scale (O,), of the weight's type.
    """
    integers = torch.empty(weight_OI.shape, dtype=torch.int8)
    scale = torch.empty(len(weight_OI), dtype=weight_OI.dtype)
    for rows in slabs(weight_OI):
        integers[rows], scale[rows] = to_int8(weight_OI[rows].contiguous())
    return {"integers": integers, "scale": scale}


def store_int4(weight_OI: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """
    Returns:
        integers uint8 (O, I / 2), the first of two inputs in the low half; scale_zero (G, O, 2), of the weight's type.
    """
    outputs, inputs = weight_OI.shape
    integers = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    scale_zero = torch.empty(inputs // group, outputs, 2, dtype=weight_OI.dtype)
    for rows in slabs(weight_OI):
        integer_OI, scale_zero[:, rows] = to_int4(weight_OI[rows].contiguous(), group)
        integers[rows] = integer_OI[:, 0::2] | integer_OI[:, 1::2] << 4
    return {"integers": integers, "scale_zero": scale_zero}


def two_of_each(byte_OI: torch.Tensor) -> torch.Tensor:
    """The integers int32 (O, I) of bytes (O, I / 2) by `store_int4`."""
    return torch.stack((byte_OI & 15, byte_OI >> 4), dim=-1).flatten(1).to(torch.int32)


def slabs(weight_OI: torch.Tensor) -> Iterator[slice]:
    """Rows that are quantized at once, a multiple of what the 4-bit kernel lays side by side."""
    rows = max(1, SLAB // weight_OI.shape[1] // SIDE_BY_SIDE) * SIDE_BY_SIDE
    return (slice(start, start + rows) for start in range(0, len(weight_OI), rows))


def to_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns:
        integers int8 (O, I) and their scales (O,), of the weight's type.
    """
    wide_OI = weight_OI.float()
    scale_O = (wide_OI.abs().amax(1) / 127).to(weight_OI.dtype)
    divisor_O1 = scale_O.where(scale_O > 0, 1)[:, None].float()
    return (wide_OI / divisor_O1).round().clamp(-127, 127).to(torch.int8), scale_O


def to_int4(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers nearest to a weight, and the scales and zeros nearest to that, by turns (Lloyd, 1957).

    Returns:
        integers int32 (O, I) of 0 to 15; scales and zeros (G, O, 2), of the weight's type.
    """
    wide_OGi = weight_OI.float().view(len(weight_OI), -1, group)
    low_OG1, high_OG1 = wide_OGi.aminmax(dim=-1, keepdim=True)
    scale_OG1 = ((high_OG1 - low_OG1) / 15).clamp_(min=TINY)
    integer_OGi = nearest(wide_OGi, scale_OG1, low_OG1)
    for _ in range(TURNS):
        scale_OG1, low_OG1 = line_through(integer_OGi, wide_OGi)
        integer_OGi = nearest(wide_OGi, scale_OG1, low_OG1)
    scale_zero_OG2 = torch.cat((scale_OG1, low_OG1 + 8 * scale_OG1), dim=-1).to(weight_OI.dtype)
    return integer_OGi.to(torch.int32).flatten(1), scale_zero_OG2.transpose(0, 1).contiguous()


def nearest(wide_OGi: torch.Tensor, scale_OG1: torch.Tensor, low_OG1: torch.Tensor) -> torch.Tensor:
    """The whole numbers of 0 to 15 for which `scale * number + low` is nearest."""
    return ((wide_OGi - low_OG1) / scale_OG1).round_().clamp_(0, 15)


def line_through(integer_OGi: torch.Tensor, wide_OGi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns:
        slopes and offsets (O, G, 1) of the least squares of each group.
    """
    mean_OG1 = integer_OGi.mean(-1, keepdim=True)
    apart_OGi = integer_OGi - mean_OG1
    spread_OG1 = apart_OGi.square().sum(-1, keepdim=True).clamp_(min=TINY)
    slope_OG1 = ((apart_OGi * wide_OGi).sum(-1, keepdim=True) / spread_OG1).clamp_(min=TINY)
    return slope_OG1, wide_OGi.mean(-1, keepdim=True) - slope_OG1 * mean_OG1


def unpacked(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The integers (B, I, o) of a weight that is packed for the 4-bit kernel: B blocks of 64 outputs side by side.

    Of each input, 32 bytes hold the integer of output o in their low and that of output o + 32 in their high half.
    """
    bytes_BIo = weight.view(-1, 2 * weight.shape[1], SIDE_BY_SIDE // 2)
    out_BIo = torch.empty(*bytes_BIo.shape[:2], SIDE_BY_SIDE, dtype=dtype)
    out_BIo[..., : SIDE_BY_SIDE // 2] = bytes_BIo & 15
    out_BIo[..., SIDE_BY_SIDE // 2 :] = bytes_BIo >> 4
    return out_BIo


@functools.cache
def layout_is_known() -> bool:
    """Whether this CPU's 4-bit kernel packs as `unpacked` expects; one without AVX-512 does not."""
    integers = torch.arange(2 * SIDE_BY_SIDE * 32, dtype=torch.int32).view(-1, 32) * 7 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(integers, 1)
    return torch.equal(unpacked(packed, torch.int32).transpose(1, 2).flatten(0, 1), integers)
