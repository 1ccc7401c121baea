"""Many requests at once: sampled tokens do not depend on the company, and little KV room loses nobody."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fakes import tiny_checkpoint

from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig, EngineConfig, ModelConfig
from distllm.engine.reader import Reader
from distllm.model.shard import Shard

SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, top_k=200, repetition_penalty=1.1, seed=1234)


def opened(folder: Path, ranks: int, **engine: int | None) -> LLM:
    cluster = ClusterConfig(workers=ranks, threads=1)
    return LLM(folder, dtype="float32", cluster=cluster, engine=EngineConfig(**engine))


@pytest.mark.parametrize("split", [(1, 3), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_sampling_depends_on_seed_and_position_only(smollm2: Path, split: tuple[int, ...]) -> None:
    prompt = "The old lighthouse keeper"
    others = [f"Number {index} is" + " very" * index for index in range(20)]
    answers = set()
    for ranks in split:
        with opened(smollm2, ranks, kv_tokens=4096, prompt_chunk=128) as llm:
            alone = llm.generate([prompt], SAMPLED)[0].token_ids
            crowd = SamplingParams(max_tokens=8, temperature=1.3)
            requests = [(text, llm.request(text, crowd)) for text in others]
            requests.insert(17, (prompt, llm.request(prompt, SAMPLED)))
            answers |= {alone, llm.answer(requests)[17].token_ids}
    assert len(answers) == 1, answers
    assert len(set(answers.pop())) > 4, "the sampled text should vary"


def test_two_hundred_requests_in_room_for_ten(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    draw = random.Random(7)
    prompts = [[draw.randrange(256) for _ in range(draw.randrange(1, 90))] for _ in range(200)]
    params = [SamplingParams(max_tokens=draw.randrange(1, 60), ignore_eos=True) for _ in prompts]
    with opened(folder, 1, kv_tokens=16384) as llm:
        plenty = llm.answer([(p, llm.request(p, q)) for p, q in zip(prompts, params, strict=True)])
    threads_before = {thread.name for thread in threading.enumerate()}
    with opened(folder, 3, kv_tokens=10 * 96, prompt_chunk=48, max_requests=24) as llm:
        asked = [(p, llm.request(p, q)) for p, q in zip(prompts, params, strict=True)]
        outputs = llm.answer(asked)
        stats = llm.stats()
        assert stats["preemptions"] > 0, "the room should have run out"  # type: ignore[operator]
        assert stats["kv_blocks_used"] == 0
        assert stats["requests"] == 0
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plenty]
    assert {thread.name for thread in threading.enumerate()} <= threads_before | {"MainThread"}
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(("kv_tokens", "penalty"), [(4096, 0.0), (480, 0.5)], ids=["room", "no room, but a penalty"])
def test_a_beginning_in_common_is_computed_once_and_changes_no_token(
    tmp_path: Path, kv_tokens: int, penalty: float
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    draw = random.Random(3)
    common = [draw.randrange(256) for _ in range(120)]
    prompts = [common[: 60 * (n % 3)] + [draw.randrange(256) for _ in range(1 + n)] for n in range(24)]
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=5, ignore_eos=True, frequency_penalty=penalty)
    answers = []
    for ranks, keep in ((3, None), (1, 0)):
        with opened(folder, ranks, kv_tokens=kv_tokens, prompt_chunk=48, max_requests=8, prefix_tokens=keep) as llm:
            several = llm.generate(prompts, params)
            again = [llm.generate([prompt], params)[0] for prompt in prompts[-3:]]
            answers.append([output.token_ids for output in (*several, *again)])
            stats = llm.stats()
            assert (stats["preemptions"] > 0) == (kv_tokens == 480)  # type: ignore[operator]
            assert stats["kv_blocks_used"] == 0
        if keep is None:
            assert stats["prefix_tokens"] > 600, "15 prompts begin with 60 tokens or more, and 2 have been answered"  # type: ignore[operator]
            assert 0 < stats["kv_blocks_kept"] <= stats["kv_blocks"] // 4  # type: ignore[operator]
        else:
            assert stats["prefix_hits"] == stats["kv_blocks_kept"] == 0
    assert answers[0] == answers[1]


def test_a_caller_that_leaves_frees_its_room(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    with opened(folder, 2, kv_tokens=1024) as llm:
        stream = llm.stream("abc", SamplingParams(max_tokens=400, ignore_eos=True))
        assert next(stream).token_ids
        stream.close()
        (after,) = llm.generate(["abc"], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(after.token_ids) == 4
        assert llm.stats()["kv_blocks_used"] == 0


def test_a_second_model_in_one_process(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path / "first", "llama", seed=1)
    second = tiny_checkpoint(tmp_path / "second", "qwen3", seed=2)
    with opened(first, 1) as llm:
        wanted = llm.generate(["hello"], SamplingParams(max_tokens=8))[0].token_ids
    for folder, same in ((second, False), (first, True)):
        with opened(folder, 2) as llm:
            answer = llm.generate(["hello"], SamplingParams(max_tokens=8))[0].token_ids
            assert (answer == wanted) == same


def test_ranks_serve_one_model_at_a_time(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    short = SamplingParams(max_tokens=3, ignore_eos=True)
    with opened(folder, 2) as llm:
        with pytest.raises(ValueError, match="close it before another one is opened"):
            opened(folder, 2)
        with opened(folder, 1) as alone:
            assert len(alone.generate("hello", short)[0].token_ids) == 3
        assert len(llm.generate("hello", short)[0].token_ids) == 3
    with opened(folder, 2) as llm:
        assert len(llm.generate("hello", short)[0].token_ids) == 3


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_ranks_that_came_for_a_model_that_cannot_be_read_are_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    came: list[psutil.Process] = []

    class Unreadable(Reader):
        def __init__(self, _: ModelConfig) -> None:
            came.extend(psutil.Process().children())
            time.sleep(seconds)
            raise ValueError("cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr("distllm.llm.Reader", Unreadable)
        with pytest.raises(ValueError, match="cannot be read"):
            LLM("nothing", workers=3)
    assert len(came) == 2, "they start while the model is read"
    assert not [each for each in came if each.is_running()]
    with opened(tiny_checkpoint(tmp_path), 2) as llm:
        assert len(llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


NEVER_CLOSED = """
import sys
from distllm import LLM, SamplingParams
from distllm.config import ClusterConfig

