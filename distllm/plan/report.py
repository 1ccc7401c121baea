"""A plan for people and for programs: what each rank holds, before or after a byte is loaded.

Knows how to say it; not how it was decided.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distllm.core import Member, ModelSizes, Plan, Span, Stage
from distllm.plan.partition import human_bytes, in_order

BAR = 40
TEXTS = ("host", "device", "holds")
"""Characters of a bar."""


def as_json(plan: Plan, members: Sequence[Member], sizes: ModelSizes, name: str) -> dict[str, object]:
    """The plan as values that JSON knows; sizes in bytes, `stop_layer` is one after the last layer.

    The weights in all are those that ranks hold: tied weights that two ranks hold count twice.
    """
    return {
        "model": name,
        "layers": sizes.layers,
        "weight_bytes": sum(stage.weight_bytes for stage in plan.stages),
        "kv_tokens": plan.kv_tokens,
        "ranks": [rank_json(member, stage_on(plan, member), plan, sizes) for member in in_order(members)],
    }


def as_table(plan: Plan, members: Sequence[Member], sizes: ModelSizes, name: str) -> str:
    """The plan as plain text: a line per rank with its sizes, and a bar per rank that shows how full it is."""
    ranks = in_order(members)
    weights = sum(stage.weight_bytes for stage in plan.stages)
    lines = [f"{name}: {sizes.layers} layers, {human_bytes(weights)} of weights, KV room for {plan.kv_tokens:,} tokens"]
    header = ("rank", "host", "device", "holds", "weights", "KV", "may use", "work")
    lines += ["", *columns([header, *(cells(member, stage_on(plan, member)) for member in ranks)], TEXTS)]
    lines += ["", "memory of each rank: # weights, = KV, . not used"]
    width = max(len(str(member.rank)) for member in ranks)
    lines += [f"rank {member.rank:>{width}} [{bar(member, stage_on(plan, member))}]" for member in ranks]
    return "\n".join(lines)


def stage_on(plan: Plan, member: Member) -> Stage:
    """What a member holds; for an idle one a stage of nothing."""
    nothing = Stage(rank=member.rank, span=Span(0, 0), weight_bytes=0, kv_bytes=0, work_share=0.0)
    return plan.stage_of(member.rank) or nothing


def why_idle(strategy: str, layers: int, ranks: int) -> str:
    """Why a plan of this strategy for so many layers leaves one of so many ranks without a part."""
    if strategy == "manual":
        return "plan.layers gives it no layer"
    parts, called = (layers + 1, "parts") if strategy == "balanced" else (layers, "layers")
    if parts < ranks:
        return f"the model has fewer {called} ({parts}) than the job has ranks ({ranks})"
    return "within the ranks' memory, no split that gives it a part is faster"


def rank_json(member: Member, stage: Stage, plan: Plan, sizes: ModelSizes) -> dict[str, object]:
    return {
        "rank": member.rank,
        "host": member.host,
        "device": member.device,
        "holds": str(stage.span),
        "first_layer": stage.span.start,
        "stop_layer": stage.span.stop,
        "embed": stage.span.embed,
        "head": stage.span.head,
        "weight_bytes": stage.weight_bytes,
        "kv_bytes": stage.kv_bytes,
        "kv_tokens": plan.kv_tokens if sizes.kv_bytes_per_token(stage.span) else 0,
        "memory_bytes": member.memory_bytes,
        "work_share": stage.work_share,
    }


def cells(member: Member, stage: Stage) -> tuple[str, ...]:
    sizes = (stage.weight_bytes, stage.kv_bytes, member.memory_bytes)
    told = (str(member.rank), member.host, member.device, str(stage.span))
    return (*told, *map(human_bytes, sizes), f"{stage.work_share:.0%}")


def columns(rows: Sequence[tuple[str, ...]], texts: Collection[str]) -> list[str]:
    """Rows as lines of equal columns, the first row being their heads: those named in `texts` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if head in texts else cell.rjust(width)
            for head, cell, width in zip(rows[0], row, widths, strict=True)
        )
        for row in rows
    )
    return [line.rstrip() for line in lines]


def bar(member: Member, stage: Stage) -> str:
    """How much of a rank's memory is weights (#) and KV (=); a part that is there shows at least one character."""
    weights = share_of_bar(stage.weight_bytes, member.memory_bytes)
    kv = min(share_of_bar(stage.kv_bytes, member.memory_bytes), BAR - weights)
    return ("#" * weights + "=" * kv).ljust(BAR, ".")


def share_of_bar(part: int, whole: int) -> int:
    if part <= 0:
        return 0
    return max(1, min(BAR, round(BAR * part / max(1, whole))))
