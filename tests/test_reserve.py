"""A part that is held beside one's own: what becomes of it when the ring changes while it loads, and after."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from distllm.core import Plan, Span, Stage
from distllm.engine import reserve
from distllm.engine.reserve import Reserve
from distllm.plan.holdings import NOTHING

PART = Span(4, 8)
STAGE = Stage(rank=1, span=PART, weight_bytes=1, kv_bytes=0, work_share=0.0)
ORDER: Any = SimpleNamespace(plan=Plan(stages=(STAGE,), idle=(), kv_tokens=16))


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How loading goes: it waits for `may`, and raises `error`."""
    control: dict[str, Any] = {"may": threading.Event(), "began": threading.Event(), "error": None}

    def load(*_: object) -> str:
        control["began"].set()
        assert control["may"].wait(10)
        if control["error"]:
            raise control["error"]
        return "loaded"

    monkeypatch.setattr(reserve, "load", load)
    monkeypatch.setattr(reserve, "Kept", SimpleNamespace(of=lambda loaded: f"kept of what is {loaded}"))
    control["may"].set()
    return control


def test_it_is_used_up_by_who_needs_it() -> None:
    mine = Reserve(1)
    mine.load(ORDER)
    assert (mine.span, mine.failure) == (PART, None)
    assert mine.give(Span(0, 6)) == "kept of what is loaded"
    assert mine.span == NOTHING
    assert mine.give(Span(0, 6)) is None


def test_it_is_given_up_when_the_ring_changes_without_it() -> None:
    mine = Reserve(1)
    mine.load(ORDER)
    assert mine.give(Span(0, 4)) is None
    assert mine.span == NOTHING


@pytest.mark.parametrize("change", [lambda mine: mine.give(Span(0, 6)), lambda mine: mine.drop()], ids=["give", "drop"])
def test_the_ring_changes_while_it_loads(loads: dict[str, Any], change: Any) -> None:
    loads["may"].clear()
    mine = Reserve(1)
    thread = threading.Thread(target=mine.load, args=(ORDER,))
    thread.start()
    assert loads["began"].wait(10)
    assert change(mine) is None
    loads["may"].set()
    thread.join(10)
    assert (mine.span, mine.failure) == (NOTHING, "it is not wanted any more")
    mine.load(ORDER)
    assert (mine.span, mine.failure) == (PART, None)


@pytest.mark.parametrize(
    ("error", "told"), [(ValueError("no such file"), "no such file"), (MemoryError(), "MemoryError")]
)
def test_it_cannot_be_loaded(loads: dict[str, Any], error: Exception, told: str) -> None:
    loads["error"] = error
    mine = Reserve(1)
    mine.load(ORDER)
    assert (mine.span, mine.failure) == (NOTHING, told)
    loads["error"] = None
    loads["may"].clear()
    mine.begin(ORDER)
    assert mine.failure is None, "what was told of the last one is not told of this one"
    loads["may"].set()
