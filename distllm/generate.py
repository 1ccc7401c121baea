"""The task of answering: one prompt streamed to standard output, or a file of prompts to a file of answers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from tqdm import tqdm

from distllm.core import Output, SamplingParams

if TYPE_CHECKING:
    from distllm.core import Request
    from distllm.engine.reader import Reader
    from distllm.llm import LLM

# Bytes of a token in an answer: some for its text, some for its id.
TOKEN_BYTES = 16


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


def check_room(output: Path, lines: Sequence[Line], max_tokens: int) -> None:
    """Refuses an output file that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: the folder is missing or not writable, or the disk is too full for the answers.
    """
    target = _target(output)
    folder = target.parent
    if not folder.is_dir():
        raise ValueError(f"output={output}: there is no folder {folder}")
    if target.is_dir():
        raise ValueError(f"output={output}: is a folder; give a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"output={output}: is not an ordinary file; leave output out for standard output")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output={output}: {folder} cannot be written to: {error.strerror}") from error
    needed = sum(len(json.dumps(line.asked)) + max_tokens * TOKEN_BYTES for line in lines)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"output={output}: the answers may take {needed:,} bytes, but {folder} has {free:,} free")


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
        self.size = len(lines)
        self.asked: list[tuple[Line, Request]] = []
        self.errors: dict[int, str] = {}
        for line in lines:
            with self._refusing(line):
                self.asked.append((line, _request(reader, line, params)))

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


def batch(llm: LLM | None, questions: Questions, output: Path | None) -> int:
    """Answers every line that can be answered; exit code 0 only if that is all of them.

    Args:
        llm: None if there is nothing that can be answered.
    """
    if llm is not None:
        questions.fit(llm)
    answers: dict[int, dict[str, object]] = {
        index: {"index": index, "error": error} for index, error in questions.errors.items()
    }
    order = iter(range(questions.size))
    at = next(order)
    with _whole_file(output) as file, Progress(len(questions.asked)) as bar:

        def write_ready() -> None:
            nonlocal at
            while at in answers:
                file.write(json.dumps(answers.pop(at), ensure_ascii=False) + "\n")
                file.flush()
                at = next(order, questions.size)

        def on_output(done: Output) -> None:
            line = questions.asked[done.index][0]
            answers[line.index] = _answer(line, done)
            bar.count(done)
            write_ready()

        write_ready()
        if llm is not None:
            llm.answer(questions.asked, on_output)
    for _, error in sorted(questions.errors.items()):
        print(f"distllm: error: {error}", file=sys.stderr)
    return 1 if questions.errors else 0


def _answer(line: Line, done: Output) -> dict[str, object]:
    return {
        "index": line.index,
        "prompt": line.asked.get("prompt", line.asked.get("messages")),
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "usage": asdict(done.usage),
    }


class Progress:
    """A bar on standard error: answers done, and tokens/s."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="answers", unit="", file=sys.stderr)
        self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, done: Output) -> None:
        self._tokens += len(done.token_ids)
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._tokens / elapsed:.0f} tokens/s" if elapsed else "", refresh=False)
        self._bar.update()


@contextmanager
def _whole_file(output: Path | None) -> Iterator[TextIO]:
    """A file that appears under its name only when it is whole; standard output if there is no name."""
    if output is None:
        yield sys.stdout
        return
    target = _target(output)
    part = target.with_name(f".distllm-{secrets.token_hex(8)}.part")
    try:
        with part.open("x", encoding="utf-8", errors="backslashreplace") as file:
            if target.exists():
                shutil.copymode(target, part)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise OSError(f"output={output}: {error.strerror or error}; nothing was written there") from error
    finally:
        part.unlink(missing_ok=True)


def _target(output: Path) -> Path:
    """The file that a name means, through links, so that it is the file that is replaced and not the link.

    Raises:
        ValueError: there is no such user, or the links go round.
    """
    try:
        return output.expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"output={output}: {error}") from error
