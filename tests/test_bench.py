"""The benchmark: one real run against the rivals, its arithmetic, its prompts, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import byte_tokenizer, tiny_checkpoint

from distllm.bench.figures import OURS, Batch, Comparison, Difference, StageSpent, first_difference
from distllm.bench.loading import _cat
from distllm.bench.machine import Clock, cpu_model
from distllm.bench.prompts import TEXT, make_prompts
from distllm.bench.report import Setting, as_json, as_table, say
from distllm.bench.rival import RIVALS, Match, Rival, loader
from distllm.bench.run import bench, check_room
from distllm.config import BenchConfig, Config, ModelConfig
from distllm.core import EngineError, Plan, Span, Stage
from distllm.model.tokenizer import Tokenizer

RUN_TIMEOUT_S = 150
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


def bench_of(checkpoint: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """A command and its environment, which has a mark that all processes inherit."""
    command = [sys.executable, "-m", "distllm.run", "task=bench", f"model.path={checkpoint}", *options]
    return command, {**os.environ, "BENCH_TEST_MARK": f"{os.getpid()}-{time.monotonic_ns()}"}


def test_a_run_compares_distllm_with_both_rivals_and_leaves_no_process(checkpoint: Path) -> None:
    command, environ = bench_of(
        checkpoint, "model.dtype=float32", "bench.requests=[1,3]", "bench.rounds=1", f"bench.new_tokens={NEW_TOKENS}"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["config"]["dtype"], found["config"]["ranks"]) == ("float32", 2)
    assert set(found["config"]["versions"]) == {"distllm", "torch", "transformers"}
    assert [rank["rank"] for rank in found["plan"]] == [0, 1]
    assert [each["requests"] for each in found["results"]] == [1, 3]
    for result in found["results"]:
        check_result(result)
    for words in ("requests 1, round 1 of 1", "requests 3, round 1 of 1", "transformers-pp", "distllm does"):
        assert words in done.stderr
    assert marked(environ) == []


def test_loading_is_measured_beside_cat_and_transformers(checkpoint: Path) -> None:
    command, environ = bench_of(checkpoint, "bench.measure=loading", "bench.rounds=1", "model.dtype=bfloat16")
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert found["dtype"] == "bfloat16"
    assert list(found["loaders"]) == ["cat", "distllm, in place", "distllm, packed", "transformers"]
    for name, told in found["loaders"].items():
        assert len(told["seconds"]) == 1
        assert all(0 < seconds < RUN_TIMEOUT_S for seconds in told["seconds"])
        assert name == "cat" or min(told["peak_bytes"]) > 0
    for words in ("round 1 of 1: ", "of cat", "peak GB"):
        assert words in done.stderr
    assert marked(environ) == []


def test_cat_has_a_deadline_too(checkpoint: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")
    with pytest.raises(
        EngineError, match=r"^cat did not read the files within 0\.2 s; bench\.deadline_s gives it longer$"
    ):
        _cat([tmp_path / "endless"], 0.2)
    with pytest.raises(EngineError, match=r"^cat ended with code 1$"):
        _cat([checkpoint / "none"], 10)


def test_a_loader_that_fails_is_named(checkpoint: Path) -> None:
    match = Match(folder=checkpoint / "none", dtype="float32", ranks=1, deadline_s=RUN_TIMEOUT_S)
    with loader("distllm, packed", "packed", match) as process, pytest.raises(EngineError) as failed:
        process.wait_ready()
    assert str(failed.value).startswith("distllm, packed ended with code 1, after saying:")
    assert "no such folder" in str(failed.value)


@pytest.mark.slow
def test_ctrl_c_ends_every_process(checkpoint: Path) -> None:
    endless = ("bench.rounds=100000", "bench.requests=[1]", "bench.rivals=[transformers-pp]", "bench.new_tokens=2")
    command, environ = bench_of(checkpoint, *endless)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as running:
        watchdog = threading.Timer(RUN_TIMEOUT_S, running.kill)
        watchdog.start()
        said = iter(running.stderr or ())
        assert any("round 1 of" in line for line in said), "it ended before it measured anything"
        assert len(marked(environ)) >= 5  # rank 0 and 1, torchrun and its two ranks
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=RUN_TIMEOUT_S)
        watchdog.cancel()
    assert running.returncode == 130
    assert "distllm: error: interrupted" in rest
    assert marked(environ) == []


def check_result(result: dict[str, Any]) -> None:
    engines, rivals, stages = result["engines"], result["rivals"], result["stages"]
    assert list(engines) == [OURS, *rivals] == [OURS, "transformers", "transformers-pp"]
    for engine in engines.values():
        assert len(engine["values"]) == 1
        assert engine["min"] > 0
    for name, rival in rivals.items():
        assert rival["tokens"] == {"equal": True, "first_difference": None}
        expected = engines[OURS]["values"][0] / engines[name]["values"][0]
        assert rival["ratio"]["values"][0] == pytest.approx(expected, rel=0.01)
    assert [stage["rank"] for stage in stages] == [0, 1]
    for stage in stages:
        assert stage["steps"] >= NEW_TOKENS
        assert stage["seconds_per_step"]["layers"] > 0
        assert 1 - 1e-3 <= sum(stage["share"].values()) < 2  # more if the sleep before a batch counted as wait
    assert stages[0]["seconds_per_step"]["head"] == 0 < stages[1]["seconds_per_step"]["head"]


def marked(environ: dict[str, str]) -> list[psutil.Process]:
    """The processes that were started, directly or not, with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("BENCH_TEST_MARK") == environ["BENCH_TEST_MARK"]:
                found.append(process)
    return found


