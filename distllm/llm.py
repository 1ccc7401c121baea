"""The library's door: `LLM` answers prompts, on one rank or many."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from distllm.config import ClusterConfig, EngineConfig, ModelConfig, PlanConfig, QuantizationConfig, WeightsConfig
from distllm.core import EngineError, FinishReason, Logprob, Output, Piece, Plan, Request, SamplingParams, Usage
from distllm.engine import process
from distllm.engine.engine import Engine
from distllm.engine.home import home
from distllm.engine.options import Options
from distllm.engine.reader import Messages, Prompt, Reader
from distllm.net import store
from distllm.net.store import Rendezvous
from distllm.validation import validate_engine

Heard = TypeVar("Heard")

# The longest wait in one go, so that Ctrl-C is heard.
LISTEN_S = 0.2


def launched(environ: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """The ranks that torchrun, or whoever sets its variables, has started; None if this process is alone.

    Raises:
        ValueError: the variables are not whole.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    try:
        return Rendezvous(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            host=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            job=f"{environ.get('TORCHELASTIC_RUN_ID', 'none')}-{_restarts_of_all(environ)}",
            hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            run_id=environ.get("TORCHELASTIC_RUN_ID"),
            restarted=environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0",
        )
    except KeyError as missing:
        raise ValueError(f"RANK and WORLD_SIZE are set, but {missing} is not; start the ranks with torchrun") from None
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and MASTER_PORT must be numbers: {error}") from None


def _restarts_of_all(environ: Mapping[str, str]) -> str:
    """How often the launcher has started all ranks again: one agent for all of them does so when one dies.

    Agents of some ranks start only those again, which come back to the same job.
    """
    all_here = environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") if all_here else "0"


def serve_here(cluster: ClusterConfig | None = None) -> int:
    """On a rank other than 0: serves rank 0 until its process ends, then returns the exit code.

    With `cluster.join`, this process becomes a new rank of a job that runs.

    Raises:
        ValueError: this is not such a rank, or the master cannot be reached.
    """
    cluster = cluster or ClusterConfig()
    rendezvous = store.newcomer(cluster.join, cluster.join_timeout_s) if cluster.join else launched()
    if rendezvous is None or rendezvous.rank == 0:
        raise ValueError("serve_here() is for the ranks of torchrun other than 0, and with cluster.join")
    return process.serve(rendezvous, cluster)


