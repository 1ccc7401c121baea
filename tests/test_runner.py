"""Runners chained by hand: whatever the split, the packing and the KV places, the tokens are those of transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from fakes import KINDS, reference, tiny_checkpoint
from transformers import AutoModelForCausalLM

from distllm.core import Plan, Row, SamplingParams, Span, Stage, Step
from distllm.model.blueprint import Blueprint
from distllm.model.runner import Runner
from distllm.model.sampler import Sampler

CPU = torch.device("cpu")
BLOCK = 4
ROOM = 512
CHUNK = 16
ANSWER = 12
EOS = 257
Runs = tuple[tuple[int, int], ...]
GREEDY = SamplingParams(seed=0)

SPLITS = {
    "whole": (Span(0, 5, embed=True, head=True),),
    "2+2+1": (Span(0, 2, embed=True), Span(2, 4), Span(4, 5, head=True)),
    "ends apart": (Span(0, 0, embed=True), Span(0, 5), Span(5, 5, head=True)),
}


def prompt(length: int) -> tuple[int, ...]:
    return tuple(random.Random(length).choices(range(256), k=length))


# Longer and shorter than a chunk and than the sliding windows of the fakes (20 and 24).
PROMPTS = tuple(prompt(length) for length in (3, 45, 29, 16))


@dataclass
class Model:
    """A checkpoint, and what transformers says to the prompts."""

    folder: Path
    blueprint: Blueprint

    @cached_property
    def answers(self) -> list[list[int]]:
        return [reference(self.folder, list(tokens), ANSWER) for tokens in PROMPTS]

    def pipeline(self, spans: tuple[Span, ...], dtype: str = "float32") -> list[Runner]:
        blueprint = self.blueprint
        if dtype != "float32":
            blueprint = Blueprint(self.folder, dtype=dtype, context_length=None)
        stages = tuple(
            Stage(rank=rank, span=span, weight_bytes=0, kv_bytes=0, work_share=0.0) for rank, span in enumerate(spans)
        )
        plan = Plan(stages=stages, idle=(), kv_tokens=ROOM)
        runners = [
            blueprint.load(plan, rank, block_tokens=BLOCK, max_requests=len(PROMPTS), device=CPU)
            for rank in range(len(spans))
        ]
        return [runner for runner in runners if runner is not None]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def make(kind: str) -> Model:
        folder = tiny_checkpoint(tmp_path_factory.mktemp(kind), kind)
        return Model(folder, Blueprint(folder, dtype="float32", context_length=None))

    return make


@dataclass
class Job:
    """One request on its way: its tokens so far, how many have been run, and where its KV lies."""

    number: int
    tokens: list[int]
    runs: Runs
    params: SamplingParams
    begins: int
    slot: int
    done: int = 0
    answer: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.answer) == ANSWER or self.answer[-1:] == [EOS]

    def row(self) -> Row:
        chunk = tuple(self.tokens[self.done : self.done + CHUNK])
        return Row(
            request=self.number,
            slot=self.slot,
            start=self.done,
            tokens=chunk,
            runs=self.runs,
            samples=self.done + len(chunk) == len(self.tokens),
            params=self.params if self.done == 0 else None,
        )


def scattered(jobs: int, blocks: int) -> list[Runs]:
    """Every job's blocks, dealt out one by one in no order."""
    deck = random.Random(0).sample(range(jobs * blocks), k=jobs * blocks)
    return [tuple((block, 1) for block in deck[job * blocks : (job + 1) * blocks]) for job in range(jobs)]


def whole_runs(jobs: int, blocks: int) -> list[Runs]:
    return [((job * blocks, blocks),) for job in range(jobs)]


