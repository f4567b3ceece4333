"""Several rows of a sequence in one decode step: the bits of one row at a time, whatever each of them sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.model import Transformer
from tests.fast.test_cache_dtypes import DTYPES, as_kernels
from tests.support.threads import threads
from tests.support.tiny import TOLERANCE, distance, tiny_args, tiny_model

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

PART = 128  # of fast/csrc/lanes.h: where the positions of a query are divided
MOST = 4096  # positions that a query may see before its parts grow


def model_of(dtype: torch.dtype = torch.float32, **args: Any) -> FastTransformer:
    return as_kernels(FastTransformer, tiny_model(tiny_args(**args), seed=4), dtype)


def filled(model: Transformer, lengths: list[int]) -> RollingBufferCache:
    """A cache whose sequences are so long, with the same keys and values for the same model and lengths."""
    generator = torch.Generator().manual_seed(7)
    cache = model.make_cache(len(lengths), max(lengths) + 64)
    cache.lengths = list(lengths)
    for store in cache.layers:
        for kept in store.storage:
            noise = torch.randn(kept.shape, generator=generator)
            kept.copy_((noise * 40).round() if kept.dtype == torch.int8 else noise.abs() if kept.dim() == 3 else noise)
    return cache


def steps(model: Transformer, lengths: list[int], rows: list[int], each: int) -> Tensor:
    """Logits of `rows` more tokens of each sequence, at most `each` of them in a step; in the order of sequences."""
    cache, found = filled(model, lengths), [list[Tensor]() for _ in rows]
    each = min(each, *(store.block for store in cache.layers))  # more take the plain way
    ids = [[3 + (5 * row + i) % 40 for i in range(n)] for row, n in enumerate(rows)]
    with torch.inference_mode():
        for first in range(0, max(rows), each):
            seqlens = [min(each, max(0, n - first)) for n in rows]
            pieces = [its[first : first + n] for its, n in zip(ids, seqlens, strict=True)]
            logits = model.forward(torch.tensor([i for piece in pieces for i in piece]), seqlens, cache)
            for row, piece in enumerate(logits.split(seqlens)):
                found[row].append(piece)
    return torch.cat([piece for pieces in found for piece in pieces])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("window", [None, 3, 20, 200])
def test_the_bits_are_those_of_one_row_at_a_time(
    window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Across the end of a part and of the buffer; with a window each row sees a position less at its far end."""
    model = model_of(dtype, sliding_window=window, n_heads=heads[0], n_kv_heads=heads[1])
    lengths, rows = [PART - 3, 5, 3 * PART - 1, 700], [7, 1, 16, 4]
    want = steps(model, lengths, rows, 1)
    assert torch.isfinite(want).all()
    for each in (2, 3, 16):
        for count in (1, 3):
            with threads(count):
                assert torch.equal(steps(model, lengths, rows, each), want)


@pytest.mark.parametrize("window", [None, MOST + 3])
def test_rows_of_which_some_have_longer_parts(window: int | None) -> None:
    model = model_of(sliding_window=window, n_heads=6, n_kv_heads=2)
    lengths, rows = [MOST - 4, 2 * MOST - 2], [9, 9]
    want = steps(model, lengths, rows, 1)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(steps(model, lengths, rows, 9), want)


@settings(max_examples=20)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (5, 1), (6, 2), (9, 3)]),
    head_dim=st.sampled_from([2, 16, 20, 64, 80, 130]),
    window=st.sampled_from([None, 1, 17, 150]),
    length=st.integers(0, 300),
    rows=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    heads: tuple[int, int], head_dim: int, window: int | None, length: int, rows: int, dtype: torch.dtype
) -> None:
    model = model_of(dtype, sliding_window=window, n_heads=heads[0], n_kv_heads=heads[1], head_dim=head_dim)
    assert torch.equal(steps(model, [length], [rows], rows), steps(model, [length], [rows], 1))


@pytest.mark.parametrize("window", [None, 200])
def test_the_numbers_are_those_of_the_plain_model(window: int | None) -> None:
    args = tiny_args(sliding_window=window, n_heads=6, n_kv_heads=2)
    plain = tiny_model(args, seed=4)
    lengths, rows = [PART - 3, 5, 700], [7, 1, 12]
    got = steps(as_kernels(FastTransformer, plain, torch.float32), lengths, rows, 12)
    assert distance([got], [steps(plain, lengths, rows, 12)]) <= TOLERANCE


def test_a_row_does_not_see_what_only_its_neighbours_see() -> None:
    """A value that is no number reaches the rows whose window holds its position, and no other row of the step."""
    model = model_of(sliding_window=20, n_layers=1)
    cache = filled(model, [40])
    store = cache.layers[0]
    store.v[0, (40 - 17) % store.capacity] = torch.nan  # seen by the rows at 40, 41 and 42
    with torch.inference_mode():
        logits = model.forward(torch.arange(3, 11), [8], cache)
    assert logits.isnan().all(-1).tolist() == [True] * 3 + [False] * 5
    assert not logits[3:].isnan().any()
