"""A model in which little things show: a dozen layers of two kinds, sharp attention, an eps that matters, hidden = dim.

The shape on which each of `mistral.oracle.mutants` moves the numbers; here it must be the float64 truth.
"""

from __future__ import annotations

import pytest
import torch

from mistral.model import Transformer
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)

LENS = [1, 23, 40, 9]
THETAS = [1e4, 1e6]


def deep_model(theta: float, seed: int = 1) -> Transformer:
    """Scores four times as large make attention pick, so that a slightly wrong angle shows."""
    args = tiny_args(n_layers=12, hidden_dim=24, sliding_window=(None, 5, 5, 5), rope_theta=theta, norm_eps=1e-2)
    model = tiny_model(args, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("wq.weight", "wk.weight")):
                weight.mul_(2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("theta", THETAS)
def test_whole_is_the_truth(theta: float) -> None:
    model = deep_model(theta)
    prompts = ragged(LENS, model.args.vocab_size)
    assert distance(whole(model, prompts), true_logprobs(model, prompts)) < TOLERANCE


@pytest.mark.parametrize("schedule", [at_random(LENS, 1), prefill_then_decode(LENS, 6)], ids=["ragged", "decode"])
@pytest.mark.parametrize("theta", THETAS)
def test_with_a_cache_is_the_truth(theta: float, schedule: list[list[int]]) -> None:
    model = deep_model(theta)
    prompts = ragged(LENS, model.args.vocab_size)
    got = play(model, prompts, schedule, make_cache(model, len(LENS)))
    assert distance(got, true_logprobs(model, prompts)) < TOLERANCE
