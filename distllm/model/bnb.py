"""Linear layers as bitsandbytes holds them. The library is an extra, and imported when a layer is made.

Both layers get faster once they are told that they are not trained: bitsandbytes then lays the weight out for the
CPU's instructions at the first step.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

NF4_BLOCK = 64
NF4_OUTPUTS = 32

# Says at every step that it casts to float16, and at import which kernels it could download.
NOISE = "bitsandbytes"


def library() -> Any:
    """
    Raises:
        ValueError: it is not installed.
    """
    logging.getLogger(NOISE).setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError("quantization=bnb_int8 and bnb_nf4 need bitsandbytes: pip install 'distllm[bnb]'") from error


class BnbInt8:
    """LLM.int8() without outliers: 8-bit weights, one scale for each output, and inputs rounded to 8 bits a row.

    Outlying columns would be looked for over all rows of a step, so that an answer depended on its company.
    """

    name = "bnb_int8"

    def takes(self, outputs: int, inputs: int) -> bool:  # noqa: ARG002
        return True

    def nbytes(self, outputs: int, inputs: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        return outputs * inputs + 4 * outputs

    def make(self, plain: nn.Linear) -> nn.Module:
        layers = library().nn
        out = layers.Linear8bitLt(
            plain.in_features, plain.out_features, bias=plain.bias is not None, has_fp16_weights=False, threshold=0.0
        )
        out.weight = layers.Int8Params(plain.weight.contiguous(), requires_grad=False, has_fp16_weights=False)
        return _finished(out, plain)


class BnbNF4:
    """4-bit codes of numbers that are spread like a normal distribution, one scale for each 64 (QLoRA, 2023)."""

    name = "bnb_nf4"

    def takes(self, outputs: int, inputs: int) -> bool:
        return outputs % NF4_OUTPUTS == 0 and inputs % NF4_BLOCK == 0

    def nbytes(self, outputs: int, inputs: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        return outputs * inputs // 2 + 4 * outputs * inputs // NF4_BLOCK

    def make(self, plain: nn.Linear) -> nn.Module:
        layers = library().nn
        out = layers.LinearNF4(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=plain.weight.dtype,
            compress_statistics=False,
        )
        out.weight = layers.Params4bit(
            plain.weight.contiguous(),
            requires_grad=False,
            quant_type="nf4",
            blocksize=NF4_BLOCK,
            compress_statistics=False,
        )
        return _finished(out, plain)


def _finished(layer: nn.Module, plain: nn.Linear) -> nn.Module:
    """Quantized, which bitsandbytes does on the way to a device."""
    layer.bias = plain.bias
    return layer.to(plain.weight.device).eval().requires_grad_(False)
