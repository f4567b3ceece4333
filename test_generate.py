"""Logits equivalence: what was generated scores the same when it is read back.

    python -m test_generate

The two checks of Mistral's 2023 repository, on models with more layers, an output width that is
not the model's, and windows shorter than the prompts: regenerate and rescore; chunked against whole.
"""

from __future__ import annotations

import torch

from mistral.generate import generate
from mistral.model import ModelArgs, Transformer

TOLERANCE = 1e-5


class DebugTokenizer:
    """Numbers separated by spaces are ids."""

    bos_id = 0
    eos_id = 1
    pad_id = -1

    def encode(self, s: str, bos: bool = True) -> list[int]:
        ids = [int(word) for word in s.split()]
        return [self.bos_id, *ids] if bos else ids

    def decode(self, t: list[int]) -> str:
        return " ".join(map(str, t))


def random_model(sliding_window: int | None, max_batch_size: int) -> Transformer:
    """A random two-layer model: grouped heads, and H * D = 384 beside dim = 256."""
    torch.manual_seed(42)
    args = ModelArgs(
        dim=256,
        n_layers=2,
        head_dim=64,
        hidden_dim=512,
        n_heads=6,
        n_kv_heads=2,
        sliding_window=sliding_window,
        norm_eps=1e-5,
        vocab_size=32_000,
        max_batch_size=max_batch_size,
    )
    return Transformer(args)


def without_bos(texts: list[str]) -> list[str]:
    return [text.split(" ", 1)[1] for text in texts]


def largest_difference(old: list[list[float]], new: list[list[float]]) -> float:
    """Of two lists of log-probabilities a sequence, which must have the same lengths."""
    assert [len(row) for row in old] == [len(row) for row in new]
    assert all(old)
    return max(abs(x - y) for a, b in zip(old, new, strict=True) for x, y in zip(a, b, strict=True))


def test_generation() -> None:
    """Tokens made one by one score what the same tokens score in one forward."""
    prompts = ["1 2 3 4 5 6 7", "0 1 2", "12 13 14", "2 4 34"]
    model = random_model(sliding_window=3, max_batch_size=len(prompts))
    tokenizer = DebugTokenizer()
    texts, made = generate(prompts, model, tokenizer, max_tokens=7)
    nothing, scored = generate(without_bos(texts), model, tokenizer, max_tokens=0)
    assert nothing == []
    assert largest_difference(made, scored) < TOLERANCE


def test_chunks() -> None:
    """A prompt scores the same in chunks below, at and above the window as in one forward."""
    prompts = [" ".join(map(str, range(2, 20))), " ".join(map(str, range(9, 1, -1))), "7"]
    model = random_model(sliding_window=4, max_batch_size=3)
    tokenizer = DebugTokenizer()
    texts, made = generate(prompts, model, tokenizer, max_tokens=8)
    for chunk_size in (1, 3, 4, 5, 100):
        _, scored = generate(without_bos(texts), model, tokenizer, max_tokens=0, chunk_size=chunk_size)
        assert largest_difference(made, scored) < TOLERANCE, chunk_size


if __name__ == "__main__":
    for test in (test_generation, test_chunks):
        test()
        print(f"{test.__name__}: passed")
    print("All tests passed.")
