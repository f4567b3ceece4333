"""A model whose results are no numbers is told apart by what is wrong with it, and the advice fits its dtype."""

from __future__ import annotations

import math

import pytest
import torch

from mistral.finite import broken_weight, why_not_finite
from tests.support.tiny import tiny_args, tiny_model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_broken_is_named(value: float) -> None:
    model = tiny_model(tiny_args())
    assert broken_weight(model) is None
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, :2] = value
    told = broken_weight(model)
    assert told is not None
    assert "2 of the 960 numbers of layers.1.feed_forward.w2.weight are NaN or infinite" in told
    assert why_not_finite(model, torch.float16) == told


def test_advice_fits_the_dtype() -> None:
    model = tiny_model(tiny_args())
    for dtype in (torch.float16, torch.bfloat16):
        assert why_not_finite(model, dtype).endswith("--dtype float32 has more room")
    for dtype in (torch.float32, torch.float64):
        assert "--dtype" not in why_not_finite(model, dtype)
