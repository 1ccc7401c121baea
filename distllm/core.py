"""The frozen nouns that every floor stands on.

Knows no torch, no network, no configuration file and no clock: plain values that compare, hash and pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


# Frames have room for so many.
MOST_BIASES, MOST_LOGPROBS, MOST_COPIES = 300, 20, 16


Fault = Literal["killed", "exited", "disconnected", "hung", "unreachable", "failed", "cannot_load", "link"]
"""What can go wrong with a rank or a ring.

The process was killed by a signal, exited, or closed its connection (that of somebody else, who does not tell why);
stood still on a host that answers, or did not answer from another host; failed in its own code; could not load its
part. Or the ring broke although every rank is well.
"""

# What following one grammar may take, as llguidance's ParserLimits have it: 0.1 s for a step at most, and 50 MB. A
# choice among 10,000 texts is within it.
GRAMMAR_LIMITS = {"initial_lexer_fuel": 200_000, "max_lexer_states": 20_000, "verbose_errors": False}


class EngineError(RuntimeError):
    """The engine has ended and took the running requests with it; the message says who or what ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick the tokens of one request.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 picks the likeliest token (greedy); otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach p, in (0, 1].
        min_p: drop tokens less likely than min_p times the likeliest, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (CTRL, 2019); 1 is off.
        presence_penalty: taken off the logits of tokens that the answer has, in [-2, 2]; 0 is off.
        frequency_penalty: the same for each time that the answer has them.
        logit_bias: added to the logits of some tokens, by their ids; each in [-100, 100].
        logprobs: tells the log-probability of each token, and of so many of the likeliest in its place; None does not.
        seed: makes sampling repeatable; None draws one when the request is accepted.
        grammar: what the answer must be, in llguidance's form: `distllm.json_grammar` makes one of a JSON schema.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on to max_tokens whatever the model says.

    Raises:
        ValueError: a value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""

    def __post_init__(self) -> None:
        given: object = self.stop  # a list or one string will do
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(self.stop))
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(sorted((int(token), float(value)) for token, value in bias)))
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of 0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and less than 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a finite number above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("logit_bias", len(self.logit_bias) <= MOST_BIASES, f"at most {MOST_BIASES} tokens"),
            ("logit_bias", all(-100 <= value <= 100 for _, value in self.logit_bias), "numbers from -100 to 100"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"sampling.{name}={getattr(self, name)!r}: it must be {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue: `tokens` is the prompt, `eos_ids` are the ids that end the text.

    `generated` are tokens that its answer has already, from before.
    """

    id: int
    tokens: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    generated: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Tokens of the prompt and of what its answer has already."""
        return len(self.tokens) + len(self.generated)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was by the model alone, as the natural logarithm of its probability.

    `top` are the likeliest tokens of its place with theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What became of one prompt.

    `prompt` is as it was given: a text, token ids, or chat messages. `logprobs` are of the tokens, if asked for.
    """

    index: int
    prompt: object
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of streamed text; the last one of a request has its finish reason.

    `reused` are tokens of the request that were not computed for it, since another one began alike.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[Logprob, ...] = ()
    reused: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range of decoder layers [start, stop), and whether the ends of the model belong to it."""

    start: int
    stop: int
    embed: bool = False
    head: bool = False

    @property
    def layers(self) -> int:
        return self.stop - self.start

    @property
    def is_empty(self) -> bool:
        return not (self.layers or self.embed or self.head)

    def overlaps(self, other: Span) -> bool:
        """Whether something belongs to both."""
        layers = max(self.start, other.start) < min(self.stop, other.stop)
        return layers or (self.embed and other.embed) or (self.head and other.head)

    def covers(self, other: Span) -> bool:
        """Whether all of another span belongs to this one."""
        layers = self.start <= other.start and other.stop <= self.stop
        return (layers or not other.layers) and self.embed >= other.embed and self.head >= other.head

    def joined(self, other: Span) -> Span:
        """Both as one; they must touch."""
        assert max(self.start, other.start) <= min(self.stop, other.stop), "there is a gap"
        start, stop = min(self.start, other.start), max(self.stop, other.stop)
        return Span(start, stop, embed=self.embed or other.embed, head=self.head or other.head)

    def __str__(self) -> str:
        middle = f"layers {self.start}-{self.stop - 1}" if self.layers else ""
        parts = ("embeddings" if self.embed else "", middle, "head" if self.head else "")
        return " + ".join(part for part in parts if part) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What the parts of a model weigh; lengths in layers, sizes in bytes.

    `tied_bytes` is the part of `head_bytes` that a rank does not hold twice when it also has the embeddings.
    `kv_bytes` is per layer and token. `layer_work` and `head_work` are in any one unit of time per step. `quantized`
    is the same for the ranks that hold their part in fewer bits.
    """

    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    tied_bytes: int
    kv_bytes: tuple[int, ...]
    layer_work: tuple[float, ...]
    head_work: float
    context_length: int
    quantized: ModelSizes | None = None

    def on(self, member: Member) -> ModelSizes:
        """What the parts weigh on this rank."""
        return self.quantized if self.quantized is not None and member.quantizes else self

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    def weight_bytes(self, span: Span) -> int:
        """Bytes of weights that a rank with this span holds."""
        total = sum(self.layer_bytes[span.start : span.stop])
        total += self.embed_bytes * span.embed + self.head_bytes * span.head
        return total - self.tied_bytes * (span.embed and span.head)

    def kv_bytes_per_token(self, span: Span) -> int:
        return sum(self.kv_bytes[span.start : span.stop])

    def work(self, span: Span) -> float:
        return sum(self.layer_work[span.start : span.stop]) + self.head_work * span.head


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank that has registered with the master; `life` is unique to the process life.

    `memory_bytes` is what this rank may use of its host's free memory, or of its GPU's; `speed` is relative to other
    members, `quantizes` whether it holds its part in fewer bits. `pid_namespace` and `started` (seconds since 1970)
    tell whether a pid seen elsewhere is this process.
    """

    life: str
    rank: int
    host: str
    boot_id: str
    pid: int
    pid_namespace: str = ""
    started: float = 0.0
    gpus: int = 0
    device: str = "cpu"
    memory_bytes: int
    cores: int
    versions: tuple[tuple[str, str], ...] = ()
    speed: float = 1.0
    quantizes: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One position of the pipeline and what it holds."""

    rank: int
    span: Span
    weight_bytes: int
    kv_bytes: int
    work_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who holds what. `stages` is in ring order, rank 0 first; `idle` ranks hold nothing."""

    stages: tuple[Stage, ...]
    idle: tuple[int, ...]
    kv_tokens: int

    def stage_of(self, rank: int) -> Stage | None:
        return next((stage for stage in self.stages if stage.rank == rank), None)


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part in a step.

    `tokens` start at position `start`; the request's KV lies in `runs`, pairs of (first block, blocks) in order of
    position. `samples` says that a token is wanted after the last one. `params` comes with a request's first row of
    an epoch and tells the last stage to start its history in `slot` anew; `prompt` is then the length of the prompt.
    `allowed`, if it is not empty, has a bit for each token, the lowest first: whether it may be sampled. `copies`,
    first blocks from and to and how many, are the KV of others that it begins with: they are made before the step.
    """

    request: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    samples: bool
    params: SamplingParams | None = None
    prompt: int = 0
    allowed: bytes = b""
    copies: tuple[tuple[int, int, int], ...] = ()

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of one batch through all stages."""

    id: int
    rows: tuple[Row, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def has_prompt(self) -> bool:
        """Some row is a part of a prompt, and not just the last token of one or of an answer."""
        return any(len(row.tokens) > 1 or not row.samples for row in self.rows)
