"""Scaled positions and growing queries: the two float64 truths, the library, transformers; and mistakes that show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistral.args import ModelArgs, QueryScaling, Yarn
from mistral.oracle import mutants
from mistral.oracle.truth import Truth
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    make_cache,
    play,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)

LENS = [80, 1, 33, 50]
START = 7
SHAPES = {
    "yarn": tiny_args(head_dim=16, yarn=Yarn(16, 32)),
    "yarn, no factor": tiny_args(head_dim=16, yarn=Yarn(5, 32, attention_factor=1.0), sliding_window=None),
    "queries": tiny_args(llama_4_scaling=QueryScaling(16, 0.4), sliding_window=9),
    "both, tied": tiny_args(
        head_dim=16, yarn=Yarn(16, 32, 8, 1, 1.2), llama_4_scaling=QueryScaling(32, 0.4), sliding_window=(None, 20)
    ),
}
NAMES = ("yarn_factor_ignored", "yarn_factor_always", "yarn_ramp_rounded", "keys_scaled_too", "query_floor_missing")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_is_the_truth(shape: str) -> None:
    """At once, and token by token from a cache that begins elsewhere."""
    model = tiny_model(SHAPES[shape], seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    with torch.no_grad():
        assert distance(whole(model, prompts), true_logprobs(model, prompts)) < TOLERANCE
        cache = make_cache(model, len(LENS), start=START)
        got = play(model, prompts, at_random(LENS, 5), cache)
    assert distance(got, true_logprobs(model, prompts, START)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracles_truth_is_the_tests(shape: str) -> None:
    model = tiny_model(SHAPES[shape], seed=2)
    args, state = model.args, model.state_dict()
    prompts = ragged(LENS, args.vocab_size, seed=2)
    truth = Truth(args, prompts)
    truth.embed(state["tok_embeddings.weight"])
    for i in range(args.n_layers):
        at = f"layers.{i}."
        truth.layer(i, {name.removeprefix(at): w for name, w in state.items() if name.startswith(at)})
    logits = torch.cat(list(truth.head(state["norm.weight"], state["output.weight"], 64)))
    got = logits.log_softmax(-1).split(LENS)
    for one, want in zip(got, true_logprobs(model, prompts), strict=True):
        assert np.abs(one.numpy() - want).max() < 1e-6  # fp32 factors, made in another order


def mistakes() -> list[tuple[str, str]]:
    return [(shape, name) for shape in SHAPES for name in NAMES if mutants.applies(name, SHAPES[shape], LENS)]


def test_every_mistake_has_a_model_to_show_in() -> None:
    assert {name for _, name in mistakes()} == set(NAMES)
    plain: ModelArgs = tiny_args()
    assert not any(mutants.applies(name, plain, LENS) for name in NAMES)
    assert not mutants.applies("keys_scaled_too", SHAPES["queries"], [16, 16])


@pytest.mark.parametrize(("shape", "name"), mistakes())
def test_a_mistake_shows(shape: str, name: str) -> None:
    model = tiny_model(SHAPES[shape], seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    assert distance(mutants.logits_with(model, prompts, name), true_logprobs(model, prompts)) > 1e-3
