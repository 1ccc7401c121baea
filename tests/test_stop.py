"""Stop strings: the same end wherever the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.model.stop import StopStrings


def feed(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """What comes out of pieces, and whether a stop string was found."""
    stream, out = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = stream.push(piece)
        out += text
        if stopped:
            return out, True
    return out + stream.flush(), False


def reference(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The text before the stop string that ends first, found by looking at every end in turn."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text("ab\n", max_size=24))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


@given(st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4).map(tuple), cut_texts())
def test_any_cut_gives_the_text_before_the_first_stop(stops: tuple[str, ...], cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    assert feed(stops, pieces) == reference(stops, text)


@given(st.text("ab\n", min_size=1, max_size=5), cut_texts())
def test_one_stop_string_is_a_split(stop: str, cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    assert feed((stop,), pieces)[0] == text.split(stop)[0]


def test_holds_back_only_what_may_begin_a_stop() -> None:
    stream = StopStrings(("\n\nQ:",))
    assert stream.push("yes\n") == ("yes", False)
    assert stream.push("\n") == ("", False)
    assert stream.push("A") == ("\n\nA", False)
    assert stream.push("\n\n\nQ") == ("\n", False)
    assert stream.push(": next") == ("", True)


def test_nothing_is_held_without_stops() -> None:
    stream = StopStrings(())
    assert stream.push("abc") == ("abc", False)
    assert stream.flush() == ""


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert feed(("b", "ab"), ["xab"]) == ("x", True)
    assert feed(("ab", "b"), ["xa", "b"]) == ("x", True)


def test_the_one_complete_first_wins() -> None:
    assert feed(("abcd", "bc"), ["abcd"]) == feed(("abcd", "bc"), list("abcd")) == ("a", True)


def test_nothing_comes_after_a_stop() -> None:
    stream = StopStrings(("#",))
    assert stream.push("a#b") == ("a", True)
    assert stream.push("c") == ("", True)
    assert stream.flush() == ""


def test_flush_gives_the_beginning_of_a_stop_once() -> None:
    stream = StopStrings(("</s>",))
    assert stream.push("a</") == ("a", False)
    assert stream.flush() == "</"
    assert stream.flush() == ""


def test_an_empty_stop_string_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        StopStrings(("",))
