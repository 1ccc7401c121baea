"""Weights in 8 and 4 bits: how near they are, that few and many rows agree, and what is quantized at all."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from architectures import FITTING, LAYERS, TEXT_PARTS, architecture_checkpoint
from fakes import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distllm.config import QuantizationConfig
from distllm.core import ModelSizes, Plan, Row, SamplingParams, Span, Stage, Step
from distllm.model import integers, linear, quantize
from distllm.model.blueprint import Blueprint
from distllm.model.bnb import BnbInt8
from distllm.model.integers import Int8Linear, to_int4, to_int8, unpacked
from distllm.model.quantize import Int4, Int8, Recipe, check_installed
from distllm.model.runner import Runner

CPU = torch.device("cpu")
METHODS = ("int8", "int4", "bnb_int8", "bnb_nf4")
SPANS = (Span(0, 2, embed=True), Span(2, 5), Span(5, 5, head=True), Span(0, 5, embed=True, head=True))


def plain_layer(outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(outputs + inputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def int8(plain: nn.Linear) -> nn.Module:
    return Int8().make(plain)


def int4(plain: nn.Linear, group: int) -> nn.Module:
    return Int4(group).make(plain)


def restored8(plain: nn.Linear) -> torch.Tensor:
    integer_OI, scale_O = to_int8(plain.weight)
    return integer_OI.double() * scale_O[:, None].double()


def restored4(plain: nn.Linear, group: int) -> torch.Tensor:
    integer_OI, scale_zero_GO2 = to_int4(plain.weight, group)
    scale_OG1, zero_OG1 = scale_zero_GO2.double().transpose(0, 1)[..., None].unbind(2)
    grouped_OGi = (integer_OI.double() - 8).unflatten(1, (-1, group))
    return (grouped_OGi * scale_OG1 + zero_OG1).flatten(1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(1e-3, 1e3), bits=st.sampled_from([8, 4]))
def test_no_weight_is_further_off_than_half_a_scale(seed: int, magnitude: float, bits: int) -> None:
    plain = nn.Linear(64, 64, bias=False).requires_grad_(False)
    plain.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * magnitude)
    if bits == 8:
        off_OI = (restored8(plain) - plain.weight).abs()
        assert (off_OI <= plain.weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
        return
    off_OGi = (restored4(plain, 32) - plain.weight).unflatten(1, (-1, 32))
    low_OG, high_OG = plain.weight.unflatten(1, (-1, 32)).aminmax(dim=-1)
    even_OG = (high_OG - low_OG) / 15
    assert (off_OGi.square().mean(-1).sqrt() <= even_OG / 2).all(), "worse than rounding to even steps can be"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_fit_the_grid_stay_as_they_are(dtype: torch.dtype) -> None:
    steps = torch.arange(64 * 64).view(64, 64)
    plain = plain_layer(64, 64, dtype)
    plain.weight.copy_((steps * 7 % 16 - 5) * 0.25)
    assert torch.equal(restored4(plain, 32), plain.weight.double())
    plain.weight.copy_((steps * 37 % 255 - 127) * 0.5)
    plain.weight[:, 0] = 63.5  # so that every output's scale is 0.5
    assert torch.equal(restored8(plain), plain.weight.double())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_weights_that_are_all_alike(value: float) -> None:
    plain = plain_layer(64, 32, torch.float32)
    plain.weight.fill_(value)
    for restored in (restored8(plain), restored4(plain, 32)):
        torch.testing.assert_close(restored, plain.weight.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 4, 15, 40])
def test_integers_that_lie_anywhere(rows: int) -> None:
    """Torch's kernel of 8 bits crashes where weights do not begin at a multiple of 16 bytes, as in mapped files."""
    plain = plain_layer(96, 64, torch.bfloat16)
    wanted = int8(plain)
    room = torch.empty(96 * 64 + 16, dtype=torch.int8)
    elsewhere = room[1 - room.data_ptr() % 16 :][: 96 * 64].view(96, 64).copy_(wanted.integers)
    assert elsewhere.data_ptr() % 16 == 1
    moved = Int8Linear(elsewhere, wanted.scale, None)
    input_TI = torch.randn(rows, 64, dtype=torch.bfloat16)
    assert torch.equal(moved(input_TI), wanted(input_TI))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 96), (64, 32), (192, 64)])
def test_few_and_many_rows_agree(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(linear, "BLOCK", 64 * inputs)  # one side-by-side block of outputs at a time
    plain = plain_layer(outputs, inputs, dtype, bias=bias)
    input_TI = torch.randn(1, integers.MANY_ROWS_4, inputs, dtype=dtype)
    for layer, weight_OI in (
        (int8(plain), restored8(plain)),
        (int4(plain, 32), restored4(plain, 32)),
    ):
        exact_TO = input_TI.double() @ weight_OI.T + (plain.bias.double() if bias else 0)
        near = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-4}
        for rows in (1, 5, integers.MANY_ROWS_8, integers.MANY_ROWS_4):
            out = layer(input_TI[:, :rows])
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), exact_TO[:, :rows], **near)


