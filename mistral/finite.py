"""Why a model's numbers are NaN or infinite: which weight is broken, or what they are too large for."""

from __future__ import annotations

import math

import torch
from torch import nn


def broken_weight(model: nn.Module) -> str | None:
    """The first tensor of a model with a value that is NaN or infinite, in a sentence; None if all are finite.

    Reads all weights once: seconds for a large model.
    """
    for name, tensor in model.state_dict().items():
        # Numbers of one byte are not looked at: those that quantized weights consist of are finite.
        if not (tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()):
            continue
        if not all(math.isfinite(end) for end in tensor.aminmax()):  # in which a NaN shows; takes no memory
            count, where = int((~tensor.isfinite()).sum()), name.replace(".of.", ".")  # beside an adapter
            return (
                f"the weights are broken: {count:,} of the {tensor.numel():,} numbers of {where} are NaN or infinite: "
                "fetch or convert the model again"
            )
    return None


def why_not_finite(model: nn.Module, dtype: torch.dtype) -> str:
    """What is wrong with a model whose results are NaN or infinite, and what to do.

    Args:
        dtype: of its arithmetic.
    """
    if (broken := broken_weight(model)) is not None:
        return broken
    name = str(dtype).removeprefix("torch.")
    if dtype.itemsize < torch.float32.itemsize:
        return f"its weights are finite, but too large for {name}: --dtype float32 has more room"
    return (
        f"its weights are finite, but too large even for {name}: they are damaged, or another model's: fetch or "
        "convert it again"
    )
