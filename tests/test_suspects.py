"""Who is held to be what rank 0 dies of, and who is not."""

from __future__ import annotations

from distllm.core import SamplingParams
from distllm.serve.calls import Call
from distllm.serve.messages import Grown, Taken
from distllm.serve.suspects import ALONE_DEATHS, SUSPECT_DEATHS, Suspects


def calls(*names: str) -> list[Call]:
    made = [Call(name, "me", "x", SamplingParams()) for name in names]
    for call in made:
        call.hear(Taken(call.name, [1], 0))
    return made


def life(suspects: Suspects, asked: list[Call]) -> list[Call]:
    """Rank 0 comes up, is asked what may be asked, and dies; returns what it was asked."""
    admitted = list(suspects.admitted(asked))
    for call in admitted:
        suspects.asked(call)
    assert suspects.rank0_died() == []
    return admitted


def grow(call: Call) -> None:
    call.hear(Grown(call.name, "a", [1]))


def test_one_that_it_dies_of_is_asked_alone_in_the_end_and_not_again() -> None:
    suspects = Suspects()
    poison, other = both = calls("poison", "other")
    for _ in range(SUSPECT_DEATHS):
        assert life(suspects, both) == both
    for _ in range(ALONE_DEATHS - 1):
        assert life(suspects, both) == [poison]
    suspects.asked(poison)
    assert suspects.rank0_died() == [poison]
    suspects.over(poison)
    assert suspects.admitted([other]) == [other], "which is a suspect still, and has its turn"
    suspects.asked(other)
    grow(other)
    assert not suspects.on_trial


def test_whoever_waits_for_a_suspect_waits_until_something_comes_of_it() -> None:
    suspects = Suspects()
    first, second, new = calls("first", "second", "new")
    for _ in range(SUSPECT_DEATHS):
        life(suspects, [first, second])
    assert suspects.admitted([new, first, second]) == [first]
    suspects.asked(first)
    assert suspects.on_trial
    assert suspects.admitted([new, second]) == []
    grow(first)
    assert suspects.admitted([new, second]) == [second]
    suspects.asked(second)
    suspects.over(second)  # its client has gone
    assert suspects.admitted([new]) == [new]


def test_one_of_which_something_comes_each_time_is_innocent() -> None:
    suspects = Suspects()
    slow, poison = both = calls("slow", "poison")
    for _ in range(SUSPECT_DEATHS):
        for call in both:
            suspects.asked(call)
        grow(slow)
        suspects.rank0_died()
    assert suspects.admitted(both) == [poison]
    suspects.asked(poison)
    grow(poison)
    assert suspects.admitted([slow]) == [slow]


def test_one_that_it_dies_of_when_it_reads_it_is_known_too() -> None:
    suspects = Suspects()
    unread = Call("unread", "me", "x", SamplingParams())
    for _ in range(SUSPECT_DEATHS):
        life(suspects, [unread])
    suspects.asked(unread)
    assert suspects.on_trial
    unread.hear(Taken("unread", [1], 0))
    assert not suspects.on_trial
