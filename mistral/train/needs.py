"""What a run needs of memory and disk, worked out before a weight is read, and refused with figures if it is too much.

Activations are an estimate from the shape: what the library's layers keep for their gradients, a token.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from mistral.args import ModelArgs
from mistral.train.options import TrainOptions
from mistral.train.step import LOGITS
from mistral.util import memory
from mistral.util.errors import Unavailable

FP32 = 4


def memory_parts(
    args: ModelArgs, options: TrainOptions, *, weights: int, trained: int, tokens: int, itemsize: int
) -> dict[str, int]:
    """Bytes that a run needs, by what they are for.

    Args:
        weights: bytes of the model's weights in memory.
        trained: how many numbers are trained.
        tokens: of the largest forward.
        itemsize: bytes of an activation.
    """
    beside = 0 if options.full else trained * FP32
    rows = min(tokens, max(16, LOGITS // args.vocab_size))
    return {
        "weights": weights,
        "adapter": beside,
        "gradients": trained * FP32,
        "AdamW": 2 * trained * FP32,
        f"activations of {tokens:,} tokens": tokens * activations(args, options.recompute) * itemsize,
        "logits": rows * args.vocab_size * FP32,
    }


def activations(args: ModelArgs, recompute: str) -> int:
    """Numbers that a token leaves behind in all layers, and in the one whose gradient is being computed."""
    dim, q, kv = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    hidden = args.hidden_dim * (1 if args.moe is None else args.moe.num_experts_per_tok)
    cheap = 4 * dim + 4 * q + 3 * kv + 2 * hidden
    kept = {"none": cheap + 4 * dim + 3 * hidden, "cheap": cheap, "layers": dim}[recompute]
    once = 4 * dim + 5 * hidden + (cheap if recompute == "layers" else 0)  # of the layer whose gradient is computed
    return args.n_layers * kept + once


def require_memory(parts: Mapping[str, int], device: torch.device, options: TrainOptions) -> None:
    """Refuse a run that would not fit.

    Raises:
        OutOfMemory: it names every part, and what to change.
    """
    figures = ", ".join(f"{memory.as_text(n)} of {what}" for what, n in parts.items() if n)
    advice = ["a smaller --seq_len or --batch_size (with more --accumulate)"]
    advice += ["--recompute layers"] if options.recompute != "layers" else []
    advice += ["an adapter instead of --full"] if options.full else ["--quant int8 or int4"]
    memory.require(sum(parts.values()), device, f"training ({figures})", f"use {', or '.join(advice)}")


def require_disk(out: Path, trained: int, written: int, options: TrainOptions) -> None:
    """Refuse a run whose state and results would not fit on the disk.

    Args:
        out: the folder, which is there.
        trained: how many numbers are trained.
        written: bytes of what will be written at the end.

    Raises:
        Unavailable: it gives the figures.
    """
    state = 3 * trained * FP32  # weights and both moments
    best = trained * FP32 if options.patience is not None else 0
    needed = max(2 * state + best, state + best + written)  # a new state is written before the old one goes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise Unavailable(
            f"training in {out} needs {memory.as_text(needed)} ({memory.as_text(state)} of state, twice while it is "
            f"replaced; {memory.as_text(written)} of results), but its disk has {memory.as_text(free)} free: "
            "free some, or give --out on another disk"
        )