class LLM:
    """A causal language model on one rank or many.

    Under torchrun the same script runs on every rank: on rank 0 this gives an engine, on the others it serves rank 0
    until that process ends and leaves with SystemExit.

    Args:
        model: folder of a checkpoint, a model configuration, or a reader that has looked the model through.
        workers: ranks to start on this host, this process included; 0 takes torchrun's, or this process alone.
        dtype: of weights and KV: auto, float32, bfloat16 or float16.
        quantization: weights in fewer bits: none, int8, int4, bnb_int8, bnb_nf4, or the section with its options.
        weights: how the other ranks come by theirs: own (they have the files) or push (this rank sends them), or the
            section with its options.
        cluster, plan, engine: further options, as in the sections of the command line's configuration.

    Raises:
        ValueError: an option, the model or its files cannot be used, or it does not fit; the sentence says why.
        EngineError: a rank does not come up or is lost.
    """

    def __init__(
        self,
        model: str | Path | ModelConfig | Reader,
        *,
        workers: int | None = None,
        dtype: str | None = None,
        quantization: str | QuantizationConfig | None = None,
        weights: str | WeightsConfig | None = None,
        cluster: ClusterConfig | None = None,
        plan: PlanConfig | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        if isinstance(model, Reader) and dtype is not None:
            raise ValueError("dtype is the reader's to know: give it to the reader")
        wanted = _wanted(model)
        cluster = cluster or ClusterConfig()
        options = Options(
            model=wanted if dtype is None else replace(wanted, dtype=dtype),
            cluster=cluster if workers is None else replace(cluster, workers=workers),
            quantization=QuantizationConfig.of(quantization),
            weights=_weights(weights),
            plan=plan or PlanConfig(),
            engine=engine or EngineConfig(),
        )
        validate_engine(**{each.name: getattr(options, each.name) for each in fields(options)})
        rendezvous = launched()
        if rendezvous is not None and rendezvous.rank != 0:
            raise SystemExit(serve_here(options.cluster))
        if rendezvous is not None and rendezvous.world_size > 1:
            home.meet(rendezvous)
        if rendezvous is None:
            home.summon(options.cluster)
        try:
            self._reader = model if isinstance(model, Reader) else Reader(options.model)
            self._engine = Engine(options, self._reader, rendezvous)
        finally:
            home.send_away()

    @property
    def plan(self) -> Plan:
        """Who holds what."""
        return self._engine.job.plan

    def stats(self) -> dict[str, object]:
        """Per rank: span, bytes of weights as planned and as held, of KV and read of files, peak RSS and where the time
        went; in all: steps, tokens, tokens/s, and a sentence for each loss of ranks."""
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_output: Callable[[Output], None] = lambda _: None,
    ) -> list[Output]:
        """Continues prompts: texts, or lists of token ids.

        Args:
            on_output: called with each output as soon as it is whole, in any order.

        Returns:
            The outputs in the order of the prompts.

        Raises:
            ValueError: a prompt is empty or too long; names it.
            EngineError: the engine ended.
        """
        return self.answer(
            [(prompt, self.request(prompt, params, f"prompt {i}")) for i, prompt in enumerate(_several(prompts))],
            on_output,
        )

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Output:
        """Answers a conversation of {"role", "content"} messages, through the model's chat template.

        Raises:
            ValueError: the messages are malformed, or the model has no chat template.
            EngineError: the engine ended.
        """
        return self.answer([(messages, self.chat_request(messages, params))])[0]

    def stream(self, prompt: Prompt | Messages | Request, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continues one prompt, or answers one conversation, piece by piece; a request brings its own params.

        Raises:
            ValueError, EngineError: as `generate` and `chat`.
        """
        if isinstance(prompt, Request):
            return self._stream(prompt)
        if isinstance(prompt, str) or all(isinstance(each, int) for each in prompt):
            return self._stream(self.request(prompt, params, "the prompt"))  # type: ignore[arg-type]
        return self._stream(self.chat_request(prompt, params, "the conversation"))  # type: ignore[arg-type]

    def request(self, prompt: Prompt, params: SamplingParams | None = None, name: str = "the prompt") -> Request:
        """A request that `answer` takes.

        Raises:
            ValueError: the prompt is empty or too long; `name` is what it is called.
        """
        request = self._reader.request(prompt, params, name)
        self.check_room(request, name)
        return request

    def chat_request(
        self, messages: Messages, params: SamplingParams | None = None, name: str = "the conversation"
    ) -> Request:
        """As `request`, for chat messages."""
        request = self._reader.chat_request(messages, params, name)
        self.check_room(request, name)
        return request

    def check_room(self, request: Request, name: str = "the prompt") -> None:
        """
        Raises:
            ValueError: the ranks have too little KV room for a reader's request; `name` is what its prompt is called.
        """
        self._engine.check_room(request, name)

    def answer(
        self,
        asked: Sequence[tuple[object, Request]],
        on_output: Callable[[Output], None] = lambda _: None,
        on_tokens: Callable[[int, Sequence[int]], None] = lambda *_: None,
    ) -> list[Output]:
        """Runs requests, each with the prompt as it was given, and waits for all.

        Args:
            on_output: called with each output as soon as it is whole, in any order.
            on_tokens: called with the index of a request and all tokens of its answer so far, as long as it grows.

        Raises:
            ValueError: the ranks have too little KV room for one of them.
            EngineError: the engine ended.
        """
        heard: queue.SimpleQueue[tuple[Draft, Piece | Exception]] = queue.SimpleQueue()
        drafts = [Draft(index, prompt, request) for index, (prompt, request) in enumerate(asked)]
        try:
            for draft in drafts:
                draft.number = self._engine.submit(draft.request, partial(_tell, heard, draft))
            left = len(drafts)
            while left:
                draft, piece = _listen(heard)
                draft.add(piece)
                if draft.finish_reason is not None:
                    left -= 1
                    on_output(draft.output())
                else:
                    on_tokens(draft.index, draft.token_ids)
        finally:
            for draft in drafts:
                if draft.number is not None and draft.finish_reason is None:
                    self._engine.master.cancel(draft.number)
        return [draft.output() for draft in drafts]

    def _stream(self, request: Request) -> Iterator[Piece]:
        heard: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        number = self._engine.submit(request, heard.put)
        finished = False
        try:
            while not finished:
                piece = _raised(_listen(heard))
                finished = piece.finish_reason is not None
                yield piece
        finally:
            if not finished:
                self._engine.master.cancel(number)

    def submit(self, request: Request, hear: Callable[[Piece | Exception], None]) -> int:
        """Queues a request and returns at once; its pieces, or the error that ends it, are heard as they come.

        Args:
            request: of `request` or `chat_request`.
            hear: called from the engine's thread, which waits for it.

        Returns:
            The number to `cancel` it by.

        Raises:
            ValueError: the ranks have too little KV room for it.
            EngineError: the engine has ended.
        """
        return self._engine.submit(request, hear)

    def cancel(self, number: int) -> None:
        """Ends a submitted request early; no more is heard of it."""
        self._engine.master.cancel(number)

    @property
    def failure(self) -> EngineError | None:
        """Why the engine has ended; None while it runs."""
        return self._engine.master.failure

    def on_end(self, told: Callable[[], None]) -> None:
        """Has somebody told, from the engine's thread, when the engine ends."""
        self._engine.master.on_end(told)

    def on_change(self, told: Callable[[], None]) -> None:
        """Has somebody told, from the engine's thread, when there is something new of the ranks in `stats`."""
        self._engine.job.crew.chronicle.on_change(told)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; it may be a part of a character."""
        return self._reader.tokenizer.token_bytes(token)

    @property
    def most_requests(self) -> int:
        """How many run at once; further ones wait."""
        return self._engine.job.options.engine.max_requests

    def close(self) -> None:
        """Frees the model; ranks that were started for it end, those of a launcher stay for the next one."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class Draft:
    """One answer on its way."""

    index: int
    prompt: object
    request: Request
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    number: int | None = None  # the engine's, once it has taken the request

    def add(self, piece: Piece | Exception) -> None:
        """
        Raises:
            EngineError: the engine ended.
        """
        piece = _raised(piece)
        self.texts.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason

    def output(self) -> Output:
        assert self.finish_reason is not None, "the answer is not whole"
        return Output(
            index=self.index,
            prompt=self.prompt,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(len(self.request.tokens), len(self.token_ids)),
            logprobs=tuple(self.logprobs),
        )


def _wanted(model: str | Path | ModelConfig | Reader) -> ModelConfig:
    if isinstance(model, Reader):
        return model.model
    return model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))


def _weights(given: str | WeightsConfig | None) -> WeightsConfig:
    return given if isinstance(given, WeightsConfig) else WeightsConfig(source=given or "own")


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt, be it a text or a list of token ids, as a list of one."""
    if isinstance(prompts, str) or (prompts and all(isinstance(each, int) for each in prompts)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _tell(heard: queue.SimpleQueue[tuple[Draft, Piece | Exception]], draft: Draft, piece: Piece | Exception) -> None:
    heard.put((draft, piece))


def _listen(heard: queue.SimpleQueue[Heard]) -> Heard:
    """The next thing from the engine's thread, which always says something in the end."""
    while True:
        try:
            return heard.get(timeout=LISTEN_S)
        except queue.Empty:
            continue


def _raised(piece: Piece | Exception) -> Piece:
    if isinstance(piece, Exception):
        raise piece
    return piece
