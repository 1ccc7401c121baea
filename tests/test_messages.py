"""Messages between the front and rank 0: what goes in comes out."""

from __future__ import annotations

import pytest

from distllm.serve.messages import (
    Ask,
    Drop,
    Failed,
    Grown,
    Message,
    Read,
    Ready,
    Refused,
    Stop,
    Taken,
    Told,
    decode,
    encode,
)


@pytest.mark.parametrize(
    "message",
    [
        Read("a/0", "a line\nand one", {"max_tokens": 3}),
        Read("a/0", [{"role": "user", "content": "ö\u2028"}], {}),
        Ask("a/0", [1, 2], {"seed": 2**62}, [3]),
        Drop("a/0"),
        Stop(),
        Ready(64),
        Taken("a/0", [1, 2], 2**63 - 1),
        Refused("a/0", "no"),
        Grown("a/0", "text", [1], "stop", [[[[104], -0.25], [[[105], -1.5]]]], 16),  # type: ignore[list-item]
        Failed("a/0", "gone"),
        Told({"tokens": 1.5}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_one_line_each(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message
