"""Tokens as text, each by itself, so that no two look alike: for log-probabilities."""

from __future__ import annotations

from functools import lru_cache

from mistral.tokenizer import Tokenizer


class Words:
    """Texts of single tokens.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {i: text for text, i in tokenizer.added_tokens.items()}
        self._before = tokenizer.encode("a", bos=False)[-1:]  # a text's first word may lose its space
        self._skip = len(tokenizer.decode(self._before))
        self._bytes = tokenizer.token_bytes()
        self.of = lru_cache(maxsize=100_000)(self._of)

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes. Control tokens go by their names; one that is no whole characters is
        `bytes:\\xf0\\x9f`, or `token_id:7` where it has no bytes."""
        if token in self._names:
            return self._names[token], list(self._names[token].encode("utf-8", "replace"))
        text = self._tokenizer.decode([*self._before, token])[self._skip :]
        if text and "\ufffd" not in text:
            return text, list(text.encode("utf-8", "replace"))
        found = self._bytes[token] if token < len(self._bytes) else None
        if not found:
            return f"token_id:{token}", None
        try:
            return found.decode(), list(found)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), list(found)

    def text(self, token: int) -> str:
        """A token's text."""
        return self.of(token)[0]


class Numbers:
    """Tokens by their ids, as vLLM's `return_tokens_as_token_ids` has them.

    Args:
        words: gives their bytes.
    """

    def __init__(self, words: Words) -> None:
        self._words = words

    def of(self, token: int) -> tuple[str, list[int] | None]:
        """A token's name, and the bytes of its text."""
        return self.text(token), self._words.of(token)[1]

    def text(self, token: int) -> str:
        """A token's name."""
        return f"token_id:{token}"
