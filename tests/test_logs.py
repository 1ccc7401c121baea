"""Lines of the log, for people and for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from distllm import logs


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("distllm.x", logging.WARNING, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_a_line_of_text_is_a_sentence_and_what_it_is_about() -> None:
    lines = logs.TextLines("rank 2: ")
    assert lines.format(record("it is so")) == "rank 2: it is so"
    with logs.about("req-1"):
        assert lines.format(record("it is so")) == "rank 2: it is so [req-1]"
    assert lines.format(record("it is so")) == "rank 2: it is so"


def test_a_line_of_json_is_one_object_whatever_is_in_it() -> None:
    lines = logs.JsonLines(rank=2)
    with logs.about('"}'):
        (text,) = lines.format(record('two\nlines "', **logs.fields(path="/", faults=("hung",)))).splitlines()
    line = json.loads(text)
    assert (line["message"], line["request"], line["rank"]) == ('two\nlines "', '"}', 2)
    assert (line["path"], line["faults"]) == ("/", ["hung"])
    assert "request" not in json.loads(lines.format(record("it is so")))
    assert "rank" not in json.loads(logs.JsonLines(rank=None).format(record("it is so")))


def test_an_error_comes_with_its_trace() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        made = logging.LogRecord("distllm.x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert json.loads(logs.JsonLines(None).format(made))["trace"].endswith("ValueError: wrong")


def test_tasks_of_a_request_are_about_it_and_others_are_not() -> None:
    async def line() -> str:
        await asyncio.sleep(0)
        return logs.TextLines("").format(record("x"))

    async def request(name: str) -> list[str]:
        with logs.about(name):
            return [await asyncio.create_task(line()), await line()]

    async def both() -> list[list[str]]:
        return await asyncio.gather(request("a"), request("b"))

    assert asyncio.run(both()) == [["x [a]", "x [a]"], ["x [b]", "x [b]"]]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_ends_a_command_is_told_in_the_same_form(tmp_path: Path, form: str) -> None:
    command = [sys.executable, "-m", "distllm.run", "task=serve", "serve.tls_key=x", f"log_format={form}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    (line,) = done.stderr.splitlines()
    why = "serve.tls_key is given: give serve.tls_cert too"
    if form == "text":
        assert line == f"distllm: error: {why}"
    else:
        told = json.loads(line)
        assert (told["message"], told["level"]) == (why, "error")
    assert done.returncode == 2
