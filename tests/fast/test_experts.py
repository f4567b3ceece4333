"""Decode steps of mixtures by the kernels: the plain path's numbers, ties, bits of a row, and chosen experts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral import load
from mistral.args import Moe
from mistral.cache import RollingBufferCache
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.linear import use_kernels
from mistral.model import Transformer
from mistral.moe import MixtureOfExperts
from tests.fast.test_kernels import ROUNDED_TOLERANCE
from tests.support.folders import make_folder
from tests.support.tiny import TOLERANCE, distance, make_cache, play, prefill_then_decode, ragged, tiny_args, tiny_model

try:
    library()
except KernelsUnavailable as error:
    pytest.skip(f"no kernels: {error}", allow_module_level=True)


def fast_one(plain: Transformer) -> FastTransformer:
    model = FastTransformer(plain.args)
    model.load_state_dict(plain.state_dict())
    use_kernels(model)
    return model


def routers(model: Transformer) -> list[MixtureOfExperts]:
    return [
        found for block in model.layers if isinstance(found := block.get_submodule("feed_forward"), MixtureOfExperts)
    ]


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 20),
    k=st.integers(1, 4),
    lens=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    hidden=st.sampled_from([8, 40, 72]),
    window=st.sampled_from([None, 5]),
    seed=st.integers(0, 99),
)
def test_steps_are_the_plain_paths(
    experts: int, k: int, lens: list[int], hidden: int, window: int | None, seed: int
) -> None:
    args = tiny_args(moe=Moe(experts, min(k, experts)), hidden_dim=hidden, sliding_window=window)
    plain = tiny_model(args, seed)
    model = fast_one(plain)
    assert model.stands_aside() is None
    prompts = ragged(lens, args.vocab_size, seed)
    with torch.inference_mode():
        got = play(model, prompts, prefill_then_decode(lens, 1), make_cache(model, len(lens)))
        want = play(plain, prompts, prefill_then_decode(lens, 1), make_cache(plain, len(lens)))
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_loaded_models_step_in_the_kernels(tmp_path: Path, quant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tiny_args(moe=Moe(6, 2), dim=64, hidden_dim=96, sliding_window=7)
    state = dict(tiny_model(args, 1).state_dict())
    names = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "sliding_window")
    params = {name: getattr(args, name) for name in names}
    moe = {"num_experts": 6, "num_experts_per_tok": 2}
    folder = make_folder(tmp_path / "m", state, tokenizer=False, **params, moe=moe)
    model = load(folder, device="cpu", quant=quant, execution="kernels").model
    calls: list[int] = []
    decode = FastTransformer.decode
    monkeypatch.setattr(FastTransformer, "decode", lambda self, *a: (calls.append(len(a[2])), decode(self, *a))[1])
    lens = [9, 3, 6]
    prompts = ragged(lens, args.vocab_size)
    with torch.inference_mode():
        got = play(model, prompts, prefill_then_decode(lens, 2), make_cache(model, 3))
        fast = len(calls)
        monkeypatch.setattr(FastTransformer, "_is_for_kernels", lambda *_: False)
        want = play(model, prompts, prefill_then_decode(lens, 2), make_cache(model, 3))
    assert fast == len(calls) >= 2
    # The plain path multiplies by the same kernels; what its norms give in other last bits may be rounded otherwise.
    assert distance(got, want) < (TOLERANCE if quant is None else ROUNDED_TOLERANCE)


def test_ties_go_to_the_lowest_expert() -> None:
    plain = tiny_model(tiny_args(moe=Moe(6, 2)), 3)
    with torch.no_grad():
        for mixture in routers(plain):
            mixture.gate.weight[:] = mixture.gate.weight[:1]  # all logits are equal
            for expert in mixture.experts[2:]:
                for weight in expert.parameters():
                    weight.fill_(torch.nan)  # the third to the sixth are never computed
    model = fast_one(plain)
    cache = RollingBufferCache(model.args, 1, positions=9)
    with torch.inference_mode():
        for token in (5, 6, 7):
            assert model.forward(torch.tensor([token]), [1], cache).isfinite().all()


def test_a_step_reads_the_chosen_experts_alone() -> None:
    """The weights of all others may be anything."""
    plain = tiny_model(tiny_args(moe=Moe(5, 2)), 4)
    model = fast_one(plain)
    seen: list[set[int]] = [set() for _ in routers(plain)]
    for found, mixture in zip(seen, routers(plain), strict=True):
        for e, expert in enumerate(mixture.experts):
            expert.register_forward_hook(lambda *_, e=e, found=found: found.add(e))
    with torch.inference_mode():
        want = plain.forward(torch.tensor([7]), [1], make_cache(plain, 1))
        assert all(len(found) == 2 for found in seen)
        for found, mixture in zip(seen, routers(model), strict=True):
            for e, expert in enumerate(mixture.experts):
                if e not in found:
                    for weight in expert.parameters():
                        weight.fill_(torch.nan)
        got = model.forward(torch.tensor([7]), [1], make_cache(model, 1))
    assert distance([got], [want]) < TOLERANCE


def test_a_row_has_the_same_bits_in_any_company() -> None:
    model = fast_one(tiny_model(tiny_args(moe=Moe(5, 2), hidden_dim=72), 5))
    prompts = [p[:4] for p in ragged([4] * 6, model.args.vocab_size)]

    def states(rows: list[int], threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            cache = make_cache(model, len(rows))
            for i in range(4):
                out = model.forward(torch.tensor([int(prompts[r][i]) for r in rows]), [1] * len(rows), cache)
            return out[rows.index(2)]
        finally:
            torch.set_num_threads(before)

    with torch.inference_mode():
        want = states([2], 1)
        for rows, threads in (([2], 2), ([0, 1, 2], 1), ([5, 4, 3, 2, 1, 0], 2)):
            assert torch.equal(states(rows, threads), want)


def test_an_expert_of_another_kind_makes_the_kernels_stand_aside() -> None:
    model = fast_one(tiny_model(tiny_args(moe=Moe(4, 2))))

    class Other(torch.nn.Module):
        def __init__(self, of: torch.nn.Module) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = of.w1, of.w2, of.w3

    mixture: Any = routers(model)[1]
    mixture.experts[3] = Other(mixture.experts[3])
    assert "layers.1.feed_forward.experts.3 (Other)" in str(model.stands_aside())
