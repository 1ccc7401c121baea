"""A conversation: what is remembered, commands, and a pipe."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import tiny_checkpoint

from distllm import LLM, SamplingParams
from distllm.chat import Chat, Conversation
from distllm.config import ModelConfig
from distllm.engine.reader import Reader

CONTEXT = 400  # tokens, of one byte each
PARAMS = SamplingParams(max_tokens=8)
Messages = list[dict[str, str]]


def said(*texts: str, system: str = "") -> Messages:
    told = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return told + [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def words(messages: Messages) -> int:
    return sum(len(message["content"].split()) for message in messages)


def test_the_oldest_turns_are_left_out() -> None:
    talk = Conversation("be brief", [("one two", "three"), ("four", "five"), ("six", "seven")])
    assert talk.messages("new") == said("one two", "three", "four", "five", "six", "seven", "new", system="be brief")
    assert talk.messages("new", without=2) == said("six", "seven", "new", system="be brief")
    assert [talk.surplus("new", words, room) for room in (10, 9, 7, 6, 5, 4, 1)] == [0, 1, 1, 2, 2, 3, 3]


class Script:
    """A terminal at which these lines are typed; Ctrl-C is pressed as soon as some text of an answer is there."""

    def __init__(self, *lines: str, stop_at: int | None = None) -> None:
        self._lines = lines
        self._stop_at = stop_at
        self.shown = self.told = ""

    def lines(self) -> Iterator[str]:
        yield from self._lines

    def show(self, text: str) -> None:
        self.shown += text

    def write(self, text: str) -> None:
        self.told += text

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        yield lambda: self._stop_at is not None and len(self.shown) >= self._stop_at


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def reader(model: Path) -> Reader:
    return Reader(ModelConfig(path=str(model), dtype="float32"))


@pytest.fixture(scope="module")
def llm(reader: Reader) -> Iterator[LLM]:
    with LLM(reader) as llm:
        yield llm


@pytest.fixture
def answer(llm: LLM) -> Callable[..., str]:
    return lambda *texts, system="": llm.chat(said(*texts, system=system), PARAMS).text


def held(llm: LLM, reader: Reader, terminal: Script, params: SamplingParams = PARAMS, system: str = "") -> int:
    return Chat(llm, reader, terminal, params, system=system).run()  # type: ignore[arg-type]


def test_what_was_said_is_remembered_until_it_is_to_be_forgotten(
    llm: LLM, reader: Reader, answer: Callable[..., str]
) -> None:
    terminal = Script("a", "", "b", "/undo", "c", "/retry", "/system Be brief", "d", "/new", "e", "/quit", "f")
    assert held(llm, reader, terminal, system="First") == 0
    first = answer("a", system="First")
    assert answer("a", first, "b", system="First") != answer("b", system="First"), "what was said matters"
    third = answer("a", first, "c", system="First")
    expected = [first, answer("a", first, "b", system="First"), third, third]
    expected += [answer("a", first, "c", third, "d", system="Be brief"), answer("e", system="Be brief")]
    assert terminal.shown == "".join(f"{text}\n" for text in expected)
    assert "(forgotten: b)" in terminal.told


def test_a_stopped_answer_is_remembered_as_far_as_it_came(llm: LLM, reader: Reader, answer: Callable[..., str]) -> None:
    terminal = Script("a", stop_at=20)
    chat = Chat(llm, reader, terminal, SamplingParams(max_tokens=350, ignore_eos=True), system="")  # type: ignore[arg-type]
    assert chat.run() == 0
    partial = terminal.shown.removesuffix("\n")
    assert len(partial) < 300
    assert "(stopped)" in terminal.told
    assert chat._conversation.turns == [("a", partial)]
    assert answer("a", partial, "b")


def test_a_conversation_that_outgrows_the_context_begins_later(
    llm: LLM, reader: Reader, answer: Callable[..., str]
) -> None:
    typed = ["x" * 150, "b", "y" * 150, "d"]
    terminal = Script(*typed)
    assert held(llm, reader, terminal) == 0
    outgrown = r"the conversation has outgrown the 400 tokens .* and begins without its first (\d) turn"
    (left_out,) = (int(count) for count in re.findall(outgrown, terminal.told))
    assert left_out > 0
    talk: list[str] = []
    expected = []
    for place, message in enumerate(typed):
        kept = talk[2 * left_out :] if place == len(typed) - 1 else talk
        expected.append(answer(*kept, message))
        talk += [message, expected[-1]]
    assert terminal.shown == "".join(f"{text}\n" for text in expected)


def test_what_cannot_be_answered_is_told_and_forgotten(llm: LLM, reader: Reader, answer: Callable[..., str]) -> None:
    terminal = Script("/frob", "/undo", "a", "x" * 500, "b", "/help")
    assert held(llm, reader, terminal) == 1
    assert terminal.shown == f"{answer('a')}\n{answer('a', answer('a'), 'b')}\n"
    for sentence in ("(/frob is no command", "(nothing has been said yet)", "the model's context takes 400)", "/retry"):
        assert sentence in terminal.told


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distllm.run", "task=chat", "cluster.threads=1", *arguments]


def test_a_pipe(model: Path, answer: Callable[..., str]) -> None:
    asked = command(f"model.path={model}", "model.dtype=float32", "sampling.max_tokens=8", "chat.system=Be brief")
    done = subprocess.run(asked, input=b"a\n\xff\nb", capture_output=True, timeout=90, check=False)
    first = answer("a", system="Be brief")
    assert done.stdout.decode() == f"{first}\n{answer('a', first, 'b', system='Be brief')}\n"
    assert b"> " not in done.stderr
    assert b"half a surrogate pair" in done.stderr
    assert done.returncode == 1, "one could not be answered"
