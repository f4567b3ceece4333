"""Samples into rows of at most seq_len tokens, and rows into batches: which sample is when in which step.

All of it follows from the seed and the number of the step, so a run that goes on needs no state of it. Samples in a
row do not see each other: they are sequences of their own in the packed forward.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mistral.train.data import Sample
from mistral.train.step import Batch

OPEN = 32  # rows that may still be filled


def pack(lengths: Sequence[int], seq_len: int, seed: int) -> list[list[int]]:
    """Rows of samples, by their numbers: in a random order, each into the first open row that has room."""
    order = list(range(len(lengths)))
    random.Random(f"pack:{seed}").shuffle(order)
    rows: list[list[int]] = []
    left: list[int] = []
    for sample in order:
        length = lengths[sample]
        for i in range(max(0, len(rows) - OPEN), len(rows)):
            if left[i] >= length:
                rows[i].append(sample)
                left[i] -= length
                break
        else:
            rows.append([sample])
            left.append(seq_len - length)
    return rows


def batch_of(samples: Sequence[Sample]) -> Batch:
    """Samples as one packed forward: each predicts its ids but the first. Those of one length lie together."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    ids = [torch.tensor(sample.ids, dtype=torch.int64) for sample in ordered]
    return Batch(
        ids=torch.cat([i[:-1] for i in ids]),
        seqlens=tuple(len(i) - 1 for i in ids),
        targets=torch.cat([i[1:] for i in ids]),
        weights=torch.cat([torch.tensor(sample.weights, dtype=torch.float32)[1:] for sample in ordered]),
    )


@dataclass(frozen=True)
class Schedule:
    """Which rows are in which step.

    Args:
        rows: samples, by number, of each row.
        batch_size: rows of a forward.
        accumulate: forwards of a step.
        seed: of the order, another one in each epoch.
    """

    rows: list[list[int]]
    batch_size: int
    accumulate: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.accumulate))

    def forwards(self, step: int) -> list[list[int]]:
        """The samples of each forward of a step, counted from 0; the last of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.rows)))
        random.Random(f"epoch:{self.seed}:{epoch}").shuffle(order)
        size = self.batch_size * self.accumulate
        chosen = order[place * size : (place + 1) * size]
        groups = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        return [[sample for row in group for sample in self.rows[row]] for group in groups]


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of samples to train on, and of those held out: at least one of each where share is above 0."""
    if not share:
        return list(range(count)), []
    order = list(range(count))
    random.Random(f"split:{seed}").shuffle(order)
    held = min(count - 1, max(1, round(share * count)))
    return sorted(order[held:]), sorted(order[:held])
