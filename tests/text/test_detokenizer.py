"""The cost of text that appears bit by bit: ids decoded are counted, whatever the ids are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.detokenizer import Detokenizer
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer

TOKENIZER = Tokenizer(BUNDLED / "tokenizer.model")
BYTE = 3  # the id of byte 0
E2, CONTINUATION = BYTE + 0xE2, BYTE + 0x82
KINDS = {
    "a word": [TOKENIZER.encode("the", bos=False)[0]],
    "past the last word": [4097],
    "control": [1],
    "a byte that begins a character": [E2],
    "a byte that goes on with one": [CONTINUATION],
    "half a character and a control id": [E2, 1],
    "half a character, control ids, a word": [E2, *[2] * 50, 300],
    "whole characters as bytes": [BYTE + b for b in "永🙂".encode()],
    "spaces": TOKENIZER.encode("  ", bos=False)[:1],
}


class Counting:
    """Counts what is decoded."""

    bos_id, eos_id = 1, 2

    def __init__(self) -> None:
        self.decoded = self.longest = 0

    def encode(self, s: str) -> list[int]:
        raise AssertionError("nothing is encoded")

    def decode(self, t: list[int]) -> str:
        self.decoded += len(t)
        self.longest = max(self.longest, len(t))
        return TOKENIZER.decode(t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [[], [1], [1, 300, 301], [E2] * 3000, [1] * 3000], ids=len)
def test_work_grows_with_the_answer_and_no_faster(kind: str, context: list[int]) -> None:
    ids = (KINDS[kind] * 1500)[:1500]
    counting = Counting()
    decoder = Detokenizer(counting, context)
    assert counting.decoded <= 8 * Detokenizer.CONTEXT
    pieces = [decoder.push(i) for i in ids]
    assert counting.longest <= Detokenizer.LONGEST + 2 * Detokenizer.CONTEXT
    assert counting.decoded <= 30 * len(ids)
    shown = "".join(pieces) + decoder.flush()
    if not TOKENIZER.decode(context).endswith("\ufffd"):
        assert shown == TOKENIZER.decode([*context, *ids])[len(TOKENIZER.decode(context)) :]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert decoder.flush() == ""


@given(
    st.lists(
        st.tuples(
            st.sampled_from([E2, BYTE + 0xF0, CONTINUATION, BYTE + 0x9F, 1, 2, 4100, 300, 65 + BYTE]),
            st.integers(1, 45),
        ),
        max_size=12,
    )
)
def test_long_runs_join_to_the_text_of_the_whole(runs: list[tuple[int, int]]) -> None:
    ids = [i for token, n in runs for i in [token] * n]
    decoder = Detokenizer(TOKENIZER, [1, 300])
    shown = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert shown == TOKENIZER.decode([1, 300, *ids])[len(TOKENIZER.decode([1, 300])) :]
