"""What the master tells a worker, and what a worker tells of itself: plain values that travel by RPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distllm.config import EngineConfig, ModelConfig, QuantizationConfig
from distllm.core import Member, Plan, Span
from distllm.model.families import Anatomy
from distllm.model.files import TensorInfo
from distllm.model.manifest import Manifest
from distllm.model.pushed import Told
from distllm.net.group import AgentId
from distllm.net.push import Offer

# Below the id of any step; steps that only time the stages have ids below 0 too.
BEFORE_STEPS = -(2**31)


def in_words(step: int) -> str:
    """A step that a rank is in."""
    if step == BEFORE_STEPS:
        return "the forming of the ring"
    return f"step {step}" if step >= 0 else "a step that times the stages"


def finished_in_words(step: int) -> str:
    """How far a rank came."""
    return f"the last step it finished is {step}" if step >= 0 else "it finished no step of a request"


@dataclass(frozen=True, slots=True)
class Registration:
    """What a new rank tells the master."""

    member: Member
    identity: AgentId


@dataclass(frozen=True, slots=True)
class Push:
    """What a rank that has no files of the model needs besides: where to fetch weights, over how many connections, and
    whether to have them compressed."""

    told: Told
    offer: Offer
    streams: int
    compressed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """Hold what this plan gives you. What the master knows of its copy of the model comes along, so that a rank looks
    into no file but its own: `fingerprint`, `anatomy`, `tensors`, the headers of all files, and of shards on disk the
    `manifest`.

    `push` is for a rank that rank 0 sends its weights to. `devices` are those of the plan's stages, in ring order.
    """

    epoch: int
    plan: Plan
    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    fingerprint: str
    anatomy: Anatomy
    tensors: Mapping[str, TensorInfo]
    manifest: Manifest | None
    push: Push | None
    devices: tuple[str, ...]
    threads: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class JoinOrder:
    """Form the ring of an epoch with the others and serve it until it ends."""

    epoch: int


@dataclass(frozen=True, slots=True)
class UnloadOrder:
    """Forget the model."""

    epoch: int


@dataclass(frozen=True, slots=True)
class RestOrder:
    """There is no master: keep the weights, and nothing else."""


@dataclass(frozen=True, slots=True)
class StopOrder:
    """End the process with this exit code."""

    code: int


Order = LoadOrder | JoinOrder | UnloadOrder | RestOrder | StopOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A snapshot of a worker.

    `epoch` is that of the newest order; `done` says that it is carried out (a ring is done when it has ended) and
    `failure` why it could not be, `ring_broke` that this was no fault of the rank. `received` and `finished` are ids of
    steps, BEFORE_STEPS at first; `read_bytes` is what its weights took of files and `held_bytes` what they take in
    memory; `still_s` is the time since the last progress. `reserve` is what it holds of another rank's part, and
    `reserve_failure` why it could not load that.
    """

    epoch: int = 0
    state: str = "idle"
    done: bool = True
    failure: str | None = None
    ring_broke: bool = False
    loaded_bytes: int = 0
    read_bytes: int = 0
    held_bytes: int = 0
    received: int = BEFORE_STEPS
    finished: int = BEFORE_STEPS
    still_s: float = 0.0
    peak_bytes: int = 0
    reserve: Span = Span(0, 0)
    reserve_failure: str | None = None
