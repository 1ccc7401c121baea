"""What a benchmark found, as JSON for programs and as a table for people.

Knows how to say it; not how it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

from distllm.bench.figures import OURS, Comparison, Difference, Spread, StageSpent
from distllm.config import BenchConfig
from distllm.core import Plan
from distllm.plan.partition import human_bytes
from distllm.plan.report import columns

QUIET = 0.05
NOISE = "Threads of one process suffer from that much more than processes: measure on a quiet machine."
PACKAGES = ("distllm", "torch", "transformers")
TEXTS = ("engine", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was measured, and on what.

    `elsewhere` is the share of all cores that went to other programs meanwhile.
    """

    model: str
    path: str
    dtype: str
    quantization: str
    cores: int
    cpu: str
    elsewhere: float
    options: BenchConfig
    plan: Plan


def as_json(setting: Setting, comparisons: Sequence[Comparison]) -> dict[str, object]:
    """Rates in tokens/s; `ratio` is how many times the rival's rate distllm's is."""
    return {
        "config": _config(setting),
        "plan": [
            {"rank": stage.rank, "holds": str(stage.span), "weight_bytes": stage.weight_bytes}
            for stage in setting.plan.stages
        ],
        "results": [_result(each) for each in comparisons],
    }


def _config(setting: Setting) -> dict[str, object]:
    return {
        "model": setting.model,
        "path": setting.path,
        "dtype": setting.dtype,
        "quantization": setting.quantization,
        "threads_per_rank": 1,
        **asdict(setting.options),
        "cores": setting.cores,
        "cpu": setting.cpu,
        "cpu_share_elsewhere": round(setting.elsewhere, 3),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _result(comparison: Comparison) -> dict[str, object]:
    return {
        "requests": comparison.requests,
        "engines": {name: _spread(comparison.rates(name)) for name in comparison.engines},
        "rivals": {
            name: {"tokens": _check(comparison.difference(name)), "ratio": _spread(comparison.ratios(name))}
            for name in comparison.rivals
        },
        "stages": [_stage(each, comparison.seconds) for each in comparison.stages],
    }


def _spread(spread: Spread) -> dict[str, object]:
    return {
        "values": [round(value, 3) for value in spread.values],
        "median": round(spread.median, 3),
        "min": round(spread.lowest, 3),
        "max": round(spread.highest, 3),
    }


def _check(difference: Difference | None) -> dict[str, object]:
    return {"equal": difference is None, "first_difference": None if difference is None else asdict(difference)}


def _parts(stage: StageSpent, seconds: float) -> dict[str, float]:
    """Where the seconds of the batches went on one stage; `other` is what its steps do not account for."""
    known = {"wait": stage.wait_s, "layers": stage.layers_s, "head": stage.head_s}
    return known | {"other": max(0.0, seconds - sum(known.values()))}


def _stage(stage: StageSpent, seconds: float) -> dict[str, object]:
    parts = _parts(stage, seconds)
    return {
        "rank": stage.rank,
        "holds": stage.span,
        "steps": stage.steps,
        "seconds_per_step": {name: round(part / max(1, stage.steps), 6) for name, part in parts.items()},
        "share": {name: round(part / seconds, 4) for name, part in parts.items()},
    }


def as_table(setting: Setting, comparisons: Sequence[Comparison]) -> str:
    """The findings as plain text."""
    options = setting.options
    lines = [
        f"{setting.model} ({setting.path}) in {setting.dtype}"
        + ("" if setting.quantization == "none" else f", weights of distllm in {setting.quantization}"),
        f"{options.ranks} ranks of one thread on {setting.cores} cores, {setting.cpu}; "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        f"prompts of {options.prompt_tokens} tokens, {options.new_tokens} new tokens each, greedy; "
        f"{options.rounds} rounds after one to warm up",
        "",
        *(f"rank {stage.rank} holds {stage.span}, {human_bytes(stage.weight_bytes)}" for stage in setting.plan.stages),
        "",
        *columns([RATE_HEAD, *(row for each in comparisons for row in _rate_rows(each))], TEXTS),
        "",
        "where a step of distllm goes, in ms and as a share of the time; steps of several stages overlap",
        *columns([STAGE_HEAD, *(row for each in comparisons for row in _stage_rows(each))], TEXTS),
    ]
    if setting.elsewhere > QUIET:
        lines += ["", f"Other programs took {setting.elsewhere:.0%} of all cores meanwhile. {NOISE}"]
    return "\n".join(lines)


RATE_HEAD = ("requests", "engine", "tokens/s", "min", "max", "distllm does", "tokens")
STAGE_HEAD = ("requests", "rank", "steps", "wait", "layers", "head", "other")


def _rate_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in comparison.engines:
        rates = comparison.rates(name)
        told = (str(comparison.requests), name, f"{rates.median:.1f}", f"{rates.lowest:.1f}", f"{rates.highest:.1f}")
        if name == OURS:
            rows.append((*told, "", ""))
        else:
            rows.append(
                (
                    *told,
                    f"{comparison.ratios(name).median:.2f} x",
                    say(comparison.difference(name), comparison.requests),
                )
            )
    return rows


def say(difference: Difference | None, requests: int) -> str:
    """Whether a rival's tokens are distllm's; a near tie can flip in 16 bits."""
    if difference is None:
        return "equal"
    ours, theirs = ("none" if token is None else str(token) for token in (difference.ours, difference.theirs))
    return (
        f"{difference.requests} of {requests} differ, first request {difference.request} at its new token "
        f"{difference.position}: {ours}, not {theirs}"
    )


def _stage_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    seconds = comparison.seconds
    return [
        (
            str(comparison.requests),
            str(stage.rank),
            str(stage.steps),
            *(
                f"{1000 * part / max(1, stage.steps):.1f} ({part / seconds:.0%})"
                for part in _parts(stage, seconds).values()
            ),
        )
        for stage in comparison.stages
    ]
