"""Grammars that would take a process down, or its time, take down one of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
from waiting import wait_until

from distllm.core import SamplingParams
from distllm.grammars import json_grammar
from distllm.serve.calls import Call, Refusal, Unavailable
from distllm.serve.trial import Trials

TEXT = {"type": "string"}
DEEP = {f"d{depth}": {"$ref": f"#/$defs/d{depth + 1}"} for depth in range(20_000)} | {"d20000": TEXT}
KINDS = {f"^a{number}.*$": TEXT for number in range(1000, 1500)}
HOSTILE = [{"$defs": DEEP, "$ref": "#/$defs/d0"}, {"type": "object", "patternProperties": KINDS}]


def call(schema: dict[str, Any], client: str = "me") -> Call:
    return Call("a", client, "x", SamplingParams(grammar=json_grammar(schema)))


@contextmanager
def trials() -> Iterator[Trials]:
    trials = Trials()
    try:
        yield trials
    finally:
        trials.close()
        wait_until(lambda: not psutil.Process().children(), "its process is left", 10)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("schema", HOSTILE, ids=["its stack", "its time"])
def test_a_grammar_that_takes_too_much_is_refused(schema: dict[str, Any]) -> None:
    async def test() -> None:
        with trials() as tried:
            await tried.attempt(call(TEXT))
            (before,) = psutil.Process().children()
            with pytest.raises(Refusal, match="reading it takes more than 1 s, or more memory"):
                await tried.attempt(call(schema))
            assert not before.is_running(), "it has died of it"
            await tried.attempt(call({"type": "integer"}))

    run(test)


def test_whatever_of_its_end_is_seen_first_it_is_refused() -> None:
    async def test() -> None:
        with trials() as tried:
            for _ in range(10):
                with pytest.raises(Refusal):
                    await tried.attempt(call(HOSTILE[0]))

    run(test)


def test_what_is_no_grammar_is_refused_with_the_reason_and_costs_no_process() -> None:
    async def test() -> None:
        with trials() as tried:
            await tried.attempt(call(TEXT))
            before = psutil.Process().children()
            with pytest.raises(Refusal, match="the grammar cannot be followed: Invalid type: frob"):
                await tried.attempt(call({"type": "frob"}))
            await tried.attempt(call({"type": "integer"}))
            assert psutil.Process().children() == before

    run(test)


def test_what_needs_no_trial_starts_no_process() -> None:
    async def test() -> None:
        with trials() as tried:
            await tried.attempt(Call("a", "me", "x", SamplingParams()))
            assert not psutil.Process().children()
            await tried.attempt(call(TEXT))
            for each in psutil.Process().children():
                each.kill()
            await tried.attempt(call(TEXT))  # is known
            with suppress(Unavailable):  # its end may not have been noticed
                await tried.attempt(call({"type": "integer"}))
            await tried.attempt(call({"type": "integer"}))

    run(test)


def test_one_client_with_many_does_not_keep_the_others_waiting() -> None:
    async def test() -> None:
        with trials() as tried:
            ended: list[str] = []

            async def attempt(who: str, schema: dict[str, Any]) -> None:
                await tried.attempt(call(schema, who))
                ended.append(who)

            large = [{"enum": [f"{kind} {number}" for number in range(5000)]} for kind in range(6)]
            many = [asyncio.create_task(attempt("many", schema)) for schema in large]
            await asyncio.sleep(0)
            await attempt("one", TEXT)
            assert len(ended) <= 3, "it was its turn behind the one that was tried already"
            await asyncio.gather(*many)

    run(test)


def test_whoever_goes_away_leaves_nothing_in_the_way() -> None:
    async def test() -> None:
        with trials() as tried:
            leaving = [asyncio.create_task(tried.attempt(call(HOSTILE[1]))) for _ in range(3)]
            await asyncio.sleep(0.2)
            for each in leaving:
                each.cancel()
            began = time.monotonic()
            await tried.attempt(call(TEXT))
            assert time.monotonic() - began < 30
            assert all(
                isinstance(each, asyncio.CancelledError)
                for each in await asyncio.gather(*leaving, return_exceptions=True)
            )

    run(test)