def rival_of(script: str, deadline_s: float = 20.0) -> Rival:
    return Rival("toy", [sys.executable, "-c", script], {}, deadline_s)


READY = "import json, sys; print(json.dumps({'ready': True}), flush=True); "


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import sys; print('no disk left', file=sys.stderr); sys.exit(3)", r"toy ended with code 3, .*\nno disk left"),
        ("import os; os.kill(os.getpid(), 9)", r"toy was killed by SIGKILL$"),
        ("import json; print(json.dumps({'error': 'rank 1: it hurts'}))", r"toy failed: rank 1: it hurts"),
    ],
)
def test_a_rival_that_dies_says_why(script: str, told: str) -> None:
    with rival_of(script) as rival, pytest.raises(EngineError, match=told):
        rival.wait_ready()


def test_a_rival_that_dies_between_batches_says_why() -> None:
    with rival_of(READY + "sys.stdin.readline(); sys.exit('out of memory')") as rival:
        rival.wait_ready()
        with pytest.raises(EngineError, match=r"ended with code 1, after saying:\nout of memory"):
            rival.run([(1, 2)], 2)
        with pytest.raises(EngineError, match="ended"):  # and not by a broken pipe
            rival.run([(1, 2)], 2)


def test_a_rival_that_hangs_is_given_up_and_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distllm.bench.rival.END_TIMEOUT_S", 1.0)
    child = "import subprocess, sys, time; c = subprocess.Popen(['sleep', '300'], start_new_session=True); "
    with rival_of(child + "print(c.pid, file=sys.stderr, flush=True); time.sleep(300)", deadline_s=1.0) as rival:
        with pytest.raises(EngineError, match=r"did not load its model within 1 s; bench\.deadline_s"):
            rival.wait_ready()
        family = psutil.Process(rival._process.pid).children(recursive=True)
    assert len(family) == 1
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_rival_that_answers_too_little_is_refused() -> None:
    answer = "sys.stdin.readline(); print(json.dumps({'tokens': [[1, 2]], 'seconds': 1.0}), flush=True)"
    with rival_of(READY + answer) as rival:
        rival.wait_ready()
        with pytest.raises(EngineError, match=r"toy gave 1 answers of \[2\] tokens; asked for 1 of 3"):
            rival.run([(1, 2)], 3)


