"""Calls of tools: what a model is told, what it may write, and what is made of what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.config import ModelConfig
from distllm.engine.reader import Reader
from distllm.model.grammar import Grammars
from distllm.model.tokenizer import Tokenizer
from distllm.serve import tools
from distllm.serve.tools import Reading

WEATHER = {
    "name": "weather",
    "description": "of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now"}
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'
STRANGE = '<tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Reader(ModelConfig(path=str(smollm2))).tokenizer


def follows(grammar: str, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a grammar lets a text be written, and end."""
    matcher = Grammars(tokenizer).begin(grammar)
    for token in (*tokenizer.encode(text), min(tokenizer.eos_ids)):
        allowed = matcher.allowed()
        if not allowed[token // 8] >> token % 8 & 1:
            return False
        matcher.take(token)
    return True


@pytest.mark.parametrize(
    ("must", "several", "text", "fits"),
    [
        (True, True, ROME, True),
        (True, True, f"{ROME}\n{TIME}", True),
        (True, True, "Hello", False),
        (True, True, WRONG, False),
        (True, True, STRANGE, False),
        (True, False, TIME, True),
        (True, False, f"{ROME}\n{TIME}", False),
        (False, True, "Hello", True),
        (False, True, f"Well: {ROME}\n{TIME}", True),
        (False, True, f"Well: {WRONG}", False),
        (False, True, "a < b, <tool", True),
        (False, False, f"Well: {ROME}", True),
        (False, False, f"{ROME}\n{TIME}", False),
        (False, False, "Hello", True),
    ],
)
def test_what_a_model_may_write(tokenizer: Tokenizer, must: bool, several: bool, text: str, fits: bool) -> None:
    assert follows(tools.grammar([WEATHER, NOW], must=must, several=several), tokenizer, text) == fits


@given(st.lists(st.sampled_from(["Well", "\n", " <", "<tool_", TIME, ROME, "</tool_call>"]), max_size=8), st.data())
def test_it_does_not_matter_how_an_answer_is_cut(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole = Reading("a").push(text, last=True)
    reading = Reading("a")
    said, calls = "", []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more, found = reading.push(text[start:stop], last=False)
        said += more
        calls += found
    rest, found = reading.push("", last=True)
    assert (said + rest, calls + found) == whole


def test_calls_are_told_from_text() -> None:
    said, (first, second) = Reading("a").push(f"Let me see. {ROME}\n{TIME}", last=True)
    assert said == "Let me see. "
    assert (first.index, first.name, json.loads(first.arguments)) == (0, "weather", {"city": "Rome"})
    assert (second.index, second.name, second.arguments) == (1, "now", "{}")
    assert first.id != second.id
    assert Reading("a").push(ROME, last=True)[1][0].id == first.id, "however often it is read"
    assert Reading("b").push(ROME, last=True)[1][0].id != first.id


def test_arguments_may_have_what_looks_like_an_end() -> None:
    call = '<tool_call>\n{"name": "write", "arguments": {"text": "</tool_call>"}}\n</tool_call>'
    reading = Reading("a")
    assert reading.push(call[:-20], last=False) == ("", [])
    said, (found,) = reading.push(call[-20:] + "bye", last=True)
    assert (said, json.loads(found.arguments)) == ("bye", {"text": "</tool_call>"})


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno JSON\n</tool_call>",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": []}\n</tool_call>',
        '<tool_call>\n{"name": "x"',
        "<tool_call",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert Reading("a").push(f"Well. {text}", last=True) == (f"Well. {text}", [])


def test_what_may_begin_a_tag_is_held_back() -> None:
    reading = Reading("a")
    assert reading.push("1 <", last=False) == ("1 ", [])
    assert reading.push(" 2 <tool", last=False) == ("< 2 ", [])
    assert reading.push("box", last=False) == ("<toolbox", [])


def test_a_model_is_told_of_its_tools_and_of_their_calls() -> None:
    asked = [
        {"role": "user", "content": "Rome?", "tool_calls": []},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": '{"city": "Rome"}'}]},
        {"role": "tool", "content": "sunny", "tool_calls": []},
    ]
    system, *rest = tools.told(asked, [WEATHER])
    assert system["role"] == "system"
    assert json.dumps({"type": "function", "function": WEATHER}) in system["content"]
    assert rest == [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": ROME},
        {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"},
    ]
    assert tools.told(asked, []) == rest
    ours = {"role": "system", "content": "Be brief.", "tool_calls": []}
    first, *others = tools.told([ours, *asked], [WEATHER])
    assert first["content"].startswith("Be brief.\n\nYou may call")
    assert others == rest
