"""Experts taken apart and transposed weights: the same numbers as transformers' own ways to run them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import (
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from distllm.model.linear import has_kernels, pack, packed_bytes
from distllm.model.unfold import SplitExperts, Unfolded, unfold

WIDTH, INNER, EXPERTS, TOP = 64, 32, 6, 2


class UngatedExperts(nn.Module):
    """Experts without a gate and with a norm after each: transformers' models of this kind are no decoders of ours."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(WIDTH)


def experts(kind: str, dtype: torch.dtype) -> Any:
    config: Any = Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=INNER, num_experts=EXPERTS)
    if kind == "gated":
        made: Any = Qwen3MoeExperts(config)
    elif kind == "transposed, with biases":
        made = GptOssExperts(GptOssConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS))
    else:
        made = use_experts_implementation(UngatedExperts, has_gate=False, has_post_expert_norm=True)(config)
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("kind", ["gated", "transposed, with biases", "ungated, with norms"])
def test_experts_say_the_same_taken_apart(kind: str, rows: int, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"experts": experts(kind, dtype)})
    hidden_TD = torch.randn(rows, WIDTH, dtype=dtype)
    weight_TK, chosen_TK = torch.rand(rows, EXPERTS).topk(TOP)
    exact_TD = batched_mm_experts_forward(
        copy.deepcopy(model.experts).double(), hidden_TD.double(), chosen_TK, weight_TK
    )

    def off(out_TD: torch.Tensor) -> float:
        return float((out_TD - exact_TD).abs().max())

    # Of their two ways to run experts, one rounds more often.
    ways = (batched_mm_experts_forward, grouped_mm_experts_forward)
    allowed = 1.2 * max(off(run(model.experts, hidden_TD, chosen_TK, weight_TK)) for run in ways)
    assert 0 < allowed < (0.1 if dtype == torch.bfloat16 else 1e-5) * float(exact_TD.abs().max())
    held = {each.data_ptr() for each in model.parameters() if each.dim() == 3}
    matrices = sum(each.nbytes for each in model.parameters() if each.dim() == 3)
    before = sum(each.numel() for each in model.parameters())
    unfold(model)
    assert isinstance(model.experts, SplitExperts)
    assert sum(each.numel() for each in model.parameters()) == before
    ends = (model.experts.first, model.experts.second)
    assert {each[0].weight.data_ptr() for each in ends} == held, "weights were copied"
    out = model.experts(hidden_TD, chosen_TK, weight_TK)
    assert out.dtype == dtype
    assert off(out) <= allowed
    if has_kernels(dtype):
        pack(model)
        assert packed_bytes(model) == matrices
        assert off(model.experts(hidden_TD, chosen_TK, weight_TK)) <= allowed
    unfold(model)
    assert isinstance(model.experts, SplitExperts), "once is enough"


def test_the_origin_of_a_weight_leads_to_it() -> None:
    for kind in ("gated", "transposed, with biases"):
        folded = experts(kind, torch.float32)
        model = nn.ModuleDict({"layer": nn.ModuleDict({"experts": copy.deepcopy(folded)})})
        unfold(model)
        layers = [module for module in model.modules() if isinstance(module, Unfolded)]
        assert len(layers) == 2 * EXPERTS
        for layer in layers:
            parameter = folded.get_parameter(layer.origin.name.removeprefix("layer.experts."))
            assert torch.equal(layer.origin.view(parameter), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_layer_says_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": Conv1D(96, WIDTH)})}).to(dtype).requires_grad_(False)
    folded = model.attn.c_attn
    nn.init.normal_(folded.bias)
    input_TI = torch.randn(5, WIDTH, dtype=dtype)
    wanted = folded(input_TI)
    unfold(model)
    layer = model.attn.c_attn
    assert isinstance(layer, Unfolded)
    assert (layer.origin.name, layer.in_features, layer.out_features) == ("attn.c_attn.weight", WIDTH, 96)
    assert layer.weight.data_ptr() == folded.weight.data_ptr(), "it was copied"
    torch.testing.assert_close(layer(input_TI), wanted, rtol=1e-2, atol=1e-2)
    if has_kernels(dtype):
        pack(model)
        torch.testing.assert_close(model.attn.c_attn(input_TI), wanted, rtol=1e-2, atol=1e-2)