@pytest.mark.slow
def test_rivals_sleep_while_they_wait_and_end_with_their_pipe(checkpoint: Path) -> None:
    match = Match(folder=checkpoint, dtype="float32", ranks=2, deadline_s=90.0)
    with ExitStack() as opened:
        rivals = [opened.enter_context(start(match)) for start in RIVALS.values()]
        for rival in rivals:
            rival.wait_ready()
        answers = [rival.run([(5, 6, 7)], 2).tokens for rival in rivals]
        assert answers == answers[:1] * 3
        heads = [psutil.Process(rival._process.pid) for rival in rivals]
        families = [[head, *head.children(recursive=True)] for head in heads]
        assert [len(family) for family in families] == [1, 3, 2]  # torchrun and its two ranks; rank 0 and its other
        time.sleep(0.5)  # OpenMP's threads spin for a moment
        before = [_cpu_s(family) for family in families]
        time.sleep(1.5)
        assert all(_cpu_s(family) - was < 0.15 for family, was in zip(families, before, strict=True))
    assert [rival._process.returncode for rival in rivals] == [0, 0, 0]
    assert not any(process.is_running() for family in families for process in family)


def _cpu_s(family: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family)


def test_a_rival_that_cannot_load_says_why(tmp_path: Path) -> None:
    match = Match(folder=tmp_path, dtype="float32", ranks=1, deadline_s=90.0)
    told = "transformers failed: rank 0: .*config"
    with RIVALS["transformers"](match) as rival, pytest.raises(EngineError, match=told):
        rival.wait_ready()


def spent(rank: int, *, steps: int, wait: float, layers: float) -> StageSpent:
    return StageSpent(rank=rank, span=f"part {rank}", steps=steps, wait_s=wait, layers_s=layers, head_s=0.5 * rank)


def batch(seconds: float, tokens: tuple[int, ...] = (1, 2), *stages: StageSpent) -> Batch:
    return Batch(tokens=(tokens, tokens), seconds=seconds, stages=stages)


@pytest.fixture
def comparison() -> Comparison:
    def ours(seconds: float) -> Batch:
        stages = (spent(0, steps=2, wait=0.25, layers=0.5), spent(1, steps=2, wait=0.1, layers=0.2))
        return batch(seconds, (1, 2), *stages)

    rounds = tuple({OURS: ours(mine), "slow": batch(theirs)} for mine, theirs in ((1.0, 2.0), (1.0, 8.0), (2.0, 6.0)))
    return Comparison(2, {OURS: ours(9.0), "slow": batch(9.0)}, rounds)


def test_rates_are_of_all_requests_and_ratios_of_pairs_in_a_round(comparison: Comparison) -> None:
    rates = comparison.rates(OURS)
    assert rates.values == (4.0, 4.0, 2.0)
    assert (rates.median, rates.lowest, rates.highest) == (4.0, 2.0, 4.0)
    assert comparison.ratios("slow").values == (2.0, 8.0, 3.0)
    assert comparison.ratios("slow").median == 3.0  # not 4 / (2 / 3)


def test_stages_add_up_over_the_measured_rounds_only(comparison: Comparison) -> None:
    assert comparison.seconds == 4.0
    first, second = comparison.stages
    assert (first.steps, first.wait_s, first.layers_s, first.head_s) == (6, 0.75, 1.5, 0.0)
    assert (second.rank, second.span, second.head_s) == (1, "part 1", 1.5)
    gone = spent(1, steps=7, wait=3.0, layers=2.0) - spent(1, steps=4, wait=1.0, layers=1.5)
    assert (gone.rank, gone.span, gone.steps, gone.wait_s, gone.layers_s) == (1, "part 1", 3, 2.0, 0.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[1, 2], [3, 4]], [(1, 2), (3, 4)], None),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], Difference(request=1, position=1, ours=4, theirs=5, requests=1)),
        ([[1, 2], [3, 4]], [[0, 9], [3, 5]], Difference(request=0, position=0, ours=1, theirs=0, requests=2)),
        ([[1]], [[1, 2]], Difference(request=0, position=1, ours=None, theirs=2, requests=1)),
    ],
)
def test_the_first_difference_names_request_position_and_tokens(
    ours: list[list[int]], theirs: list[list[int]], expected: Difference | None
) -> None:
    assert first_difference(ours, theirs) == expected


