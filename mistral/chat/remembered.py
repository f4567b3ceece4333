"""Ids of the newest texts, kept: a conversation is written again for every answer, and most of it is as it was."""

from __future__ import annotations

from threading import Lock
from typing import Any

KEPT = 1 << 20  # characters of texts whose ids are kept: about ten megabytes of ids


def remember(tokenizer: Any, most: int = KEPT) -> Any:
    """Have a tokenizer of mistral-common's give the ids of texts that it has just encoded without encoding them again.

    Args:
        tokenizer: changed in place.
        most: characters of the texts that are kept; the oldest go first.
    """
    encode, held, lock = tokenizer.encode, dict[tuple[str, bool, bool], list[int]](), Lock()
    size = 0

    def from_memory(s: str, bos: bool, eos: bool) -> list[int]:
        nonlocal size
        key = s, bos, eos
        with lock:
            ids = held.pop(key, None)
            if ids is not None:
                held[key] = ids  # the newest now
                return list(ids)
        ids = encode(s, bos, eos)
        with lock:
            if key not in held and len(s) <= most:
                held[key], size = ids, size + len(s)
            while size > most:
                oldest = next(iter(held))
                del held[oldest]
                size -= len(oldest[0])
        return list(ids)

    tokenizer.encode = from_memory
    return tokenizer
