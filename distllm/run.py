"""The command line's door: Hydra's overrides in, a task run, errors in one sentence, an exit code out.

Rank 0 leads; the other ranks of a launcher serve it. torch is imported only when a task needs it.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from distllm import logs
from distllm.compose import compose, help_text, split_arguments, yaml_of
from distllm.config import SHARD_TASKS, Config
from distllm.core import EngineError
from distllm.serve.messages import WAKE, FrontLost, Role
from distllm.validation import validate

if TYPE_CHECKING:
    from distllm.engine.reader import Reader
    from distllm.llm import LLM

logger = logging.getLogger("distllm")

DEFAULT_PROMPT = "Once upon a time"
# Ranks other than 0 leave the word on a bad command line to rank 0; this long they wait for its end to end them.
SILENCE_S = 5.0
# Longer than the engine takes to find out who broke its ring, shorter than the other ranks linger for that.
VERDICT_S = 3.5


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(slots=True)
class Front:
    """The HTTP front that this process is rank 0 of; if it `keeps` on, it starts another one when this one ends."""

    connection: socket.socket
    role: Role
    keeps: bool = field(init=False)

    def __post_init__(self) -> None:
        self.keeps = self.role is not Role.FIRST

    def wait_to_be_woken(self) -> bool:
        """Whether rank 0's turn has come for a process that stands by; if the front is gone, it never does."""
        return self.connection.recv(len(WAKE)) == WAKE


def main(arguments: Sequence[str] | None = None, front: Front | None = None) -> NoReturn:
    """`python -m distllm.run key=value ...`, alone or under torchrun.

    Args:
        front: of task=serve, the HTTP front that this process is rank 0 of.
    """
    # torch warns of every connection that closes, which is how ranks end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model writes more than an old locale can
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    # Thousands of modules are imported and stay: looking through them again and again is a tenth of the start.
    gc.set_threshold(50_000)
    given = list(sys.argv[1:] if arguments is None else arguments)
    rank = _number("RANK", 0)
    code = _lead(given, front) if rank == 0 else _follow(given, rank)
    with suppress(OSError):  # of what rank 0 wrote, it has been told
        sys.stdout.flush()
    sys.stderr.flush()
    # A rank that leaves while a dead neighbour still holds a receive would wait for it in torch's destructors.
    os._exit(code)


def _lead(given: Sequence[str], front: Front | None) -> int:
    """
    Args:
        front: the HTTP front that this process is rank 0 of, if any.
    """
    _listen_to_signals()
    began = over = told = again = False
    try:
        try:
            if (before := _concluded()) is not None:
                return before
            config = _configured(given, front)
            told = config is not None and config.cluster.join is not None
            began = config is not None and not told
            if config is not None and began and config.task == "serve" and front is None:
                code, told = _serve_http(config, given)
                over = told or code == 0
            else:
                code, over = _run(config, front) if config is not None else 0, True
            sys.stdout.flush()
        finally:
            _ignore_signals()
            _send_ranks_away()
    except BrokenPipeError:
        code, over = 1, True  # whoever read standard output has had enough
    except (ValueError, EngineError, OSError) as error:
        code = _say(str(error), 2 if isinstance(error, ValueError) else 1)
        again = _kept(front) and not isinstance(error, FrontLost)
        over = isinstance(error, ValueError) and not again
    except KeyboardInterrupt:
        code, over = _say("interrupted", 130), True
    except Terminated as end:
        verdict = _verdict_behind(end)
        code = _say("ended by SIGTERM", 143) if verdict is None else _say(str(verdict), 1)
        again = _kept(front)
    if over and not told:
        _conclude(code)
    # What the words alone tell, the other ranks know too: they wait for this one to end, or have ended. If this one is
    # started again, they wait for that.
    if began and not told and _number("WORLD_SIZE", 1) > 1 and (over or not (again or _comes_again())):
        _dismiss(code)
    return code


def _kept(front: Front | None) -> bool:
    return front is not None and front.keeps


def _comes_again() -> bool:
    """Whether the launcher will start this process again if it fails."""
    return _number("TORCHELASTIC_MAX_RESTARTS", 0) > _number("TORCHELASTIC_RESTART_COUNT", 0)


def _conclude(code: int) -> None:
    """Tells processes that the launcher starts again that there is nothing left to do."""
    if _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0:
        from distllm.llm import launched
        from distllm.net import store

        with suppress(ValueError):  # a launcher that cannot be understood has been complained of
            if (rendezvous := launched()) is not None:
                store.conclude(rendezvous, code)


