"""The kit of mutants: each is what it says, shows in every kind of model, and makes our own tests fail."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mistral
from mistral.backends import varlen
from mistral.cache import NoCache
from mistral.fast.bitwise import BitwiseTransformer
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.linear import use_kernels
from mistral.model import Transformer
from mistral.oracle.family_mutants import FAMILY
from mistral.oracle.mutants import MUTANTS, applies, logits_with, mutated, theta
from mistral.oracle.mutation import PLAIN, Mutant
from mistral.parameters import parameters
from mistral.quant import put_quantized, quantize
from mistral.tokenizer import Tokenizer
from mistral.util.errors import Unavailable, UsageError
from tests.core.test_deep import LENS, deep_model
from tests.support import truth
from tests.support.tiny import (
    TOLERANCE,
    Schedule,
    all_at_once,
    at_random,
    distance,
    in_chunks,
    logprobs,
    make_cache,
    play,
    ragged,
    tiny_args,
    tiny_model,
    whole,
)

SHOWS = 1e-4
THETA = 1e5  # neither of the usual ones, so that both of them are mistakes
NAMES = sorted(MUTANTS)
# Those that every dense model can make; the others are in test_scaled.py, test_moe.py and below.
DENSE = [name for name in MUTANTS if name not in {mistake.name for mistake in FAMILY}]
OF_ITS_STEP = ("mask_leak", "not_causal")  # what is seen depends on what comes along

State = dict[str, Tensor]
Patch = pytest.MonkeyPatch


def model_of(kind: str) -> Transformer:
    """A deep model: the plain one, or its weights in another class of model."""
    plain = deep_model(THETA)
    if kind == "plain":
        return plain
    try:
        library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    fast = (BitwiseTransformer if kind == "bitwise" else FastTransformer)(plain.args)
    fast.load_state_dict(plain.state_dict())
    use_kernels(fast)
    return fast.requires_grad_(False)


def prompt_ids(find_mutant: Mutant, prompts: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    changed = [find_mutant.prompt_ids(p) for p in prompts]
    return changed, [len(p) for p in changed]


def with_mistake(model: Transformer, prompts: list[Tensor], name: str, schedule: Callable) -> list[Tensor]:
    """Logits of each prompt, lined up, in steps on a cache that is made meanwhile."""
    ids, lens = prompt_ids(MUTANTS[name], prompts)
    with torch.no_grad(), mutated(name):
        rows = play(model, ids, schedule(lens), make_cache(model, len(lens)))
    return [MUTANTS[name].align(r, len(p)) for r, p in zip(rows, prompts, strict=True)]


def apart(got: list[Tensor], want: list[Any]) -> float:
    """Largest difference of log-probs at the positions that both have."""
    both = [(logprobs(g), logprobs(w) if isinstance(w, Tensor) else w) for g, w in zip(got, want, strict=True)]
    differences = np.concatenate([a - b for a, b in both])
    rows = ~np.isnan(differences).any(axis=1)
    assert rows.sum() >= len(rows) - len(got)
    return float(np.abs(differences[rows]).max(initial=0))


def chunks_then_decode(lens: list[int]) -> Schedule:
    last = [min(n, 4) for n in lens]
    return [*in_chunks([n - m for n, m in zip(lens, last, strict=True)], 13), *in_chunks(last, 1)]


# Put back


def replaced() -> Iterator[tuple[Any, str]]:
    for find_mutant in MUTANTS.values():
        yield from ((owner, name) for owner, name, _ in (*PLAIN, *find_mutant.changes))


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_put_back(name: str) -> None:
    before = [vars(owner)[f] for owner, f in replaced()]
    mine = [(owner, f) for owner, f, _ in MUTANTS[name].changes]
    with pytest.raises(ZeroDivisionError), mutated(name):  # noqa: PT012
        changed = [vars(owner)[f] for owner, f in mine]
        assert mine
        assert not any(x is y for x in changed for y in before)
        with mutated("no_scale"), mutated(name):
            assert not any(vars(owner)[f] in (*changed, *before) for owner, f in mine)
        assert all(vars(owner)[f] is x for (owner, f), x in zip(mine, changed, strict=True))
        _ = 1 // 0
    assert all(vars(owner)[f] is x for (owner, f), x in zip(replaced(), before, strict=True))


def test_models_that_step_in_their_own_way_are_known() -> None:
    """Else the mistake would not be theirs."""
    for module in pkgutil.walk_packages(mistral.__path__, "mistral."):
        try:
            importlib.import_module(module.name)
        except (ImportError, Unavailable):
            continue  # an optional library's part
    led_back = {(owner, name) for owner, name, _ in PLAIN}
    kinds, found = [Transformer], set()
    while kinds:
        kinds += (subclasses := kinds.pop().__subclasses__())
        for kind in subclasses:
            if kind.__module__.startswith("mistral."):
                found |= {(kind, f) for f in ("step", "logits", "forward", "forward_partial") if f in vars(kind)}
    assert found
    assert found <= led_back


def test_names_that_are_not_there_are_refused() -> None:
    with (
        pytest.raises(UsageError, match="no mistake is called 'window'; there are window_one_more, "),
        mutated("window"),
    ):
        pass


# Seen


@pytest.mark.parametrize("kind", ["plain", "fast", "bitwise"])
def test_each_shows_in_every_model(kind: str) -> None:
    """On models made before: without a cache, and in ragged chunks and then decode steps, where kernels are at home."""
    model = model_of(kind)
    prompts = ragged(LENS, model.args.vocab_size)
    right = whole(deep_model(THETA), prompts)
    for name in DENSE:
        assert applies(name, model.args, LENS), name
        assert apart(logits_with(model, prompts, name), right) > SHOWS, name
        assert apart(with_mistake(model, prompts, name, chunks_then_decode), right) > SHOWS, name
    assert apart(whole(model, prompts), right) < TOLERANCE


def test_no_two_are_the_same() -> None:
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    got = {name: logits_with(model, prompts, name) for name in DENSE}
    for a, b in combinations(got, 2):
        assert apart(got[a], got[b]) > SHOWS, (a, b)


def test_several_at_once() -> None:
    """One inside the other: both mistakes are made."""
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    with mutated("window_one_more"), mutated("window_one_fewer"):
        assert distance(whole(model, prompts), in_truth(model, prompts)) < TOLERANCE


def in_truth(model: Transformer, prompts: list[Tensor]) -> list[np.ndarray]:
    return [truth.truth(model.state_dict(), model.args, p)[0] for p in prompts]


@pytest.mark.parametrize("name", ["mask_leak", "not_causal", "window_one_more"])
def test_other_attention_backends_stand_aside(name: str) -> None:
    def kernel(*_: Any) -> Tensor:
        raise AssertionError("the backend computed")

    plain = deep_model(THETA)
    model = Transformer(plain.args, varlen.VarlenAttention(lambda *_: None, kernel))
    model.load_state_dict(plain.state_dict())
    prompts = ragged(LENS, model.args.vocab_size)
    with pytest.raises(AssertionError, match="computed"):
        whole(model, prompts)
    assert distance(logits_with(model, prompts, name), logits_with(plain, prompts, name)) < TOLERANCE


def test_quantized_weights_are_swapped_as_they_are_meant() -> None:
    plain = deep_model(THETA)
    fast = FastTransformer(plain.args)
    state = plain.state_dict()
    few = {n: quantize(p, state[n], "int8") for n, p in parameters(plain.args).items() if p.quantized}
    fast.load_state_dict({n: w for n, w in state.items() if n not in few} | put_quantized(fast, few), assign=True)
    plain.load_state_dict({n: few[n].rows(0, len(w)) if n in few else w for n, w in state.items()})
    prompts = ragged(LENS, plain.args.vocab_size)
    got = logits_with(fast, prompts, "w2_w3_swapped")
    assert distance(got, logits_with(plain, prompts, "w2_w3_swapped")) < 0.01


@pytest.mark.parametrize("hidden_dim", [24, 40])
def test_w2_and_w3_are_read_by_size(hidden_dim: int) -> None:
    model = tiny_model(tiny_args(hidden_dim=hidden_dim))
    state = model.state_dict()
    shapes = {"w2": (24, hidden_dim), "w3": (hidden_dim, 24)}
    for i in range(2):
        names = {w: f"layers.{i}.feed_forward.{w}.weight" for w in shapes}
        state |= {
            names["w2"]: state[names["w3"]].reshape(shapes["w2"]),
            names["w3"]: state[names["w2"]].reshape(shapes["w3"]),
        }
    prompts = ragged(LENS, model.args.vocab_size)
    want = [truth.truth(state, model.args, p)[0] for p in prompts]
    assert distance(logits_with(model, prompts, "w2_w3_swapped"), want) < TOLERANCE


# The mistake that it says: the truth about another shape, other weights, or by a changed rule


def windows(change: Callable[[int | None], int | None]) -> Callable:
    def wrong(patch: Patch, state: State, args: Any) -> tuple[State, Any]:
        return state, dataclasses.replace(args, sliding_window=tuple(map(change, args.sliding_window)))

    return wrong


def shape(**changes: Any) -> Callable:
    return lambda patch, state, args: (state, dataclasses.replace(args, **changes))


def weights(change: Callable[[str, State, Any], Tensor]) -> Callable:
    return lambda patch, state, args: ({name: change(name, state, args) for name in state}, args)


def rule(name: str, change: Callable) -> Callable:
    """The truth by another rule: `change` is called in place of a function of support/truth.py, which it gets first."""

    def wrong(patch: Patch, state: State, args: Any) -> tuple[State, Any]:
        right = getattr(truth, name)
        patch.setattr(truth, name, lambda *given: change(right, *given))
        return state, args

    return wrong


def exchanged(a: str, b: str) -> Callable:
    return weights(lambda name, state, args: state[name.replace(a, "?").replace(b, a).replace("?", b)])


def layers(order: list[int]) -> Callable:
    def change(name: str, state: State, args: Any) -> Tensor:
        kind, _, rest = name.partition(".")
        place, _, rest = rest.partition(".")
        return state[f"layers.{order[int(place)]}.{rest}"] if kind == "layers" else state[name]

    return weights(change)


def rows(first: int, second: int) -> Callable:
    """Rows of a head of q and k, seen as a matrix [first, second], in the other order."""

    def change(name: str, state: State, args: Any) -> Tensor:
        if not name.endswith(("wq.weight", "wk.weight")):
            return state[name]
        return state[name].unflatten(0, (-1, first, second)).transpose(1, 2).flatten(0, 2)

    return weights(change)


def remainder(name: str, state: State, args: Any) -> Tensor:
    """Query heads in the order in which those that share a key by remainder are neighbours; wo wants them so too."""
    H, K = args.n_heads, args.n_kv_heads
    order = [h for kv in range(K) for h in range(kv, H, K)]
    if name.endswith("wq.weight"):
        return state[name].unflatten(0, (H, -1))[order].flatten(0, 1)
    if name.endswith("wo.weight"):
        return state[name].unflatten(1, (H, -1))[:, order].flatten(1, 2)
    return state[name]


def cast(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


def angles_of_bf16_frequencies(
    right: Callable, positions: Tensor, D: int, theta: float, _: Any = None
) -> tuple[np.ndarray, ...]:
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2).float() / D)
    angle = positions.float()[:, None] * frequencies.bfloat16().float()
    return angle.cos().double().numpy(), angle.sin().double().numpy()


def gelu(right: Callable, x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def eps_outside(right: Callable, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps) * weight


def later_keys_too(right: Callable, n: int, window: int | None) -> np.ndarray:
    return right(n, window) | ~np.tri(n, dtype=bool)


def each(pattern: list[int | None]) -> Callable:
    return shape(sliding_window=tuple(pattern))


def no_scale(name: str, state: State, args: Any) -> Tensor:
    return state[name] * args.head_dim**0.5 if name.endswith("wq.weight") else state[name]


def tied(name: str, state: State, args: Any) -> Tensor:
    return state["tok_embeddings.weight" if name == "output.weight" else name]


WRONG: dict[str, Callable] = {
    "window_one_more": windows(lambda w: w and w + 1),
    "window_one_fewer": windows(lambda w: w and w - 1),
    "no_window": each([None]),
    "one_window_for_all_layers": each([5]),
    "windows_reversed": each([5, 5, 5, None]),
    "not_causal": rule("mask", later_keys_too),
    "theta_1e4": shape(rope_theta=1e4),
    "theta_1e6": shape(rope_theta=1e6),
    "rotary_bf16": rule("angles", lambda right, *given: tuple(map(cast, right(*given)))),
    "rotary_frequencies_bf16": rule("angles", angles_of_bf16_frequencies),
    "rotated_backwards": rule("turn", lambda right, x, cos, sin: right(x, cos, -sin)),
    "no_rotation": rule("turn", lambda right, x, cos, sin: x),
    "rows_not_permuted": rows(4, 2),
    "rows_permuted_needlessly": rows(2, 4),
    "no_scale": weights(no_scale),
    "heads_by_remainder": weights(remainder),
    "w2_w3_swapped": exchanged("w2", "w3"),
    "w1_w3_swapped": exchanged("w1", "w3"),
    "gelu_for_silu": rule("silu", gelu),
    "norms_swapped": exchanged("attention_norm", "ffn_norm"),
    "eps_missing": shape(norm_eps=1e-30),
    "eps_outside_root": rule("rms_norm", eps_outside),
    "output_tied": weights(tied),
    "first_layers_swapped": layers([1, 0, *range(2, 12)]),
    "layers_by_name": layers([0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
    "layers_reversed": layers([*range(12)][::-1]),
    "bos_doubled": shape(),
    "bos_absent": shape(),
}


def schedules(name: str) -> list[Callable[[list[int]], Schedule]]:
    """Ways to feed the prompts in which the mistake comes to the same."""
    several = [lambda lens: in_chunks(lens, 7), lambda lens: at_random(lens, 1)]
    return [all_at_once] if name in OF_ITS_STEP else [all_at_once, *several]


@pytest.mark.parametrize("name", WRONG)
def test_each_is_what_it_says(name: str, monkeypatch: Patch) -> None:
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    with monkeypatch.context() as patch:
        state, args = WRONG[name](patch, model.state_dict(), model.args)
        ids, _ = prompt_ids(MUTANTS[name], prompts)
        want = [truth.truth(state, args, p)[0] if len(p) else np.zeros((0, args.vocab_size)) for p in ids]
    want = [MUTANTS[name].align(torch.from_numpy(r), len(p)).numpy() for r, p in zip(want, prompts, strict=True)]
    limit = 10 * TOLERANCE if name == "output_tied" else TOLERANCE  # embeddings are wider: logits up to 60
    assert apart(logits_with(model, prompts, name), want) < limit
    for schedule in schedules(name):
        assert apart(with_mistake(model, prompts, name, schedule), want) < limit


def test_a_leak_makes_one_sequence_of_all() -> None:
    """Its mask is that of the packed ids, its angles are those of each prompt; a cache takes them as they come."""
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    places = torch.cat([torch.arange(n) for n in LENS])
    with pytest.MonkeyPatch.context() as patch:
        right = truth.angles
        patch.setattr(truth, "angles", lambda positions, *given: right(places, *given))
        want = truth.truth(model.state_dict(), model.args, torch.cat(prompts))[0]
        assert distance([torch.cat(logits_with(model, prompts, "mask_leak"))], [want]) < TOLERANCE
        at_once = with_mistake(model, prompts, "mask_leak", all_at_once)
        assert distance([torch.cat(at_once)], [want]) < TOLERANCE
        # Token by token in turns: packed as they came.
        came = sorted((place, row) for row, n in enumerate(LENS) for place in range(n))
        order = torch.tensor([sum(LENS[:row]) + place for place, row in came])
        places = places[order]
        want = truth.truth(model.state_dict(), model.args, torch.cat(prompts)[order])[0]
    in_turns = torch.cat(with_mistake(model, prompts, "mask_leak", lambda lens: in_chunks(lens, 1)))
    assert distance([in_turns[order]], [want]) < TOLERANCE


def test_any_theta() -> None:
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    with theta(1234.0).patch():
        got = whole(model, prompts)
    args = dataclasses.replace(model.args, rope_theta=1234.0)
    assert distance(got, [truth.truth(model.state_dict(), args, p)[0] for p in prompts]) < TOLERANCE


def test_rows_keep_their_places() -> None:
    model = deep_model(THETA)
    prompts = ragged(LENS, model.args.vocab_size)
    for name in MUTANTS:
        got = logits_with(model, prompts, name)
        assert [len(rows) for rows in got] == LENS
        missing = [rows.isnan().any(-1).nonzero().flatten().tolist() for rows in got]
        assert missing == [[0] if name == "bos_absent" else []] * len(LENS)


def test_texts_begin_with_two_bos_or_none() -> None:
    words = Tokenizer(Path(mistral.__file__).parent / "bundled" / "tokenizer.model")
    ids = words.encode("there was a king")
    with mutated("bos_doubled"):
        assert words.encode("there was a king") == [words.bos_id, *ids]
        assert words.encode("there was a king", bos=False) == ids[1:]
    with mutated("bos_absent"):
        assert words.encode("there was a king") == ids[1:]


# Where a mistake cannot show


@pytest.mark.parametrize(
    ("changes", "lens", "silent"),
    [
        ({"sliding_window": 5}, [9, 4], {"one_window_for_all_layers", "windows_reversed"}),
        (
            {"sliding_window": None},
            [9, 4],
            {"window_one_more", "window_one_fewer", "no_window", "one_window_for_all_layers", "windows_reversed"},
        ),
        ({}, [5, 2], {"window_one_more", "no_window", "one_window_for_all_layers", "windows_reversed"}),
        ({}, [6], {"mask_leak"}),
        ({}, [6, 0], {"mask_leak"}),
        ({"sliding_window": 1}, [9, 4], {"window_one_fewer", "mask_leak", "rotary_bf16", "no_scale", "bos_absent"}),
        ({"rope_theta": 1e4}, [9, 4], {"theta_1e4"}),
        ({"rope_theta": 1e6}, [9, 4], {"theta_1e6"}),
        ({"head_dim": 2}, [9, 4], {"theta_1e4", "theta_1e6", "rows_not_permuted", "rows_permuted_needlessly"}),
        ({"n_kv_heads": 4}, [9, 4], {"heads_by_remainder"}),
        ({"n_kv_heads": 1}, [9, 4], {"heads_by_remainder"}),
        ({"n_layers": 10}, [9, 4], {"layers_by_name"}),
        ({"n_layers": 2}, [9, 4], {"layers_by_name"}),
        ({"n_layers": 1}, [9, 4], {"layers_by_name", "layers_reversed", "first_layers_swapped"}),
        (
            {},
            [1, 1],
            {"not_causal", "theta_1e4", "rows_not_permuted", "rotated_backwards", "bos_doubled", "bos_absent"},
        ),
    ],
)
def test_a_mistake_that_cannot_show_is_known(changes: dict[str, Any], lens: list[int], silent: set[str]) -> None:
    given = {"n_layers": 12, "hidden_dim": 24, "rope_theta": THETA, "norm_eps": 1e-2, **changes}
    model = tiny_model(tiny_args(**given))
    prompts = ragged(lens, model.args.vocab_size)
    right = logits_with_none(model, prompts)
    for name in MUTANTS:
        shows = apart(logits_with(model, prompts, name), right) > TOLERANCE
        if name in silent:
            assert not applies(name, model.args, lens), name
        assert shows <= applies(name, model.args, lens), name


def logits_with_none(model: Transformer, prompts: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return whole(model, prompts)


def test_a_cache_made_before_keeps_its_window() -> None:
    model = deep_model(THETA)
    before = NoCache(model.args, "cpu")
    with mutated("no_window"):
        assert before.layer(1).window == 5
        assert NoCache(model.args, "cpu").layer(1).window is None


# Our own tests

SUITE = [
    "tests/core/test_deep.py",
    "tests/text/test_tokenizer.py::test_some_ids_by_hand",
]
# What notices mistakes that only other members can make.
OF_THE_FAMILY = [
    "tests/oracle/test_scaled.py::test_the_library_is_the_truth",
    "tests/core/test_moe.py::test_the_library_is_the_truth",
    "tests/formats/test_adapter.py::test_dora_scales_rows_to_the_lengths_that_were_learned",
]
RUN_WITH_EACH = """
import json, sys
import pytest

