"""Numbers made fewer bytes and back, whatever comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.net.squeeze import Unreadable, squeeze, unsqueeze

SIZES = st.sampled_from([1, 2, 4, 8])


@given(numbers=st.binary(min_size=1, max_size=300), item_bytes=SIZES)
def test_there_and_back(numbers: bytes, item_bytes: int) -> None:
    content = numbers * item_bytes
    into = bytearray(len(content))
    unsqueeze(squeeze(content, item_bytes), item_bytes, memoryview(into))
    assert bytes(into) == content


@given(garbage=st.binary(max_size=100), item_bytes=SIZES)
def test_garbage(garbage: bytes, item_bytes: int) -> None:
    with pytest.raises(Unreadable):
        unsqueeze(garbage, item_bytes, memoryview(bytearray(16)))


@pytest.mark.parametrize("size", [8, 24, 1000])
def test_another_size(size: int) -> None:
    with pytest.raises(Unreadable):
        unsqueeze(squeeze(bytes(16), 2), 2, memoryview(bytearray(size)))
