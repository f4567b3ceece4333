"""Prompts that begin alike: each is handed out once, its beginning is in its row, and nothing is processed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.cache import CacheError
from mistral.eval.shared_prefix import SharedPrefixes, branches
from mistral.generate import completions
from tests.support.tiny import distance, make_cache, tiny_args, tiny_model, whole

MODEL = tiny_model(tiny_args(sliding_window=(5, None)))


@st.composite
def trees(draw: Any) -> list[list[int]]:
    """Prompts that continue beginnings of each other."""
    prompts = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))]
    for _ in range(draw(st.integers(0, 8))):
        base = draw(st.sampled_from(prompts))
        kept = base[: draw(st.integers(0, len(base)))]
        prompts.append([*kept, *draw(st.lists(st.integers(0, 3), min_size=0 if kept else 1, max_size=6))])
    return prompts


@given(prompts=trees(), rows=st.integers(1, 4))
def test_every_prompt_comes_once_with_its_beginning_in_its_row(prompts: list[list[int]], rows: int) -> None:
    walk = SharedPrefixes(MODEL, prompts, rows)
    for layer in walk.cache.layers:  # what no query may see
        layer.k.fill_(1e4)
        layer.v.fill_(1e4)
    seen: list[int] = []
    for batch in walk.batches():
        assert 1 <= len(batch) <= rows
        for row, i in enumerate(batch):
            held = walk.cache.lengths[row]
            assert held < len(prompts[i])
            rest = torch.tensor(prompts[i][held:])
            logits = MODEL.forward(rest, [*[0] * row, len(rest)], walk.cache)
            assert distance([logits[-1:]], [whole(MODEL, [torch.tensor(prompts[i])])[0][-1:]]) < 1e-5
        seen += batch
    assert sorted(seen) == list(range(len(prompts)))
    assert walk.shared <= sum(len(p) - 1 for p in prompts)
    assert len(walk.cache.lengths) == rows + branches(prompts)


def test_a_beginning_is_processed_once() -> None:
    """A trunk of which a prompt parts at each tenth token, and two that are equal."""
    trunk = [int(i) for i in torch.randint(3, 61, (100,), generator=torch.Generator().manual_seed(0))]
    prompts = [[*trunk[: 10 * i], 1, 2] for i in range(1, 10)] + [[*trunk], [*trunk]]
    told: list[int] = []
    walk = SharedPrefixes(MODEL, prompts, 3, progress=told.append)
    rest = sum(len(prompts[i]) - walk.cache.lengths[row] for batch in walk.batches() for row, i in enumerate(batch))
    assert walk.shared == sum(told) == 99
    assert walk.saved == sum(map(len, prompts)) - walk.shared - rest
    assert rest == 2 * 9 + 2


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_texts_are_those_of_each_prompt_alone(rows: int) -> None:
    class Letters:
        bos_id, eos_id = 1, -1

        def encode(self, s: str) -> list[int]:
            raise AssertionError("prompts are ids")

        def decode(self, t: list[int]) -> str:
            return "".join(chr(64 + i) for i in t)

    prompts = [[1, 5, 6, *range(3, 3 + i)] for i in range(9)] + [[1, 7]]
    alone = {i: found.text for i, found in completions(prompts, MODEL, Letters(), max_tokens=8, temperature=0)}
    walk = SharedPrefixes(MODEL, prompts, rows)
    shared = {
        batch[place]: found.text
        for batch in walk.batches()
        for place, found in completions(
            [prompts[i] for i in batch], MODEL, Letters(), max_tokens=8, temperature=0, cache=walk.cache
        )
    }
    assert shared == alone


@given(
    length=st.integers(0, 40),
    rewound=st.integers(0, 4),
    window=st.sampled_from([None, 3, 9, (None, 4)]),
    start=st.sampled_from([0, 7]),
)
def test_a_copied_row_goes_on_like_its_source(length: int, rewound: int, window: Any, start: int) -> None:
    model = tiny_model(tiny_args(sliding_window=window))
    ids = torch.randint(3, 61, (length + 6,), generator=torch.Generator().manual_seed(length))
    cache = make_cache(model, 3, start=start)
    model.forward(ids[:length], [0, length, 0], cache)
    if rewound <= min(2, length):
        cache.rewind(1, start + length - rewound)
    cache.copy(1, 2)
    now = cache.lengths[1] - start
    assert cache.lengths == [start, start + now, start + now]
    rest = ids[now:]
    source = model.forward(rest, [0, len(rest), 0], cache)
    copied = model.forward(rest, [0, 0, len(rest)], cache)
    assert distance([copied], [source]) < 1e-6


def test_rows_that_cannot_be_copied() -> None:
    cache = make_cache(MODEL, 2)
    for source, target in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(CacheError, match="in a cache of 2 rows"):
            cache.copy(source, target)
    cache.layers[0].written = True
    with pytest.raises(CacheError, match="did not finish"):
        cache.copy(0, 1)
