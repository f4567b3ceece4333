"""Drafts: guesses come from the text or a smaller model, pay, and change nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.engine import Engine
from mistral.fast.bitwise import BitwiseTransformer
from mistral.fast.draft import LONGEST, SHORTEST, STALE, STEP_COST, Costs, NgramDraft, Rate, how_many
from mistral.fast.draft_model import ModelDraft
from mistral.formats.convert import convert
from mistral.generate import complete, stream
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.request import BrokenLogits, Draft, Request
from mistral.sampling_params import SamplingParams
from tests.support.folders import make_folder
from tests.support.tiny import ragged, tiny_args, tiny_model


def request_of(prompt: Sequence[int], output: Sequence[int] = ()) -> Request:
    return Request(0, list(prompt), SamplingParams(max_tokens=1000), frozenset(), None, output_ids=list(output))


def cheap() -> Costs:
    """Steps of which further tokens cost nothing, so that all that is found is proposed."""
    costs = Costs()
    for tokens in range(1, 20):
        costs.learn(tokens, 1.0)
    return costs


def found(ids: Sequence[int], most: int) -> list[int]:
    """The rule, spelled out: the longest end of the text that came before, where it came last, and what followed."""
    for n in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
        for place in range(len(ids) - 1, n - 1, -1):
            if list(ids[place - n : place]) == list(ids[-n:]):
                text = list(ids)
                for i in range(most):
                    text.append(text[place + i])
                return text[len(ids) :]
    return []


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), cut=st.integers(1, 40), most=st.integers(0, 9))
def test_what_followed_the_longest_run_that_came_before(ids: list[int], cut: int, most: int) -> None:
    prompt, output = ids[:cut], ids[cut:]
    draft = NgramDraft(cheap())
    request = request_of(prompt)
    for token in [*output, None]:
        guesses = draft.propose([request], [most])[0]
        want = found(prompt + request.output_ids, most)
        assert guesses == want[: len(guesses)]
        assert bool(guesses) == bool(want)
        if token is not None:
            request.output_ids.append(token)


def test_a_step_is_not_filled_beyond_what_the_kernels_take() -> None:
    requests = [request_of([1, 2, 3, 4, 5, 6, 7, 8] * 3) for _ in range(4)]
    proposed = NgramDraft(cheap(), most_tokens=16).propose(requests, [30, 30, 2, 30])
    assert 4 + sum(map(len, proposed)) <= 16
    assert proposed[0] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4][: len(proposed[0])]


def test_how_many_follows_from_rate_and_cost() -> None:
    costs = Costs()
    for tokens, seconds in ((1, 1.0), (2, 1.2), (4, 1.6), (8, 2.4), (16, 4.0)):
        costs.learn(tokens, seconds)
    assert costs.of(3) == pytest.approx(1.4)
    assert how_many(costs, 1, 1.0, 15) == 15  # 16 tokens in the time of 4
    assert how_many(costs, 1, 0.9, 15) in range(5, 12)
    assert how_many(costs, 1, 0.1, 15) == 0
    assert how_many(costs, 1, 1.0, 3) == 3
    assert how_many(costs, 1, 1.0, 15, each=2.0) == 0  # guesses that cost more than they save
    for tokens in range(1, 17):
        costs.learn(tokens, 50.0 * tokens)
    assert how_many(costs, 1, 0.9, 15) in range(16)


def test_guesses_that_are_wrong_stop_and_are_tried_again() -> None:
    rate = Rate()
    hope = rate.value
    rate.learn(guessed=4, right=4)
    assert rate.value > hope
    for _ in range(20):
        rate.learn(guessed=2, right=0)
    assert rate.value < 0.2
    for _ in range(1000):
        rate.rest()
    assert rate.value == pytest.approx(hope, abs=0.01)


class Record:
    """A draft that keeps what it heard."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.heard = draft, list[tuple[int, int]]()

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        return self.draft.propose(requests, most)

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        self.heard += zip(guessed, right, strict=True)
        self.draft.learn(requests, guessed, right, 1.0)


