"""Beside a module that they do not know the fast paths stand aside, and say why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistral.args import QueryScaling
from mistral.fast.bitwise import BitwiseTransformer, NotDeterministic
from mistral.fast.cuda_graph import CudaGraphTransformer
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.known import unknown_module
from mistral.fast.linear import use_kernels
from mistral.linear import Linear
from mistral.model import FeedForward, RMSNorm, Transformer
from tests.support.tiny import TOLERANCE, distance, make_cache, play, prefill_then_decode, ragged, tiny_args, tiny_model

try:
    library()
except KernelsUnavailable as error:
    pytest.skip(f"no kernels: {error}", allow_module_level=True)

LENS = [9, 3, 6]


class Doubled(FeedForward):
    """A feed-forward of another kind, as a mixture of experts is one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Rooted(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs().sqrt()


class Added(nn.Module):
    """A product with something added, as a run-time adapter is one."""

    def __init__(self, of: Linear) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.of(x)


def other_feed_forward(model: Transformer) -> None:
    block: Any = model.layers[1]
    other = Doubled(model.args)
    other.load_state_dict(block.feed_forward.state_dict())
    block.feed_forward = other


def other_norm(model: Transformer) -> None:
    block: Any = model.layers[0]
    other = Rooted(model.args.dim, model.args.norm_eps)
    other.load_state_dict(block.ffn_norm.state_dict())
    block.ffn_norm = other


def other_last_norm(model: Transformer) -> None:
    other = Rooted(model.args.dim, model.args.norm_eps)
    other.load_state_dict(model.norm.state_dict())
    model.norm = other


def other_product(model: Transformer) -> None:
    block: Any = model.layers[1]
    block.attention.wq = Added(block.attention.wq)


CHANGES: dict[str, tuple[Callable[[Transformer], None], str]] = {
    "feed-forward": (other_feed_forward, "layers.1.feed_forward (Doubled)"),
    "norm": (other_norm, "layers.0.ffn_norm (Rooted)"),
    "last norm": (other_last_norm, "norm (Rooted)"),
    "product": (other_product, "layers.1.attention.wq (Added)"),
}


def fast_one(plain: Transformer, kind: type[FastTransformer]) -> FastTransformer:
    model = kind(plain.args)
    model.load_state_dict(plain.state_dict())
    use_kernels(model)
    return model


def test_what_is_known_is_taken() -> None:
    model = fast_one(tiny_model(tiny_args()), FastTransformer)
    assert model.stands_aside() is None
    assert unknown_module(model) is None
    assert model.described(make_cache(model, 1)) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernels_stand_aside(change: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = CHANGES[change]
    plain = tiny_model(tiny_args())
    model = fast_one(plain, FastTransformer)
    before = model.stands_aside()
    make(plain)
    make(model)
    assert before is None
    assert reason in str(model.stands_aside())
    prompts = ragged(LENS, plain.args.vocab_size)
    with torch.inference_mode():
        got = play(model, prompts, prefill_then_decode(LENS, 2), make_cache(model, 3))
        want = play(plain, prompts, prefill_then_decode(LENS, 2), make_cache(plain, 3))
    assert distance(got, want) < TOLERANCE
    assert model.described(make_cache(model, 3)) is None
    assert caplog.text.count(reason) == 1  # two steps, and a look


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_bitwise_refuses_and_says_why(change: str) -> None:
    make, reason = CHANGES[change]
    model = fast_one(tiny_model(tiny_args()), BitwiseTransformer)
    make(model)
    with pytest.raises(NotDeterministic, match=re.escape(reason)):
        model.forward_partial(ragged([4], model.args.vocab_size)[0], [4])


class Recorded(CudaGraphTransformer):
    """Captures on a CPU, and counts."""

    devices = ("cpu",)
    layer = staticmethod(lambda: lambda layer, h, *rest: layer(h, *rest[:2], None, rest[2]))
    captured: list[int]

    def _capture(self, cache: Any, used: int) -> Any:
        self.captured.append(used)
        raise AssertionError("a module that is not known was captured")


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "product"])
def test_nothing_unknown_is_captured(change: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = CHANGES[change]
    plain = tiny_model(tiny_args())
    model = Recorded(plain.args)
    model.captured = []
    model.load_state_dict(plain.state_dict())
    make(plain)
    make(model)
    assert reason in str(model.stands_aside())
    prompts = ragged(LENS, plain.args.vocab_size)
    with torch.inference_mode():
        got = play(model, prompts, prefill_then_decode(LENS, 2), make_cache(model, 3))
        want = play(plain, prompts, prefill_then_decode(LENS, 2), make_cache(plain, 3))
    assert distance(got, want) < TOLERANCE
    assert caplog.text.count(reason) == 1


def test_what_is_known_is_captured() -> None:
    model = Recorded(tiny_args())
    model.captured = []
    cache = make_cache(model, 1)
    with torch.inference_mode(), pytest.raises(AssertionError, match="captured"):
        model.forward(torch.tensor([1]), [1], cache)
    assert model.captured


def test_queries_that_grow_are_known_to_the_kernels_alone() -> None:
    args = tiny_args(llama_4_scaling=QueryScaling(4, 0.5))
    plain = tiny_model(args)
    for kind in (FastTransformer, BitwiseTransformer):
        assert fast_one(plain, kind).stands_aside() is None
    assert "rope (QueryScaling)" in str(Recorded(args).stands_aside())
