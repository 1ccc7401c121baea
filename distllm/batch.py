"""A file of prompts into answers: to standard output as they come, or to a file, by a journal that outlives a crash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from tqdm import tqdm

from distllm.core import Output
from distllm.generate import Line, Questions
from distllm.journal import Journal

if TYPE_CHECKING:
    from distllm.config import Config
    from distllm.core import Request
    from distllm.engine.reader import Reader
    from distllm.llm import LLM

logger = logging.getLogger(__name__)

# Bytes of a token in an answer: some for its text, some for its id. The journal has all of them too, and again while
# the answer grows.
TOKEN_BYTES = 16
COPIES = 3
LONGEST_NAME = 255
JOURNAL = ".journal"
WAL = "-wal"

Asked = list[tuple[Line, "Request"]]


def batch(llm: LLM | None, questions: Questions, answers: Answers) -> int:
    """Answers every line that can be answered; exit code 0 only if that is all of them.

    Args:
        llm: None if there is nothing that can be answered, or nothing left.
    """
    if llm is not None:
        questions.fit(llm)
    for index, error in questions.errors.items():
        answers.refuse(index, error)

    def on_tokens(index: int, tokens: Sequence[int]) -> None:
        answers.grow(questions.asked[index][0].index, tokens)

    with Progress(len(questions.asked)) as bar:

        def on_output(done: Output) -> None:
            line = questions.asked[done.index][0]
            answers.put(line.index, _answer(line, done))
            bar.count(done)

        if llm is not None:
            llm.answer(questions.asked, on_output, on_tokens)
    for _, error in sorted(questions.errors.items()):
        print(f"distllm: error: {error}", file=sys.stderr)
    return 1 if questions.errors else 0


def _answer(line: Line, done: Output) -> str:
    return _json(
        {
            "index": line.index,
            "prompt": line.asked.get("prompt", line.asked.get("messages")),
            "text": done.text,
            "token_ids": done.token_ids,
            "finish_reason": done.finish_reason,
            "usage": asdict(done.usage),
        }
    )


def _json(answer: object) -> str:
    """In one line; half a character, which no file can hold, stays escaped."""
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace").decode()


class Answers(Protocol):
    """Where the answers to a file of prompts go; each line of them is JSON."""

    def resume(self, asked: Asked) -> Asked:
        """What is left to answer."""

    def refuse(self, index: int, error: str) -> None:
        """A line cannot be answered."""

    def grow(self, index: int, tokens: Sequence[int]) -> None:
        """All tokens so far of an answer that is not whole yet."""

    def put(self, index: int, answer: str) -> None:
        """A whole answer."""


class Printed:
    """To standard output, each as soon as it and all before it are whole."""

    def __init__(self) -> None:
        self._ready: dict[int, str] = {}
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def resume(self, asked: Asked) -> Asked:
        return asked

    def refuse(self, index: int, error: str) -> None:
        self.put(index, _json({"index": index, "error": error}))

    def grow(self, index: int, tokens: Sequence[int]) -> None:
        pass

    def put(self, index: int, answer: str) -> None:
        self._ready[index] = answer
        while self._next in self._ready:
            sys.stdout.write(self._ready.pop(self._next) + "\n")
            sys.stdout.flush()
            self._next += 1


class Saved:
    """To a file, which appears when it is whole; what is there before is in a journal beside it.

    When it ends early, the journal stays, and the same job goes on from there.

    Raises:
        ValueError: the journal is not one of this job, or another process has it.
    """

    def __init__(self, output: Path, about: dict[str, str]) -> None:
        self._output = output
        self._target = target(output)
        path = journal_of(self._target)
        is_new = not path.exists()
        if is_new and self._target.exists():
            path.touch()
            path.chmod(stat.S_IMODE(self._target.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)
        try:
            self._journal = Journal(path, about)
        except ValueError:
            if is_new:
                path.unlink(missing_ok=True)
            raise
        self._errors: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._write()
            self._journal.remove()
            return
        self._journal.flush()
        if self._journal.holds_something:
            whole = len(self._journal.answers())
            logger.warning("%s has %d whole answers; the same command goes on from there", self._journal.path, whole)
            self._journal.close()
        else:
            self._journal.remove()

    def resume(self, asked: Asked) -> Asked:
        if self._journal.holds_something:
            logger.info("going on from %s", self._journal.path)
        requests = self._journal.accept((str(line.index), request) for line, request in asked)
        whole = self._journal.answers()
        taken = zip((line for line, _ in asked), requests, strict=True)
        return [(line, request) for line, request in taken if str(line.index) not in whole]

    def refuse(self, index: int, error: str) -> None:
        self._errors[index] = _json({"index": index, "error": error})

    def grow(self, index: int, tokens: Sequence[int]) -> None:
        self._journal.deliver(str(index), tokens)

    def put(self, index: int, answer: str) -> None:
        self._journal.end(str(index), answer)

    def _write(self) -> None:
        """
        Raises:
            OSError: it cannot be written; all answers are still in the journal then.
        """
        try:
            self._journal.settle()
            lines = self._errors | {int(name): answer for name, answer in self._journal.answers().items()}
            with _whole_file(self._target) as file:
                file.writelines(f"{lines[index]}\n" for index in sorted(lines))
        except OSError as error:
            self._journal.close()
            why = f"{error.strerror or error}; nothing was written there"
            raise OSError(
                f"output={self._output}: {why}; the same command goes on from {self._journal.path}"
            ) from error


def saved(output: Path, config: Config, reader: Reader, questions: Questions) -> Saved:
    """Answers to a file, which depend on the model, on how it is held and asked, and on the prompts."""
    blueprint = reader.blueprint
    checkpoint = blueprint.checkpoint
    files = {info.file: checkpoint.path / info.file for info in checkpoint.tensors.values()}
    stamps = [(name, each.stat().st_size, each.stat().st_mtime_ns) for name, each in files.items() if each.exists()]
    about = {
        "model": f"{checkpoint.path} {checkpoint.fingerprint} {sorted(stamps)}",
        "model.dtype": str(blueprint.dtype),
        "model.context_length": str(blueprint.sizes.context_length),
        "quantization": str(config.quantization),
        "sampling": str(config.sampling),
        "list of prompts": questions.digest,
    }
    return Saved(output, about)


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


def check_room(output: Path, lines: Sequence[Line], max_tokens: int) -> None:
    """Refuses an output file that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: the folder is missing or not writable, or the disk is too full for the answers.
    """
    file = target(output)
    folder = file.parent
    if not folder.is_dir():
        raise ValueError(f"output={output}: there is no folder {folder}")
    if file.is_dir():
        raise ValueError(f"output={output}: is a folder; give a file")
    if file.exists() and not file.is_file():
        raise ValueError(f"output={output}: is not an ordinary file; leave output out for standard output")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output={output}: {folder} cannot be written to: {error.strerror}") from error
    needed = COPIES * sum(len(json.dumps(line.asked)) + max_tokens * TOKEN_BYTES for line in lines)
    journal = journal_of(file)
    there = (journal, journal.with_name(journal.name + WAL))
    needed -= sum(each.stat().st_size for each in there if each.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"output={output}: the answers may take {needed:,} bytes, but {folder} has {free:,} free")


def target(output: Path) -> Path:
    """The file that a name means, through links, so that it is the file that is replaced and not the link.

    Raises:
        ValueError: there is no such user, or the links go round.
    """
    try:
        return output.expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"output={output}: {error}") from error


def journal_of(file: Path) -> Path:
    """The journal of an output file, beside it."""
    return file.with_name(_beside(file.name, JOURNAL))


def _beside(name: str, suffix: str) -> str:
    """The name of a file that belongs to another, as long as a name may be with what SQLite adds to it."""
    room = LONGEST_NAME - len(suffix) - len(WAL)
    if len(os.fsencode(name)) <= room:
        return name + suffix
    return hashlib.sha256(os.fsencode(name)).hexdigest() + suffix


@contextmanager
def _whole_file(file: Path) -> Iterator[TextIO]:
    """A file that appears under its name only when it is whole."""
    part = file.with_name("." + _beside(file.name, ".part"))
    part.unlink(missing_ok=True)  # of a process that died
    try:
        with part.open("x", encoding="utf-8") as opened:
            if file.exists():
                shutil.copymode(file, part)
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
