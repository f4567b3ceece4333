"""Samples in rows, rows in steps: all of them, none twice, in an order that follows from the seed."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.train.data import Sample
from mistral.train.packing import Schedule, batch_of, pack, split

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=80)


@given(lengths=lengths, seed=st.integers(0, 3))
def test_rows_hold_every_sample_once_and_are_not_too_long(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 30, seed)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= 30 for row in rows)
    assert rows == pack(lengths, 30, seed)


def test_rows_are_well_filled() -> None:
    lengths = [1 + i % 29 for i in range(1000)]
    rows = pack(lengths, 64, 0)
    assert sum(lengths) / (64 * len(rows)) > 0.95


@given(count=st.integers(1, 20), batch_size=st.integers(1, 4), accumulate=st.integers(1, 3), seed=st.integers(0, 3))
def test_an_epoch_has_every_sample_once(count: int, batch_size: int, accumulate: int, seed: int) -> None:
    schedule = Schedule([[2 * i, 2 * i + 1] for i in range(count)], batch_size, accumulate, seed)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        forwards = [schedule.forwards(step) for step in steps]
        assert sorted(s for step in forwards for chosen in step for s in chosen) == list(range(2 * count))
        assert all(len(step) <= accumulate for step in forwards)
        assert all(len(chosen) <= 2 * batch_size for step in forwards for chosen in step)


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        schedule = Schedule([[i] for i in range(30)], 30, 1, seed)
        return schedule.forwards(epoch)

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_batch_predicts_every_id_but_the_first() -> None:
    samples = [
        Sample(1, array("i", [5, 6, 7, 8]), array("f", [0, 0, 1, 0.5])),
        Sample(2, array("i", [1, 2]), array("f", [0, 1])),
    ]
    batch = batch_of(samples)
    assert batch.seqlens == (1, 3)  # the shorter one first
    assert batch.ids.tolist() == [1, 5, 6, 7]
    assert batch.targets.tolist() == [2, 6, 7, 8]
    assert torch.equal(batch.weights, torch.tensor([1, 0, 1, 0.5]))
    assert batch.total == 2.5


@given(count=st.integers(2, 50), share=st.floats(0.01, 0.5), seed=st.integers(0, 3))
def test_a_split_holds_out_something_and_leaves_something(count: int, share: float, seed: int) -> None:
    kept, held = split(count, share, seed)
    assert sorted(kept + held) == list(range(count))
    assert kept
    assert held
    assert (kept, held) == split(count, share, seed)
