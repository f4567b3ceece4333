"""Log-probabilities leave the library in float64, whatever the logits' dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mistral.engine import Engine
from mistral.eval.perplexity import perplexity
from mistral.logprobs import logprobs
from mistral.sampling_params import SamplingParams
from tests.support.tiny import tiny_args, tiny_model


def by_numpy(logits: torch.Tensor) -> np.ndarray:
    """[R, V] float64, by the definition."""
    wide = logits.double().numpy()
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("vocab_size", [49_152, 131_072])
def test_a_large_vocabulary_adds_no_bias(vocab_size):
    logits = 4 * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0))
    want = by_numpy(logits)
    assert np.abs(logits.log_softmax(-1).numpy() - want).max() > 4e-6  # what this is about
    got = logprobs(logits)
    assert got.dtype == torch.float64
    assert np.abs(got.numpy() - want).max() < 1e-9
    ids = torch.randint(vocab_size, (5, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logprobs(logits, ids), got.gather(-1, ids))


@pytest.mark.parametrize("vocab_size", [61, 49_152])
def test_a_row_has_the_same_bits_among_any_number_of_rows(vocab_size):
    """Also where the rows are widened in several blocks, and with other threads."""
    logits = 4 * torch.randn(17, vocab_size, generator=torch.Generator().manual_seed(0))
    want = logprobs(logits)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 6, 16):
                assert torch.equal(logprobs(logits[:rows]), want[:rows])
                assert torch.equal(logprobs(logits[-rows:]), want[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_widened_first(dtype):
    logits = (4 * torch.randn(2, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert np.abs(logprobs(logits).numpy() - by_numpy(logits)).max() < 1e-13


def test_no_rows_and_no_ids():
    assert logprobs(torch.zeros(0, 7)).shape == (0, 7)
    assert logprobs(torch.zeros(2, 7), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_infinite_logits():
    found = logprobs(torch.tensor([[0.0, -torch.inf, 0.0], [torch.nan, 0.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([-np.log(2), -np.inf, -np.log(2)])
    assert found[1].isnan().all()


def test_every_door_gives_the_same_numbers(monkeypatch):
    """Prompts scored, tokens generated, top tokens and perplexity, by the very logits that the model gave."""
    model = tiny_model(tiny_args(vocab_size=49_152), seed=1)
    given: list[torch.Tensor] = []
    right = model.logits
    monkeypatch.setattr(model, "logits", lambda h: given.append(right(h)) or given[-1])
    prompt = [1, 40_000, 7, 12_345, 3]
    engine = Engine(model, eos_ids=(), score_prompts=True)
    request = engine.add(prompt, SamplingParams(temperature=0, max_tokens=1, top_logprobs=2))
    (token,) = engine.step()
    near = {"abs": 1e-9, "rel": 0}
    of_prompt, of_token = map(by_numpy, given)
    assert request.prompt_logprobs == pytest.approx(of_prompt[range(4), prompt[1:]], **near)
    assert token.logprob == pytest.approx(of_token[0].max(), **near)
    assert token.top[token.id] == token.logprob
    assert list(token.top.values()) == pytest.approx(np.sort(of_token[0])[:-3:-1], **near)
    given.clear()
    nats = perplexity(model, prompt).nats
    assert -nats == pytest.approx(by_numpy(torch.cat(given))[range(4), prompt[1:]].sum(), **near)
