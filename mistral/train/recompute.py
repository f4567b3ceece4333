"""Activation checkpointing: what a layer keeps for its gradient, and what it computes again.

"cheap" computes norms and gates again (`frugal.py`). "layers" keeps the input of each layer, and computes the whole
layer again: a third more arithmetic.
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from mistral.model import Transformer
from mistral.train.frugal import make_frugal, use


def recompute(model: Transformer, what: str, dropout: bool) -> None:
    """Have every layer of a model keep less for its gradient.

    Args:
        what: one of `options.RECOMPUTE`.
        dropout: whether the same random numbers must be drawn again.
    """
    if what == "none":
        return
    make_frugal(model, again=what == "cheap")  # a layer that is computed again keeps the rest for a moment only
    if what == "layers":
        for layer in model.layers:
            use(layer, partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=dropout))
