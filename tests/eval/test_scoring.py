"""Continuations in a batch: the numbers of each alone, whatever the context, the window and the rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.eval.scoring import Continuation, Scored, Scorer
from mistral.model import Transformer
from mistral.request import GenerationError
from tests.support.tiny import tiny_args, tiny_model

WORDS = st.integers(3, 40)


def alone(model: Transformer, one: Continuation) -> Scored:
    """By one forward without a cache."""
    true = model(torch.tensor(one.ids), [len(one.ids)]).double().log_softmax(-1)
    rows = range(one.begin - 1, len(one.ids) - 1)
    sums = [true[i, one.ids[i + 1]].item() for i in rows]
    return Scored(math.fsum(sums), all(int(true[i].argmax()) == one.ids[i + 1] for i in rows))


@settings(max_examples=30)
@given(data=st.data())
def test_scores_are_those_of_each_alone(data: st.DataObject) -> None:
    model = tiny_model(tiny_args(sliding_window=data.draw(st.sampled_from([None, 5]))))
    shots = data.draw(st.lists(WORDS, max_size=30))
    wanted = []
    for _ in range(data.draw(st.integers(1, 4))):
        context = [1, *shots, *data.draw(st.lists(WORDS, max_size=25))]
        for _ in range(data.draw(st.integers(1, 4))):
            wanted.append(Continuation(context + data.draw(st.lists(WORDS, max_size=5)), len(context)))
    order = data.draw(st.permutations(wanted))
    told: list[int] = []
    got = Scorer(model, data.draw(st.integers(1, 4)))(order, told.append)
    assert sorted(told) == list(range(len(order)))
    for score, one in zip(got, order, strict=True):
        want = alone(model, one) if len(one.ids) > one.begin else Scored(0.0, True)
        assert score.logprob == pytest.approx(want.logprob, abs=2e-5)
        assert score.greedy == want.greedy


def test_a_context_is_processed_once() -> None:
    model = tiny_model(tiny_args(sliding_window=None))
    shots = [1, *range(3, 40)]
    questions = [[*shots, *([q] * 30)] for q in (7, 8)]
    asked = [Continuation([*question, a, a + 1], len(question)) for a in (5, 6, 7, 8) for question in questions]
    scorer = Scorer(model, 1)
    scorer(asked)
    # The context twice but for the shared shots, then each answer and the token before it.
    assert scorer.processed == len(questions[0]) + 30 + 8 * 3


def test_greedy_flags_and_nan() -> None:
    model = tiny_model(tiny_args())
    ids = [1, 5, 6]
    for _ in range(3):
        ids.append(int(model(torch.tensor(ids), [len(ids)])[-1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % model.args.vocab_size]
    assert [s.greedy for s in Scorer(model, 2)([Continuation(ids, 3), Continuation(wrong, 3)])] == [True, False]
    assert Scorer(model, 2)([]) == []
    with torch.no_grad():
        model.tok_embeddings.weight[9] = math.nan
    with pytest.raises(GenerationError, match="are NaN"):
        Scorer(model, 2)([Continuation([1, 9, 5], 2)])
