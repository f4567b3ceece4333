"""How many threads a step takes, by a clock of the test's own: choices, not times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mistral.engine import Engine
from mistral.fast.decode import FastTransformer
from mistral.fast.linear import use_kernels
from mistral.fast.threads import IN_A_ROW, PATIENCE, TRIES, Threads
from mistral.model import Transformer
from mistral.sampling_params import SamplingParams
from mistral.util.threads import Sharing
from tests.support.tiny import tiny_args, tiny_model


def run(threads: Threads, steps: int, seconds: Callable[[int], float], most: int = 4) -> list[int]:
    """The choices of so many steps, each of which takes what `seconds` says for its number of threads."""
    picked = []
    for _ in range(steps):
        picked.append(threads.pick(most))
        assert threads.pick(most) == picked[-1]  # asking changes nothing
        threads.took(picked[-1], seconds(picked[-1]))
    return picked


def quiet(threads: int) -> float:
    return 1 / threads


def busy(threads: int) -> float:
    return 1.0 if threads == 1 else 25.0


def test_on_a_quiet_machine_all_threads_and_now_and_then_a_look_at_one() -> None:
    picked = run(Threads(), 1000, quiet)
    assert picked[0] == 4
    assert picked.count(1) <= 1000 // PATIENCE * TRIES + TRIES
    assert set(picked) == {1, 4}


def test_beside_a_busy_program_one_thread_and_ever_rarer_looks_at_all() -> None:
    picked = run(Threads(), 10_000, busy)
    at = [i for i, n in enumerate(picked) if n == 4]
    assert at[0] == 0
    assert len(at) <= 5
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert gaps == sorted(gaps)
    lost = sum(map(busy, picked)) / len(picked)
    assert lost < 1.02  # times what one thread alone takes


def test_a_first_step_that_finds_nothing_in_memory_decides_nothing() -> None:
    threads = Threads()
    first = [10.0]
    picked = run(threads, PATIENCE, lambda n: first.pop() if first else quiet(n))
    assert picked.count(1) <= TRIES


def test_a_program_that_comes_and_goes() -> None:
    threads = Threads()
    run(threads, 50, quiet)
    came = run(threads, 50, lambda n: 25 * quiet(n) if n > 1 else 1.0)
    assert came.count(4) <= IN_A_ROW + 1
    gone = run(threads, 5 * PATIENCE, quiet)
    assert gone[-1] == 4


def test_steps_that_become_slower_by_themselves_keep_the_better_choice() -> None:
    threads, length = Threads(), iter(range(10**6))
    picked = run(threads, 2000, lambda n: (1 + next(length) / 100) / n)
    assert picked.count(4) > 1900


@pytest.mark.parametrize("most", [1, 2])
def test_another_number_of_threads_begins_anew(most: int) -> None:
    threads = Threads()
    run(threads, 100, busy)
    assert run(threads, 1, busy, most) == [most]


def test_one_thread_is_never_questioned() -> None:
    assert set(run(Threads(), 100, busy, 1)) == {1}


@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_beside_others_takes_the_cores_that_they_leave(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the kernels, of PyTorch, and what an engine chooses from them; no number changes."""
    args = tiny_args()
    plain = tiny_model(args)
    model: Transformer = FastTransformer(args) if kernels else plain
    if kernels:
        use_kernels(model)
        model.load_state_dict(plain.state_dict())
    seen: list[int] = []
    sample = Engine._sample

    def noted(self: Engine, *given: Any) -> Any:
        seen.append(torch.get_num_threads())
        return sample(self, *given)

    monkeypatch.setattr(Engine, "_sample", noted)
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for free in (2, 1):
            model._sharing = Sharing(lambda free=free: free)
            engine = Engine(model, eos_ids=())
            request = engine.add([5, 6, 7], SamplingParams(max_tokens=6, temperature=0))
            while not engine.done:
                engine.step()
            found.append(request.output_ids)
        assert seen == [2] * 6 + [1] * 6
        assert found[0] == found[1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
