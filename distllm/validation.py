"""The checks of a configuration: each names the key, the value and the fix, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from distllm.config import (
    CHOICES,
    SHARD_TASKS,
    SPLIT_RIVAL,
    ClusterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    PlanConfig,
    QuantizationConfig,
    Section,
    ServeConfig,
    WeightsConfig,
    kind,
    one_of,
)

DAY_S = 86400  # no wait is longer; the network's clocks overflow at the infinite

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and what it must be."""


def _within(low: float, high: float, unit: str = "") -> Rule:
    return lambda value: low <= value <= high, f"{low} to {high}{unit}"


def _at_least(low: int) -> Rule:
    return lambda value: value >= low, f"at least {low}"


def _positive(most: int, unit: str = "") -> Rule:
    return lambda value: 0 < value <= most, f"more than 0 and at most {most}{unit}"


# Ranks and threads beyond any machine's would take the host down, not fail.
RULES: dict[str, Rule] = {
    "model.context_length": _at_least(2),
    "cluster.workers": _within(0, 256),
    "cluster.spares": _within(0, 255),
    "cluster.threads": _within(1, 1024),
    "cluster.join_timeout_s": _positive(DAY_S, " seconds"),
    "cluster.load_timeout_s": _positive(DAY_S, " seconds"),
    "cluster.deadline_s": _within(1, DAY_S, " seconds"),
    "cluster.recovery_deadline_s": _within(0, DAY_S, " seconds"),
    "cluster.orphan_deadline_s": _within(0, DAY_S, " seconds"),
    "cluster.restarts": _within(0, 10**6),
    "quantization.group": (lambda numbers: numbers in (32, 64, 128, 256), "32, 64, 128 or 256"),
    "quantization.stages": (lambda ranks: all(rank >= 0 for rank in ranks), "numbers of ranks, from 0"),
    "weights.stages": (lambda ranks: all(rank >= 1 for rank in ranks), "numbers of ranks, from 1"),
    "weights.streams": _within(1, 64),
    "plan.layers": (lambda counts: all(count >= 0 for count in counts), "numbers of 0 or more"),
    "plan.memory_fraction": _positive(1),
    "plan.replicate": (lambda ranks: all(rank >= 1 for rank in ranks), "numbers of ranks, from 1"),
    "plan.min_gain": _within(0, 1, ", a share of a step's time"),
    "engine.max_requests": _within(1, 4096),
    "engine.prompt_chunk": _within(1, 65536),
    "engine.block_tokens": _within(1, 1024),
    "engine.kv_tokens": _at_least(1),
    "engine.prefix_tokens": _at_least(0),
    "engine.steps_in_flight": _at_least(1),
    "serve.port": _within(0, 65535),
    "serve.max_body_bytes": _within(1024, 2**30),
    "serve.max_queue": _at_least(1),
    "serve.request_timeout_s": _positive(DAY_S, " seconds"),
    "serve.keep_s": _within(0, 10**9, " seconds"),
    "serve.resume_s": _within(0, DAY_S, " seconds"),
    "serve.drain_s": _within(0, DAY_S, " seconds"),
    "shard.stages": _within(1, 256),
    "bench.ranks": _within(1, 256),
    "bench.rivals": (lambda names: len(set(names)) == len(names), "different ones"),
    "bench.requests": (lambda counts: len(counts) > 0 and min(counts) >= 1, "numbers of at least 1"),
    "bench.rounds": _at_least(1),
    "bench.prompt_tokens": _at_least(1),
    "bench.new_tokens": _at_least(1),
    "bench.deadline_s": _positive(DAY_S, " seconds"),
}


def validate(config: Config) -> None:
    """Refuses what cannot work, before anything starts.

    Raises:
        ValueError: names the key, the value and the fix.
    """
    _check_values("", config)
    if config.prompt is not None and config.prompts is not None:
        raise ValueError("prompt= and prompts= are both given: give one of them")
    if config.output is not None and config.prompts is None:
        raise ValueError("output= is for the answers to prompts=FILE: give that too, or redirect standard output")
    _check_names(config)
    config.sampling.params()
    validate_engine(
        model=config.model,
        cluster=config.cluster,
        quantization=config.quantization,
        weights=config.weights,
        plan=config.plan,
        engine=config.engine,
    )
    _check_values("serve.", config.serve)
    _check_serve(config.serve)
    _check_values("shard.", config.shard)
    _check_values("bench.", config.bench)
    if config.task == "chat" and (config.prompt is not None or config.prompts is not None):
        raise ValueError("task=chat reads messages from standard input: leave prompt= and prompts= out, or task=chat")
    if config.task in SHARD_TASKS:
        _check_shard(config)
    if config.task == "bench":
        _check_bench(config)


