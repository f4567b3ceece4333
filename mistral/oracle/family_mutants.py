"""Mistakes that only other members can make: in scaled positions, growing queries, experts, ties, and adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mistral.formats.merge
import mistral.moe
from mistral.args import ModelArgs
from mistral.linear import widened_product
from mistral.model import Attention, Transformer, widen
from mistral.moe import MixtureOfExperts
from mistral.oracle.mutation import As, Mutant, angles, looks_back, turns_unevenly, weight_of
from mistral.plan import Plan
from mistral.rope import Rope, inverse_frequencies, yarn_ramp


def another_factor(args: ModelArgs, lens: Sequence[int]) -> bool:
    """The attention factor is not the one that follows from YaRN's factor."""
    yarn = args.yarn
    return yarn is not None and yarn.attention_factor != yarn.usual_attention_factor and looks_back(args, lens)


def ramp_of_steps(right: Callable[..., tuple[Tensor, ...]], self: Rope, positions: Tensor) -> tuple[Tensor, ...]:
    """Each pair keeps its frequency or has all of it divided: nothing in between."""
    if self.yarn is None:
        return right(self, positions)
    kept = inverse_frequencies(2 * len(self.frequencies), self.theta)
    ramp = yarn_ramp(2 * len(self.frequencies), self.theta, self.yarn).round()
    return right(As(self, frequencies=kept / self.yarn.factor * ramp + kept * (1 - ramp)), positions)


def some_between(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Some pair is on the ramp, neither at its foot nor at its head."""
    if args.yarn is None:
        return False
    ramp = yarn_ramp(args.head_dim, args.rope_theta, args.yarn)
    return bool((ramp != ramp.round()).any()) and turns_unevenly(args, lens)


def keys_grow(
    right: Callable[..., Tensor],
    self: Attention,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: Plan,
    store: Any,
    q_scale: Any,
) -> Tensor:
    return right(self, x, cos * q_scale, sin * q_scale, plan, store)


def no_floor(right: Callable[..., Tensor], self: Rope, positions: Tensor) -> Tensor:
    """Queries grow a little at each position, not in steps."""
    grows = self.query_scaling
    if grows is None:
        return right(self, positions)
    return (1 + grows.beta * torch.log(1 + positions.float() / grows.original_length))[:, None]


def grows_far(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Some query grows."""
    grows = args.llama_4_scaling
    return grows is not None and max(lens, default=0) > grows.original_length and looks_back(args, lens)


def over_all_experts(right: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Shares of all experts, of which the chosen ones are taken as they are: they do not sum to 1."""
    experts, _ = right(logits, chosen)
    return experts, widen(logits).softmax(-1).gather(-1, experts).to(logits.dtype)


def experts_swapped(right: Callable[..., Tensor], self: MixtureOfExperts, x: Tensor) -> Tensor:
    swapped = [lambda x, e=e: e.w2(F.silu(e.w3(x)) * e.w1(x)) for e in self.experts]
    return right(As(self, experts=swapped), x)


def w2_as_stored(right: Callable[..., Tensor], self: MixtureOfExperts, x: Tensor) -> Tensor:
    """The first release stores w2 of an expert turned round, [hidden, dim]: read as [dim, hidden] it has as many."""

    def made(expert: Any, x: Tensor) -> Tensor:
        w2 = weight_of(expert.w2)
        return widened_product(F.silu(expert.w1(x)) * expert.w3(x), w2.T.reshape(w2.shape))

    return right(As(self, experts=[partial(made, expert) for expert in self.experts]), x)


def no_output(right: Callable[..., Tensor], self: Transformer, h: Tensor) -> Tensor:
    if not self.args.tied_embeddings:
        return right(self, h)
    return right(As(self, output=lambda h: h.new_zeros(len(h), self.args.vocab_size)), h)


def some_not_chosen(args: ModelArgs, lens: Sequence[int]) -> bool:
    return args.moe is not None and args.moe.num_experts_per_tok < args.moe.num_experts and any(lens)


FAMILY = (
    Mutant(
        "yarn_factor_ignored",
        "YaRN's attention factor is ignored: cosines and sines are not multiplied",
        angles(lambda right, self, at: right(As(self, scale=1.0), at)),
        lambda args, lens: args.yarn is not None and args.yarn.attention_factor != 1.0 and looks_back(args, lens),
    ),
    Mutant(
        "yarn_factor_always",
        "YaRN's attention factor is 0.1 ln(factor) + 1 whatever the args say",
        angles(
            lambda right, self, at: right(As(self, scale=self.yarn.usual_attention_factor if self.yarn else 1.0), at)
        ),
        another_factor,
    ),
    Mutant(
        "yarn_ramp_rounded",
        "YaRN's ramp is rounded: a pair keeps its frequency or has all of it divided",
        angles(ramp_of_steps),
        some_between,
    ),
    Mutant(
        "keys_scaled_too",
        "the factor of queries that grow multiplies keys too",
        ((Attention, "forward", keys_grow),),
        grows_far,
    ),
    Mutant(
        "query_floor_missing",
        "queries grow at every position instead of once an original length (the floor is missing)",
        ((Rope, "query_scale", no_floor),),
        lambda args, lens: args.llama_4_scaling is not None and looks_back(args, lens),
    ),
    Mutant(
        "experts_not_renormalised",
        "the softmax is over all experts and the chosen ones are not divided by their sum",
        ((mistral.moe, "route", over_all_experts),),
        some_not_chosen,
    ),
    Mutant(
        "experts_w1_w3_swapped",
        "w1 and w3 are swapped in every expert: the gate is on the other one",
        ((MixtureOfExperts, "forward", experts_swapped),),
        lambda args, lens: args.moe is not None and any(lens),
    ),
    Mutant(
        "experts_w2_not_transposed",
        "w2 of the experts, which the first release's files hold turned round, is read as if it were not",
        ((MixtureOfExperts, "forward", w2_as_stored),),
        lambda args, lens: args.moe is not None and any(lens),
    ),
    Mutant(
        "output_not_tied",
        "the output matrix is not the embeddings but what it was before loading: zeros",
        ((Transformer, "logits", no_output),),
        lambda args, lens: args.tied_embeddings and any(lens),
    ),
    Mutant(
        "adapter_rows_not_permuted",
        "rows of q and k in an adapter of Hugging Face's order are added to Mistral's as they are",
        ((mistral.formats.merge, "rows_to_mistral", lambda right, w, heads: w),),
        turns_unevenly,
        loads=True,
    ),
)
