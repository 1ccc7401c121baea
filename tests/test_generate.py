"""Reading prompts and writing answers, on a real engine with a tiny checkpoint."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny_checkpoint

from distllm import generate
from distllm.config import ClusterConfig, EngineConfig, ModelConfig, PlanConfig
from distllm.core import EngineError, Output, Request, SamplingParams
from distllm.engine.reader import Reader
from distllm.generate import Line, Questions, batch, check_room, read_lines, read_prompt
from distllm.llm import LLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes on standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def lines_of(*asked: object) -> list[Line]:
    return [
        Line(index, index + 1, each if isinstance(each, dict) else {"prompt": each}) for index, each in enumerate(asked)
    ]


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestRoom:
    def test_a_good_place_is_left_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_text("old")
        check_room(tmp_path / "old", lines_of("a"), 10)
        check_room(tmp_path / "new", lines_of("a"), 10)
        assert [path.name for path in tmp_path.iterdir()] == ["old"]
        assert (tmp_path / "old").read_text() == "old"

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/no$"):
            check_room(tmp_path / "no" / "out", lines_of("a"), 10)

    def test_a_file_for_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/file$"):
            check_room(tmp_path / "file" / "out", lines_of("a"), 10)

    def test_a_folder_for_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"^output={tmp_path}: is a folder; give a file$"):
            check_room(tmp_path, lines_of("a"), 10)

    @pytest.mark.parametrize("name", ["/dev/null", "/dev/full"])
    def test_a_device_is_not_replaced_by_a_file(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"^output={name}: is not an ordinary file"):
            check_room(Path(name), lines_of("a"), 10)

    @pytest.mark.parametrize("name", ["~no-such-user/out", "ring"])
    def test_a_name_that_leads_nowhere(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("ring").symlink_to("ring")
        with pytest.raises(ValueError, match=f"^output={name}: "):
            check_room(Path(name), lines_of("a"), 10)

    def test_a_read_only_disk(self, small_disk: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(ValueError, match=f"{small_disk} cannot be written to: Read-only file system$"):
            check_room(small_disk / "out", lines_of("a"), 10)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_of_others(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match=r"cannot be written to: Permission denied$"):
            check_room(tmp_path / "out", lines_of("a"), 10)

    def test_a_small_disk(self, small_disk: Path) -> None:
        check_room(small_disk / "out", lines_of("a", "b"), 1000)
        with pytest.raises(ValueError, match=r"the answers may take [\d,]{9,} bytes, but .* has 1,048,576 free$"):
            check_room(small_disk / "out", lines_of(*["a"] * 100), 1000)

    def test_a_disk_that_says_it_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        check_room(tmp_path / "out", lines_of("a"), 10)
        with pytest.raises(ValueError, match=r"but .* has 1,000 free$"):
            check_room(tmp_path / "out", lines_of("a"), 100)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(ModelConfig(path=str(tiny_checkpoint(tmp_path_factory.mktemp("model")))))


@pytest.fixture(scope="module")
def llm(reader: Reader) -> Iterator[LLM]:
    with LLM(reader, cluster=ClusterConfig(threads=1), plan=PlanConfig(calibrate=False)) as opened:
        yield opened


class Watched:
    """An LLM that tells of every answer, after it has been written; the prompt `long` gets a long one."""

    def __init__(self, llm: LLM, tell: Callable[[Output], None]) -> None:
        self._llm, self._tell = llm, tell

    def check_room(self, request: Request, name: str) -> None:
        self._llm.check_room(request, name)

    def answer(self, asked: Sequence[tuple[Line, Request]], on_output: Callable[[Output], None]) -> list[Output]:
        def both(done: Output) -> None:
            on_output(done)
            self._tell(done)

        return self._llm.answer([(line, _longer(line, request)) for line, request in asked], both)


def _longer(line: Line, request: Request) -> Request:
    if line.asked["prompt"] != "long":
        return request
    return replace(request, params=replace(request.params, max_tokens=40))


Answer = Callable[..., int]


@pytest.fixture
def answer(reader: Reader) -> Answer:
    return lambda llm, lines, output: batch(llm, Questions(reader, lines, PARAMS), output)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestBatch:
    def test_every_line_is_answered_in_its_place(
        self, answer: Answer, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chat = [{"role": "user", "content": "Grüße"}]
        content = [
            json.dumps({"prompt": "x" * 40}),
            "nonsense",
            json.dumps({"prompt": [1, 2, 3]}),
            json.dumps({"messages": chat}),
            json.dumps({"prompt": ""}),
            json.dumps({"prompt": "x" * 600}),
            json.dumps({"messages": [{"role": "user"}]}),
            json.dumps({"prompt": "\ud800"}),
            json.dumps({"prompt": [320]}),
            json.dumps({"prompt": "é"}),
        ]
        output = tmp_path / "out.jsonl"
        assert answer(llm, read_lines(write(tmp_path, "\n".join(content))), output) == 1
        found = read(output)
        assert [each["index"] for each in found] == list(range(10))
        wrong = {each["index"]: each["error"] for each in found if "error" in each}
        assert all(set(each) == {"index", "error"} for each in found if "error" in each)
        assert [(index, sentence.split(":")[0]) for index, sentence in wrong.items()] == [
            (index, f"line {index + 1}") for index in (1, 4, 5, 6, 7, 8)
        ]
        assert "600 tokens" in wrong[5]
        assert "512" in wrong[5]
        prompts: list[str | list[int]] = ["x" * 40, [1, 2, 3], "é"]
        expected = llm.generate(prompts, PARAMS)
        for index, one in [(0, expected[0]), (2, expected[1]), (3, llm.chat(chat, PARAMS)), (9, expected[2])]:
            assert found[index] == {
                "index": index,
                "prompt": one.prompt,
                "text": one.text,
                "token_ids": list(one.token_ids),
                "finish_reason": "length",
                "usage": {"prompt_tokens": one.usage.prompt_tokens, "completion_tokens": 6},
            }
        captured = capsys.readouterr()
        assert captured.out == ""
        said = [line for line in captured.err.splitlines() if line.startswith("distllm: error: ")]
        assert said == [f"distllm: error: {sentence}" for sentence in wrong.values()]

    def test_all_answered_is_success(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        assert answer(llm, lines_of("a", "b"), tmp_path / "out") == 0

    def test_none_to_answer(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        assert answer(llm, lines_of(""), tmp_path / "out") == 1
        assert [set(each) for each in read(tmp_path / "out")] == [{"index", "error"}]

    def test_without_a_file_the_answers_go_to_standard_output(
        self, answer: Answer, llm: LLM, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert answer(llm, lines_of("a", "", "é"), None) == 1
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(each["index"], each.get("prompt")) for each in found] == [(0, "a"), (1, None), (2, "é")]

    def test_what_has_no_room_is_told_and_the_rest_answered(
        self, answer: Answer, reader: Reader, tmp_path: Path
    ) -> None:
        engine = EngineConfig(kv_tokens=64, block_tokens=16)
        with LLM(reader, cluster=ClusterConfig(threads=1), engine=engine) as little:
            assert answer(little, lines_of("x" * 40, "x" * 100, "", "b"), tmp_path / "out") == 1
        found = read(tmp_path / "out")
        assert [set(each) == {"index", "error"} for each in found] == [False, True, True, False]
        assert found[1]["error"] == (
            "line 2: the prompt has 100 tokens; there is KV room for 64: raise engine.kv_tokens"
        )

    def test_half_a_character_goes_through(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        asked = {"messages": [{"role": "user", "content": "hi", "name": "\ud800"}]}
        lines = read_lines(write(tmp_path, json.dumps(asked)))
        assert answer(llm, lines, tmp_path / "out") == 0
        assert read(tmp_path / "out")[0]["prompt"] == asked["messages"]

    def test_order_is_kept_when_answers_end_out_of_order(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        ended: list[int] = []
        watched = Watched(llm, lambda done: ended.append(len(done.token_ids)))
        assert answer(watched, lines_of("long", "b", "c"), tmp_path / "out") == 0
        assert ended == [6, 6, 40]
        assert [(each["index"], each["prompt"]) for each in read(tmp_path / "out")] == [(0, "long"), (1, "b"), (2, "c")]

    @pytest.mark.parametrize("error", [EngineError("rank 1 is gone"), KeyboardInterrupt()], ids=["engine", "ctrl-c"])
    @pytest.mark.parametrize("old", [None, "old answers"], ids=["new", "old"])
    def test_an_engine_that_fails_leaves_the_old_file(
        self, answer: Answer, llm: LLM, tmp_path: Path, error: BaseException, old: str | None
    ) -> None:
        output = tmp_path / "out"
        if old is not None:
            output.write_text(old)
        told: list[Output] = []

        def fail_half_way(done: Output) -> None:
            told.append(done)
            if len(told) == 2:
                raise error

        with pytest.raises(type(error)):
            answer(Watched(llm, fail_half_way), lines_of("a", "b", "c", "d"), output)
        assert [path.name for path in tmp_path.iterdir()] == ([] if old is None else ["out"])
        assert old is None or output.read_text() == old
        assert answer(llm, lines_of("a"), output) == 0, "the engine goes on"

    def test_the_old_file_stays_until_the_new_one_is_whole(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.write_text("old")
        seen: list[tuple[str, int]] = []
        watched = Watched(llm, lambda _: seen.append((output.read_text(), len(list(tmp_path.iterdir())))))
        assert answer(watched, lines_of("a", "b"), output) == 0
        assert seen == [("old", 2)] * 2
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert len(read(output)) == 2

    def test_a_new_file_is_as_open_as_others_and_an_old_one_as_before(
        self, answer: Answer, llm: LLM, tmp_path: Path
    ) -> None:
        before = os.umask(0o027)
        try:
            answer(llm, lines_of("a"), tmp_path / "new")
            (tmp_path / "old").touch()
            (tmp_path / "old").chmod(0o600)
            answer(llm, lines_of("a"), tmp_path / "old")
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")]
        assert modes == [0o640, 0o600]

    def test_a_link_stays_a_link(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there/out")
        answer(llm, lines_of("a"), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert len(read(tmp_path / "there" / "out")) == 1

    def test_the_longest_name_there_is(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        assert answer(llm, lines_of("a"), tmp_path / ("n" * 255)) == 0

    def test_a_disk_that_fills_up_leaves_the_old_file(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.write_text("old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(OSError, match=f"^output={output}: File too large; nothing was written there$"):
                answer(llm, lines_of("a", "b"), output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert output.read_text() == "old"

    def test_a_folder_that_went_away(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=f"^output={tmp_path}/no/out: No such file or directory; nothing was written"):
            answer(llm, lines_of("a"), tmp_path / "no" / "out")


def test_stream_writes_the_text_and_a_newline(reader: Reader, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.stream(llm, reader.request("Grüße", PARAMS)) == 0
    captured = capsys.readouterr()
    assert captured.out == llm.generate("Grüße", PARAMS)[0].text + "\n"
    assert captured.err == ""