@pytest.mark.parametrize("inputs", [8, 40, 36, 17])
def test_inputs_that_the_8_bit_kernel_reads_past_never_reach_it(inputs: int) -> None:
    plain = plain_layer(3, inputs, torch.bfloat16)
    input_TI = torch.randn(1, 1, inputs, dtype=torch.bfloat16)
    exact_TO = input_TI.double() @ restored8(plain).T
    torch.testing.assert_close(int8(plain)(input_TI).double(), exact_TO, rtol=3e-2, atol=3e-2)


def test_the_layout_of_4_bits_is_known_or_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    integer_OI = torch.randint(0, 16, (192, 64), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(integer_OI, 1)
    is_ours = torch.equal(unpacked(packed, torch.int32).transpose(1, 2).flatten(0, 1), integer_OI)
    assert integers.layout_is_known() == is_ours == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    plain = plain_layer(64, 32, torch.float32)
    many_TI = torch.randn(integers.MANY_ROWS_4, 32)
    known = int4(plain, 32)(many_TI)
    monkeypatch.setattr(integers, "layout_is_known", lambda: False)
    torch.testing.assert_close(int4(plain, 32)(many_TI), known, rtol=1e-4, atol=1e-4)


def test_a_large_weight_is_quantized_by_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_layer(320, 64, torch.bfloat16)
    whole8, whole4 = int8(plain), int4(plain, 32)
    monkeypatch.setattr(integers, "SLAB", 64 * 130)
    assert [rows.start for rows in integers.slabs(plain.weight)] == [0, 128, 256]
    assert torch.equal(int8(plain).integers, whole8.integers)
    assert torch.equal(int8(plain).scale, whole8.scale)
    assert torch.equal(int4(plain, 32).integers, whole4.integers)
    assert torch.equal(int4(plain, 32).scale_zero, whole4.scale_zero)


def blueprint(folder: Path, dtype: str = "float32") -> Blueprint:
    return Blueprint(folder, dtype=dtype, context_length=None)


def load(known: Blueprint, span: Span, quantization: QuantizationConfig) -> Runner:
    stage = Stage(rank=0, span=span, weight_bytes=0, kv_bytes=0, work_share=1.0)
    plan = Plan(stages=(stage,), idle=(), kv_tokens=64)
    recipe = Recipe.of(quantization)
    runner = known.load(plan, 0, block_tokens=16, max_requests=2, device=CPU, recipe=recipe)
    assert runner is not None
    return runner


def quantized_sizes(known: Blueprint, quantization: QuantizationConfig) -> ModelSizes:
    sizes = known.sizes_with(quantization).quantized
    assert sizes is not None
    return sizes


@pytest.mark.parametrize("head", ["none", "int8", "int4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_the_plan_knows_what_each_part_takes(kind: str, method: str, head: str, tmp_path: Path) -> None:
    known = blueprint(tiny_checkpoint(tmp_path, kind), "bfloat16")
    quantization = QuantizationConfig(method=method, head=head)
    sizes = quantized_sizes(known, quantization)
    assert sum(sizes.layer_bytes) < 0.6 * sum(known.sizes.layer_bytes)
    assert sizes.embed_bytes == known.sizes.embed_bytes
    assert (sizes.head_bytes < 0.6 * known.sizes.head_bytes) == (head != "none")
    for span in SPANS:
        held = load(known, span, quantization).shard.nbytes
        books = {"bnb_int8": 1, "bnb_nf4": 160}.get(method, 0) * (7 * span.layers + span.head)  # of bitsandbytes
        assert sizes.weight_bytes(span) <= held <= sizes.weight_bytes(span) + books


def layers_of(runner: Runner) -> dict[str, str]:
    """The type of each module that multiplies, by name."""
    modules = runner.shard.model.named_modules()
    return {name: type(module).__name__ for name, module in modules if "Linear" in type(module).__name__}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_may_be_rounded_is(method: str, tmp_path: Path) -> None:
    known = blueprint(architecture_checkpoint(tmp_path, "qwen2_moe"))
    whole = Span(0, LAYERS, embed=True, head=True)
    types = layers_of(load(known, whole, QuantizationConfig(method=method, head="none")))
    kept = {name for name, type_ in types.items() if type_ == "Linear"}
    assert {name.rpartition(".")[2] for name in kept} == {"lm_head", "shared_expert_gate"}
    assert len(set(types) - kept) >= LAYERS * 4, "attention's layers"


def test_a_size_that_is_not_taken_falls_back_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantize._say_once.cache_clear()
    known = blueprint(tiny_checkpoint(tmp_path, "llama", intermediate_size=72))
    with caplog.at_level(logging.INFO, "distllm"):
        types = layers_of(load(known, SPANS[-1], QuantizationConfig(method="int4")))
    assert {type_ for name, type_ in types.items() if "mlp" in name} == {"Int8Linear"}
    assert {type_ for name, type_ in types.items() if "q_proj" in name} == {"Int4Linear"}
    said = [message for message in caplog.messages if "64 x 72" in message]
    assert said == ["int4 takes no weight of 64 x 72: such are held in int8"]


def test_without_bitsandbytes_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"need bitsandbytes: pip install 'distllm\[bnb\]'$"):
        check_installed("bnb_nf4")
    check_installed("int8")
    known = blueprint(tiny_checkpoint(tmp_path))
    assert quantized_sizes(known, QuantizationConfig(method="bnb_nf4", stages=[1])), "another rank may have it"
    with pytest.raises(ValueError, match="need bitsandbytes"):
        load(known, SPANS[-1], QuantizationConfig(method="bnb_nf4"))


def test_a_row_of_bitsandbytes_does_not_see_an_outlier_of_another() -> None:
    layer = BnbInt8().make(plain_layer(64, 64, torch.bfloat16))
    input_TI = torch.randn(3, 64, dtype=torch.bfloat16)
    alone_TO = layer(input_TI[1:])
    input_TI[0, 7] = 50.0
    assert torch.equal(layer(input_TI)[1:], alone_TO)


@pytest.mark.parametrize("rows", [1, integers.MANY_ROWS_8])
def test_numbers_of_float16_do_not_overflow(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_kernels", lambda _: True)  # as on a CPU that multiplies float16 itself
    plain = nn.Linear(1024, 64, bias=False, dtype=torch.float16).requires_grad_(False)
    plain.weight.fill_(0.01)
    out_TO = int8(plain)(torch.ones(rows, 1024, dtype=torch.float16))
    torch.testing.assert_close(out_TO, torch.full_like(out_TO, 10.24), rtol=1e-2, atol=0)


def test_small_weights_are_rounded_no_worse() -> None:
    plain = plain_layer(64, 64, torch.float32)
    plain.weight.mul_(1e-7)
    off = (restored8(plain) - plain.weight).norm() / plain.weight.norm()
    assert off < 0.02


def test_rows_that_lie_apart() -> None:
    plain = plain_layer(64, 64, torch.float32)
    apart_TI = torch.randn(5, 128)[:, :64]
    for layer in (int8(plain), int4(plain, 32)):
        torch.testing.assert_close(layer(apart_TI), layer(apart_TI.contiguous()))


@pytest.mark.parametrize("method", METHODS)
def test_a_token_does_not_depend_on_its_company(method: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    runner = load(blueprint(folder), SPANS[-1], QuantizationConfig(method=method))
    params = SamplingParams(seed=0)
    alone = Step(0, (Row(0, 0, 0, (5, 6, 7), ((0, 1),), True, params),))
    company = Step(1, (Row(1, 1, 0, tuple(range(30)), ((1, 2),), True, params), *alone.rows))
    single, both = runner.run(alone, None).tensor, runner.run(company, None).tensor
    assert single.tolist() == both.tolist()[1:]


# The others are as these: the long runs have them all.
SHORT = ("falcon", "gpt_oss", "deepseek_v3", "hunyuan_v1_moe", "opt", "phi", "qwen3_moe", "gemma3")
EVERY = [pytest.param(kind, marks=[] if kind in SHORT else pytest.mark.slow) for kind in (*FITTING, *TEXT_PARTS)]


@pytest.mark.parametrize("kind", EVERY)
def test_no_architecture_misses_the_plain_layers(kind: str, tmp_path: Path) -> None:
    known = blueprint(architecture_checkpoint(tmp_path, kind), "bfloat16")
    runner = load(known, Span(0, LAYERS, embed=True, head=True), QuantizationConfig(method="int8"))
    row = Row(0, 0, 0, (5, 6, 7), ((0, 1),), True, SamplingParams(seed=0))
    assert 0 <= runner.run(Step(0, (row,)), None).tensor.item() < known.config.vocab_size
    layers = runner.shard.base.get_submodule(known.anatomy.layers)
    left = [name for name, parameter in layers.named_parameters() if parameter.dim() > 1]
    chooses = re.compile(r"\.(gate|router|shared_expert_gate|wg)\b")  # experts, so it stays exact
    others = {name.partition(".")[2] for name in left if not chooses.search(name)}
    assert others == {f"feed_forward.experts.{each}_proj" for each in ("gate_up", "down") if "llama4" in kind}
    assert "Int8Linear" in {type(module).__name__ for module in layers.modules()}
