"""Files of prompts into answers, on a real engine with a tiny checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny_checkpoint

from distllm import journal
from distllm.batch import Printed, Saved, batch, check_room, saved
from distllm.config import ClusterConfig, Config, EngineConfig, ModelConfig, PlanConfig
from distllm.core import EngineError, Output, Request, SamplingParams
from distllm.engine.reader import Reader
from distllm.generate import Line, Questions, read_lines
from distllm.llm import LLM

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def lines_of(*asked: object) -> list[Line]:
    return [
        Line(index, index + 1, each if isinstance(each, dict) else {"prompt": each}) for index, each in enumerate(asked)
    ]


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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


class FullDisk:
    """A file system that can be filled to the last byte, on which the journal writes whenever it can."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fillers = [folder / "filler", folder / "rest"]

    def fill(self) -> None:
        for filler in self._fillers:
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(2 * 2**20))
        assert shutil.disk_usage(self.folder).free == 0

    def clear(self) -> None:
        for filler in self._fillers:
            filler.unlink()


@pytest.fixture
def full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    monkeypatch.setattr(journal, "FLUSH_S", 0.0)
    return FullDisk(small_disk)


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

    def test_what_a_journal_has_needs_no_room_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        (tmp_path / "out.journal").write_bytes(bytes(3000))
        (tmp_path / "out.journal-wal").write_bytes(bytes(1500))
        check_room(tmp_path / "out", lines_of("a"), 100)

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
    """An LLM that tells of every answer and of tokens, after they have been written; `long` gets a long answer."""

    def __init__(
        self,
        llm: LLM,
        tell: Callable[[Output], None] = lambda _: None,
        tell_of_tokens: Callable[[], None] = lambda: None,
    ) -> None:
        self._llm, self._tell, self._tell_of_tokens = llm, tell, tell_of_tokens

    def check_room(self, request: Request, name: str) -> None:
        self._llm.check_room(request, name)

    def answer(
        self,
        asked: Sequence[tuple[Line, Request]],
        on_output: Callable[[Output], None],
        on_tokens: Callable[[int, Sequence[int]], None],
    ) -> list[Output]:
        def both(done: Output) -> None:
            on_output(done)
            self._tell(done)

        def both_of_tokens(index: int, tokens: Sequence[int]) -> None:
            on_tokens(index, tokens)
            self._tell_of_tokens()

        return self._llm.answer([(line, _longer(line, request)) for line, request in asked], both, both_of_tokens)


def _longer(line: Line, request: Request) -> Request:
    if line.asked["prompt"] != "long":
        return request
    return replace(request, params=replace(request.params, max_tokens=40))


Answer = Callable[..., int]


