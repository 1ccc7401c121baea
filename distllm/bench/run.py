"""task=bench: distllm against other engines on the same cores, turn by turn in one run.

Each engine stays loaded in processes of its own and sleeps while another is measured, so that what else happens on the
machine falls on all of them alike, and the ratio of two that follow each other means something.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from distllm.bench.engines import Engine, Ours, Prompts
from distllm.bench.figures import OURS, Batch, Comparison
from distllm.bench.loading import bench_loading
from distllm.bench.machine import Clock, cores, cpu_model
from distllm.bench.prompts import make_prompts
from distllm.bench.report import Setting, as_json, as_table
from distllm.bench.rival import RIVALS, Match
from distllm.config import BenchConfig, Config
from distllm.core import Plan
from distllm.engine.reader import open_blueprint
from distllm.llm import LLM, launched
from distllm.model.blueprint import Blueprint
from distllm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def bench(config: Config) -> int:
    """Measures, and prints a table on standard error and JSON on standard output; returns the exit code.

    Raises:
        ValueError: an option or the model cannot be used; the sentence says why.
        EngineError: an engine ended or failed.
    """
    if launched() is not None:
        raise ValueError("task=bench starts its ranks itself: run it without torchrun")
    if config.bench.measure == "loading":
        return bench_loading(config)
    blueprint = open_blueprint(config.model)
    check_room(config.bench, blueprint.sizes.context_length)
    prompts = _prompts(config.bench, blueprint.checkpoint.path)
    if config.bench.ranks > cores():
        logger.warning("%d ranks share %d cores: they slow each other down", config.bench.ranks, cores())
    with _opened(config, blueprint) as (engines, plan):
        began = Clock.read()
        comparisons = [_compare(engines, asked, config.bench) for asked in prompts]
        elsewhere = Clock.read().elsewhere(began)
    setting = _setting(config, blueprint, plan, elsewhere)
    print(as_table(setting, comparisons), file=sys.stderr)
    print(json.dumps(as_json(setting, comparisons), indent=2))
    return 0


def check_room(options: BenchConfig, context_length: int) -> None:
    """
    Raises:
        ValueError: prompt and answer are longer than the model allows.
    """
    length = options.prompt_tokens + options.new_tokens
    if length > context_length:
        raise ValueError(
            f"bench.prompt_tokens={options.prompt_tokens} and bench.new_tokens={options.new_tokens} make {length} "
            f"tokens; the model's context takes {context_length}"
        )


def _prompts(options: BenchConfig, folder: Path) -> list[Prompts]:
    """Those of each number of requests."""
    tokenizer = Tokenizer.load(folder)
    return [make_prompts(tokenizer, count=count, tokens=options.prompt_tokens) for count in options.requests]


@contextmanager
def _opened(config: Config, blueprint: Blueprint) -> Iterator[tuple[list[Engine], Plan]]:
    """All engines, loaded, and distllm's plan; all end with the context.

    distllm comes last, so that it plans with the memory that the rivals leave.
    """
    options = config.bench
    match = Match(
        folder=blueprint.checkpoint.path.resolve(),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        ranks=options.ranks,
        deadline_s=options.deadline_s,
        sections={"model": asdict(config.model), "plan": asdict(config.plan), "engine": asdict(config.engine)},
    )
    with ExitStack() as stack:
        logger.info("loading the model into %s", ", ".join([*options.rivals, OURS]))
        rivals = [stack.enter_context(RIVALS[name](match)) for name in options.rivals]
        for rival in rivals:
            rival.wait_ready()
        cluster = replace(config.cluster, workers=options.ranks, threads=1)
        llm = stack.enter_context(
            LLM(
                config.model,
                cluster=cluster,
                quantization=config.quantization,
                weights=config.weights,
                plan=config.plan,
                engine=config.engine,
            )
        )
        yield [Ours(llm), *rivals], llm.plan


def _compare(engines: Sequence[Engine], prompts: Prompts, options: BenchConfig) -> Comparison:
    """One warm-up of each engine, then the measured rounds, every other one in reverse order."""
    warm_ups = {engine.name: engine.run(prompts, options.new_tokens) for engine in engines}
    rounds = []
    for number in range(1, options.rounds + 1):
        done = {
            engine.name: _measure(engine, prompts, options.new_tokens)
            for engine in (engines if number % 2 else reversed(engines))
        }
        rates = ", ".join(f"{engine.name} {done[engine.name].tokens_per_s:.1f}" for engine in engines)
        logger.info("requests %d, round %d of %d: %s tokens/s", len(prompts), number, options.rounds, rates)
        rounds.append(done)
    return Comparison(len(prompts), warm_ups, tuple(rounds))


def _measure(engine: Engine, prompts: Prompts, new_tokens: int) -> Batch:
    """One timed batch. A token before it wakes the engine, or the first step would count how long it slept."""
    engine.run(prompts[:1], 1)
    return engine.run(prompts, new_tokens)


def _setting(config: Config, blueprint: Blueprint, plan: Plan, elsewhere: float) -> Setting:
    path = blueprint.checkpoint.path
    return Setting(
        model=config.model.name or path.name,
        path=str(path),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        quantization=config.quantization.method,
        cores=cores(),
        cpu=cpu_model(),
        elsewhere=elsewhere,
        options=config.bench,
        plan=plan,
    )
