"""The task of answering: one prompt streamed to standard output, or a file of prompts to a file of answers."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from distllm.core import Output, SamplingParams

if TYPE_CHECKING:
    from distllm.core import Request
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
        text = sys.stdin.read().removesuffix("\n")
    elif given.startswith("@"):
        text = _read_text(Path(given[1:])).removesuffix("\n")
    else:
        text = given
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
    numbered = [(number, text) for number, text in enumerate(_read_text(path).split("\n"), 1) if text.strip()]
    if not numbered:
        raise ValueError(f"prompts={path}: has no lines")
    return [_line(index, number, text) for index, (number, text) in enumerate(numbered)]


def _line(index: int, number: int, text: str) -> Line:
    try:
        asked = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(index, number, {}, f"line {number}: is not JSON: {error}")
    if not isinstance(asked, dict) or len(asked.keys() & {"prompt", "messages"}) != 1:
        return Line(index, number, {}, f'line {number}: must be {{"prompt": ...}} or {{"messages": [...]}}')
    if unknown := asked.keys() - {"prompt", "messages"}:
        return Line(index, number, {}, f"line {number}: has the unknown key {min(unknown)}")
    prompt = asked.get("prompt", "")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(each) is int for each in prompt)):
        return Line(index, number, {}, f"line {number}: prompt must be a text or a list of token ids")
    return Line(index, number, asked)


def _read_text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from error


def check_room(output: Path, lines: Sequence[Line], max_tokens: int) -> None:
    """Refuses an output file that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: the folder is missing or not writable, or the disk is too full for the answers.
    """
    folder = output.expanduser().parent
    if not folder.is_dir():
        raise ValueError(f"output={output}: there is no folder {folder}")
    if output.expanduser().is_dir():
        raise ValueError(f"output={output}: is a folder; give a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output={output}: {folder} is not writable")
    needed = sum(len(json.dumps(line.asked)) + max_tokens * TOKEN_BYTES for line in lines)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"output={output}: the answers may take {needed:,} bytes, but {folder} has {free:,} free")


def stream(llm: LLM, prompt: str, params: SamplingParams) -> int:
    """Writes the answer as it comes."""
    for piece in llm.stream(prompt, params):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def batch(llm: LLM, lines: Sequence[Line], output: Path | None, params: SamplingParams) -> int:
    """Answers every line that can be answered; exit code 0 only if that is all of them."""
    asked, errors = _requests(llm, lines, params)
    answers = errors | {}
    order = iter(range(len(lines)))
    at = next(order)
    with _whole_file(output) as file, _bar(len(asked)) as bar:

        def write_ready() -> None:
            nonlocal at
            while at in answers:
                file.write(json.dumps(answers.pop(at), ensure_ascii=False) + "\n")
                at = next(order, len(lines))

        def on_output(done: Output) -> None:
            index, line = asked[done.index][0]
            answers[index] = _answer(index, line, done)
            bar.update_with(done)
            write_ready()

        write_ready()
        llm.answer([(line, request) for (_, line), request in asked], on_output)
    for error in errors.values():
        print(f"distllm: error: {error['error']}", file=sys.stderr)
    return 1 if errors else 0


def _requests(
    llm: LLM, lines: Sequence[Line], params: SamplingParams
) -> tuple[list[tuple[tuple[int, Line], Request]], dict[int, dict[str, object]]]:
    """Requests for the lines that can be answered, and the answers of those that cannot."""
    asked: list[tuple[tuple[int, Line], Request]] = []
    errors: dict[int, dict[str, object]] = {}
    for line in lines:
        try:
            if line.error:
                raise ValueError(line.error)
            name = f"line {line.number}: the prompt"
            if "messages" in line.asked:
                request = llm.chat_request(line.asked["messages"], params, name)
            else:
                request = llm.request(line.asked["prompt"], params, name)
            asked.append(((line.index, line), request))
        except ValueError as error:
            sentence = str(error) if str(error).startswith("line ") else f"line {line.number}: {error}"
            errors[line.index] = {"index": line.index, "error": sentence}
    return asked, errors


def _answer(index: int, line: Line, done: Output) -> dict[str, object]:
    return {
        "index": index,
        "prompt": line.asked.get("prompt", line.asked.get("messages")),
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "usage": asdict(done.usage),
    }


class AnswerBar(tqdm):  # type: ignore[misc]
    """done/total and tokens/s."""

    tokens = 0

    def update_with(self, done: Output) -> None:
        self.tokens += len(done.token_ids)
        elapsed = self.format_dict["elapsed"]
        self.set_postfix_str(f"{self.tokens / elapsed:.0f} tokens/s" if elapsed else "", refresh=False)
        self.update()


def _bar(total: int) -> AnswerBar:
    return AnswerBar(total=total, desc="answers", unit="", file=sys.stderr)


@contextmanager
def _whole_file(output: Path | None) -> Iterator[TextIO]:
    """A file that appears under its name only when it is whole; standard output if there is no name."""
    if output is None:
        yield sys.stdout
        return
    target = output.expanduser()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except OSError as error:
        raise OSError(f"output={output}: {error.strerror or error}; nothing was written there") from error
    finally:
        Path(name).unlink(missing_ok=True)
