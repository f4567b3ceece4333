"""Every weight of a model, described once: name, shape, role. Runs without torch.

What a folder must hold, what is quantized, whose rows the layouts order differently, what a step reads and how a model
splits over devices all derive from here. Knows nothing about files or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mistral.args import ModelArgs

OUTPUT, EMBEDDINGS, NORM = "output.weight", "tok_embeddings.weight", "norm.weight"


@dataclass(frozen=True)
class Parameter:
    """One weight of a model.

    Args:
        name: in Mistral's checkpoints, and in `Transformer.named_parameters()`.
        shape: [out, in] of a matrix, [dim] of a norm.
        role: "embedding" (a row a token), "norm", "matrix" (a product in a layer), "router" (the
            product that chooses experts, small and never rounded), "output" (the product that makes
            the logits).
        layer: the layer that it belongs to, counted from 0; None for the model's own.
        heads: of q and k, the heads whose rows turn in pairs, which Hugging Face's layout has in another order.
        split: how tensor parallelism divides it: "rows" or "columns" (then the partial products are added up); None:
            every device has all of it. The rows of q, k and v are divided by whole heads.
        expert: the number of the expert that it belongs to; None: every token goes through it.
        tied: whether an embedding is the output matrix too.
    """

    name: str
    shape: tuple[int, ...]
    role: Literal["embedding", "norm", "matrix", "router", "output"]
    layer: int | None = None
    heads: int | None = None
    split: Literal["rows", "columns"] | None = None
    expert: int | None = None
    tied: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def quantized(self) -> bool:
        """Whether it is stored quantized when a model is quantized: every weight of a large product is."""
        return self.role in ("matrix", "output") or self.tied


def parameters(args: ModelArgs) -> dict[str, Parameter]:
    """Every weight by name, in the model's order; a tied output is the embeddings, and not there again.

    Worked out, not read off a model: with sizes that are wrong by a factor of a million none can be made.
    """
    return dict(_parameters(args))


def active(args: ModelArgs) -> int:
    """How many weights one token goes through: of experts, those of the chosen ones."""
    everyone = sum(p.numel for p in _parameters(args).values() if p.expert is None)
    first = sum(p.numel for p in _parameters(args).values() if p.expert == 0)
    return everyone + first * (0 if args.moe is None else args.moe.num_experts_per_tok)


@lru_cache(maxsize=16)
def _parameters(args: ModelArgs) -> dict[str, Parameter]:
    found = [Parameter(EMBEDDINGS, (args.vocab_size, args.dim), "embedding", tied=args.tied_embeddings)]
    for i in range(args.n_layers):
        found += _layer(args, i)
    found.append(Parameter(NORM, (args.dim,), "norm"))
    if not args.tied_embeddings:
        found.append(Parameter(OUTPUT, (args.vocab_size, args.dim), "output", split="rows"))
    return {parameter.name: parameter for parameter in found}


def _layer(args: ModelArgs, i: int) -> Iterator[Parameter]:
    """The weights of layer i, in order."""
    dim, hidden, H, K = args.dim, args.hidden_dim, args.n_heads, args.n_kv_heads
    q, kv = H * args.head_dim, K * args.head_dim
    at = f"layers.{i}"
    yield Parameter(f"{at}.attention.wq.weight", (q, dim), "matrix", i, heads=H, split="rows")
    yield Parameter(f"{at}.attention.wk.weight", (kv, dim), "matrix", i, heads=K, split="rows")
    yield Parameter(f"{at}.attention.wv.weight", (kv, dim), "matrix", i, split="rows")
    yield Parameter(f"{at}.attention.wo.weight", (dim, q), "matrix", i, split="columns")
    experts: list[tuple[str, int | None]] = [(f"{at}.feed_forward", None)]
    if args.moe is not None:
        experts = [(f"{at}.feed_forward.experts.{expert}", expert) for expert in range(args.moe.num_experts)]
        yield Parameter(f"{at}.feed_forward.gate.weight", (args.moe.num_experts, dim), "router", i)
    for path, expert in experts:
        yield Parameter(f"{path}.w1.weight", (hidden, dim), "matrix", i, split="rows", expert=expert)
        yield Parameter(f"{path}.w2.weight", (dim, hidden), "matrix", i, split="columns", expert=expert)
        yield Parameter(f"{path}.w3.weight", (hidden, dim), "matrix", i, split="rows", expert=expert)
    yield Parameter(f"{at}.attention_norm.weight", (dim,), "norm", i)
    yield Parameter(f"{at}.ffn_norm.weight", (dim,), "norm", i)
