"""Answers that follow a grammar: what may come next, what cannot be followed, and where an answer ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distllm import LLM, SamplingParams
from distllm.config import ModelConfig
from distllm.core import Piece, Request
from distllm.engine.delivery import Delivery
from distllm.engine.reader import Reader
from distllm.grammars import json_grammar
from distllm.model.grammar import Grammars
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
    grammar = Grammars(tokenizer).begin(json_grammar(CITY))
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
    "grammar",
    ["{", "[]"]
    + [
        json_grammar(schema)
        for schema in (
            {"type": "frob"},
            {"$ref": "#/nowhere"},
            {"$ref": "#"},  # nothing follows it
            {"type": "integer", "multipleOf": 982_451_653},
            {"type": "string", "pattern": "a*" * 20_000},
        )
    ],
    ids=range(7),
)
def test_what_cannot_be_followed_is_refused_in_one_line(tokenizer: Tokenizer, grammar: str) -> None:
    with pytest.raises(ValueError, match=r"^the grammar cannot be followed: .+") as refused:
        Grammars(tokenizer).check(grammar)
    assert "\n" not in str(refused.value)


def test_a_large_choice_can_be_followed(tokenizer: Tokenizer) -> None:
    Grammars(tokenizer).check(json_grammar({"enum": [f"value {number}" for number in range(10_000)]}))


GROWING = json_grammar({"type": "string", "pattern": ".*a.{200}"})  # has a state for each way to come so far
COME = "abacadcab" * 40


def test_answers_with_one_grammar_do_not_take_each_others_room(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer)

    def followed() -> int:
        """How many tokens."""
        grammar = grammars.begin(GROWING)
        for count, token in enumerate(tokenizer.encode(f'"{COME}')):
            grammar.allowed()
            try:
                grammar.take(token)
            except ValueError as error:
                assert "too many states" in str(error)  # noqa: PT017
                return count
        raise AssertionError("it has no limit")

    grammars.check(GROWING)
    assert followed() == followed() > 3


def test_an_answer_whose_grammar_cannot_be_followed_further_fails_and_does_not_just_end(tokenizer: Tokenizer) -> None:
    heard: list[Piece | Exception] = []
    request = Request(id=0, tokens=(1,), params=SamplingParams(), eos_ids=tokenizer.eos_ids)
    delivery = Delivery(request, tokenizer, heard.append, Grammars(tokenizer).begin(GROWING))
    (end,) = tokenizer.eos_ids
    for token in tokenizer.encode(f'"{COME}'):
        if bits(delivery.allowed()) == {end}:
            break
        assert not delivery.push(token, None)
    assert delivery.push(end, "stop"), "it has ended"
    assert isinstance(heard[-1], ValueError)
    assert "the grammar cannot be followed further" in str(heard[-1])


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
