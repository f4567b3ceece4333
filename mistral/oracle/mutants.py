"""Mutants: the library's own model with one named mistake, to prove that a test would catch it.

    with mutated("window_one_more"):
        ...                             # every Transformer, old or new, sees one key too many
    logits_with(model, prompts, name)   # what an engine that makes the mistake answers

Functions of the library are replaced from outside and put back afterwards; weights and files stay as they are. While a
mutant is open, kernels and attention backends stand aside, and every model goes the plain way, where the mistake
is. It is there for all threads, of which one at a time may plant. Caches whose window is to be mistaken are those made
meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mistral.attention
import mistral.buffers
import mistral.cache
import mistral.model
import mistral.window
from mistral.args import ModelArgs
from mistral.cache import NoCache, RollingBufferCache
from mistral.linear import widened_product
from mistral.model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock, widen
from mistral.oracle.family_mutants import FAMILY
from mistral.oracle.mutation import As, Change, Mutant, angles, looks_back, several_ids, turns_unevenly, weight_of
from mistral.plan import Plan, make_plan
from mistral.rope import Rope, inverse_frequencies, rotate
from mistral.tokenizer import Tokenizer
from mistral.util.errors import UsageError
from mistral.window import Window


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """While open, every Transformer of the library makes the mistake of that name.

    Raises:
        UsageError: there is none.
    """
    with find_mutant(name).patch():
        yield


def find_mutant(name: str) -> Mutant:
    """The mistake of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in MUTANTS:
        raise UsageError(f"no mistake is called {name!r}; there are {', '.join(MUTANTS)}")
    return MUTANTS[name]


def applies(name: str, args: ModelArgs, lens: Sequence[int], adapted: bool = False) -> bool:
    """Whether a model of this shape, asked for prompts of these lengths, can give other numbers by the mistake.

    Args:
        adapted: whether the model is loaded with an adapter, which some mistakes need.
    """
    mistake = find_mutant(name)
    return (adapted or not mistake.loads) and mistake.matters(args, lens)


@torch.no_grad()
def logits_with(model: Transformer, prompts: Sequence[Tensor], name: str) -> list[Tensor]:
    """Logits [n, V] of each prompt [n], packed into one forward without a cache, by a model that makes the mistake.

    Args:
        model: any that does not make it; for one that is made while a model is loaded, one loaded so.
        prompts: ids on the model's device, each begun by BOS. It is what is left out or doubled; the rows of the other
            ids stay at their places, and a row for which there is no id is nan.
        name: of the mistake.

    Raises:
        UsageError: there is no such mistake.
    """
    mistake = find_mutant(name)
    prompt_ids = [mistake.prompt_ids(ids) for ids in prompts]
    lens = [len(ids) for ids in prompt_ids]
    with mistake.patch():
        logits = model.forward(torch.cat(prompt_ids), lens)
    return [mistake.align(rows, len(ids)) for rows, ids in zip(logits.split(lens), prompts, strict=True)]


# When a mistake can matter.


def always(args: ModelArgs, lens: Sequence[int]) -> bool:
    return any(lens)


