"""Answers that follow a grammar: what may come next, what cannot be followed, and where an answer ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig
from distllm.core import Request
from distllm.engine.reader import Reader
from distllm.grammars import json_grammar
from distllm.model.grammar import Grammar, check
from distllm.model.tokenizer import Tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reader(smollm2: Path) -> Reader:
    return Reader(ModelConfig(path=str(smollm2), dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(reader: Reader) -> Tokenizer:
    return reader.tokenizer


def bits(mask: bytes) -> set[int]:
    return {8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def test_what_may_come_next(tokenizer: Tokenizer) -> None:
    grammar = Grammar(json_grammar(CITY), tokenizer)
    mask = grammar.allowed()
    assert len(mask) == -(-tokenizer.known // 8)
    assert bits(mask), "something may"
    assert all(
        tokenizer.token_bytes(token) and b'{"city'.startswith(tokenizer.token_bytes(token)) for token in bits(mask)
    )
    for token in tokenizer.encode('{"city": "Rome", "people": 3'):
        assert token in bits(grammar.allowed())
        assert not grammar.take(token)
    (end,) = tokenizer.encode("}")
    assert end in bits(grammar.allowed())
    assert not tokenizer.eos_ids & bits(grammar.allowed())
    grammar.take(end)
    assert bits(grammar.allowed()) <= tokenizer.eos_ids


@pytest.mark.parametrize(
    "grammar", ["{", "[]", json_grammar({"type": "frob"}), json_grammar({"$ref": "#/nowhere"})], ids=range(4)
)
def test_what_cannot_be_followed_is_refused_in_one_line(tokenizer: Tokenizer, grammar: str) -> None:
    with pytest.raises(ValueError, match=r"^the grammar cannot be followed: .+") as refused:
        check(grammar, tokenizer)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def llm(reader: Reader) -> Iterator[LLM]:
    with LLM(reader) as llm:
        yield llm


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "seeded"])
def test_answers_follow_their_schema_and_end(llm: LLM, how: dict[str, float]) -> None:
    constrained = SamplingParams(max_tokens=60, grammar=json_grammar(CITY), **how)  # type: ignore[arg-type]
    free = SamplingParams(max_tokens=20, **how)  # type: ignore[arg-type]
    alone = llm.generate("Paris in JSON:", constrained)[0]
    mixed = llm.answer([(each, llm.request("Paris in JSON:", each)) for each in (free, constrained, free)])
    assert mixed[1].text == alone.text
    assert mixed[0].text == mixed[2].text == llm.generate("Paris in JSON:", free)[0].text
    resumed = list(llm.stream(_from_the_middle(llm, constrained, alone.token_ids)))
    found = json.loads(alone.text)
    assert found.keys() == {"city", "people"}
    assert isinstance(found["people"], int)
    assert alone.finish_reason == "stop"
    assert "".join(piece.text for piece in resumed) == alone.text


def _from_the_middle(llm: LLM, params: SamplingParams, tokens: tuple[int, ...]) -> Request:
    return replace(llm.request("Paris in JSON:", params), generated=tokens[:5])
