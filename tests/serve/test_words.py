"""Names of single tokens: whatever the tokenizer, their bytes join to the text that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral.serve.words import Words
from mistral.tokenizer import Tokenizer
from tests.support.tokenizer_json import small_tekken, write_tokenizer

TEXT = "x king's 👩\u200d👧 é, مرحبا; 日本語\n\ufffd."


@pytest.mark.parametrize("kind", ["sentencepiece", "v3", "tekken", "byte level", "tekken.json"])
def test_bytes_of_tokens_join_to_the_text(tmp_path: Path, kind: str) -> None:
    if kind == "tekken.json":
        tokenizer = Tokenizer(small_tekken(tmp_path / kind))
    else:
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "m", kind, tmp_path) / "tokenizer.json")
    words = Words(tokenizer)
    found = [words.of(i) for i in tokenizer.encode(TEXT, bos=False)]
    joined = b"".join(bytes(encoded or b"?") for _, encoded in found)
    assert joined.removeprefix(b" ").decode() == TEXT
    parts = [(name, encoded) for name, encoded in found if name.startswith("bytes:")]
    assert len(parts) > 3
    assert all(name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded or ()) for name, encoded in parts)


def test_a_token_without_text_goes_by_its_id(tmp_path: Path) -> None:
    words = Words(Tokenizer(small_tekken(tmp_path / "tekken.json")))
    assert words.of(1_000_000) == ("token_id:1000000", None)