def _concluded() -> int | None:
    """How the job has ended, if the launcher has started this process again in spite of that.

    Raises:
        ConnectionError: nobody can tell, because the launcher of rank 0 has ended.
    """
    if _number("TORCHELASTIC_RESTART_COUNT", 0) == 0:
        return None
    from distllm.llm import launched
    from distllm.net import store

    try:
        rendezvous = launched()
    except ValueError:  # it will be complained of
        return None
    if rendezvous is None or rendezvous.hosts_store:
        return None
    return store.concluded(rendezvous)


def _number(variable: str, default: int) -> int:
    """A launcher's variable; what is no number is complained of where the launcher's word is needed."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


def _dismiss(code: int) -> None:
    """Lets the launcher's other ranks end as this one does."""
    from distllm.engine.home import home
    from distllm.llm import launched

    with suppress(ValueError):  # a launcher that cannot be understood has been complained of
        if (rendezvous := launched()) is not None:
            home.meet(rendezvous)
            home.dismiss(code)


def _verdict_behind(end: BaseException) -> EngineError | None:
    """The engine's word, if the end came while that was on its way up."""
    behind = end.__context__
    while behind is not None and not isinstance(behind, EngineError):
        behind = behind.__context__
    return behind


def _say(sentence: str, code: int) -> int:
    logs.complain(sentence)
    return code


def _listen_to_signals() -> None:
    """The first signal ends the task; others find it on its way out.

    A launcher that loses one rank sends SIGTERM to the rest at once. The name of the lost one is worth a moment, in
    which the engine notices by itself.
    """
    others = _number("WORLD_SIZE", 1) > 1

    def end(number: int, *_: object) -> None:
        _ignore_signals()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM and others:
            _hold_ranks()
            signal.setitimer(signal.ITIMER_REAL, VERDICT_S)
            return
        raise Terminated

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(each, end)


def _hold_ranks() -> None:
    """If this process has come so far that there are any."""
    if (home := sys.modules.get("distllm.engine.home")) is not None:
        home.home.hold()


def _send_ranks_away() -> None:
    """Those that this process has started and found nothing to do for."""
    if (home := sys.modules.get("distllm.engine.home")) is not None:
        home.home.send_away()


