"""Activation checkpointing: what a layer keeps for its gradient, and what it computes again.

"cheap" keeps the results of large products and of attention, and computes the rest again: norms, rotations, gates,
and the small products of an adapter. "layers" keeps a layer's input alone. Neither changes a bit of a gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mistral.model import Transformer

_aten = torch.ops.aten
# Where each product has its matrix; None: always kept.
_KEPT = {
    _aten.mm.default: 1,
    _aten.addmm.default: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: None,
    _aten._scaled_dot_product_flash_attention.default: None,
    _aten._scaled_dot_product_efficient_attention.default: None,
    _aten._scaled_dot_product_cudnn_attention.default: None,
}


def recompute(model: Transformer, what: str, rank: int, dropout: bool) -> None:
    """Have every layer of a model keep less for its gradient.

    Args:
        what: one of `options.RECOMPUTE`.
        rank: of the adapter, whose products are computed again; 0 without one.
        dropout: whether the same random numbers must be drawn again.
    """
    if what == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if what == "cheap":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, rank))
    for layer in model.layers:
        # On the instance: names of modules and parameters stay as they are.
        layer.__dict__["forward"] = partial(checkpoint, layer.forward, **how)


def _policy(rank: int, _context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if op not in _KEPT:
        return CheckpointPolicy.PREFER_RECOMPUTE
    place = _KEPT[op]
    large = place is None or min(args[place].shape) > rank
    return CheckpointPolicy.MUST_SAVE if large else CheckpointPolicy.PREFER_RECOMPUTE
