"""Reach and position: exactly nothing from beyond layers x (W - 1), something from within; the plain computation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.eval.position import SPAN, by_context, places_in
from mistral.eval.reach import CHUNK, distances_for, edges, reach, samples, window_args
from mistral.util.errors import UsageError
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder
from tests.support.tiny import ragged, tiny_args, tiny_model, true_logprobs


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@settings(max_examples=12)
@given(
    layers=st.integers(1, 3),
    window=st.integers(1, 9),
    length=st.integers(2, 32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_nothing_arrives_from_beyond_and_something_from_the_edge(
    layers: int, window: int, length: int, dtype: torch.dtype, seed: int
) -> None:
    args = tiny_args(n_layers=layers, sliding_window=window)
    model = tiny_model(args, seed).to(dtype)
    texts = [ids.tolist() for ids in ragged([length, length], args.vocab_size, seed)]
    found = reach(model, texts, distances=range(1, length), seed=seed)
    edge = layers * (window - 1)
    assert found.edge == edge
    assert found.layer_edges == [(i + 1) * (window - 1) for i in range(layers)]
    for at, distance in enumerate(found.distances):
        assert (found.largest[at] == 0) == (distance > edge)
        for behind, moved in zip(found.layer_edges, found.layers, strict=True):
            assert (moved[at] == 0) == (distance > behind)  # type: ignore[operator]
    assert found.beyond == (None if length - 1 <= edge else 0)


def test_nothing_arrives_from_beyond_over_many_steps() -> None:
    """Texts of several steps, and windows that are none in some layers or wider than a step."""
    args = tiny_args(sliding_window=(CHUNK + 9, 3))
    model = tiny_model(args)
    texts = [ids.tolist() for ids in ragged([3 * CHUNK + 5], args.vocab_size)]
    edge = CHUNK + 8 + 2
    chosen = [1, CHUNK, edge - 1, edge, edge + 1, 2 * CHUNK, 3 * CHUNK + 4]
    found = reach(model, texts, distances=chosen)
    assert found.edge == edge
    assert [kl > 0 for kl in found.largest] == [True, True, True, True, False, False, False]
    full = reach(model, texts, args=window_args(args, None), distances=chosen)
    assert (full.edge, full.beyond, full.window) == (None, None, "none")
    assert min(full.largest) > 0


def test_it_is_the_divergence_of_two_forwards() -> None:
    args = tiny_args(sliding_window=9)
    model = tiny_model(args).double()
    (ids,) = ragged([30], 3)
    found = reach(model, [ids.tolist()], distances=[4])
    others = set(ids.tolist()[1:]) - {ids.tolist()[25]}
    expected = []
    for other in others:
        changed = ids.clone()
        changed[25] = other
        a, b = (model(x, [30]).detach()[-1].log_softmax(-1) for x in (ids, changed))
        expected.append(float((a.exp() * (a - b)).sum()))
    assert any(found.kl[0] == pytest.approx(kl, rel=1e-9) for kl in expected)


def test_distances_and_samples_and_edges() -> None:
    assert distances_for(20, 9, 5) == [1, 2, 4, 8, 9, 10, 14, 19]
    assert distances_for(2, None) == [1]
    assert edges(tiny_args(n_layers=4, sliding_window=(3, None))) == [2, None, None, None]
    for piece in samples([5, 6, 7], 4, 9, 0, [1]):
        assert len(piece) == 9
        assert piece[0] == 1
        assert all(b == 5 + (a - 4) % 3 for a, b in pairwise(piece[1:]))
    args = window_args(tiny_args(rope_theta=None), None)
    assert (args.sliding_window, args.rope_theta) == (None, 1e4)


def test_what_cannot_be_measured() -> None:
    model = tiny_model(tiny_args())
    for texts, distances, error in (
        ([], None, "texts of"),
        ([[1, 2], [1]], None, "the same length"),
        ([[1]], None, "at least 2"),
        ([[1, 2, 3]], [3], "distances must ascend"),
        ([[1, 2, 3]], [2, 1], "distances must ascend"),
        ([[1, 2, 3]], [], "distances must ascend"),
    ):
        with pytest.raises(UsageError, match=error):
            reach(model, texts, distances=distances)


@given(window=st.sampled_from([None, 4, (None, 3)]), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_losses_are_the_plain_computation(window: Any, seed: int) -> None:
    model = tiny_model(tiny_args(sliding_window=window), seed)
    (text,) = ragged([200], model.args.vocab_size, seed)
    ids, contexts = text.tolist(), [2, 5, 40]
    places = places_in(ids, 3, 40, seed)
    told: list[tuple[int, int]] = []
    found = by_context(model, ids, contexts, places=places, bos=[1], progress=lambda *at: told.append(at))
    for context, loss in zip(contexts, found.losses, strict=True):
        expected = []
        for place in places:
            prompt = torch.tensor([1, *ids[place - context + 1 : place + SPAN]])
            truth = true_logprobs(model, [prompt])[0]
            expected += [-truth[i - 1, prompt[i]] for i in range(context, len(prompt))]
        assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert found.gains[-1] == found.errors[-1] == 0
    assert found.gains[0] == pytest.approx(found.losses[-1] - found.losses[0])
    assert told[-1] == (3 * (47 + 3 * SPAN),) * 2


def test_texts_that_are_too_short() -> None:
    with pytest.raises(UsageError, match="the text has 30 tokens; a context of 20 and 16 tokens to predict need 36"):
        places_in(range(30), 2, 20, 0)
    model = tiny_model(tiny_args())
    for contexts, places in (([1], [9]), ([4, 4], [9]), ([9, 4], [9]), ([4], [3]), ([4], [90]), ([4], [])):
        with pytest.raises(UsageError, match="must"):
            by_context(model, [3] * 40, contexts, places=places, bos=[1])


def test_the_commands(cli: Command, tmp_path: Path) -> None:
    folder, picture = make_folder(tmp_path / "model"), tmp_path / "p.svg"
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a king who had three sons. " * 40, encoding="utf-8")
    words = ("eval", folder, "--task", "reach", "--n", "2", "--windows", "3,none", "--lengths", "24", "--filler", story)
    report = json.loads(cli(*words, "--plot", picture, "--json").text)
    assert [(row["window"], row["edge"], row["beyond"]) for row in report["rows"]] == [
        ("3", 4, 0),
        ("none", None, None),
    ]
    assert (report["window"], report["reach"], report["length"]) == (5, 8, 24)
    assert "reach 4" in picture.read_text()
    assert "not measured" in cli(*words).text
    position = ("eval", folder, "--task", "position", "--n", "3", "--lengths", "4,16,64", "--filler", story)
    report = json.loads(cli(*position, "--plot", picture, "--json").text)
    assert report["rows"][0]["contexts"] == [4, 16, 64]
    assert "<svg" in picture.read_text()
    assert len(cli(*position).text.splitlines()) == 6
    assert "the text has" in cli(*position[:-4], "--lengths", "4k", "--filler", story).error
    assert "made from word lists" in cli("eval", folder, "--task", "reach", "--n", "1").text