@pytest.fixture
def answer(reader: Reader) -> Answer:
    def answered(llm: LLM, lines: list[Line], output: Path | None, params: SamplingParams = PARAMS) -> int:
        questions = Questions(reader, lines, params)
        about = {"sampling": str(params), "list of prompts": questions.digest}
        with Printed() if output is None else Saved(output, about) as answers:
            questions.asked = answers.resume(questions.asked)
            return batch(llm if questions.asked else None, questions, answers)

    return answered


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
    def test_an_engine_that_fails_leaves_the_old_file_and_what_it_has(
        self,
        answer: Answer,
        llm: LLM,
        tmp_path: Path,
        error: BaseException,
        old: str | None,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        output, lines = tmp_path / "out", lines_of("long", "a", "b", "c", "d", "")
        assert answer(Watched(llm), lines, tmp_path / "whole") == 1
        if old is not None:
            output.write_text(old)
        told: list[Output] = []

        def fail_half_way(done: Output) -> None:
            told.append(done)
            if len(told) == 2:
                raise error

        with pytest.raises(type(error)):
            answer(Watched(llm, fail_half_way), lines, output)
        assert (tmp_path / "out.journal").exists()
        assert "out.journal has 2 whole answers; the same command goes on from there" in caplog.text
        assert (output.read_text() if output.exists() else None) == old
        told.clear()
        assert answer(Watched(llm, told.append), lines, output) == 1
        assert len(told) == 3, "what was whole is not answered again"
        assert read(output) == read(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]

    def test_a_journal_without_an_answer_goes(self, answer: Answer, tmp_path: Path) -> None:
        class Broken:
            def check_room(self, *_: object) -> None:
                raise EngineError("rank 1 is gone")

        with pytest.raises(EngineError):
            answer(Broken(), lines_of("a"), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_another_job_does_not_go_on_with_it(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        def fail(_: Output) -> None:
            raise EngineError("rank 1 is gone")

        with pytest.raises(EngineError):
            answer(Watched(llm, fail), lines_of("a", "b"), tmp_path / "out")
        journal = tmp_path / "out.journal"
        with pytest.raises(ValueError, match=f"^{journal}: was begun with another list of prompts; .* delete it"):
            answer(llm, lines_of("a", "c"), tmp_path / "out")
        with pytest.raises(ValueError, match=f"^{journal}: was begun with another sampling; "):
            answer(llm, lines_of("a", "b"), tmp_path / "out", replace(PARAMS, temperature=0.5))
        assert answer(llm, lines_of("a", "b"), tmp_path / "out") == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_other_weights_under_the_same_name(self, reader: Reader, tmp_path: Path) -> None:
        questions = Questions(reader, lines_of("a"), PARAMS)
        saved(tmp_path / "out", Config(), reader, questions)._journal.close()
        weights = reader.blueprint.checkpoint.path / "model.safetensors"
        before = weights.stat()
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        try:
            with pytest.raises(ValueError, match=r"out\.journal: was begun with another model; "):
                saved(tmp_path / "out", Config(), reader, questions)
        finally:
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        saved(tmp_path / "out", Config(), reader, questions)._journal.remove()

    def test_an_answer_that_has_no_room_any_more_waits_for_it(
        self, answer: Answer, llm: LLM, reader: Reader, tmp_path: Path
    ) -> None:
        """The ranks are fewer than before: that is no reason to give it up."""
        lines, params = lines_of("x" * 40), replace(PARAMS, max_tokens=60)
        questions = Questions(reader, lines, params)
        generated = llm.answer(questions.asked)[0].token_ids
        before = Saved(tmp_path / "out", {"sampling": str(params), "list of prompts": questions.digest})
        before.resume(questions.asked)
        before.grow(0, generated[:50])
        before.__exit__(EngineError)
        engine = EngineConfig(kv_tokens=64, block_tokens=16)
        sentence = r"line 1: the prompt has \d+ tokens with its answer so far; there is KV room for 64: .* add ranks"
        with (
            LLM(reader, cluster=ClusterConfig(threads=1), engine=engine) as little,
            pytest.raises(EngineError, match=sentence),
        ):
            answer(little, lines, tmp_path / "out", params)
        assert answer(llm, lines, tmp_path / "out", params) == 0
        assert read(tmp_path / "out")[0]["token_ids"] == list(generated)

    def test_an_old_file_that_may_not_be_written(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        """It is replaced, which its folder allows; the journal is as closed to others, but open to its owner."""
        output = tmp_path / "out"
        output.touch()
        output.chmod(0o400)
        modes: list[int] = []
        watched = Watched(llm, lambda _: modes.append(stat.S_IMODE((tmp_path / "out.journal").stat().st_mode)))
        assert answer(watched, lines_of("a"), output) == 0
        assert modes == [0o600]
        assert stat.S_IMODE(output.stat().st_mode) == 0o400

    def test_all_was_answered_but_not_written(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        """Killed at the very end, or the disk was full."""
        output = tmp_path / "out"
        part = tmp_path / ".out.part"
        part.mkdir()  # in the way
        with pytest.raises(OSError, match=r"nothing was written there; the same command goes on from .*out\.journal$"):
            answer(llm, lines_of("a", "b"), output)
        part.rmdir()
        part.write_text("half")
        assert answer(None, lines_of("a", "b"), output) == 0
        assert [each["prompt"] for each in read(output)] == ["a", "b"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_disk_that_is_full_for_a_while(
        self, answer: Answer, llm: LLM, full_disk: FullDisk, caplog: pytest.LogCaptureFixture
    ) -> None:
        def clear() -> None:
            if "trying again" in caplog.text and not cleared:
                full_disk.clear()
                cleared.append(True)

        cleared: list[bool] = []
        lines = lines_of("a", "long")
        assert (
            answer(
                Watched(llm, lambda _: None if cleared else full_disk.fill(), clear), lines, full_disk.folder / "out"
            )
            == 0
        )
        assert "cannot be written (database or disk is full); going on without, and trying again" in caplog.text
        assert "can be written again" in caplog.text
        assert answer(Watched(llm), lines, full_disk.folder / "whole") == 0
        assert read(full_disk.folder / "out") == read(full_disk.folder / "whole")

    def test_a_disk_that_stays_full_leaves_the_old_file(self, answer: Answer, llm: LLM, full_disk: FullDisk) -> None:
        output, lines = full_disk.folder / "out", lines_of("a", "b", "long")
        output.write_text("old")
        with pytest.raises(
            OSError, match=f"^output={output}: .* make room on its disk; nothing was written there; the"
        ):
            answer(Watched(llm, lambda _: full_disk.fill()), lines, output)
        assert output.read_text() == "old"
        full_disk.clear()
        assert answer(Watched(llm), lines, output) == 0
        assert [each["prompt"] for each in read(output)] == ["a", "b", "long"]

    def test_the_old_file_stays_until_the_new_one_is_whole(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        output = tmp_path / "out"
        output.write_text("old")
        seen: list[str] = []
        watched = Watched(llm, lambda _: seen.append(output.read_text()))
        assert answer(watched, lines_of("a", "b"), output) == 0
        assert seen == ["old"] * 2
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

    def test_a_folder_that_went_away(self, answer: Answer, llm: LLM, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=f"^{tmp_path}/no/out.journal: cannot be used as a journal: unable to open"
        ):
            answer(llm, lines_of("a"), tmp_path / "no" / "out")