def run(model: Transformer, draft: Callable[[], Draft] | None, prompts: Sequence[Any], **params: Any) -> list[Any]:
    model = copy.copy(model)
    model.draft = draft
    engine = Engine(model, eos_ids=(), rows=3)
    chosen = SamplingParams(**{"max_tokens": 40, "seed": 3, **params})
    requests = [engine.add(p.tolist(), chosen, index=i) for i, p in enumerate(prompts)]
    tokens: dict[Request, list[Any]] = {request: [] for request in requests}
    while not engine.done:
        for token in engine.step():
            tokens[token.request].append((token.id, token.logprob, token.top))
    return list(tokens.values())


def assert_close(got: list[Any], want: list[Any]) -> None:
    """The same tokens, and the same log-probs but for rounding."""
    assert [[token for token, *_ in one] for one in got] == [[token for token, *_ in one] for one in want]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(
            torch.tensor([logprob for _, logprob, _ in one]), torch.tensor([logprob for _, logprob, _ in other])
        )


WINDOWS: tuple[Any, ...] = (None, 6, (6, 20))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_model_that_guesses_for_itself_is_always_right(window: Any, temperature: float) -> None:
    model = tiny_model(tiny_args(sliding_window=window), seed=5, scale=2.0).double()
    record = Record(ModelDraft(model, cheap()))
    prompts = ragged([9, 30, 2, 17], 61)
    params = {"temperature": temperature, "top_k": 7}
    assert_close(run(model, lambda: record, prompts, **params), run(model, None, prompts, **params))
    assert sum(guessed for guessed, _ in record.heard) > 60
    assert all(guessed == right for guessed, right in record.heard)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_another_model_guesses_and_changes_nothing(window: Any, temperature: float) -> None:
    large = tiny_model(tiny_args(sliding_window=window), seed=5, scale=1.0).double()
    small = copy.deepcopy(large)
    with torch.no_grad():
        small.layers[1].feed_forward.w2.weight *= 0.7
    records = [Record(ModelDraft(small, cheap())), Record(NgramDraft(cheap()))]
    prompts = [*ragged([9, 30, 2], 61), torch.tensor([4, 5, 6] * 5)]
    params = {"temperature": temperature, "repetition_penalty": 1.2}
    plain = run(large, None, prompts, **params)
    for record in records:
        assert_close(run(large, lambda record=record: record, prompts, **params), plain)
    heard = records[0].heard
    assert any(guessed > right for guessed, right in heard)  # some are wrong
    assert sum(right for _, right in heard) > 20  # and some right


@pytest.mark.parametrize("window", [None, 6])
def test_bits_are_those_of_plain_decoding(window: Any) -> None:
    plain = tiny_model(tiny_args(sliding_window=window, vocab_size=70), seed=5, scale=2.0)
    with torch.device("meta"):
        bitwise = BitwiseTransformer(plain.args)
    bitwise.load_state_dict(plain.state_dict(), assign=True)
    from mistral.fast.linear import use_kernels

    use_kernels(bitwise)
    prompts = [*ragged([9, 30], 70), torch.tensor([4, 5, 6] * 9)]
    for temperature in (0, 0.8):
        params = {"temperature": temperature, "top_logprobs": 2}
        want = run(bitwise, None, prompts, **params)
        for draft in (NgramDraft(cheap()), ModelDraft(tiny_model(plain.args, seed=5, scale=1.9), cheap())):
            assert run(bitwise, lambda draft=draft: draft, prompts, **params) == want


class Always:
    """A draft that guesses the same two ids whatever came before."""

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        return [[1, 2]] * len(requests)

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        pass


def test_a_request_that_breaks_with_guesses_left_ends_alone() -> None:
    model = copy.deepcopy(tiny_model(tiny_args(vocab_size=61), seed=5))
    with torch.no_grad():
        model.tok_embeddings.weight[9] = float("nan")
    found = {}
    for draft in (Always, None):
        model.draft = draft
        engine = Engine(model, eos_ids=())
        to, away = (SamplingParams(max_tokens=8, temperature=0, logit_bias=((9, bias),)) for bias in (100.0, -100.0))
        broken, other = engine.add([3, 4], to), engine.add([5, 6], away)
        while not engine.done:
            engine.step()
        assert (broken.output_ids, type(broken.error)) == ([9], BrokenLogits)
        found[draft] = other.output_ids
    assert found[Always] == found[None]
    assert len(found[None]) == 8


