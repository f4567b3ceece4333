"""Which modules the fast paths know: those whose arithmetic they repeat. Beside any other they stand aside."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from torch import nn

from mistral.model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from mistral.moe import MixtureOfExperts

PARTS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "feed_forward": FeedForward,
    "attention_norm": RMSNorm,
    "ffn_norm": RMSNorm,
}


def unknown_module(model: Transformer, *, mixtures: bool = False, growing: bool = False) -> str | None:
    """The name and class of the first module that the fast paths do not know; None if they know all.

    Args:
        mixtures: whether they know mixtures of experts.
        growing: whether they know queries that grow with their position, or rotate q and k alike.

    Kinds of `Linear` are not looked at: that is the business of whoever reads their weights. A subclass is another
    module, because it may compute something else.
    """
    if model.args.llama_4_scaling is not None and not growing:
        return "rope (QueryScaling)"
    for i, block in enumerate(model.layers):
        if type(block) is not TransformerBlock:
            return _unknown(f"layers.{i}", block)
        for name, kind in PARTS.items():
            part = block.get_submodule(name)
            if mixtures and name == "feed_forward" and type(part) is MixtureOfExperts:
                for e, expert in enumerate(part.experts):
                    if type(expert) is not FeedForward:
                        return _unknown(f"layers.{i}.{name}.experts.{e}", expert)
            elif type(part) is not kind:
                return _unknown(f"layers.{i}.{name}", part)
    return None if type(model.norm) is RMSNorm else _unknown("norm", model.norm)


_reported: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def report(model: Transformer, reason: str) -> None:
    """Log why a fast path stands aside: once for each model and reason, not at every step."""
    if _reported.get(model) != reason:
        _reported[model] = reason
        logging.getLogger(__name__).warning("%s: it stands aside", reason)


def _unknown(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})"
