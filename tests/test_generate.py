"""Reading prompts and writing answers, on a real engine with a tiny checkpoint."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import tiny_checkpoint

from distllm import generate
from distllm.config import ClusterConfig, ModelConfig, PlanConfig
from distllm.core import SamplingParams
from distllm.engine.reader import Reader
from distllm.generate import read_lines, read_prompt
from distllm.llm import LLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class TestPrompt:
    @pytest.mark.parametrize("text", ["hi", " - ", "a@b", "\n", "two\nlines\n", "é🙂", "--", "\ufeffx"])
    def test_is_taken_as_typed(self, text: str) -> None:
        assert read_prompt(text) == text

    @pytest.mark.parametrize(
        ("content", "text"),
        [(b"hi\n", "hi"), (b"hi", "hi"), (b"a\nb\n\n", "a\nb\n"), ("é🙂".encode(), "é🙂"), (b" x \r\n", " x \r")],
    )
    def test_is_read_from_standard_input(self, content: bytes, text: str, stdin: Callable[[bytes], None]) -> None:
        stdin(content)
        assert read_prompt("-") == text

    @pytest.mark.parametrize("content", [b"", b"\n"])
    def test_empty_standard_input(self, content: bytes, stdin: Callable[[bytes], None]) -> None:
        stdin(content)
        with pytest.raises(ValueError, match="the prompt is empty; give prompt="):
            read_prompt("-")

    def test_standard_input_that_is_not_text(self, stdin: Callable[[bytes], None]) -> None:
        stdin(b"ab\xff")
        with pytest.raises(ValueError, match="standard input is not UTF-8 text: byte 2 is 0xff"):
            read_prompt("-")

    def test_is_read_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a prompt=é.txt"
        path.write_bytes("\ufefffirst\r\nsecond é\n".encode())
        assert read_prompt(f"@{path}") == "first\nsecond é"

    def test_file_in_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "p").write_text("home")
        assert read_prompt("@~/p") == "home"

    @pytest.mark.parametrize("name", ["", ".", "no/such", "~no-such-user/p"])
    def test_file_that_cannot_be_read(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"^prompt=@{name}: cannot be read: [A-Z]"):
            read_prompt(f"@{name}")

    def test_typed_bytes_that_are_not_text(self) -> None:
        with pytest.raises(ValueError, match="the prompt is not UTF-8 text: byte 1 is 0xff"):
            read_prompt(os.fsdecode(b"a\xff"))

    def test_empty(self) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            read_prompt("")


class TestLines:
    def test_keeps_order_and_numbers_without_blank_lines(self, tmp_path: Path) -> None:
        content = '\n{"prompt": "a"}\r\n  \n{"messages": [{"role": "user", "content": "é"}]}\n{"prompt": [1, 2]}'
        found = read_lines(write(tmp_path, content))
        assert [(line.index, line.number, line.error) for line in found] == [(0, 2, None), (1, 4, None), (2, 5, None)]
        assert [line.asked for line in found] == [
            {"prompt": "a"},
            {"messages": [{"role": "user", "content": "é"}]},
            {"prompt": [1, 2]},
        ]

    def test_text_within_json_is_left_alone(self, tmp_path: Path) -> None:
        text = 'tab\t newline\n quote" \u2028 \u0085 🙂 \\n'
        found = read_lines(write(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False)))
        assert [line.asked["prompt"] for line in found] == [text]

    def test_byte_order_mark_is_left_out(self, tmp_path: Path) -> None:
        assert read_lines(write(tmp_path, '\ufeff{"prompt": "a"}'))[0].asked == {"prompt": "a"}

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{prompt: 1}", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
            ("nonsense", "is not JSON: Expecting value at column 1"),
            ('"a"', 'must be {"prompt": ...} or {"messages": [...]}'),
            ("{}", 'must be {"prompt": ...} or {"messages": [...]}'),
            ('{"prompt": "a", "messages": []}', 'must be {"prompt": ...} or {"messages": [...]}'),
            ('{"prompt": "a", "max_tokens": 3}', "has the unknown key max_tokens"),
            ('{"prompt": 5}', "prompt must be a text or a list of token ids"),
            ('{"prompt": null}', "prompt must be a text or a list of token ids"),
            ('{"prompt": [1, "a"]}', "prompt must be a text or a list of token ids"),
            ('{"prompt": [true]}', "prompt must be a text or a list of token ids"),
            ('{"prompt": [1.0]}', "prompt must be a text or a list of token ids"),
            ("[" * 100_000, "cannot be read: maximum recursion depth"),
            ('{"prompt": [' + "9" * 5000 + "]}", "cannot be read: Exceeds the limit"),
        ],
    )
    def test_a_line_not_understood_is_kept_with_its_error(self, text: str, sentence: str, tmp_path: Path) -> None:
        found = read_lines(write(tmp_path, f'{{"prompt": "a"}}\n\n{text}\n{{"prompt": "b"}}\n'))
        assert [line.error is None for line in found] == [True, False, True]
        assert str(found[1].error).startswith(f"line 3: {sentence}")
        assert [line.index for line in found] == [0, 1, 2]

    @pytest.mark.parametrize("content", ["", "\n \n\t\n"])
    def test_file_without_lines(self, content: str, tmp_path: Path) -> None:
        path = write(tmp_path, content)
        with pytest.raises(ValueError, match=f"^prompts={path}: has no lines$"):
            read_lines(path)

    def test_file_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = write(tmp_path, b'{"prompt": "\xe9"}')
        with pytest.raises(ValueError, match=f"^prompts={path} is not UTF-8 text: byte 12 is 0xe9$"):
            read_lines(path)

    def test_file_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"^prompts={tmp_path}/no: cannot be read: No such file or directory$"):
            read_lines(tmp_path / "no")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(ModelConfig(path=str(tiny_checkpoint(tmp_path_factory.mktemp("model")))))


@pytest.fixture(scope="module")
def llm(reader: Reader) -> Iterator[LLM]:
    with LLM(reader, cluster=ClusterConfig(threads=1), plan=PlanConfig(calibrate=False)) as opened:
        yield opened


def test_stream_writes_the_text_and_a_newline(reader: Reader, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.stream(llm, reader.request("Grüße", PARAMS)) == 0
    captured = capsys.readouterr()
    assert captured.out == llm.generate("Grüße", PARAMS)[0].text + "\n"
    assert captured.err == ""
