"""A model whose bits depend on nothing but the sequence: not on the batch, the chunks, the queue or the threads.

All of it is the decode kernel, which sums every output in one order and walks keys by position: a step of many tokens
is given to it a group at a time. PyTorch is left with copying, and with cosines, made for whole blocks of positions.
Decoding is as fast as ever, and a large batch faster; a prompt goes in at about three quarters of the speed. For a
CPU in fp32, and inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from mistral.cache import NoCache, RollingBufferCache
from mistral.fast.decode import CACHE_KINDS, FastTransformer
from mistral.fast.kernels import Matrix
from mistral.fast.linear import HasMatrix, product, use_kernels
from mistral.fast.prompt import aligned_angles
from mistral.logprobs import logprobs
from mistral.model import ModelArgs, Transformer
from mistral.plan import Plan
from mistral.util.errors import Unavailable

TOKENS = 64  # of a call of the kernels; more are no faster

# The self-test: rows that take every way through the kernels, most first, and outputs of a matrix that are looked at.
# Few calls, because on a busy machine threads wait for each other in each of them.
COUNTS = (17, 16, 5, 3, 2, 1)
OUTPUTS = 128


class NotDeterministic(Unavailable):
    """Bits that depend on more than the sequence."""


class BitwiseTransformer(FastTransformer):
    """`FastTransformer` all of whose steps are the kernels'. Nothing flows back."""

    @torch.no_grad()
    def step(self, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
        if isinstance(cache, NoCache):
            sequences = max(1, len(plan.seqlens))
            cache = self.make_cache(sequences, max(plan.seqlens, default=0))
        model = self.described(cache) if cache.layer(0).k.dtype in CACHE_KINDS else None
        if model is None:
            reason = self.stands_aside()
            raise NotDeterministic(
                "deterministic is for weights on a CPU, as they were loaded, and a cache that the kernels read"
                f"{f' ({reason})' if reason else ''}; load without it to run another way"
            )
        h = self.tok_embeddings(input_ids).to(torch.float32)
        for store in cache.layers:
            store.written = True
        for rows, tokens in groups(plan.seqlens, min(store.block for store in cache.layers)):
            positions, origins = plan.positions[tokens], [plan.origins[row] for row in rows]
            part = h[tokens]
            self.decode(model, part, rows, positions, origins, aligned_angles(positions, self.rope))
            if model.overflows:  # moved to float32 it would change the bits of all that comes after it
                raise NotDeterministic(
                    "keys or values exceed 65,504, the most of a cache in float16: "
                    "use --cache_dtype bfloat16 or float32"
                )
            h[tokens] = part
        return h

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        matrix = matrix_of(self.output)
        logits = h.new_empty(len(h), matrix.n)
        for first in range(0, len(h), TOKENS):
            logits[first : first + TOKENS] = product(matrix, h[first : first + TOKENS])
        return logits


def groups(seqlens: Sequence[int], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of a step, for one call after the other: at most TOKENS of them, and `most` of a sequence.

    Yields:
        The row of each token, and its place in the packed step.
    """
    begins = [0, *accumulate(seqlens)]
    for first in range(0, max(seqlens, default=0), most):
        both = [(row, begins[row] + i) for row, n in enumerate(seqlens) for i in range(first, min(first + most, n))]
        for at in range(0, len(both), TOKENS):
            rows, tokens = zip(*both[at : at + TOKENS], strict=True)
            yield list(rows), list(tokens)


def matrix_of(linear: object) -> Matrix:
    """The weights of a product as the kernels have them."""
    matrix = linear.matrix() if isinstance(linear, HasMatrix) else None
    if matrix is None:
        raise NotDeterministic(
            "deterministic is for weights on a CPU, as they were loaded; load without it to move them"
        )
    return matrix


def self_test(model: Transformer) -> None:
    """Compute the same in several groupings, by several numbers of threads.

    Looked at are products with the model's own weights, steps of a small model with its heads, and what sampling
    makes of logits.

    Raises:
        NotDeterministic: a bit differs.
    """
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for name, linear in [*model.layers[0].named_modules(), ("output", model.output)]:
            if isinstance(linear, HasMatrix):
                matrix = matrix_of(linear)
                x = torch.rand(COUNTS[0], matrix.k, generator=generator) - 0.5
                _compare(f"products with {name}", before, partial(_products, matrix, x))
        small = _small(model.args, generator)
        ids = torch.randint(small.args.vocab_size, (2 * COUNTS[0],), generator=generator)
        _compare("steps", before, partial(_by_steps, small, ids))
        logits = 10 * torch.rand(COUNTS[0], model.args.vocab_size, generator=generator)
        _compare("log-probabilities", before, lambda n: logprobs(logits[:n]))
        _compare("sums of probabilities", before, lambda n: logits[:n].softmax(-1).cumsum(-1))
    finally:
        torch.set_num_threads(before)


def _compare(what: str, most: int, compute: Callable[[int], Tensor]) -> None:
    """Refuse if the bits of `compute(rows)`, which belong to the first of some tokens, depend on rows or threads."""
    want = None
    for threads in sorted({1, 2, most}):
        torch.set_num_threads(threads)
        for count in COUNTS:
            bits = compute(count).view(torch.int32)  # a NaN equals itself; a float64 is two
            want = bits if want is None else want
            if not torch.equal(bits, want[: len(bits)]):
                raise NotDeterministic(
                    f"deterministic cannot be had on this machine: {what} have other bits with {count} rows and "
                    f"{threads} threads than with {COUNTS[0]} rows and 1 thread; load without it"
                )


def _products(matrix: Matrix, x: Tensor, count: int) -> Tensor:
    """The first outputs of a matrix for the first `count` rows of x."""
    return product(Matrix(matrix.data, matrix.scale, matrix.kind, min(matrix.n, OUTPUTS), matrix.k), x[:count])


def _small(args: ModelArgs, generator: torch.Generator) -> BitwiseTransformer:
    """A random model with the heads of a large one, two layers, and windows that roll and that do not."""
    with torch.device("meta"):
        small = BitwiseTransformer(
            replace(
                args,
                dim=32,
                hidden_dim=32,
                vocab_size=32,
                n_layers=2,
                sliding_window=(None, COUNTS[0]),
                tied_embeddings=False,
                max_batch_size=0,
            )
        )
    state = {name: torch.rand(w.shape, generator=generator) - 0.5 for name, w in small.state_dict().items()}
    small.load_state_dict(state, assign=True)
    use_kernels(small)
    return small


def _by_steps(model: BitwiseTransformer, ids: Tensor, count: int) -> Tensor:
    """Hidden states of a sequence that contributes `count` tokens and then the rest, beside one of one token a step."""
    cache = model.make_cache(2, count)
    steps = [(torch.cat([ids[:1], part]), [1, len(part)]) for part in ids.tensor_split([count])]
    return torch.cat([model.forward_partial(both, seqlens, cache)[1:] for both, seqlens in steps])