class Outcomes:
    def __init__(self):
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report):
        self.passed += report.passed and report.when == "call"
        if report.failed:
            self.failed.append((report.nodeid, report.when, report.longrepr.reprcrash.message.splitlines()[0]))

found = {}
names, suite = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in ("", *names, ""):
    outcomes = Outcomes()
    status = pytest.main(
        ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", *suite, *(["--mutant", name] if name else [])], [outcomes]
    )
    found.setdefault(name, []).append((int(status), outcomes.passed, outcomes.failed))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "suite", "count"), [(DENSE, SUITE, 12), ([mistake.name for mistake in FAMILY], OF_THE_FAMILY, 10)]
)
@pytest.mark.long
def test_our_own_tests_fail_on_each(names: list[str], suite: list[str], count: int) -> None:
    """A small part of them, by `pytest --mutant NAME`; with none, first and last, they pass."""
    root = Path(mistral.__file__).parents[1]
    command = [sys.executable, "-c", RUN_WITH_EACH, json.dumps(sorted(names)), json.dumps(suite)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for status, passed, failed in found.pop(""):
        assert (status, failed) == (pytest.ExitCode.OK, [])
        assert passed == count
    assert sorted(found) == sorted(names)
    for name, [(status, _, failed)] in found.items():
        assert status == pytest.ExitCode.TESTS_FAILED, name
        assert failed, name
        assert all(when == "call" and said.startswith(("AssertionError", "assert ")) for _, when, said in failed), (
            failed
        )
