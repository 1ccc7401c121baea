"""Half-precision weights with fp32 arithmetic: the exact result, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from distllm.model import linear
from distllm.model.linear import WideningLinear, widen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_the_exact_one_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, bias: bool
) -> None:
    monkeypatch.setattr(linear, "BLOCK", 24 * 10)  # blocks of 10 outputs, the last one shorter
    torch.manual_seed(0)
    plain = nn.Linear(24, 37, bias=bias, dtype=dtype)
    input_TI = torch.randn(1, rows, 24, dtype=dtype)
    with torch.inference_mode():
        out = WideningLinear(plain)(input_TI)
    exact = input_TI.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    assert out.dtype == dtype
    if rows >= linear.FEW_ROWS:
        unit = torch.finfo(dtype).eps / 2
        assert ((out.double() - exact).abs() <= unit * exact.abs() * 1.01 + 1e-6).all()
    else:
        torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.02)


def test_a_model_keeps_its_parameters_and_its_ties() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama_tied"), dtype=torch.bfloat16).eval()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    widen(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_this_cpu_has_an_answer() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert linear.has_fast_half_precision() == ("avx512bw" in flags)
