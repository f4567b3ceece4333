"""What two texts of ids have in common."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mistral import request
from mistral.request import common_prefix

IDS = st.lists(st.integers(0, 2), max_size=12)


@given(a=IDS, b=IDS, block=st.integers(1, 5))
def test_the_common_prefix_is_found_whatever_the_blocks(a: list[int], b: list[int], block: int) -> None:
    usual, request.PREFIX_BLOCK = request.PREFIX_BLOCK, block
    try:
        found = common_prefix(a, tuple(b))
    finally:
        request.PREFIX_BLOCK = usual
    assert a[:found] == b[:found]
    assert found == min(len(a), len(b)) or a[found] != b[found]


def test_beyond_a_block() -> None:
    ids = list(range(10_000))
    assert common_prefix(ids, [*ids[:9_000], -1]) == 9_000
    assert common_prefix(ids, ids) == 10_000