def validate_engine(
    *,
    model: ModelConfig,
    cluster: ClusterConfig,
    quantization: QuantizationConfig,
    weights: WeightsConfig,
    plan: PlanConfig,
    engine: EngineConfig,
) -> None:
    """The checks of the sections that the library takes too.

    Raises:
        ValueError: names the key, the value and the fix.
    """
    sections: dict[str, Section]
    sections = {"model": model, "cluster": cluster, "quantization": quantization, "weights": weights}
    sections |= {"plan": plan, "engine": engine}
    for name, section in sections.items():
        _check_values(f"{name}.", section)
    validate_quantization(quantization)
    if weights.source == "own" and weights.compression != "none":
        raise ValueError(f"weights.compression={weights.compression} is for what rank 0 sends: add weights=push")
    if weights.source == "own" and weights.stages is not None:
        raise ValueError("weights.stages names ranks that rank 0 sends their weights to: add weights=push")
    if (plan.strategy == "manual") != (plan.layers is not None):
        raise ValueError("plan.strategy=manual and plan.layers=[...] go together: give both or neither")
    if engine.kv_tokens is not None and engine.kv_tokens < engine.block_tokens:
        raise ValueError(
            f"engine.kv_tokens={engine.kv_tokens}: it must be at least one block, engine.block_tokens="
            f"{engine.block_tokens}"
        )


def validate_quantization(quantization: QuantizationConfig) -> None:
    """The same of one section alone.

    Raises:
        ValueError: names the key, the value and the fix.
    """
    _check_values("quantization.", quantization)
    if quantization.method == "none" and quantization != QuantizationConfig():
        given = next(item.name for item in fields(quantization) if getattr(quantization, item.name) != item.default)
        raise ValueError(f"quantization.{given} is given without a method: add quantization=int8 or another")


def _check_values(prefix: str, section: Section) -> None:
    for item in fields(section):
        value = getattr(section, item.name)
        if not is_dataclass(value) and not item.metadata["text"]:
            _check_value(prefix + item.name, value, str(item.type))


def _check_value(name: str, value: Any, type_name: str) -> None:
    """A value by itself: its type, its choices and its rule."""
    if not _is_of(value, type_name):
        raise ValueError(f"{name}={value}: it must be {kind(name, type_name)}")
    if name in CHOICES:
        for word in [value] if isinstance(value, str) else value:
            one_of(name, word, CHOICES[name])
    if name in RULES and value is not None:
        holds, rule = RULES[name]
        if not holds(value):
            raise ValueError(f"{name}={value}: it must be {rule}")


def _is_of(value: object, type_name: str) -> bool:
    """Whether a value has the type that a key is declared with; the library's users are not held to it by Hydra."""
    type_name, *optional = type_name.split(" | ")
    if value is None:
        return bool(optional)
    if type_name.startswith("list["):
        element = type_name.removeprefix("list[").removesuffix("]")
        return isinstance(value, list | tuple) and all(_is_of(each, element) for each in value)
    wanted = {"int": Integral, "float": Real, "bool": bool, "str": str}[type_name]
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _check_names(config: Config) -> None:
    """Names of files, of a folder and of an interface."""
    named = (
        ("prompts", config.prompts, "a file"),
        ("output", config.output, "a file"),
        ("model.path", config.model.path, "a folder"),
        ("model.hub", config.model.hub, "an id such as Qwen/Qwen3-0.6B"),
        ("model.revision", config.model.revision, "a branch, tag or commit"),
        ("cluster.interface", config.cluster.interface, "an interface"),
        ("cluster.join", config.cluster.join, "HOST:PORT"),
        ("shard.output", config.shard.output, "a folder"),
    )
    for name, value, what in named:
        if value == "":
            raise ValueError(f"{name}= is empty: name {what}, or leave it out")
    if config.output is not None and config.prompts is not None and _same_file(config.output, config.prompts):
        raise ValueError(f"output={config.output}: is the file of prompts itself; give another")


def _same_file(one: str, other: str) -> bool:
    """Whether two names mean one file, through links of both kinds, or would if it were there."""
    one, other = os.path.expanduser(one), os.path.expanduser(other)
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _check_serve(serve: ServeConfig) -> None:
    """What two options of the server say of each other."""
    if serve.keep_s < serve.resume_s:
        raise ValueError(
            f"serve.keep_s={serve.keep_s:g} is less than serve.resume_s={serve.resume_s:g}: an answer that ends before "
            "its client has come back would be gone; raise the one or lower the other"
        )


def _check_shard(config: Config) -> None:
    """Whether it is told where to write, and how many files."""
    if config.shard.output is None:
        raise ValueError(f"task={config.task} writes a folder: name it by shard.output=FOLDER")
    if config.task == "reconstruct" and config.model.path is None:
        raise ValueError("task=reconstruct reads a folder of shards: name it by model.path=FOLDER")
    if config.task == "shard" and (config.shard.stages is None) == (config.plan.layers is None):
        raise ValueError("task=shard: say either shard.stages=N, or plan.strategy=manual plan.layers=[...]")


def _check_bench(config: Config) -> None:
    """What two options of a benchmark say of each other."""
    options = config.bench
    if SPLIT_RIVAL in options.rivals and options.ranks == 1:
        raise ValueError(
            f"bench.ranks=1: {SPLIT_RIVAL} needs at least 2; give more ranks or leave it out of bench.rivals"
        )
    for name in ("workers", "threads"):
        if getattr(config.cluster, name):
            raise ValueError(f"cluster.{name} is for other tasks: bench.ranks says how many ranks, of one thread each")
    if max(options.requests) > config.engine.max_requests:
        raise ValueError(
            f"bench.requests={max(options.requests)}: engine.max_requests={config.engine.max_requests} would make some "
            "wait; raise that too"
        )