llm = LLM(sys.argv[1], cluster=ClusterConfig(threads=1, workers=int(sys.argv[2])))
stream = llm.stream("hello", SamplingParams(max_tokens=400, ignore_eos=True))
print(len(next(stream).token_ids))
"""


@pytest.mark.parametrize("ranks", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_program_may_end_in_the_middle_of_an_answer(tmp_path: Path, ranks: str) -> None:
    command = [sys.executable, "-c", NEVER_CLOSED, str(tiny_checkpoint(tmp_path)), ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_request_that_cannot_be_answered_harms_no_other(tmp_path: Path) -> None:
    reader = Reader(ModelConfig(path=str(tiny_checkpoint(tmp_path))))
    short = SamplingParams(max_tokens=3, ignore_eos=True)
    long, twice = reader.request("x" * 200, short), reader.request("hello", short)
    with LLM(reader, cluster=ClusterConfig(threads=1), engine=EngineConfig(kv_tokens=64, block_tokens=16)) as llm:
        for ask in (llm.stream, lambda request: llm.answer([("", twice), ("", request)])):
            with pytest.raises(ValueError, match="the prompt has 200 tokens; there is KV room for 64"):
                list(ask(long))
        with pytest.raises(ValueError, match="prompt 0 must be a text or a list of token ids: 'float'"):
            llm.generate([[1.0, 2.0]])  # type: ignore[list-item]
        both = llm.answer([("", twice), ("", twice)])
        assert len(both[0].token_ids) == 3
        assert both[0].token_ids == both[1].token_ids
        assert llm.stats()["kv_blocks_used"] == 0


def test_a_closed_llm_holds_no_weights(tmp_path: Path) -> None:
    def shards() -> int:
        gc.collect()
        return sum(type(each) is Shard for each in gc.get_objects())

    before = shards()
    with opened(tiny_checkpoint(tmp_path), 1) as llm:
        assert shards() == before + 1
    assert shards() == before
    llm.close()


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(tmp_path: Path, prompt: str | list[int]) -> None:
    with opened(tiny_checkpoint(tmp_path / "model"), 1) as llm, pytest.raises(ValueError, match="prompt 0 is empty"):
        llm.generate([prompt])
