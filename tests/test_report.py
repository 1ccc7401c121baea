"""What a plan looks like in JSON and as text."""

import json
from dataclasses import replace

import pytest

from distllm.core import Member, ModelSizes
from distllm.plan.partition import PlanWish, partition
from distllm.plan.report import BAR, as_json, as_table, why_idle

SIZES = ModelSizes(
    layer_bytes=(100_000_000,) * 4,
    embed_bytes=50_000_000,
    head_bytes=50_000_000,
    tied_bytes=50_000_000,
    kv_bytes=(1000,) * 4,
    layer_work=(1.0,) * 4,
    head_work=1.0,
    context_length=1024,
)
MEMBERS = tuple(
    Member(
        life=f"life-{rank}",
        rank=rank,
        host=host,
        boot_id=host,
        pid=rank,
        device="cpu",
        memory_bytes=1_000_000_000,
        cores=1,
    )
    for rank, host in enumerate(("alpha", "beta", "gamma-7"))
)
WISH = PlanWish(
    strategy="manual",
    layers=(3, 1),
    kv_tokens=100_000,
    kv_tokens_wanted=0,
    kv_tokens_needed=0,
    workspace_bytes=0,
    block_tokens=16,
)
PLAN = partition(MEMBERS[:2], SIZES, WISH)
IDLE = type(PLAN)(stages=PLAN.stages, idle=(2,), kv_tokens=PLAN.kv_tokens)


def test_json_has_every_rank_and_survives_json() -> None:
    told = as_json(IDLE, MEMBERS, SIZES, "toy")
    assert json.loads(json.dumps(told)) == told
    assert {key: told[key] for key in ("model", "layers", "weight_bytes", "kv_tokens")} == {
        "model": "toy",
        "layers": 4,
        "weight_bytes": 500_000_000,
        "kv_tokens": 100_000,
    }
    assert told["ranks"] == [
        {
            "rank": 0,
            "host": "alpha",
            "device": "cpu",
            "holds": "embeddings + layers 0-2",
            "first_layer": 0,
            "stop_layer": 3,
            "embed": True,
            "head": False,
            "weight_bytes": 350_000_000,
            "kv_bytes": 300_000_000,
            "kv_tokens": 100_000,
            "memory_bytes": 1_000_000_000,
            "work_share": 0.6,
        },
        {
            "rank": 1,
            "host": "beta",
            "device": "cpu",
            "holds": "layers 3-3 + head",
            "first_layer": 3,
            "stop_layer": 4,
            "embed": False,
            "head": True,
            "weight_bytes": 150_000_000,
            "kv_bytes": 100_000_000,
            "kv_tokens": 100_000,
            "memory_bytes": 1_000_000_000,
            "work_share": 0.4,
        },
        {
            "rank": 2,
            "host": "gamma-7",
            "device": "cpu",
            "holds": "nothing",
            "first_layer": 0,
            "stop_layer": 0,
            "embed": False,
            "head": False,
            "weight_bytes": 0,
            "kv_bytes": 0,
            "kv_tokens": 0,
            "memory_bytes": 1_000_000_000,
            "work_share": 0.0,
        },
    ]


def test_table_says_it_in_columns_and_bars() -> None:
    assert as_table(IDLE, MEMBERS, SIZES, "toy").splitlines() == [
        "toy: 4 layers, 500 MB of weights, KV room for 100,000 tokens",
        "",
        "rank  host     device  holds                    weights      KV  may use  work",
        "   0  alpha    cpu     embeddings + layers 0-2   350 MB  300 MB  1.00 GB   60%",
        "   1  beta     cpu     layers 3-3 + head         150 MB  100 MB  1.00 GB   40%",
        "   2  gamma-7  cpu     nothing                      0 B     0 B  1.00 GB    0%",
        "",
        "memory of each rank: # weights, = KV, . not used",
        f"rank 0 [{'#' * 14}{'=' * 12}{'.' * 14}]",
        f"rank 1 [{'#' * 6}{'=' * 4}{'.' * 30}]",
        f"rank 2 [{'.' * BAR}]",
    ]


def test_small_parts_show_and_a_full_rank_ends_at_the_bar() -> None:
    full = tuple(
        Member(**{**{name: getattr(member, name) for name in Member.__slots__}, "memory_bytes": 650_000_001})
        for member in MEMBERS
    )
    lines = as_table(IDLE, full, SIZES, "toy").splitlines()
    assert lines[-3] == f"rank 0 [{'#' * 22}{'=' * 18}]"
    tiny = tuple(
        Member(**{**{name: getattr(member, name) for name in Member.__slots__}, "memory_bytes": 10**15})
        for member in MEMBERS
    )
    assert as_table(IDLE, tiny, SIZES, "toy").splitlines()[-3] == f"rank 0 [#={'.' * 38}]"


@pytest.mark.parametrize(
    ("strategy", "layers", "ranks", "why"),
    [
        ("balanced", 1, 3, "the model has fewer parts (2) than the job has ranks (3)"),
        ("balanced", 2, 3, "within the ranks' memory, no split that gives it a part is faster"),
        ("balanced", 32, 3, "within the ranks' memory, no split that gives it a part is faster"),
        ("even", 2, 3, "the model has fewer layers (2) than the job has ranks (3)"),
        ("manual", 1, 3, "plan.layers gives it no layer"),
    ],
)
def test_why_a_rank_is_idle(strategy: str, layers: int, ranks: int, why: str) -> None:
    assert why_idle(strategy, layers, ranks) == why


@pytest.mark.parametrize("last", [replace(MEMBERS[2], speed=0.01), replace(MEMBERS[2], memory_bytes=10_000_000)])
def test_a_rank_may_be_idle_with_layers_enough_for_all(last: Member) -> None:
    plan = partition((*MEMBERS[:2], last), SIZES, replace(WISH, strategy="balanced", layers=None))
    assert plan.idle == (2,)
