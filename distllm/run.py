"""The command line's door: Hydra's overrides in, a task run, errors in one sentence, an exit code out.

Rank 0 leads; the other ranks of a launcher serve it. torch is imported only when a task needs it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from distllm.compose import compose, help_text, split_arguments, yaml_of
from distllm.config import Config, validate
from distllm.core import EngineError

logger = logging.getLogger("distllm")

DEFAULT_PROMPT = "Once upon a time"
# Ranks other than 0 leave the word on a bad command line to rank 0; this long they wait for its end to end them.
SILENCE_S = 5.0
VERDICT_S = 4.0


class Terminated(BaseException):
    """SIGTERM arrived."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m distllm.run key=value ...`, alone or under torchrun."""
    # torch warns of every connection that closes, which is how ranks end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = list(sys.argv[1:] if arguments is None else arguments)
    rank = int(os.environ.get("RANK", "0"))
    code = _lead(given) if rank == 0 else _follow(given, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that leaves while a dead neighbour still holds a receive would wait for it in torch's destructors.
    os._exit(code)


def _lead(given: Sequence[str]) -> int:
    with _signals():
        try:
            return _task(given)
        except (ValueError, EngineError, OSError) as error:
            return _say(str(error), 2 if isinstance(error, ValueError) else 1)
        except KeyboardInterrupt:
            return _say("interrupted", 130)
        except Terminated:
            return _say("ended by SIGTERM", 143)


def _say(sentence: str, code: int) -> int:
    print(f"distllm: error: {sentence}", file=sys.stderr)
    return code


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM raises Terminated, once: what follows is the way out."""

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _task(given: Sequence[str]) -> int:
    flags, overrides = split_arguments(given)
    if flags.help:
        print(help_text())
        return 0
    config = compose(flags, overrides)
    if flags.cfg:
        print(yaml_of(config), end="")
        return 0
    validate(config)
    _log_to_stderr(config.log_level, "")
    return _run(config)


def _run(config: Config) -> int:
    if config.task == "bench":
        from distllm.bench.run import bench

        return bench(config)
    if config.task == "plan":
        return _plan(config)
    return _generate(config)


def _generate(config: Config) -> int:
    """One prompt streamed, or a file of them."""
    from distllm import generate
    from distllm.engine.home import home
    from distllm.llm import LLM

    lines = generate.read_lines(Path(config.prompts)) if config.prompts is not None else None
    if lines is not None and config.output is not None:
        generate.check_room(Path(config.output), lines, config.sampling.max_tokens)
    prompt = generate.read_prompt(DEFAULT_PROMPT if config.prompt is None else config.prompt)
    code = 1
    llm = None
    try:
        llm = LLM(config.model, cluster=config.cluster, plan=config.plan, engine=config.engine)
        with llm:
            if lines is None:
                code = generate.stream(llm, prompt, config.sampling.params())
            else:
                output = None if config.output is None else Path(config.output)
                code = generate.batch(llm, lines, output, config.sampling.params())
        return code
    except Terminated:
        # A launcher ends all ranks when one dies; that one's name is worth the wait.
        if llm is not None and (verdict := llm.failure(VERDICT_S)) is not None:
            raise verdict from None
        raise
    finally:
        home.dismiss(code)


def _plan(config: Config) -> int:
    """Who would hold what: a table for people on standard error, JSON on standard output."""
    from distllm.engine.engine import Ranks, open_blueprint
    from distllm.engine.home import home
    from distllm.engine.job import Job, Options
    from distllm.llm import launched
    from distllm.plan.report import as_json, as_table

    options = Options(model=config.model, cluster=config.cluster, plan=config.plan, engine=config.engine)
    code = 1
    try:
        blueprint = open_blueprint(options)
        ranks = Ranks(options, launched())
        try:
            job = Job(options, blueprint, ranks.cluster)
        finally:
            ranks.close()
        print(as_table(job.plan, job.members, job.sizes, job.name), file=sys.stderr)
        print(json.dumps(as_json(job.plan, job.members, job.sizes, job.name), indent=2))
        code = 0
        return code
    finally:
        home.dismiss(code)


def _follow(given: Sequence[str], rank: int) -> int:
    """What a launcher's rank other than 0 does; rank 0 speaks for all."""
    try:
        flags, overrides = split_arguments(given)
        if flags.help or flags.cfg:
            return 0
        config = compose(flags, overrides)
        validate(config)
        _log_to_stderr("debug" if config.log_level == "debug" else "warning", f"rank {rank}: ")
        if config.task == "bench":
            return 0
        from distllm.llm import serve_here

        return serve_here(config.cluster)
    except (ValueError, OSError) as error:
        time.sleep(SILENCE_S)
        return _say(f"rank {rank}: {error}", 2)


def _log_to_stderr(level: str, prefix: str) -> None:
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr)
    logger.setLevel(level.upper())


if __name__ == "__main__":
    main()
