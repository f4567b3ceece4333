"""A mixture of experts: the contract's numbers, its router, and that only chosen experts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral import load
from mistral.args import ArgsError, Moe
from mistral.cache import RollingBufferCache
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.layout import ParamsError
from mistral.formats.mistral import to_args
from mistral.moe import MixtureOfExperts, route
from mistral.oracle import mutants
from mistral.oracle.truth import Truth
from mistral.oracle.verify import verify
from tests.formats.test_family import NEW, greedy, their_greedy, theirs
from tests.support.folders import BUNDLED, PARAMS, make_folder
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)

LENS = [33, 1, 6, 21]
SHAPES = {
    "mixtral": tiny_args(moe=Moe(4, 2), sliding_window=None),
    "windowed, three of five": tiny_args(moe=Moe(5, 3)),
    "one of one": tiny_args(moe=Moe(1, 1)),
    "all of three": tiny_args(moe=Moe(3, 3), tied_embeddings=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_library_is_the_truth(shape: str) -> None:
    model = tiny_model(SHAPES[shape], seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    want = true_logprobs(model, prompts)
    with torch.no_grad():
        assert distance(whole(model, prompts), want) < TOLERANCE
        assert distance(play(model, prompts, at_random(LENS, 5), make_cache(model, 4)), want) < TOLERANCE


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
    got = torch.cat(list(truth.head(state["norm.weight"], state["output.weight"], 64))).log_softmax(-1).split(LENS)
    for one, want in zip(got, true_logprobs(model, prompts), strict=True):
        assert np.abs(one.numpy() - want).max() < 1e-9


def test_the_router() -> None:
    """The best logits, of equal ones the lowest expert's, and the softmax of those alone, in fp32."""
    logits = torch.tensor([[0.5, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, -3.0, -2.0, -9.0]])
    chosen, weights = route(logits, 2)
    assert chosen.tolist() == [[1, 2], [0, 1], [0, 2]]
    assert torch.allclose(weights, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.7310586, 0.2689414]]))
    over_all = logits.softmax(-1).gather(-1, chosen)
    assert torch.allclose(weights, over_all / over_all.sum(-1, keepdim=True))
    assert not torch.allclose(weights, over_all)
    narrow = route(logits.bfloat16(), 2)[1]
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, route(logits.bfloat16().float(), 2)[1].bfloat16())


def test_only_chosen_experts_are_read() -> None:
    """One call for all tokens of an expert, and none where it has no token: its weights may be anything."""
    model = tiny_model(SHAPES["mixtral"], seed=3)
    experts: Any = model.layers[0].feed_forward
    assert isinstance(experts, MixtureOfExperts)
    x = torch.rand(1, model.args.dim)
    calls: list[tuple[int, int]] = []
    for i, expert in enumerate(experts.experts):
        expert.register_forward_hook(lambda module, given, out, i=i: calls.append((i, len(given[0]))))
    with torch.no_grad():
        want = experts(x)
        chosen = {i for i, _ in calls}
        assert len(calls) == len(chosen) == 2
        for i, expert in enumerate(experts.experts):
            if i not in chosen:
                expert.w1.weight.fill_(torch.nan)
        assert torch.equal(experts(x), want)
        calls.clear()
        experts(torch.rand(30, model.args.dim))
    assert len(calls) == len({i for i, _ in calls}) <= 4
    assert sum(n for _, n in calls) == 60


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_a_decode_step_touches_the_chosen_experts_bytes_alone(tmp_path: Path, quant: str | None) -> None:
    """All storage of an expert's weights that a step reads, counted where it enters a product."""
    folder = make_folder(tmp_path, state=dict(tiny_model(to_args(MIXTRAL)).state_dict()), **MOE)
    model = load(folder, device="cpu", quant=quant).model
    touched: dict[str, int] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        size = sum(tensor.nbytes for tensor in module.state_dict().values())
        module.register_forward_pre_hook(lambda *_: touched.update({name: size}))

    for name, module in model.named_modules():
        if "experts" in name and name.endswith((".w1", ".w2", ".w3")):
            watch(name, module)
    cache = RollingBufferCache(model.args, 1, positions=40)
    with torch.inference_mode():
        model.forward(torch.arange(5, 25), [20], cache)
        assert len(touched) > 2 * 2 * 3  # a prompt goes through more
        for token in (7, 8, 9):
            touched.clear()
            model.forward(torch.tensor([token]), [1], cache)
            assert len(touched) == 2 * 2 * 3  # layers, experts, matrices
            experts = sum(t.nbytes for n, t in model.state_dict().items() if ".experts." in n)
            assert sum(touched.values()) == experts // 2  # two of four


def test_it_can_be_trained() -> None:
    model = tiny_model(SHAPES["mixtral"], seed=3)
    model.forward(torch.arange(12), [12]).square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    assert model.layers[0].get_parameter("feed_forward.gate.weight").grad.abs().sum() > 0  # type: ignore[union-attr]