def _ignore_signals() -> None:
    """What is on its way out ends by itself, and soon."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _configured(given: Sequence[str], front: Front | None) -> Config | None:
    """What to do; None if the words only asked to be shown something."""
    flags, overrides = split_arguments(given)
    if flags.help:
        print(help_text(flags.config_dir))
        return None
    config = compose(flags, overrides)
    if flags.cfg:
        print(yaml_of(config), end="")
        return None
    validate(config)
    is_no_rank_yet = config.cluster.join is not None or (config.task == "serve" and front is None)
    logs.log_to_stderr(config.log_level, config.log_format, rank=None if is_no_rank_yet else 0)
    return config


def _run(config: Config, front: Front | None) -> int:
    if config.cluster.join is not None:
        from distllm.llm import serve_here

        return serve_here(config.cluster)
    if config.task == "bench":
        from distllm.bench.run import bench

        return bench(config)
    if config.task == "plan":
        return _plan(config)
    if config.task in SHARD_TASKS:
        return _shard(config)
    if config.task == "serve":
        assert front is not None, "without one this process is the front"
        return _serve_front(config, front)
    if config.task == "chat":
        return _chat(config)
    return _generate(config)


def _serve_http(config: Config, given: Sequence[str]) -> tuple[int, bool]:
    """The HTTP front, which starts rank 0; the exit code, and whether that has told the other ranks."""
    from distllm.serve.front import serve

    return serve(config, given)


def _serve_front(config: Config, front: Front) -> int:
    """Rank 0 of an HTTP front."""
    from distllm.serve.backend import Backend, Pipe

    reader = _reader(config)
    if front.role is Role.STANDBY and not front.wait_to_be_woken():
        raise SystemExit(0)  # as if it had never been: of the job, others tell
    pipe = Pipe(front.connection)
    with _opened(config, reader) as llm:
        front.keeps = True  # from here on
        Backend(llm, pipe).serve()
    pipe.close()
    return 0


def _chat(config: Config) -> int:
    """A conversation by the terminal."""
    from distllm.chat import Chat
    from distllm.terminal import Terminal

    terminal = Terminal()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(terminal)
    if _number("TORCHELASTIC_RESTART_COUNT", 0) > 0:
        logger.warning("rank 0 was started again, and the conversation begins anew")
    reader = _reader(config)
    reader.chat_request([{"role": "user", "content": "Hi"}])  # refused before ranks come up
    with _opened(config, reader) as llm:
        return Chat(llm, reader, terminal, config.sampling.params(), system=config.chat.system).run()


def _generate(config: Config) -> int:
    """One prompt streamed, or a file of them."""
    from distllm import batch, generate

    output = None if config.output is None else Path(config.output)
    params = config.sampling.params()
    if output is None and _number("TORCHELASTIC_RESTART_COUNT", 0) > 0:
        logger.warning("rank 0 was started again, and begins anew; with prompts=FILE output=FILE it would go on")
    if config.prompts is None:
        prompt = generate.read_prompt(DEFAULT_PROMPT if config.prompt is None else config.prompt)
        reader = _reader(config)
        request = reader.request(prompt, params)
        with _opened(config, reader) as llm:
            return generate.stream(llm, request)
    lines = generate.read_lines(Path(config.prompts))
    if output is not None:
        batch.check_room(output, lines, params.max_tokens)
    reader = _reader(config)
    questions = generate.Questions(reader, lines, params)
    with batch.Printed() if output is None else batch.saved(output, config, reader, questions) as answers:
        questions.asked = answers.resume(questions.asked)
        with _opened(config, reader) if questions.asked else nullcontext() as llm:
            return batch.batch(llm, questions, answers)


def _reader(config: Config) -> Reader:
    """The model, looked through while ranks that are to be started here start."""
    from distllm.engine.home import home
    from distllm.engine.reader import Reader
    from distllm.llm import launched

    if launched() is None:
        home.summon(config.cluster)
    return Reader(config.model)


def _opened(config: Config, reader: Reader) -> LLM:
    from distllm.llm import LLM

    return LLM(
        reader,
        cluster=config.cluster,
        quantization=config.quantization,
        weights=config.weights,
        plan=config.plan,
        engine=config.engine,
    )


def _plan(config: Config) -> int:
    """Who would hold what: a table for people on standard error, JSON on standard output."""
    from distllm.engine.engine import Ranks
    from distllm.engine.job import Job
    from distllm.engine.options import Options
    from distllm.engine.reader import open_blueprint
    from distllm.llm import launched
    from distllm.plan.report import as_json, as_table

    options = Options(
        model=config.model,
        cluster=config.cluster,
        quantization=config.quantization,
        weights=config.weights,
        plan=config.plan,
        engine=config.engine,
    )
    blueprint = open_blueprint(config.model)
    ranks = Ranks(options, launched())
    try:
        job = Job(options, blueprint, ranks.cluster)
    finally:
        ranks.close()
    print(as_table(job.plan, job.members, job.sizes, job.name), file=sys.stderr)
    print(json.dumps(as_json(job.plan, job.members, job.sizes, job.name), indent=2))
    return 0


def _shard(config: Config) -> int:
    """A model into files of stages, or back."""
    from distllm import shards

    if _number("WORLD_SIZE", 1) > 1:
        raise ValueError(f"task={config.task} is the work of one process: run it without torchrun")
    wanted, output = config.shard, config.shard.output or ""
    with shards.Bar(config.task) as progress:
        if config.task == "reconstruct":
            shards.reconstruct_model(config.model.path or "", output, progress=progress)
        else:
            shards.shard_model(
                config.model,
                output,
                stages=wanted.stages,
                by=wanted.by,
                layers=config.plan.layers,
                quantization=config.quantization,
                progress=progress,
            )
    return 0


def _follow(given: Sequence[str], rank: int) -> int:
    """What a launcher's rank other than 0 does; rank 0 speaks for all.

    One that was started again may come too late, and must not fail for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if (before := _concluded()) is not None:
            return before
        code = _serve(given, rank)
        over = _concluded() if code else None
        return code if over is None else over
    except ConnectionError:
        print(f"rank {rank} was started again, but the job has ended meanwhile", file=sys.stderr)
        return 0


def _serve(given: Sequence[str], rank: int) -> int:
    try:
        flags, overrides = split_arguments(given)
        if flags.help or flags.cfg:
            return 0
        config = compose(flags, overrides)
        validate(config)
        level = "debug" if config.log_level == "debug" else "warning"
        logs.log_to_stderr(level, config.log_format, rank=rank, prefix=f"rank {rank}: ")
        if config.cluster.join is None and config.task in ("bench", *SHARD_TASKS):
            return 0
        from distllm.llm import serve_here

        return serve_here(config.cluster)
    except (ValueError, OSError) as error:
        time.sleep(SILENCE_S)
        return _say(f"rank {rank}: {error}", 2)


if __name__ == "__main__":
    main()
