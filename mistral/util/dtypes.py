"""Dtypes by name: what may be typed, and PyTorch's name for it. Runs without torch."""

from __future__ import annotations

DTYPE_NAMES = {
    "float64": "float64",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def full_name(dtype: str) -> str:
    """PyTorch's name of a dtype that was typed, as "torch.bfloat16" and "bf16" too; other words as they are."""
    word = dtype.removeprefix("torch.")
    return DTYPE_NAMES.get(word, word)