def of_all_tokens(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Some token goes through the one feed-forward of a layer; of several, see `family_mutants`."""
    return args.moe is None and any(lens)


def not_tied(args: ModelArgs, lens: Sequence[int]) -> bool:
    return not args.tied_embeddings and any(lens)


def looks_back_twice(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Some token sees two others: with fewer a second BOS changes nothing but the angles, and these only together."""
    return looks_back(args, lens) and any(w is None or w > 2 for w in args.windows)


# The window. Both kinds of cache take it from the args, for what they keep as for what is seen.


def window_mutant(name: str, what: str, change: Callable[[tuple[Window, ...]], Sequence[Window]]) -> Mutant:
    """A mistake in the layers' windows."""

    def wrong(right: Callable[..., None], self: Any, args: ModelArgs, *given: Any, **named: Any) -> None:
        right(self, dataclasses.replace(args, sliding_window=tuple(change(args.windows))), *given, **named)

    def matters(args: ModelArgs, lens: Sequence[int]) -> bool:
        most = max(lens, default=0)
        before, after = ([min(w or most, most) for w in windows] for windows in (args.windows, change(args.windows)))
        return before != after

    return Mutant(name, what, ((NoCache, "__init__", wrong), (RollingBufferCache, "__init__", wrong)), matters)


def first_for_all(windows: tuple[Window, ...]) -> list[Window]:
    return [next((w for w in windows if w is not None), None)] * len(windows)


# Who sees whom.


def sees_later_keys(right: Callable[..., Tensor], q_pos: Tensor, k_pos: Tensor, window: Window) -> Tensor:
    """`visible`, of keys to come as well."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    seen = (k_pos[..., None, :] >= 0).expand_as(distance)
    return seen if window is None else seen & (distance < window)


def one_tile(right: Callable[..., int], window: Window) -> int:
    """`block_for`: a tile offers no later keys than its own, so all that a step contributes becomes one."""
    return 2**31


def leaks(right: Callable[..., Plan], self: NoCache, seqlens: Sequence[int]) -> Plan:
    """For the mask one sequence, in packed order; tokens keep the angles of their own positions."""
    return dataclasses.replace(right(self, [sum(seqlens)]), positions=right(self, seqlens).positions)


def leaks_in_a_cache(right: Callable[..., Plan], self: RollingBufferCache, seqlens: Sequence[int]) -> Plan:
    """Likewise: all that comes goes into one row, in the order in which it comes."""
    rest = [0] * (len(self.lengths) - 1)
    came = sum(self.lengths) - sum(self.origins)
    one = right(As(self, lengths=[came, *rest], origins=[0, *rest]), [sum(seqlens), *rest])
    counts = [*seqlens, *[0] * (len(self.lengths) - len(seqlens))]
    own = make_plan(counts, self.lengths, self.origins, self.device)
    return dataclasses.replace(one, seqlens=own.seqlens, positions=own.positions)


# Angles, and rows of q and k.


def theta(value: float, name: str = "theta") -> Mutant:
    """The mistake of another rope_theta, any."""

    def wrong(right: Callable[..., tuple[Tensor, Tensor]], self: Rope, positions: Tensor) -> tuple[Tensor, ...]:
        return right(As(self, frequencies=inverse_frequencies(2 * len(self.frequencies), value)), positions)

    def matters(args: ModelArgs, lens: Sequence[int]) -> bool:
        return args.rope_theta != value and turns_unevenly(args, lens)

    return Mutant(name, f"rope_theta is {value:g}", angles(wrong), matters)


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def backwards(right: Callable[..., tuple[Tensor, Tensor]], *given: Any) -> tuple[Tensor, ...]:
    cos, sin = right(*given)
    return cos, -sin


def turned(reorder: Callable[[Tensor], Tensor]) -> tuple[Change, ...]:
    """A mistake in the order of q's and k's rows; `reorder` is given them a head at a time, in the last dimension."""
    return ((mistral.model, "rotate", lambda right, x, cos, sin: right(reorder(x), cos, sin)),)


def to_halves(x: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) become (i, i + D/2): Mistral's order becomes Hugging Face's."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_pairs(x: Tensor) -> Tensor:
    """The other way round."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


# Attention.


def attends(wrong: Callable[..., Tensor]) -> tuple[Change, ...]:
    """A mistake around attention: `wrong(attend, q, k, v, store, plan)`."""
    return (
        (Attention, "forward", lambda right, self, *given: right(As(self, attend=partial(wrong, self.attend)), *given)),
    )


def by_remainder(attend: Callable[..., Tensor], q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    K = k.shape[1]
    grouped = q.unflatten(1, (-1, K)).transpose(1, 2).flatten(1, 2)
    return attend(grouped, k, *rest).unflatten(1, (K, -1)).transpose(1, 2).flatten(1, 2)


def values_turned(
    right: Callable[..., Tensor], self: Attention, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any
) -> Tensor:
    def wv(x: Tensor) -> Tensor:
        return rotate(self.wv(x).unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)

    return right(As(self, wv=wv), x, cos, sin, *rest)


# Weights, norms, layers.


def read_as(linear: Any, other: Any) -> Callable[[Tensor], Tensor]:
    """The product with one matrix's numbers in the other's shape, as a loader that goes by size has them."""

    return lambda x: widened_product(x, weight_of(linear).reshape(weight_of(other).shape))


def w2_is_w3(right: Callable[..., Tensor], self: FeedForward, x: Tensor) -> Tensor:
    return right(As(self, w2=read_as(self.w3, self.w2), w3=read_as(self.w2, self.w3)), x)


def other_norms(right: Callable[..., Tensor], self: TransformerBlock, *given: Any) -> Tensor:
    return right(As(self, attention_norm=self.ffn_norm, ffn_norm=self.attention_norm), *given)


def eps_outside(right: Callable[..., Tensor], self: RMSNorm, x: Tensor) -> Tensor:
    wide = widen(x)
    normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)
    return normed.to(x.dtype) * self.weight.to(x.dtype)


def tied(right: Callable[..., Tensor], self: Transformer, h: Tensor) -> Tensor:
    return right(As(self, output=lambda h: widened_product(h, self.tok_embeddings.weight)), h)


def layers_mutant(name: str, what: str, order: Callable[[range], Sequence[int]], least: int) -> Mutant:
    """A mistake in the order of layers, seen where there are at least so many."""

    def wrong(right: Callable[..., Tensor], self: Transformer, *given: Any) -> Tensor:
        return right(As(self, layers=[self.layers[i] for i in order(range(len(self.layers)))]), *given)

    return Mutant(name, what, ((Transformer, "step", wrong),), lambda args, lens: args.n_layers >= least and any(lens))


# BOS. Texts get it in `encode`; prompts of ids are what the caller feeds, see `Mutant.prompt_ids`.


def encode_twice(right: Callable[..., list[int]], self: Tokenizer, s: str, bos: bool = True) -> list[int]:
    return [self.bos_id] * bos + right(self, s, bos)


def encode_without(right: Callable[..., list[int]], self: Tokenizer, s: str, bos: bool = True) -> list[int]:
    return right(self, s, False)


ALL = (
    window_mutant(
        "window_one_more",
        "each query sees one key too many (W + 1)",
        lambda ws: [None if w is None else w + 1 for w in ws],
    ),
    window_mutant(
        "window_one_fewer",
        "each query sees one key too few (W - 1)",
        lambda ws: [None if w is None else max(1, w - 1) for w in ws],
    ),
    window_mutant("no_window", "each query sees all keys before it", lambda ws: [None] * len(ws)),
    window_mutant("one_window_for_all_layers", "layers without a window have that of the others", first_for_all),
    window_mutant("windows_reversed", "the layers' windows are counted from the last layer", lambda ws: ws[::-1]),
    Mutant(
        "mask_leak",
        "packed sequences see each other: for the mask they are one sequence",
        ((NoCache, "plan", leaks), (RollingBufferCache, "plan", leaks_in_a_cache)),
        lambda args, lens: sum(n > 0 for n in lens) > 1 and set(args.windows) != {1},
    ),
    Mutant(
        "not_causal",
        "a query sees later keys too, all that its step contributes",
        (
            (mistral.attention, "visible", sees_later_keys),
            (mistral.buffers, "block_for", one_tile),
            (mistral.cache, "block_for", one_tile),
            (mistral.window, "block_for", one_tile),
        ),
        several_ids,
    ),
    theta(1e4, "theta_1e4"),
    theta(1e6, "theta_1e6"),
    Mutant(
        "rotary_bf16",
        "cosines and sines are rounded to bf16",
        angles(lambda right, *given: tuple(map(rounded, right(*given)))),
        looks_back,
    ),
    Mutant(
        "rotary_frequencies_bf16",
        "rotary frequencies are rounded to bf16, as when a model is cast with all it holds",
        angles(lambda right, self, at: right(As(self, frequencies=rounded(self.frequencies)), at)),
        turns_unevenly,
    ),
    *FAMILY,
    Mutant("rotated_backwards", "q and k turn the other way", angles(backwards), looks_back),
    Mutant(
        "no_rotation",
        "q and k do not turn",
        ((mistral.model, "rotate", lambda right, x, cos, sin: x),),
        looks_back,
    ),
    Mutant(
        "rows_not_permuted",
        "rows of q and k in Hugging Face's order are taken as Mistral's (the permutation is missing)",
        turned(to_halves),
        turns_unevenly,
    ),
    Mutant(
        "rows_permuted_needlessly",
        "rows of q and k in Mistral's order are taken as Hugging Face's (halves turn instead of adjacent pairs)",
        turned(to_pairs),
        turns_unevenly,
    ),
    Mutant("values_rotated", "v turns too", ((Attention, "forward", values_turned),), several_ids),
    Mutant(
        "no_scale",
        "scores are not divided by the root of the head's width",
        attends(lambda attend, q, *rest: attend(q * q.shape[-1] ** 0.5, *rest)),
        looks_back,
    ),
    Mutant(
        "heads_by_remainder",
        "query head h reads key head h % K instead of h // (H // K)",
        attends(by_remainder),
        lambda args, lens: 1 < args.n_kv_heads < args.n_heads and any(lens),
    ),
    Mutant("w2_w3_swapped", "w2 and w3 are swapped, read by size", ((FeedForward, "forward", w2_is_w3),), always),
    Mutant(
        "w1_w3_swapped",
        "w1 and w3 are swapped: the gate is on the other one",
        ((FeedForward, "forward", lambda right, self, x: right(As(self, w1=self.w3, w3=self.w1), x)),),
        of_all_tokens,
    ),
    Mutant(
        "gelu_for_silu",
        "the gate is gelu instead of silu",
        ((FeedForward, "forward", lambda right, self, x: self.w2(F.gelu(self.w1(x)) * self.w3(x))),),
        always,
    ),
    Mutant(
        "norms_swapped",
        "attention_norm and ffn_norm are swapped in every layer",
        ((TransformerBlock, "forward", other_norms),),
        always,
    ),
    Mutant(
        "eps_missing",
        "RMSNorm has no epsilon",
        ((RMSNorm, "forward", lambda right, self, x: right(As(self, eps=0.0), x)),),
        always,
    ),
    Mutant(
        "eps_outside_root",
        "RMSNorm adds its epsilon to the root instead of under it",
        ((RMSNorm, "forward", eps_outside),),
        always,
    ),
    Mutant(
        "no_final_norm",
        "the last norm, before the output matrix, is missing",
        ((Transformer, "step", lambda right, self, *given: right(As(self, norm=lambda h: h), *given)),),
        always,
    ),
    Mutant("output_tied", "the embeddings are the output matrix too", ((Transformer, "logits", tied),), not_tied),
    layers_mutant(
        "first_layers_swapped", "layers 0 and 1 are swapped", lambda n: [1, 0, *n[2:]] if len(n) > 1 else n, 2
    ),
    layers_mutant(
        "layers_by_name", "layers are ordered as text: 0, 1, 10, 11, 2, ..", lambda n: sorted(n, key=str), 11
    ),
    layers_mutant("layers_reversed", "the last layer comes first", lambda n: n[::-1], 2),
    Mutant("bos_doubled", "prompts begin with two BOS", ((Tokenizer, "encode", encode_twice),), looks_back_twice, 1),
    Mutant("bos_absent", "prompts begin without BOS", ((Tokenizer, "encode", encode_without),), looks_back, -1),
)
MUTANTS = {mistake.name: mistake for mistake in ALL}