# --- folders


def mixtral(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.MixtralConfig(
        vocab_size=4096,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((BUNDLED / "tokenizer.model").read_bytes())
    return model


def test_mixtral_is_transformers_in_both_layouts(tmp_path: Path) -> None:
    """Logits and 50 greedy tokens; converted both ways, and read by transformers in between."""
    other = mixtral(tmp_path / "hf")
    transformers = pytest.importorskip("transformers")
    prompts = ragged(LENS, 4096, seed=3)
    want, want_ids = theirs(other, prompts), their_greedy(other, prompts[0])
    assert len(want_ids) == NEW
    convert(tmp_path / "hf", tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "back", "hf")
    found = [load(tmp_path / name, device="cpu") for name in ("hf", "mistral", "back")]
    assert found[0].args == found[1].args == found[2].args
    assert found[0].args.moe == Moe(4, 2)
    assert found[0].args.rope_theta == 1e6
    for one in found:
        with torch.inference_mode():
            assert distance(whole(one.model, prompts), want) < TOLERANCE
            cache = RollingBufferCache(one.args, len(prompts), positions=max(LENS))
            assert distance(play(one.model, prompts, prefill_then_decode(LENS, 4), cache), want) < TOLERANCE
    assert greedy(found[0].model, prompts[0]) == greedy(found[1].model, prompts[0]) == want_ids
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert distance(theirs(again, prompts), want) < TOLERANCE


def test_fast_paths_and_quantized_experts_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", state=dict(tiny_model(to_args(MIXTRAL)).state_dict()), **MOE)
    plain = load(folder, device="cpu", execution="eager")
    prompts = ragged(LENS, 4096, seed=3)
    kernels = load(folder, device="cpu")
    with torch.inference_mode():
        want = whole(plain.model, prompts)
        assert distance(whole(kernels.model, prompts), want) < TOLERANCE
    if kernels.runtime.execution != "eager":  # there is a compiler
        assert kernels.runtime.execution == "kernels"
        assert not any("stands aside" in note for note in kernels.notes)
        alike = load(folder, device="cpu", deterministic=True).model
        with torch.inference_mode():
            assert distance(whole(alike, prompts), want) < TOLERANCE
    for quant, limit in (("int8", 0.1), ("int4", 1.5)):
        small = load(folder, device="cpu", quant=quant)
        assert type(small.model.layers[0].get_submodule("feed_forward.gate")).__name__.endswith("Linear")
        assert small.model.layers[0].get_parameter("feed_forward.gate.weight").dtype == torch.float32
        with torch.inference_mode():
            assert 0 < distance(whole(small.model, prompts), want) < limit
        convert(folder, tmp_path / quant, "mistral", quant=quant)
        with torch.inference_mode():
            stored = load(tmp_path / quant, device="cpu")
            assert distance(whole(stored.model, prompts), whole(small.model, prompts)) < TOLERANCE


MOE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2}, "sliding_window": None}
MIXTRAL = {**PARAMS, **MOE}


@pytest.mark.long
def test_verify_takes_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", state=dict(tiny_model(to_args(MIXTRAL)).state_dict()), **MOE)
    report = verify(read_folder(folder))
    assert report.rows
    assert all(row.verdict.passes for row in report.rows), report.rows


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_experts": 4}, "moe lacks num_experts_per_tok"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "moe.num_experts_per_tok is 5 of 4 experts"),
        ({"num_experts": 0, "num_experts_per_tok": 1}, "moe.num_experts is 0"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}, "moe has 'num_shared_experts'"),
        (8, "moe must be an object, not 8"),
    ],
)
def test_params_that_cannot_be(given: object, said: str) -> None:
    with pytest.raises(ParamsError) as error:
        to_args({**PARAMS, "moe": given})
    assert said in str(error.value)
    with pytest.raises(ArgsError, match="moe must be a Moe or None"):
        tiny_args(moe={"num_experts": 4})


# --- mistakes

MISTAKES = ("experts_not_renormalised", "experts_w1_w3_swapped")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name: str) -> None:
    model = tiny_model(SHAPES["mixtral"], seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    want = true_logprobs(model, prompts)
    assert mutants.applies(name, model.args, LENS)
    assert not mutants.applies(name, tiny_args(), LENS)
    assert distance(mutants.logits_with(model, prompts, name), want) > 1e-3
    with torch.no_grad():
        assert distance(whole(model, prompts), want) < TOLERANCE


def test_the_one_file_reference_refuses_it_by_name(tmp_path: Path) -> None:
    import one_file_ref

    folder = make_folder(tmp_path, moe={"num_experts": 8, "num_experts_per_tok": 2})
    with pytest.raises(ValueError, match=r"a mixture of experts \(Mixtral\) is more than this file has"):
        one_file_ref.load(folder)