def jobs_of(params: SamplingParams = GREEDY, places: Callable[[int, int], list[Runs]] = scattered) -> list[Job]:
    """A job a prompt; they begin one after the other, so that decodes meet prompt chunks in a step."""
    runs = places(len(PROMPTS), ROOM // BLOCK // len(PROMPTS))
    return [Job(n, list(tokens), runs[n], params, begins=2 * n, slot=n) for n, tokens in enumerate(PROMPTS)]


def through(runners: list[Runner], step: Step) -> torch.Tensor:
    out = runners[0].run(step, None).tensor
    for runner in runners[1:]:
        out = runner.run(step, out).tensor
    return out


def play(runners: list[Runner], jobs: list[Job]) -> list[list[int]]:
    """Runs all jobs to their ends, each step with a row of every job that has begun."""
    number = 0
    mixed = False
    while not all(job.finished for job in jobs):
        running = [job for job in jobs if job.begins <= number and not job.finished]
        step = Step(number, tuple(job.row() for job in running))
        number += 1
        if not running:
            continue
        mixed |= len({len(row.tokens) == 1 for row in step.rows}) == 2
        drawn = iter(through(runners, step).tolist())
        for job, row in zip(running, step.rows, strict=True):
            job.done = row.stop
            if row.samples:
                token = next(drawn)
                job.answer.append(token)
                job.tokens.append(token)
        assert next(drawn, None) is None
    assert mixed or len(jobs) == 1, "no step had both prompt chunks and decodes"
    return [job.answer for job in jobs]


# The same tokens as transformers


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_generate(kind: str, split: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(kind)
    assert play(model.pipeline(SPLITS[split]), jobs_of(places=scattered)) == model.answers


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_tokens_do_not_depend_on_the_places(kind: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(kind)
    assert play(model.pipeline(SPLITS["2+2+1"]), jobs_of(places=whole_runs)) == model.answers


@pytest.mark.parametrize("kind", ["llama_tied", "gemma2", "mixtral"])
def test_bfloat16_does_not_depend_on_the_split(kind: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(kind)
    cut = model.pipeline(SPLITS["2+2+1"], "bfloat16")
    step = Step(0, (jobs_of()[0].row(),))
    hidden = cut[0].run(step, None).tensor
    assert hidden.dtype == torch.bfloat16
    assert hidden.isfinite().all()
    assert play(cut, jobs_of()) == play(model.pipeline(SPLITS["whole"], "bfloat16"), jobs_of())


def test_places_of_a_finished_request_can_be_used_again(model_of: Callable[[str], Model]) -> None:
    model = model_of("gemma2")
    runners = model.pipeline(SPLITS["2+2+1"])
    assert play(runners, jobs_of(places=whole_runs)) == model.answers
    backwards = [replace(job, begins=6 - job.begins, slot=3 - job.slot) for job in jobs_of(places=scattered)]
    assert play(runners, backwards) == model.answers


def test_a_replayed_answer_goes_on_as_before(model_of: Callable[[str], Model]) -> None:
    """After a loss the tokens given out so far are the prompt: the rest must be the same."""
    model = model_of("gemma3_text")
    jobs = jobs_of()
    for job, answer in zip(jobs, model.answers, strict=True):
        job.answer = answer[:5]
        job.tokens += answer[:5]
    assert play(model.pipeline(SPLITS["2+2+1"]), jobs) == model.answers


# What a stage gives back


@pytest.mark.parametrize("split", ["whole", "2+2+1"])
def test_a_copied_beginning_is_as_good_as_a_computed_one(split: str, model_of: Callable[[str], Model]) -> None:
    *before, last = model_of("llama").pipeline(SPLITS[split])
    params = replace(GREEDY, logprobs=5)
    tokens = prompt(3 * BLOCK)

    def told(step: Step) -> list[float]:
        hidden = None
        for runner in before:
            hidden = runner.run(step, hidden).tensor
        ((_, logprob),) = last.run(step, hidden).logprobs
        return [likely for _, likely in logprob.top]

    wanted = told(Step(0, (Row(0, 0, 0, tokens, ((4, 3),), True, params),)))
    told(Step(1, (Row(1, 1, 0, (*tokens[: 2 * BLOCK], 9, 9), ((0, 3),), True, params),)))
    row = Row(2, 2, 2 * BLOCK, tokens[2 * BLOCK :], ((8, 1), (7, 1), (9, 1)), True, params)
    assert told(Step(2, (replace(row, copies=((0, 8, 1), (1, 7, 1))),))) == pytest.approx(wanted)
    assert told(Step(3, (replace(row, copies=((0, 8, 1), (0, 7, 1))),))) != pytest.approx(wanted), "it should matter"


def test_a_step_without_samples_gives_no_tokens(model_of: Callable[[str], Model]) -> None:
    runners = model_of("llama").pipeline(SPLITS["2+2+1"])
    step = Step(0, (jobs_of()[1].row(), jobs_of()[2].row()))
    assert not any(row.samples for row in step.rows)
    hidden = runners[0].run(step, None).tensor
    assert hidden.shape == (2 * CHUNK, 64)
    tokens = runners[2].run(step, runners[1].run(step, hidden).tensor).tensor
    assert tokens.shape == (0,)
    assert tokens.dtype == torch.int64


def test_seconds_are_shared_between_body_and_head(model_of: Callable[[str], Model]) -> None:
    first, last = model_of("llama").pipeline((Span(0, 4, embed=True), Span(4, 5, head=True)))
    step = Step(0, (jobs_of()[0].row(),))
    middle = first.run(step, None)
    end = last.run(step, middle.tensor)
    assert middle.body_seconds > 0
    assert middle.head_seconds == 0
    assert end.body_seconds > 0
    assert end.head_seconds > 0


def test_a_cache_holds_only_the_layers_of_the_span(model_of: Callable[[str], Model]) -> None:
    runners = model_of("llama").pipeline(SPLITS["2+2+1"])
    layer = 2 * 2 * 16 * ROOM * 4  # keys and values of two heads
    assert [runner.cache.nbytes for runner in runners] == [2 * layer, 2 * layer, layer]
    assert [runner.cache.nbytes for runner in model_of("llama").pipeline(SPLITS["ends apart"])] == [0, 5 * layer, 0]


def test_an_idle_rank_loads_nothing(model_of: Callable[[str], Model]) -> None:
    stage = Stage(rank=0, span=SPLITS["whole"][0], weight_bytes=0, kv_bytes=0, work_share=1.0)
    plan = Plan(stages=(stage,), idle=(1,), kv_tokens=ROOM)
    blueprint = model_of("llama").blueprint
    assert blueprint.load(plan, 1, block_tokens=BLOCK, max_requests=1, device=CPU) is None


# Parameters on their way to the sampler


def test_a_penalty_is_that_of_transformers(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    params = SamplingParams(seed=0, repetition_penalty=1.4)
    whole = AutoModelForCausalLM.from_pretrained(model.folder)
    expected = [
        whole.generate(
            torch.tensor([tokens]), max_new_tokens=ANSWER, do_sample=False, use_cache=False, repetition_penalty=1.4
        )[0, len(tokens) :].tolist()
        for tokens in PROMPTS
    ]
    assert expected != model.answers, "a penalty that changes nothing tests nothing"
    assert play(model.pipeline(SPLITS["2+2+1"]), jobs_of(params)) == expected


def test_a_new_request_in_a_slot_has_no_history(model_of: Callable[[str], Model]) -> None:
    runners = model_of("llama").pipeline(SPLITS["2+2+1"])
    params = SamplingParams(seed=0, repetition_penalty=3.0)

    def alone() -> list[int]:
        [answer] = play(runners, [replace(jobs_of(params)[0], slot=2, answer=[])])
        return answer

    expected = alone()
    before = Row(9, 2, 0, tuple(expected), ((0, 3),), samples=False, params=params)
    through(runners, Step(0, (before,)))
    assert alone() == expected
    through(runners, Step(0, (before,)))
    same_request = replace(jobs_of(params)[0].row(), slot=2, params=None)
    assert through(runners, Step(1, (same_request,))).tolist() != expected[:1], "nothing was penalised"


@pytest.mark.parametrize("split", SPLITS)
def test_samples_follow_seed_and_position(split: str, model_of: Callable[[str], Model]) -> None:
    """Each token is what the sampler draws from transformers' logits at its position."""
    model = model_of("qwen3")
    params = SamplingParams(seed=7, temperature=3.0, top_p=0.95)
    answers = play(model.pipeline(SPLITS[split]), jobs_of(params))
    assert answers != play(model.pipeline(SPLITS[split]), jobs_of(replace(params, seed=8)))
    whole = AutoModelForCausalLM.from_pretrained(model.folder)
    sampler = Sampler(1, 320, CPU)
    sampler.start(0, params)
    for tokens, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits_TV = whole(torch.tensor([[*tokens, *answer]]), use_cache=False).logits[0]
        positions = range(len(tokens), len(tokens) + len(answer))
        drawn = sampler.sample(logits_TV[len(tokens) - 1 : -1], [0] * len(answer), positions)
        assert answer == drawn.tolist()


def test_jobs_in_a_step_have_parameters_of_their_own(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    jobs = jobs_of()
    jobs[1] = replace(jobs[1], params=SamplingParams(seed=3, temperature=5.0), answer=[])
    answers = play(model.pipeline(SPLITS["2+2+1"]), jobs)
    greedy = model.answers
    assert [answers[n] for n in (0, 2, 3)] == [greedy[n] for n in (0, 2, 3)]
    assert answers[1] != greedy[1]
