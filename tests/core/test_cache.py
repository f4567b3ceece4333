"""Going back in a cache, and going on from one: the numbers of a fresh prefill, and only what is new is taken in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.attention import eager, sdpa, tiled
from mistral.cache import CacheError, RollingBufferCache
from mistral.generate import stream
from mistral.model import Transformer
from mistral.request import GenerationError
from mistral.tokenizer import Tokenizer
from mistral.window import block_for
from tests.support.folders import BUNDLED, make_folder
from tests.support.tiny import POISON, TOLERANCE, distance, make_cache, ragged, tiny_args, tiny_model, true_logprobs

WINDOWS: tuple[Any, ...] = (None, 1, 3, 6, (None, 4), (7, 2))


def feed(model: Transformer, cache: RollingBufferCache, ids: torch.Tensor, chunk: int, row: int = 0) -> torch.Tensor:
    """Logits of ids that join row `row`; no other row brings any."""
    rows = len(cache.lengths)
    pieces = [model(piece, [len(piece) if r == row else 0 for r in range(rows)], cache) for piece in ids.split(chunk)]
    return torch.cat(pieces)


@pytest.mark.parametrize("kernel", [eager, sdpa])
@settings(max_examples=60)
@given(
    window=st.sampled_from(WINDOWS),
    first=st.integers(1, 60),
    back=st.integers(0, 60),
    more=st.integers(1, 30),
    chunk=st.sampled_from([1, 3, 100]),
    start=st.sampled_from([0, 4, 1000]),
    seed=st.integers(0, 1000),
)
def test_going_on_from_an_earlier_position_is_a_fresh_prefill(
    kernel: Any, window: Any, first: int, back: int, more: int, chunk: int, start: int, seed: int
) -> None:
    args = tiny_args(sliding_window=window)
    model = tiny_model(args, seed, attend=tiled(kernel))
    one, other, beside = ragged([first, more, 20], args.vocab_size, seed)
    back = min(back, first)
    cache = make_cache(model, 2, start=start)
    with torch.inference_mode():
        feed(model, cache, one, chunk)
        feed(model, cache, beside[:12], 5, row=1)
        kept = cache.rewind(0, start + first - back) - start
        assert cache.lengths[0] == start + kept
        assert kept in (0, first - back)
        reach = min((block_for(w) for w in args.windows if w is not None), default=10**9)
        if back <= reach:
            assert kept == first - back
        poison_forgotten(cache, 0)
        text = torch.cat((one[:kept], other))
        got = feed(model, cache, other, chunk)
        neighbour = feed(model, cache, beside[12:], 4, row=1)
    assert distance([got], [true_logprobs(model, [text], start)[0][kept:]]) <= TOLERANCE
    assert distance([neighbour], [true_logprobs(model, [beside], start)[0][12:]]) <= TOLERANCE


def poison_forgotten(cache: RollingBufferCache, row: int) -> None:
    """Fill every slot of a row whose position was forgotten."""
    length, origin = cache.lengths[row], cache.origins[row]
    for layer in cache.layers:
        first = origin if layer.window is None else max(origin, length - layer.window + 1)
        held = {p % layer.capacity for p in range(first, length)}
        for slot in set(range(layer.capacity)) - held:
            layer.k[row, slot] = layer.v[row, slot] = POISON


@settings(max_examples=60)
@given(
    window=st.sampled_from((None, 1, 3, 17, (None, 4), (7, 2))),
    moves=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
)
def test_going_back_again_and_again_is_a_fresh_prefill(window: Any, moves: list[tuple[int, int]], seed: int) -> None:
    """What was overwritten stays so, however often a sequence goes back."""
    model = tiny_model(tiny_args(sliding_window=window), seed)
    cache = make_cache(model, 1)
    pieces = ragged([60, *(more for _, more in moves)], model.args.vocab_size, seed)
    with torch.inference_mode():
        feed(model, cache, pieces[0], 100)
        text = pieces[0]
        for (back, _), more in zip(moves, pieces[1:], strict=True):
            wanted = max(0, len(text) - back)
            kept = cache.rewind(0, wanted)
            assert kept in (0, wanted)
            text = torch.cat((text[:kept], more))
            logits = feed(model, cache, more, 100)
            want = true_logprobs(model, [text])[0][-len(more) :]
            assert distance([logits], [want]) < TOLERANCE


def test_going_back_twice_does_not_reach_further_than_once() -> None:
    model = tiny_model(tiny_args(sliding_window=17))
    cache = make_cache(model, 1)
    with torch.inference_mode():
        feed(model, cache, ragged([100], model.args.vocab_size)[0], 100)
    assert cache.rewind(0, 84) == 84
    assert cache.rewind(0, 70) == 0


def test_what_a_rolled_buffer_cannot_give_back() -> None:
    args = tiny_args(sliding_window=4)  # 7 slots, of which the next token looks at 3: it goes back 4
    model = tiny_model(args)
    for back, kept in ((0, 30), (4, 26), (5, 0), (30, 0)):
        cache = make_cache(model, 1)
        with torch.inference_mode():
            feed(model, cache, ragged([30], args.vocab_size)[0], 30)
        assert cache.rewind(0, 30 - back) == kept


def test_a_step_that_broke_off_takes_everything_with_it() -> None:
    model = tiny_model(tiny_args())
    cache = make_cache(model, 2)
    ids = torch.arange(6)
    with torch.inference_mode():
        model(ids, [3, 3], cache)
        plan = cache.plan([1, 0])
        model.layers[0](torch.zeros(1, 24), torch.ones(1, 4), torch.zeros(1, 4), plan, cache.layer(0))
        assert cache.rewind(1, 3) == 0
        assert cache.lengths == [0, 0]
        model(ids, [3, 3], cache)


def test_rows_and_lengths_that_cannot_be() -> None:
    cache = make_cache(tiny_model(tiny_args()), 2, start=5)
    for row, length, message in (
        (2, 5, "no row 2 in a cache of 2 rows"),
        (-1, 5, "no row -1"),
        (0, 6, "row 0 holds positions 5 to 5; it cannot be rewound to 6"),
        (0, 4, "cannot be rewound to 4"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.rewind(row, length)
    assert cache.rewind(0, 5) == 5


# --- generation with a cache that holds the beginning


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


def run(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], **options: Any) -> list[tuple[int, float]]:
    pieces = stream(prompts, model, tokenizer, max_tokens=9, temperature=0.8, seed=3, **options)
    return [(p.index, p.token.id, p.token.logprob) for p in pieces if p.token]  # type: ignore[misc]


@pytest.mark.parametrize("window", [None, 5])
def test_only_what_is_new_is_taken_in(tokenizer: Tokenizer, window: int | None) -> None:
    args = tiny_args(vocab_size=tokenizer.n_words, sliding_window=window)
    model = tiny_model(args)
    prompts = [p.tolist() for p in ragged([40, 7, 23], args.vocab_size)]
    want = run(model, tokenizer, prompts)
    cache = make_cache(model, 4)
    with torch.inference_mode():
        model(torch.tensor(prompts[0][:30] + prompts[2][:22]), [30, 0, 22], cache)
    taken = []
    step = model.step
    model.step = lambda ids, plan, held: (taken.append(len(ids)), step(ids, plan, held))[1]  # type: ignore
    told = []
    got = run(model, tokenizer, prompts, cache=cache, chunk_size=6, progress=lambda *now: told.append(now))
    assert [t[:2] for t in sorted(got)] == [t[:2] for t in sorted(want)]
    torch.testing.assert_close([t[2] for t in sorted(got)], [t[2] for t in sorted(want)], rtol=0, atol=TOLERANCE)
    assert sum(taken) == 10 + 7 + 1 + 3 * 8
    assert told[0] == (52, 70)
    assert told[-1] == (70, 70)
    assert len(told) == len(taken)  # before each step


def test_caches_that_cannot_be_gone_on_from(tokenizer: Tokenizer) -> None:
    model = tiny_model(tiny_args(vocab_size=tokenizer.n_words))
    cache = make_cache(model, 1)
    with torch.inference_mode():
        model(torch.arange(5), [5], cache)
    for prompts, message in (
        ([[0, 1], [2]], "2 prompts for a cache of 1 rows"),
        ([[0, 1, 2, 3, 4]], "the cache holds 5 tokens of prompt 0, which has 5: rewind it"),
    ):
        with pytest.raises(GenerationError, match=message):
            run(model, tokenizer, prompts, cache=cache)
    assert cache.lengths == [5]


def test_what_progress_raises_ends_it_between_steps(tokenizer: Tokenizer, tmp_path: Any) -> None:
    make_folder(tmp_path)
    model = tiny_model(tiny_args(vocab_size=tokenizer.n_words))
    cache = make_cache(model, 1)
    ids = ragged([40], 60)[0].tolist()

    def stop(taken: int, total: int) -> None:
        if taken >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, [ids], cache=cache, chunk_size=10, progress=stop)
    assert cache.lengths == [20]
    again, want = run(model, tokenizer, [ids], cache=cache), run(model, tokenizer, [ids])
    assert [t[:2] for t in again] == [t[:2] for t in want]
    assert [t[2] for t in again] == pytest.approx([t[2] for t in want], abs=TOLERANCE)


def test_a_cache_holds_no_history() -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 1)
    for _ in range(3):
        model(torch.tensor([1, 2]), [2], cache)
    assert not cache.layer(0).k.requires_grad
    assert not cache.layer(0).v.requires_grad


def test_a_step_that_broke_off_is_not_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 1)
    ids = ragged([40], model.args.vocab_size)[0]
    with torch.inference_mode():
        model(ids[:20], [20], cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.layers[1], "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(ids[20:], [20], cache)
        with pytest.raises(CacheError, match="did not finish"):
            model(ids[20:], [20], cache)
        cache.reset()
        assert distance([model(ids, [40], cache)], true_logprobs(model, [ids])) < TOLERANCE


def test_a_cache_made_in_inference_mode_works_outside() -> None:
    model = tiny_model(tiny_args())
    with torch.inference_mode():
        cache = RollingBufferCache(model.args, 1)
        model(torch.tensor([1, 2]), [2], cache)
    with torch.no_grad():
        model(torch.tensor([3]), [1], cache)
    assert cache.lengths == [3]


def test_storage_that_nobody_reserved_seldom_moves() -> None:
    """Its capacity is doubled, so that a text of n tokens, one at a time, moves some 2 n of them in all."""
    cache, found = RollingBufferCache(tiny_args(sliding_window=None), 1), []
    for _ in range(1025):
        cache.commit(cache.plan([1]))
        found.append(cache.layers[0].capacity)
    assert sorted(set(found)) == [256, 512, 1024, 2048]
