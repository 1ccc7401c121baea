"""To which master a rank belongs: what it hears from the store and from masters, and what it makes of that."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.core import Member
from distllm.engine import allegiance
from distllm.engine.allegiance import Allegiance
from distllm.net.control import PeerLost

MEMBER = Member(life="life", rank=1, host="here", boot_id="boot", pid=1, memory_bytes=1, cores=1)
CLOSED = PeerLost("", "its connection is closed", timed_out=False)
SILENT = PeerLost("", "it does not answer", timed_out=True)


class Agent:
    def __init__(self) -> None:
        self.listed = True
        self.answers = 0

    def answer(self) -> None:
        self.answers += 1

    def is_listed(self) -> bool:
        return self.listed


class Node:
    """The store's word on who is the master, and this process in the group."""

    identity = "rank1_life"

    def __init__(self) -> None:
        self.named: str | None = "rank0_a"
        self.agent = Agent()

    def master(self) -> str | None:
        return self.named


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """What each master answers to each call; an error is raised. Nobody else is there."""
    answers: dict[tuple[str, str], Any] = {}

    def call(name: str, _key: str, verb: str, *_: object, timeout_s: float) -> object:
        assert timeout_s > 0
        answer = answers.get((name, verb), CLOSED)
        answer = answer() if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(allegiance, "call_by_name", call)
    monkeypatch.setattr(allegiance, "bury_by_name", lambda _: None)
    monkeypatch.setattr(allegiance, "POLL_S", 0.001)
    return answers


@pytest.fixture
def mine(node: Node, said: dict[tuple[str, str], Any]) -> Allegiance:
    """Has registered with rank0_a."""
    said["rank0_a", "register"] = None
    made = Allegiance(node, MEMBER, 1.0)
    made.pledge(5.0, unless=lambda: False)
    return made


def never() -> bool:
    return False


def test_a_dead_master_has_a_successor(node: Node, said: dict[tuple[str, str], Any]) -> None:
    made = Allegiance(node, MEMBER, 1.0)

    def dies() -> Exception:
        node.named = "rank0_b"
        return CLOSED

    said["rank0_a", "register"] = dies
    said["rank0_b", "register"] = None
    made.pledge(5.0, never)
    said["rank0_b", "knows"] = True
    assert made.knows()
    assert node.agent.answers > 0, "it answers roll calls meanwhile"


def test_a_master_that_was_only_slow_is_asked_again(node: Node, said: dict[tuple[str, str], Any]) -> None:
    heard: list[Any] = [SILENT, None]
    said["rank0_a", "register"] = lambda: heard.pop(0)
    Allegiance(node, MEMBER, 1.0).pledge(5.0, never)
    assert heard == []


@pytest.mark.parametrize(
    ("named", "answer", "sentence"),
    [
        (None, None, "rank 0 did not come up within 0.1 s"),
        ("rank0_a", CLOSED, "rank 1 could not register: of the master, its connection is closed"),
        ("rank0_a", "it has torch 1", r"rank 1 \(host here, pid 1\) was refused: it has torch 1"),
    ],
)
def test_no_master(node: Node, said: dict[tuple[str, str], Any], named: str | None, answer: Any, sentence: str) -> None:
    node.named = named
    said["rank0_a", "register"] = answer
    with pytest.raises(ValueError, match=sentence):
        Allegiance(node, MEMBER, 1.0).pledge(0.1, never)


def test_a_process_that_is_to_end_pledges_nothing(node: Node, said: dict[tuple[str, str], Any]) -> None:
    with pytest.raises(ConnectionError, match="it was told to"):
        Allegiance(node, MEMBER, 1.0).pledge(5.0, unless=lambda: True)
    assert said == {}


def test_the_old_master_is_back(mine: Allegiance, said: dict[tuple[str, str], Any]) -> None:
    assert not mine.renew()
    said["rank0_a", "knows"] = SILENT
    assert not mine.renew()
    said["rank0_a", "knows"] = True
    assert mine.renew()


def test_the_old_master_has_given_this_rank_up(mine: Allegiance, said: dict[tuple[str, str], Any]) -> None:
    said["rank0_a", "knows"] = False
    with pytest.raises(ConnectionError, match="the master does not know it"):
        mine.renew()


def test_another_master(mine: Allegiance, node: Node, said: dict[tuple[str, str], Any]) -> None:
    node.named = "rank0_b"
    assert not mine.renew(), "it is not there yet"
    said["rank0_b", "register"] = None
    assert mine.renew()
    said["rank0_b", "knows"] = True
    assert mine.knows()


def test_another_master_has_taken_this_rank_for_dead(mine: Allegiance, node: Node) -> None:
    node.named, node.agent.listed = "rank0_b", False
    with pytest.raises(ConnectionError, match="it was taken for dead by another master"):
        mine.renew()


def test_leaving(mine: Allegiance, said: dict[tuple[str, str], Any]) -> None:
    assert not mine.may_leave()
    said["rank0_a", "leave"] = True
    assert mine.may_leave()
