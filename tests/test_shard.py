"""Shards: a stage owns its part, hands on the rest, and stages in a row are the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from fakes import KINDS, tiny_checkpoint
from transformers import AutoModelForCausalLM

from distllm.core import Row, Span, Step
from distllm.model import weights
from distllm.model.blueprint import Blueprint
from distllm.model.cache import KVCache, Layout
from distllm.model.shard import InTurn, PassThrough, Shard

CPU = torch.device("cpu")
TOKENS = tuple(range(40, 70))
LAYOUT_STEP = Step(0, (Row(0, 0, 0, TOKENS, ((0, 8),), samples=True),))


@pytest.fixture(scope="module")
def blueprint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Blueprint]:
    @cache
    def make(kind: str) -> Blueprint:
        folder: Path = tiny_checkpoint(tmp_path_factory.mktemp(kind), kind)
        return Blueprint(folder, dtype="float32", context_length=None)

    return make


def empty(plan: Blueprint, span: Span) -> Shard:
    return Shard(plan.config, plan.anatomy, span, plan.dtype)


def ready(plan: Blueprint, span: Span) -> Shard:
    shard = empty(plan, span)
    weights.load(shard, plan.tensors, CPU)
    kinds = plan.anatomy.attention
    shard.use(KVCache({n: kinds[n].shape for n in range(span.start, span.stop)}, 32, plan.dtype, CPU))
    return shard


def layout() -> Layout:
    return Layout.of(LAYOUT_STEP, 4, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_are_those_of_transformers(
    kind: str, blueprint_of: Callable[[str], Blueprint]
) -> None:
    plan = blueprint_of(kind)
    whole = AutoModelForCausalLM.from_pretrained(plan.checkpoint.path).eval()
    with torch.inference_mode():
        expected = whole(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False)
    first, last = ready(plan, Span(0, 3, embed=True)), ready(plan, Span(3, 5, head=True))
    hidden_TD = first.forward(torch.tensor(TOKENS), layout())
    torch.testing.assert_close(hidden_TD, expected.hidden_states[3][0], atol=1e-4, rtol=1e-4)
    wanted = [0, 7, len(TOKENS) - 1]
    logits_BV = last.forward(hidden_TD, layout(), torch.tensor(wanted))
    torch.testing.assert_close(logits_BV, expected.logits[0, wanted], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_without_layers_hands_on_what_it_gets(kind: str, blueprint_of: Callable[[str], Blueprint]) -> None:
    shard = ready(blueprint_of(kind), Span(2, 2))
    hidden_TD = torch.randn(len(TOKENS), 64)
    assert torch.equal(shard.forward(hidden_TD, layout()), hidden_TD)
    assert shard.nbytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_wait_on_the_meta_device(kind: str, blueprint_of: Callable[[str], Blueprint]) -> None:
    shard = empty(blueprint_of(kind), Span(0, 5, embed=True, head=True))
    assert all(parameter.is_meta for parameter in shard.model.parameters())
    assert not any(buffer.is_meta for buffer in shard.model.buffers())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_parts_of_others_are_gone(kind: str, blueprint_of: Callable[[str], Blueprint]) -> None:
    model = empty(blueprint_of(kind), Span(1, 3)).model
    gone = [isinstance(layer, PassThrough) for layer in model.model.layers]
    assert gone == [True, False, False, True, True]
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        assert isinstance(part, PassThrough)
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"1", "2"}


def test_positions_of_layers_are_kept(blueprint_of: Callable[[str], Blueprint]) -> None:
    """Some models choose by a layer's number; the second stage must not begin at 0."""
    layers = empty(blueprint_of("gemma3_text"), Span(1, 3)).model.model.layers
    assert [layers[n].self_attn.layer_idx for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "span", "held"),
    [
        ("llama", Span(0, 0, embed=True), ("embed_tokens",)),
        ("llama", Span(5, 5, head=True), ("norm", "lm_head")),
        ("llama_tied", Span(0, 0, embed=True), ("embed_tokens",)),
        ("llama_tied", Span(5, 5, head=True), ("norm", "embed_tokens")),
        ("gpt2", Span(0, 0, embed=True), ("wte", "wpe")),
        ("gpt2", Span(5, 5, head=True), ("ln_f", "wte")),
    ],
    ids=str,
)
def test_the_ends_hold_tables_norm_and_head(
    kind: str, span: Span, held: tuple[str, ...], blueprint_of: Callable[[str], Blueprint]
) -> None:
    parameters = dict(empty(blueprint_of(kind), span).model.named_parameters())
    assert {name.split(".")[-2] for name in parameters} == set(held)


def test_without_wanted_tokens_the_last_stage_gives_hidden_states(blueprint_of: Callable[[str], Blueprint]) -> None:
    shard = ready(blueprint_of("llama"), Span(3, 5, head=True))
    hidden_TD = torch.randn(len(TOKENS), 64)
    for nothing in (None, torch.tensor([], dtype=torch.long)):
        assert shard.forward(hidden_TD, layout(), nothing).shape == (len(TOKENS), 64)


def test_two_shards_in_a_process_keep_caches_of_their_own(blueprint_of: Callable[[str], Blueprint]) -> None:
    plan = blueprint_of("llama")
    one, other = (ready(plan, Span(0, 5, embed=True, head=True)) for _ in range(2))
    ends = torch.tensor([len(TOKENS) - 1])
    expected = one.forward(torch.tensor(TOKENS), layout(), ends)
    step = Step(0, (Row(0, 0, len(TOKENS), (9,), ((0, 8),), samples=True),))
    after = Layout.of(step, 4, CPU)
    alone = one.forward(torch.tensor([9]), after, torch.tensor([0]))
    other.forward(torch.tensor(TOKENS[::-1]), layout(), ends)
    assert torch.equal(one.forward(torch.tensor([9]), after, torch.tensor([0])), alone)
    assert torch.equal(one.forward(torch.tensor(TOKENS), layout(), ends), expected)


def test_the_body_ends_before_the_head(blueprint_of: Callable[[str], Blueprint]) -> None:
    shard = ready(blueprint_of("llama"), Span(0, 5, embed=True, head=True))
    order: list[str] = []
    shard.base.register_forward_hook(lambda *_: order.append(f"body {shard.body_done > 0}"))
    shard.model.lm_head.register_forward_hook(lambda *_: order.append("head"))
    shard.forward(torch.tensor(TOKENS), layout(), torch.tensor([3]))
    assert order == ["body True", "head"]


@pytest.mark.parametrize("turn", [0, 1])
def test_a_part_works_in_its_turn(turn: int) -> None:
    part = InTurn(torch.nn.Tanh(), turn)
    hidden_TD = torch.randn(3, 4)
    changed = [not torch.equal(part(hidden_TD), hidden_TD) for _ in range(4)]
    assert changed == [turn == 0, turn == 1] * 2


def test_hidden_states_pass_through_wherever_they_are_given() -> None:
    hidden_TD, places_T = torch.randn(3, 4), torch.arange(3)
    assert PassThrough()(hidden_TD, places_T) is hidden_TD
    assert PassThrough()(position_ids=places_T, inputs_embeds=hidden_TD) is hidden_TD
    assert PassThrough(in_tuple=True)(hidden_TD)[0] is hidden_TD
