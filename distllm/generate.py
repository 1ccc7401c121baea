"""The task of answering: a prompt that is streamed to standard output, or a file of prompts."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distllm.core import SamplingParams

if TYPE_CHECKING:
    from distllm.core import Request
    from distllm.engine.reader import Reader
    from distllm.llm import LLM


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file of prompts: what it asks, or why it cannot be understood."""

    index: int
    number: int
    asked: dict[str, Any]
    error: str | None = None


def read_prompt(given: str) -> str:
    """The prompt as typed, or what `-` (standard input) or `@FILE` hold, without the newline at their end.

    Raises:
        ValueError: it is empty, or the file cannot be read.
    """
    if given == "-":
        text = _decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    elif given.startswith("@"):
        text = _read_text(Path(given[1:]), f"prompt={given}").removesuffix("\n")
    else:
        text = _decoded(given.encode(errors="surrogateescape"), "the prompt")
    if not text:
        raise ValueError(
            "the prompt is empty; give prompt=TEXT, prompt=@FILE, or prompt=- and something on standard input"
        )
    return text


def read_lines(path: Path) -> list[Line]:
    """The prompts of a file; a line that cannot be understood is kept with its error. Blank lines do not count.

    Raises:
        ValueError: the file cannot be read or has no lines.
    """
    numbered = [
        (number, text) for number, text in enumerate(_read_text(path, f"prompts={path}").split("\n"), 1) if text.strip()
    ]
    if not numbered:
        raise ValueError(f"prompts={path}: has no lines")
    return [_line(index, number, text) for index, (number, text) in enumerate(numbered)]


def _line(index: int, number: int, text: str) -> Line:
    try:
        asked = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(index, number, {}, f"line {number}: is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Line(index, number, {}, f"line {number}: cannot be read: {error}")
    if not isinstance(asked, dict) or len(asked.keys() & {"prompt", "messages"}) != 1:
        return Line(index, number, {}, f'line {number}: must be {{"prompt": ...}} or {{"messages": [...]}}')
    if unknown := asked.keys() - {"prompt", "messages"}:
        return Line(index, number, {}, f"line {number}: has the unknown key {min(unknown)}")
    prompt = asked.get("prompt", "")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(each) is int for each in prompt)):
        return Line(index, number, {}, f"line {number}: prompt must be a text or a list of token ids")
    return Line(index, number, asked)


def _read_text(path: Path, name: str) -> str:
    try:
        return _decoded(path.expanduser().read_bytes(), name).removeprefix("\ufeff").replace("\r\n", "\n")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is {text[error.start]:#04x}") from error


def stream(llm: LLM, request: Request) -> int:
    """Writes the answer as it comes."""
    for piece in llm.stream(request):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


class Questions:
    """The lines of a file as requests, and the errors, by index, of the lines that cannot be answered.

    Args:
        reader: of the model that is to answer.
    """

    def __init__(self, reader: Reader, lines: Sequence[Line], params: SamplingParams) -> None:
        self.asked: list[tuple[Line, Request]] = []
        self.errors: dict[int, str] = {}
        for line in lines:
            with self._refusing(line):
                self.asked.append((line, _request(reader, line, params)))

    @property
    def digest(self) -> str:
        """The same for the same prompts, as the model has them."""
        digest = hashlib.sha256()
        for line, request in self.asked:
            digest.update(f"{line.index}{request.tokens}".encode())
        return digest.hexdigest()

    def fit(self, llm: LLM) -> None:
        """Takes out what the ranks have no KV room for."""
        asked, self.asked = self.asked, []
        for line, request in asked:
            with self._refusing(line):
                llm.check_room(request, _name(line))
                self.asked.append((line, request))

    @contextmanager
    def _refusing(self, line: Line) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.errors[line.index] = str(error) if str(error).startswith("line ") else f"line {line.number}: {error}"


def _request(reader: Reader, line: Line, params: SamplingParams) -> Request:
    if line.error:
        raise ValueError(line.error)
    if "messages" in line.asked:
        return reader.chat_request(line.asked["messages"], params, _name(line))
    return reader.request(line.asked["prompt"], params, _name(line))


def _name(line: Line) -> str:
    return f"line {line.number}: the prompt"