def test_a_difference_in_any_round_is_told_before_the_ratio(comparison: Comparison) -> None:
    assert comparison.difference("slow") is None
    rounds = (*comparison.rounds[:2], {**comparison.rounds[2], "slow": batch(6.0, (1, 7))})
    flipped = Comparison(2, comparison.warm_ups, rounds)
    assert flipped.difference("slow") == Difference(request=0, position=1, ours=2, theirs=7, requests=2)
    assert say(flipped.difference("slow"), 2) == "2 of 2 differ, first request 0 at its new token 1: 2, not 7"
    assert re.search(r"slow .* 3\.00 x +2 of 2 differ", as_table(SETTING, [flipped]))
    told: Any = as_json(SETTING, [flipped])
    assert told["results"][0]["rivals"]["slow"]["tokens"]["first_difference"]["theirs"] == 7


STAGE = Stage(rank=0, span=Span(0, 3, embed=True), weight_bytes=3000, kv_bytes=1, work_share=0.5)
SETTING = Setting(
    model="toy",
    path="/toy",
    dtype="float32",
    quantization="none",
    cores=2,
    cpu="abacus",
    elsewhere=0.0,
    options=BenchConfig(),
    plan=Plan(stages=(STAGE, replace(STAGE, rank=1, span=Span(3, 5, head=True))), idle=(), kv_tokens=64),
)


def test_the_report_says_who_holds_what_and_where_the_time_goes(comparison: Comparison) -> None:
    table = as_table(SETTING, [comparison])
    assert table.startswith("toy (/toy) in float32\n")
    assert "in float32, weights of distllm in int8\n" in as_table(replace(SETTING, quantization="int8"), [comparison])
    assert "rank 0 holds embeddings + layers 0-2, 3.00 kB" in table
    assert re.search(r"distllm +4\.0 +2\.0 +4\.0\n", table)
    assert re.search(r"slow +0\.7 +0\.5 +2\.0 +3\.00 x +equal", table)
    # 4 s, 6 steps: 0.75 s of wait and 1.5 s in the layers leave 1.75 s.
    assert re.search(r"2 +0 +6 +125\.0 \(19%\) +250\.0 \(38%\) +0\.0 \(0%\) +291\.7 \(44%\)", table)
    told = as_json(SETTING, [comparison])
    assert json.loads(json.dumps(told)) == told


def test_the_processor_has_a_name_even_if_the_system_hides_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Abacus 9\nmodel name\t: Abacus 9\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Abacus 9" != cpu_model(tmp_path / "nothing")


def test_what_other_programs_took_is_told_if_it_matters(comparison: Comparison) -> None:
    assert Clock(100.0, 90.0, 30.0).elsewhere(Clock(80.0, 80.0, 25.0)) == pytest.approx((10 - 5) / 20)
    assert Clock(100.0, 90.0, 30.0).elsewhere(Clock(80.0, 88.0, 25.0)) == 0.0  # clocks of two grains
    assert "Other programs" not in as_table(SETTING, [comparison])
    assert "Other programs took 25% of all cores" in as_table(replace(SETTING, elsewhere=0.25), [comparison])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return Tokenizer.load(folder)


def test_prompts_are_different_pieces_of_the_text_and_the_same_every_time(tokenizer: Tokenizer) -> None:
    prompts = make_prompts(tokenizer, count=32, tokens=8)
    assert prompts == make_prompts(tokenizer, count=32, tokens=8)
    assert len(set(prompts)) == 32
    assert {len(prompt) for prompt in prompts} == {8}
    assert all(tokenizer.decode(prompt) in TEXT for prompt in prompts)


def test_the_text_may_be_too_short(tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(TEXT))
    (prompt,) = make_prompts(tokenizer, count=1, tokens=2 * length + 3)
    assert len(prompt) == 2 * length + 3
    assert prompt[length : 2 * length] == prompt[:length]
    with pytest.raises(ValueError, match=r"bench\.requests=100000: there are prompts for at most \d+"):
        make_prompts(tokenizer, count=100_000, tokens=8)


def test_prompt_and_answer_must_fit_the_context() -> None:
    options = BenchConfig(prompt_tokens=8, new_tokens=64)
    check_room(options, 72)
    with pytest.raises(ValueError, match="make 72 tokens; the model's context takes 71"):
        check_room(options, 71)


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="run it without torchrun"):
        bench(Config(model=ModelConfig(path="/nowhere")))