def test_text_ends_at_its_stop_string_although_a_step_gave_more() -> None:
    loaded = load(device="cpu", execution="eager")
    prompt = "The wolf came to the house and said: let me in, let me in"
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 30}
    whole = complete([prompt], loaded.model, loaded.tokenizer, **params)[0]
    stop = whole.text[20:24]
    want = complete([prompt], loaded.model, loaded.tokenizer, stop=(stop,), **params)[0]
    model = copy.copy(loaded.model)
    record = Record(ModelDraft(loaded.model, cheap()))
    model.draft = lambda: record
    got = complete([prompt], model, loaded.tokenizer, stop=(stop,), **params)[0]
    assert (got.text, got.tokens, got.finish_reason) == (want.text, want.tokens, "stop")
    assert any(right > 1 for _, right in record.heard)
    pieces = list(stream([prompt], model, loaded.tokenizer, stop=(stop,), **params))
    assert "".join(piece.text for piece in pieces) == want.text
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]


def test_loading_with_a_draft(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "large", vocab_size=40, tokenizer=False)
    make_folder(tmp_path / "small", vocab_size=40, n_layers=3, tokenizer=False)
    make_folder(tmp_path / "other", vocab_size=48, tokenizer=False)
    assert load(folder, device="cpu").model.draft is None
    loaded = load(folder, device="cpu", draft="ngram")
    assert loaded.describe().endswith("drafts by n-grams")
    assert isinstance(loaded.model.draft(), NgramDraft)
    loaded = load(folder, device="cpu", draft=tmp_path / "small")
    assert "small, 0.0 M parameters" in loaded.describe()
    with pytest.raises(OptionError, match="cannot guess for this model: its vocabulary is another one"):
        load(folder, device="cpu", draft=str(tmp_path / "other"))


def test_a_draft_has_the_same_words_in_another_kind_of_file(tmp_path: Path) -> None:
    """A tokenizer.json made from the tokenizer.model: what it writes for <unk> and a byte alone is another text."""
    folder = make_folder(tmp_path / "large", vocab_size=4096)
    convert(folder, tmp_path / "small", "hf")
    (tmp_path / "small" / "tokenizer.model").unlink()
    assert load(folder, device="cpu", draft=str(tmp_path / "small")).model.draft is not None
    file = tmp_path / "small" / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    words = told["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(OptionError, match="or other words"):
        load(folder, device="cpu", draft=str(tmp_path / "small"))


def test_what_a_step_costs_is_corrected() -> None:
    """A size that once looked dear is not tried again, so nothing but time and larger steps can correct it."""
    costs = Costs()
    costs.learn(1, 1.0)
    costs.learn(2, 9.0)  # something else was at work
    costs.learn(4, 1.6)
    assert costs.of(2) == 1.6  # no more than a step of more tokens
    assert costs.of(3) == 1.6
    for _ in range(STALE):
        costs.learn(1, 1.0)
        costs.learn(4, 1.6)
    assert costs.of(2) == pytest.approx(1.2)
    assert costs.of(8) > 1.6


def test_the_first_step_after_a_prompt_is_no_measure() -> None:
    costs = Costs()
    draft = NgramDraft(costs)
    request = request_of([1, 2, 3, 1, 2], [3])
    for seconds, want in ((50.0, 1 + STEP_COST), (2.0, 2.0), (2.0, 2.0)):
        draft.propose([request], [0])
        request.output_ids.append(4)
        draft.learn([request], [0], [0], seconds)
        assert costs.of(1) == want


def test_a_draft_that_is_not_there_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes(b"no weights")
    with pytest.raises(OptionError, match=r"draft nogram is neither ngram nor a folder .*; did you mean ngram\?"):
        load(folder, device="cpu", draft="nogram")
