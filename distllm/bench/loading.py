"""task=bench bench.measure=loading: how fast weights come out of the page cache, beside `cat` and transformers.

Every loader begins anew in each round, in a process of its own, on one thread; `cat` reads the same files.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distllm.bench.figures import OURS, Spread
from distllm.bench.machine import cores, cpu_model
from distllm.bench.rival import Match, loader
from distllm.config import WHOLE_RIVAL, Config
from distllm.core import EngineError
from distllm.engine.reader import open_blueprint
from distllm.plan.report import columns

logger = logging.getLogger(__name__)

CAT = "cat"
IN_PLACE = f"{OURS}, in place"
# By name, what the loading process is told.
LOADERS = {IN_PLACE: "in-place", f"{OURS}, packed": "packed", WHOLE_RIVAL: "transformers"}
HEAD = ("loader", "seconds", "min", "max", "GB/s", "of cat", "peak GB", "own GB")


@dataclass(frozen=True, slots=True)
class Loaded:
    """One round of one loader: seconds, the most memory that it took, and what of that is no page of a file."""

    seconds: float
    peak_bytes: int = 0
    own_bytes: int = 0


def bench_loading(config: Config) -> int:
    """Measures, and prints a table on standard error and JSON on standard output; returns the exit code.

    Raises:
        ValueError: the model cannot be used; the sentence says why.
        EngineError: a loader ended or failed.
    """
    blueprint = open_blueprint(config.model)
    checkpoint = blueprint.checkpoint
    if config.quantization.method != "none" or checkpoint.quantization is not None:
        raise ValueError("bench.measure=loading is of weights that are not quantized: leave quantization out")
    names = sorted({info.file for info in checkpoint.tensors.values()})
    checkpoint.fetch(names)
    files = [checkpoint.path.resolve() / name for name in names]
    match = Match(
        folder=checkpoint.path.resolve(),
        dtype=str(blueprint.dtype).removeprefix("torch."),
        ranks=1,
        deadline_s=config.bench.deadline_s,
    )
    rounds = _measure(files, match, config.bench.rounds)
    nbytes = sum(file.stat().st_size for file in files)
    name = f"{checkpoint.path} in {match.dtype}, {nbytes / 1e9:.2f} GB in {len(files)} files"
    print(as_table(name, nbytes, rounds), file=sys.stderr)
    print(json.dumps(as_json(match, nbytes, rounds), indent=2))
    return 0


def _measure(files: Sequence[Path], match: Match, rounds: int) -> dict[str, list[Loaded]]:
    """Of each loader all rounds, every other one in reverse order, after one that brings the files into memory."""
    ways: dict[str, Callable[[], Loaded]] = {CAT: partial(_cat, files, match.deadline_s)}
    ways |= {name: partial(_load, name, how, match) for name, how in LOADERS.items()}
    done: dict[str, list[Loaded]] = {name: [] for name in ways}
    _cat(files, match.deadline_s)
    for number in range(1, rounds + 1):
        for name in ways if number % 2 else reversed(ways):
            done[name].append(ways[name]())
        told = ", ".join(f"{name} {each[-1].seconds:.3f}" for name, each in done.items())
        logger.info("round %d of %d: %s s", number, rounds, told)
    return done


def _cat(files: Sequence[Path], deadline_s: float) -> Loaded:
    began = time.perf_counter()
    try:
        subprocess.run([CAT, *map(str, files)], stdout=subprocess.DEVNULL, check=True, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{CAT} did not read the files within {deadline_s:g} s; bench.deadline_s gives it longer"
        ) from None
    except subprocess.CalledProcessError as error:
        raise EngineError(f"{CAT} ended with code {error.returncode}") from error
    return Loaded(time.perf_counter() - began)


def _load(name: str, how: str, match: Match) -> Loaded:
    with loader(name, how, match) as process:
        return Loaded(**process.wait_ready())


def as_json(match: Match, nbytes: int, rounds: Mapping[str, Sequence[Loaded]]) -> dict[str, object]:
    """Seconds and bytes of every round."""
    return {
        "path": str(match.folder),
        "dtype": match.dtype,
        "bytes": nbytes,
        "cores": cores(),
        "cpu": cpu_model(),
        "loaders": {
            name: {
                "seconds": [round(each.seconds, 4) for each in done],
                "peak_bytes": [each.peak_bytes for each in done],
                "own_bytes": [each.own_bytes for each in done],
            }
            for name, done in rounds.items()
        },
    }


def as_table(name: str, nbytes: int, rounds: Mapping[str, Sequence[Loaded]]) -> str:
    """The findings as plain text."""
    rows = [_row(loader, nbytes, done, rounds[CAT]) for loader, done in rounds.items()]
    return "\n".join([name, "", *columns([HEAD, *rows], ("loader",))])


def _row(name: str, nbytes: int, done: Sequence[Loaded], cat: Sequence[Loaded]) -> tuple[str, ...]:
    seconds = Spread(tuple(each.seconds for each in done))
    times = Spread(tuple(one.seconds / each.seconds for one, each in zip(cat, done, strict=True)))
    told = (name, *(f"{each:.3f}" for each in (seconds.median, seconds.lowest, seconds.highest)))
    told = (*told, f"{nbytes / 1e9 / seconds.median:.2f}")
    if name == CAT:
        return (*told, "", "", "")
    peak, own = (max(getattr(each, key) for each in done) / 1e9 for key in ("peak_bytes", "own_bytes"))
    return (*told, f"{times.median:.2f}", f"{peak:.2f}", f"{own:.2f}")
