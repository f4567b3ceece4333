"""The contract in float64, written from its rules alone: dense mask, one sequence, no cache.

Imports nothing from mistral/. Slow and plain on purpose: this is what the library is measured against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def mask(n: int, window: int | None) -> np.ndarray:
    """Rule 1: [n, n] bool, query row q sees key column k iff 0 <= q - k < W."""
    seen = np.zeros((n, n), dtype=bool)
    for q in range(n):
        first = 0 if window is None else max(0, q - window + 1)
        seen[q, first : q + 1] = True
    return seen


def angles(positions: torch.Tensor, head_dim: int, theta: float, yarn: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Rules 3 and 15: cos and sin [n, D/2], made in fp32 and then widened."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if yarn is not None:
        low, high = (
            head_dim * np.log(yarn.original_length / (2 * np.pi * turns)) / (2 * np.log(theta))
            for turns in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(np.floor(low), 0), min(np.ceil(high), head_dim - 1)
        for i in range(head_dim // 2):
            slowed = torch.tensor(min(max((i - low) / (high - low), 0), 1)).float()
            frequencies[i] = frequencies[i] / yarn.factor * slowed + frequencies[i] * (1 - slowed)
    angle = positions.float()[:, None] * frequencies[None, :]
    factor = 1.0 if yarn is None else yarn.attention_factor
    return (angle.cos() * factor).double().numpy(), (angle.sin() * factor).double().numpy()


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rule 3: pairs (2i, 2i+1) of x [n, D] turn by angle i."""
    out = np.empty_like(x)
    for i in range(x.shape[1] // 2):
        a, b = x[:, 2 * i], x[:, 2 * i + 1]
        out[:, 2 * i] = a * cos[:, i] - b * sin[:, i]
        out[:, 2 * i + 1] = a * sin[:, i] + b * cos[:, i]
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Rule 5."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def swiglu(w: Mapping[str, np.ndarray], at: str, x: np.ndarray) -> np.ndarray:
    """Rule 7."""
    return (silu(x @ w[at + "w1.weight"].T) * (x @ w[at + "w3.weight"].T)) @ w[at + "w2.weight"].T


def experts(w: Mapping[str, np.ndarray], at: str, x: np.ndarray, moe: Any) -> np.ndarray:
    """Rule 17, token by token."""
    out = np.zeros_like(x)
    for t, logits in enumerate(x @ w[at + "gate.weight"].T):
        chosen = np.argsort(-logits, kind="stable")[: moe.num_experts_per_tok]
        for expert, share in zip(chosen, softmax(logits[chosen]), strict=True):
            out[t] += share * swiglu(w, f"{at}experts.{expert}.", x[t : t + 1])[0]
    return out


def layer_windows(args: Any) -> list[int | None]:
    """One window per layer; a list repeats."""
    w = args.sliding_window
    given = list(w) if isinstance(w, tuple | list) else [w]
    return [given[i % len(given)] for i in range(args.n_layers)]


def truth(
    state: Mapping[str, torch.Tensor], args: Any, ids: torch.Tensor, start: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-probabilities and hidden states of one sequence, alone, in float64.

    Args:
        state: weights under their checkpoint names.
        args: anything with the fields of params.json; rope_theta must be a number.
        ids: [n] token ids.
        start: absolute position of the first.

    Returns:
        [n, V] natural log-probabilities, and the residual stream [n, dim] after each layer.
    """
    w = {name: value.detach().double().numpy() for name, value in state.items()}
    n, D = len(ids), args.head_dim
    group = args.n_heads // args.n_kv_heads
    cos, sin = angles(torch.arange(start, start + n), D, args.rope_theta, getattr(args, "yarn", None))
    grows = getattr(args, "llama_4_scaling", None)
    cos_q, sin_q = cos, sin
    if grows is not None:  # rule 16, in fp32 as the angles are
        behind = torch.arange(start, start + n)[:, None] // grows.original_length
        grown = (1 + grows.beta * (1 + behind).float().log()).numpy()
        cos_q, sin_q = ((x.astype(np.float32) * grown).astype(np.float64) for x in (cos, sin))
    h = w["tok_embeddings.weight"][ids.numpy()]
    hidden = []
    for i, window in enumerate(layer_windows(args)):
        p = f"layers.{i}."
        x = rms_norm(h, w[p + "attention_norm.weight"], args.norm_eps)
        q, k, v = (x @ w[p + f"attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        seen = mask(n, window)
        heads = []
        for head in range(args.n_heads):
            kv = head // group
            q_h = turn(q[:, head * D : (head + 1) * D], cos_q, sin_q)
            k_h = turn(k[:, kv * D : (kv + 1) * D], cos, sin)
            scores = np.where(seen, q_h @ k_h.T / np.sqrt(D), -np.inf)
            heads.append(softmax(scores) @ v[:, kv * D : (kv + 1) * D])
        h = h + np.concatenate(heads, axis=1) @ w[p + "attention.wo.weight"].T
        x = rms_norm(h, w[p + "ffn_norm.weight"], args.norm_eps)
        moe = getattr(args, "moe", None)
        h = h + (swiglu(w, p + "feed_forward.", x) if moe is None else experts(w, p + "feed_forward.", x, moe))
        hidden.append(h)
    logits = rms_norm(h, w["norm.weight"], args.norm_eps) @ w["output.weight"].T
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)), hidden
