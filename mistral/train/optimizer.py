"""How weights are changed by a gradient: AdamW, a learning rate that rises and falls, a gradient that is clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mistral.train.options import TrainOptions

BETAS = (0.9, 0.95)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Of step `step`, counted from 0: a linear rise over the warmup's share of the steps, then a cosine to 0."""
    rising = round(options.warmup * steps)
    if step < rising:
        return options.peak_lr * (step + 1) / rising
    return options.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def adamw(weights: Mapping[str, Tensor], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over weights in their order, fp32; what is no matrix does not decay."""
    groups = [
        {"params": [w for w in weights.values() if w.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [w for w in weights.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(w.device.type in ("cpu", "cuda") for w in weights.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.peak_lr, betas=BETAS, fused=fused or None)


def clipped(weights: Mapping[str, Tensor], clip: float) -> float:
    """Scale the gradients that are there to a length of at most `clip` (0: as they are); return what it was."""
    return float(torch.nn.utils.clip_grad_norm_(list(weights.values()), clip or math.inf))


def change(optimizer: torch.optim.AdamW, lr: float) -> None:
    """One step from the gradients that are there, which are then forgotten."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
