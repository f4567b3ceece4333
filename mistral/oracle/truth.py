"""The contract in float64: what every other number is compared with.

Written from the rules alone (docs/contract.md), one prompt at a time, with masks made of positions: no cache, no tiles,
none of the library's model. Given a compute dtype it does the same operations and rounds each result where the
contract stores one, and scores and norms, which it has in fp32, to that; sums are off by random amounts as large as
sums in fp32 are. How far what comes out is from the truth is the error budget: no implementation in this dtype avoids
errors of this size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mistral.args import ModelArgs

Weights = Mapping[str, Tensor]  # by the names in a layer, such as attention.wq.weight
Stores = Callable[[str, Tensor], Tensor]  # given a result's name and value; what is stored of it
Note = Callable[[str, Tensor], None]  # told the name and the value [T, width] of each activation, in order

# The errors of a budget are random, and all log-probs of a position err together: a position is one sample. So rounding
# is tried several times, and more often where the positions are few.
DRAWS = (4, 16)  # at least, at most
ENOUGH = 500  # positions, over all draws
# A sum of n terms in fp32 is off by SUMS * sqrt(n) times eps / 2 times the root of the sum of its squared terms, as a
# standard deviation. Adding one after the other, in random order, has 1 / sqrt(6); adding in sixteen lanes, or in
# blocks, as kernels do, has about a quarter of it.
SUMS = 1 / 8
SHAKEN = 1 / 16  # of the dtype's epsilon: the most by which a number is shaken before it is rounded, as by other sums
# Where two experts' logits are about as close as rounding moves them, the dtype does not decide between them: an
# implementation may choose either, and be as right as another. So a budget chooses at random: what it orders experts
# by is off by up to so many times the typical distance of its logits to the exact ones. By their own rounding alone its
# few draws would meet too few of the ties that some implementation meets.
UNDECIDED = 4
QUERIES = 128  # whose scores are held at once
WIDENED = 2**24  # weights in float64 held at once: 128 MB


class Truth:
    """Prompts on their way through a model, a layer at a time; see `streams.LayerwiseRunner`.

    Args:
        args: the shape.
        prompts: [n] int64 ids of each; they share nothing.
        weights: dtype to which weights are rounded first; None leaves them.
        compute: dtype to which each stored result is rounded; None rounds nothing, and sums are exact.
        cache: dtype in which keys and values are kept until they are looked at; None keeps them as they are. In int8 a
            head's key at a position has a scale. What is beyond float16 is not kept in it.
        note: told each activation.
        draw: seed of what is random about the rounding.
        exact: the same prompts without rounding, which go through each layer first: what a router's logits are off by.
    """

    def __init__(
        self,
        args: ModelArgs,
        prompts: Sequence[Tensor],
        weights: torch.dtype | None = None,
        compute: torch.dtype | None = None,
        note: Note | None = None,
        draw: int = 0,
        cache: torch.dtype | None = None,
        exact: Truth | None = None,
    ) -> None:
        self.args = args
        self.ids = torch.cat(list(prompts))
        self.lens = [len(p) for p in prompts]
        self._weights, self._compute, self._cache = weights, compute, cache
        self._random = torch.Generator().manual_seed(draw)
        self.note = note or (lambda name, value: None)
        self._exact = exact
        self._router = torch.empty(0)  # [T, experts], logits of the last layer
        self._h = torch.empty(0)
        positions = torch.cat([torch.arange(n) for n in self.lens])
        angles = positions.float()[:, None] * _frequencies(args)
        cos, sin = angles.cos(), angles.sin()
        if args.yarn is not None:
            cos, sin = cos * args.yarn.attention_factor, sin * args.yarn.attention_factor
        grown = _query_scale(args, positions)[:, None]
        # [T, 1, D/2] each, of keys and of queries: fp32 values, also those that grew
        self._turns_k = cos.double()[:, None], sin.double()[:, None]
        self._turns_q = (cos * grown).double()[:, None], (sin * grown).double()[:, None]

    def embed(self, weight: Tensor) -> None:
        """[V, dim] embeddings: where the prompts begin."""
        self._h = self._stored("tok_embeddings", self._weight(weight[self.ids]))

    def layer(self, i: int, weights: Weights) -> None:
        """One layer, by its weights."""
        at = f"layers.{i}."

        def product(name: str, x: Tensor) -> Tensor:
            return self._stored(at + name, self._product(x, weights[f"{name}.weight"]))

        x = self._stored(at + "attention_norm", self._norm(self._h, weights["attention_norm.weight"]))
        q, k, v = (
            product(f"attention.{name}", x).unflatten(-1, (-1, self.args.head_dim)) for name in ("wq", "wk", "wv")
        )
        q = self._stored(at + "attention.q", self._turn(q, *self._turns_q).flatten(1)).view_as(q)
        k = self._stored(at + "attention.k", self._turn(k, *self._turns_k).flatten(1)).view_as(k)
        per_prompt = zip(*(x.split(self.lens) for x in (q, self._kept(k), self._kept(v))), strict=True)
        heads = torch.cat([self._attend(*one, window=self.args.windows[i]) for one in per_prompt])
        heads = self._stored(at + "attention.heads", heads.flatten(1))
        h = self._rounded(self._h + product("attention.wo", heads))
        x = self._stored(at + "ffn_norm", self._norm(h, weights["ffn_norm.weight"]))
        if self.args.moe is None:
            made = self._swiglu("feed_forward.", x, weights, lambda name, x: self._stored(at + name, x))
        else:
            made = self._stored(f"{at}feed_forward", self._experts(at, x, weights))
        self._h = self._stored(at[:-1], h + made)

    def _swiglu(self, path: str, x: Tensor, weights: Weights, stored: Stores) -> Tensor:
        """Rule 7, by the weights of that path in the layer."""
        gate = stored(f"{path}w1", self._product(x, weights[f"{path}w1.weight"]))
        up = stored(f"{path}w3", self._product(x, weights[f"{path}w3.weight"]))
        gated = stored(f"{path}gated", self._rounded(gate * torch.sigmoid(gate)) * up)
        return stored(f"{path}w2", self._product(gated, weights[f"{path}w2.weight"]))

    def _experts(self, at: str, x: Tensor, weights: Weights) -> Tensor:
        """Rule 17: every expert for every token, of which those that were not chosen count nothing."""
        assert self.args.moe is not None
        logits = self._stored(f"{at}feed_forward.gate", self._product(x, weights["feed_forward.gate.weight"]))
        self._router = logits
        chosen = (-self._order(logits)).argsort(dim=-1, stable=True)[:, : self.args.moe.num_experts_per_tok]
        shares = self._rounded(self._in_fp32(logits.gather(-1, chosen)).softmax(-1))
        share, out = torch.zeros_like(logits).scatter(-1, chosen, shares), torch.zeros_like(x)
        for expert in range(self.args.moe.num_experts):
            path = f"feed_forward.experts.{expert}."
            made = self._swiglu(path, x, weights, lambda name, x: self._rounded(x))
            out = self._rounded(out + self._rounded(share[:, expert, None] * made))
        return out

    def _order(self, logits: Tensor) -> Tensor:
        """What experts are chosen by: their logits, which in a budget are off once more, see UNDECIDED.

        Not where a coarse cache is what they are off by: that moves the logits of every implementation alike.
        """
        if self._exact is None or self._cache is not None:
            return logits
        off = (logits - self._exact._router).square().mean(-1).sqrt().median()
        return logits + UNDECIDED * off * self._uniform(logits)

    def head(self, norm: Tensor, output: Tensor, rows: int) -> Iterator[Tensor]:
        """Logits [at most `rows`, V] in float64, block after block."""
        h = self._stored("norm", self._norm(self._h, norm))
        for block in h.split(rows):
            yield self._rounded(self._product(block, output))

    def _rounded(self, x: Tensor) -> Tensor:
        if self._compute is None:
            return x
        most = SHAKEN * torch.finfo(self._compute).eps  # too little for what is exact to change
        return (x * (1 + most * self._uniform(x))).to(self._compute).double()

    def _kept(self, x: Tensor) -> Tensor:
        """Keys or values [T, K, D] as the cache has them."""
        if self._cache is None:
            return x
        if self._cache == torch.int8:
            scale = (x.abs().amax(-1, keepdim=True) / 127).float().double()
            return torch.where(scale > 0, (x / scale).round() * scale, 0.0)
        kept = x.to(self._cache).double()
        return x if self._cache == torch.float16 and kept.isinf().any() else kept

    def _uniform(self, x: Tensor) -> Tensor:
        """Random numbers in [-1, 1) in x's shape; `torch.rand`, which is the same on every machine."""
        return 2 * torch.rand(x.shape, generator=self._random, dtype=torch.float64) - 1

    def _summed(self, sums: Tensor, squares: Tensor, n: int) -> Tensor:
        """Exact sums of n terms, whose squares sum to `squares`, as fp32 has them: see SUMS."""
        deviation = SUMS * n**0.5 * torch.finfo(torch.float32).eps / 2
        return sums + deviation * squares.sqrt() * 3**0.5 * self._uniform(sums)

    def _in_fp32(self, x: Tensor) -> Tensor:
        """What the contract has in fp32, whatever the dtype."""
        return x if self._compute is None else x.float().double()

    def _stored(self, name: str, x: Tensor) -> Tensor:
        x = self._rounded(x)
        self.note(name, x)
        return x

    def _weight(self, weight: Tensor) -> Tensor:
        return (weight if self._weights is None else weight.to(self._weights)).double()

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        rows = max(1, WIDENED // weight.shape[1])
        return torch.cat([self._matmul(x, self._weight(part).T) for part in weight.split(rows)], -1)

    def _matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, k] by [k, m], whose sums of k terms are in fp32 unless everything is exact."""
        if self._compute is None:
            return x @ y
        # fp32 is enough to know how large errors are, once it cannot overflow.
        largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        squares = (x / largest).float().square() @ y.float().square()
        return self._summed(x @ y, squares.double() * largest.square(), len(y))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rule 5: rounded before the weight, and after it by whoever stores it."""
        square = x.square()
        mean = square.mean(-1, keepdim=True)
        if self._compute is not None:
            mean = self._summed(mean, square.square().sum(-1, keepdim=True) / x.shape[-1] ** 2, x.shape[-1])
        inverse = self._in_fp32(1 / torch.sqrt(self._in_fp32(mean + self.args.norm_eps)))
        normed = x * inverse
        return self._rounded(normed) * self._rounded(self._weight(weight))

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rule 3: pairs (2i, 2i+1) of [T, heads, D] turn by angle i."""
        turned = torch.empty_like(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned[..., 0::2] = even * cos - odd * sin
        turned[..., 1::2] = even * sin + odd * cos
        return turned

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Rules 1, 6 and 8, for one prompt: [n, H, D] by [n, K, D] to [n, H, D]."""
        n, H, D = q.shape
        K = k.shape[1]
        out = torch.empty_like(q)
        for first in range(0, n, QUERIES):
            last = min(first + QUERIES, n)
            oldest = 0 if window is None else max(0, first - window + 1)
            distance = torch.arange(first, last)[:, None] - torch.arange(oldest, last)
            hidden = (distance < 0) | (distance >= (window or n))
            for head in range(H):
                keys, values = k[oldest:last, head // (H // K)], v[oldest:last, head // (H // K)]
                scores = self._in_fp32(self._matmul(q[first:last, head], keys.T) / D**0.5)
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                out[first:last, head] = self._matmul(weights, values)
        return out


def _frequencies(args: ModelArgs) -> Tensor:
    """Rules 3 and 15: fp32 in this spelling, also here."""
    D, theta, yarn = args.head_dim, args.rope_theta, args.yarn
    powers = theta ** (torch.arange(0, D, 2).float() / D)
    if yarn is None:
        return 1.0 / powers

    def dimension(turns: float) -> float:
        return D * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = min(max(math.floor(dimension(yarn.beta_fast)), 0), D - 1)
    high = min(max(math.ceil(dimension(yarn.beta_slow)), 0), D - 1)
    ramp = ((torch.arange(D // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (yarn.factor * powers) * ramp + 1.0 / powers * (1 - ramp)


def _query_scale(args: ModelArgs, positions: Tensor) -> Tensor:
    """Rule 16, in fp32: [T]."""
    if args.llama_4_scaling is None:
        return torch.ones(len(positions))
    return 1 + args.llama_4_scaling.beta * (1 + positions // args.llama_4_scaling.original_length).float().log()


def error_budget(
    args: ModelArgs,
    prompts: Sequence[Tensor],
    weights: torch.dtype | None,
    compute: torch.dtype,
    cache: torch.dtype | None = None,
    *,
    exact: Truth | None = None,
) -> list[Truth]:
    """The truth with results rounded as `compute` rounds them, and keys as `cache` does, `num_draws` times; for
    float64, which the truth is in itself, as float32 does: see `scale_of_rounding`.

    Args:
        exact: the truth, which must go through each layer first; None chooses experts by rounded logits alone.
    """
    rounded = torch.float32 if compute == torch.float64 else compute
    draws = range(num_draws(prompts, cache))
    return [Truth(args, prompts, weights, rounded, draw=draw, cache=cache, exact=exact) for draw in draws]


def num_draws(prompts: Sequence[Tensor], cache: torch.dtype | None = None) -> int:
    """How often rounding is tried, so that an error budget of these prompts is not a matter of luck.

    A cache that is coarser than the arithmetic rounds the same keys to the same numbers however they were computed, but
    for the few that lie between two: once is enough.
    """
    if cache is not None:
        return 1
    least, most = DRAWS
    return max(least, min(most, -(-ENOUGH // sum(map(len, prompts)))))


def scale_of_rounding(compute: torch.dtype) -> float:
    """By what the errors of `error_budget` are to be multiplied."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return ratio if compute == torch.float64 else 1.0
