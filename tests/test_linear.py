"""Linear layers of 16-bit weights: packed ones give the same bits, widened ones the exact result, rounded once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import tiny_config
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from distllm.model import linear
from distllm.model.linear import PackedLinear, WideningLinear, pack, packed_bytes, widen


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


PACKS = linear.has_kernels(torch.bfloat16)
packing = pytest.mark.skipif(not PACKS, reason="this CPU has no kernels of its own for bfloat16, so nothing is packed")


def test_this_cpu_has_an_answer() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert bool({"avx512bw", "avx_ne_convert"} & set(flags)) == PACKS
    assert not linear.has_kernels(torch.float32)


@packing
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (576, 192), (33, 17)])
def test_packed_weights_give_the_same_bits(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    input_TI = torch.randn(1, rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(PackedLinear(plain)(input_TI), plain(input_TI))


@packing
def test_a_packed_layer_adds_its_bias() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 40, dtype=torch.bfloat16)
    input_TI = torch.randn(5, 48, dtype=torch.bfloat16)
    exact = input_TI.double() @ plain.weight.double().T + plain.bias.double()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain)(input_TI).double(), exact, atol=1e-3, rtol=1e-2)


@packing
def test_a_model_is_packed_but_for_a_weight_that_is_used_twice() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama_tied"), dtype=torch.bfloat16).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        before = model(tokens, use_cache=False).logits
    weights = sum(module.weight.nbytes for module in model.modules() if type(module) is nn.Linear)
    table = model.get_input_embeddings().weight
    told: list[int] = []
    pack(model, told.append)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is table
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == [nn.Linear]
    assert sum(told) == packed_bytes(model) == weights - table.nbytes
    with torch.inference_mode():
        assert torch.equal(model(tokens, use_cache=False).logits, before)


@packing
def test_a_weight_of_two_layers_stays_plain_and_halves_of_one_are_packed() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    halves = [nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    both = torch.randn(128, 64, dtype=torch.bfloat16)
    for half, weight in zip(halves, both.chunk(2), strict=True):
        half.weight = nn.Parameter(weight)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), *halves).requires_grad_(False)
    input_TI = torch.randn(3, 64, dtype=torch.bfloat16)
    before = model(input_TI)
    pack(model)
    assert [type(module) for module in model[:2].modules() if isinstance(module, nn.Linear)] == [nn.Linear]
    assert packed_bytes(model) == both.nbytes
    assert torch.equal(model(input_TI), before)


GIVEN_BACK = """
import re, sys, torch
from pathlib import Path
from safetensors import safe_open
from torch import nn
from distllm.model.linear import pack
def mapped():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, device="meta") for _ in range(20)))
pack(nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16)).requires_grad_(False))
with safe_open(sys.argv[1], "pt") as file:
    model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)
kept = model[0].weight[:1]
before, most = mapped(), []
pack(model.requires_grad_(False), lambda _: most.append(mapped()))
print(len(most), max(most) - before)
"""


@packing
def test_pages_of_packed_weights_are_given_back_although_their_file_stays_mapped(tmp_path: Path) -> None:
    weights = {f"{index}.weight": torch.randn(1024, 1024, dtype=torch.bfloat16) for index in range(20)}
    save_file(weights, tmp_path / "weights.safetensors")
    command = [sys.executable, "-c", GIVEN_BACK, str(tmp_path / "weights.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    packed, held = map(int, done.stdout.split())
    assert packed == 20
    assert held < 3 * weights["0.weight"].nbytes, "the pages of all 20 are still held"
