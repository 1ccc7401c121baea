"""What shards on disk say of the plan: their own split, unless all of their files are here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fakes import tiny_checkpoint

from distllm.core import Member, Plan
from distllm.engine.stored import check_stored, stored_wish
from distllm.model.blueprint import Blueprint
from distllm.plan.partition import PlanWish, partition
from distllm.shards import get_shard_paths, shard_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of 3, 1 and 1 layers."""
    folder = tmp_path_factory.mktemp("stored")
    shard_model(tiny_checkpoint(folder / "model"), folder / "shards", layers=[3, 1, 1])
    return folder / "shards"


@pytest.fixture(scope="module")
def part(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As rank 0 has it."""
    folder = tmp_path_factory.mktemp("part") / "shards"
    shutil.copytree(whole, folder)
    for path in get_shard_paths(folder)[1:]:
        path.unlink()
    return folder


def members(count: int, memory: int = 10**9) -> list[Member]:
    return [
        Member(life=f"{rank}", rank=rank, host="host", boot_id="boot", pid=rank + 1, memory_bytes=memory, cores=1)
        for rank in range(count)
    ]


def plan(folder: Path, ranks: int, memory: int = 10**9, **wishes: object) -> Plan:
    """As the engine makes it."""
    blueprint = Blueprint(folder, dtype="auto", context_length=None)
    limits = {"kv_tokens_wanted": 512, "kv_tokens_needed": 512, "workspace_bytes": 0, "block_tokens": 16}
    wish = stored_wish(PlanWish(**limits, **wishes), blueprint, ranks)  # type: ignore[arg-type]
    made = partition(members(ranks, memory), blueprint.sizes, wish)
    check_stored(made, blueprint.checkpoint)
    return made


def layers(made: Plan) -> list[int]:
    return [stage.span.layers for stage in made.stages]


@pytest.mark.parametrize("given", [{}, {"strategy": "manual", "layers": (3, 1, 1)}])
def test_the_split_is_that_of_the_shards(given: dict[str, object], whole: Path, part: Path) -> None:
    assert layers(plan(whole, 3, **given)) == [3, 1, 1]
    assert layers(plan(part, 3, **given)) == [3, 1, 1]


@pytest.mark.parametrize(
    ("ranks", "given", "told"),
    [
        (2, {}, r"2 stages \(embeddings \+ layers 0-.; layers .-4 \+ head\)"),
        (3, {"strategy": "even"}, r"3 stages \(embeddings \+ layers 0-1; layers 2-3; layers 4-4 \+ head\)"),
        (
            3,
            {"strategy": "manual", "layers": (1, 3, 1)},
            r"3 stages \(embeddings \+ layers 0-0; layers 1-3; layers 4-4 ",
        ),
    ],
)
def test_another_split_needs_all_files(
    ranks: int, given: dict[str, object], told: str, whole: Path, part: Path
) -> None:
    assert layers(plan(whole, ranks, **given)) != [3, 1, 1]
    with pytest.raises(ValueError, match=f"^the plan is for {told}") as error:
        plan(part, ranks, **given)
    own = "are for 3 (embeddings + layers 0-2; layers 3-3; layers 4-4 + head): start 3 ranks without plan.layers, or "
    assert f"the shards in {part} {own}" in str(error.value)
    assert str(error.value).endswith("copy the other files, such as stage-1.safetensors, to every rank")


def test_shards_that_do_not_fit_are_to_be_cut_anew(part: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 0 .* too much.*; cut the shards anew for these ranks, ") as error:
        plan(part, 3, memory=600_000)
    assert not re.search(r"plan\.\w+", str(error.value))


def test_an_ordinary_checkpoint_is_left_alone(tmp_path: Path, whole: Path) -> None:
    assert layers(plan(tiny_checkpoint(tmp_path / "model"), 2)) != []
    assert sum(layers(plan(whole, 2))) == 5
