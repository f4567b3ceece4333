"""Log-probabilities of logits, in float64: the only way by which they leave the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MORE = 64  # ids beyond those asked for, among which those are that are equal to the last of them
BLOCK = 1 << 18  # logits widened to float64 at once: 2 MB, which stays in a core's cache


@torch.no_grad()
def logprobs(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """Natural logs of the softmax (docs/contract.md, rule 10): each logit minus the logsumexp of its row.

    PyTorch sums a row of fp32 logits in fp32, which adds the same error to all its log-probabilities: up to 1e-5 at a
    vocabulary of 49,152. In float64 nothing is left of it. A row's bits depend neither on the other rows nor on the
    number of threads.

    Args:
        logits: [R, V], of any floating dtype.
        ids: [R, k] int64, of which tokens; None: of all, in order.

    Returns:
        [R, k] or [R, V] float64, on the logits' device, or on the CPU where that device has no float64 (MPS).
    """
    if logits.device.type == "mps":
        logits, ids = logits.cpu(), None if ids is None else ids.cpu()
    wide = logits.new_empty(logits.shape if ids is None else ids.shape, dtype=torch.float64)
    rows = max(1, BLOCK // logits.shape[-1])
    for first in range(0, len(logits), rows):
        block = slice(first, first + rows)
        found = logits[block].double().log_softmax(-1)
        wide[block] = found if ids is None else found.gather(-1, ids[block])
    return wide


def _largest(logits: Tensor, count: int) -> Tensor:
    """The ids of the largest of each row, of equal ones the lowest id first: as a stable sort has them, [R, count].

    topk breaks ties anyhow, so it is asked for some more, and all are sorted where those are equal too.
    """
    some = count + MORE
    if logits.shape[-1] < 4 * some:
        return logits.argsort(dim=-1, descending=True, stable=True)[:, :count]
    top = logits.topk(some)
    ids = top.indices.sort(dim=-1).values
    ids = ids.gather(-1, logits.gather(-1, ids).argsort(dim=-1, descending=True, stable=True))[:, :count]
    unsure = ~(top.values[:, count - 1] > top.values[:, -1])
    if unsure.any():
        ids[unsure] = logits[unsure].argsort(dim=-1, descending=True, stable=True)[:, :count]
    return ids


def most_likely(logits: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """The most likely ids of each row and their log-probabilities, as many as its request asks for."""
    most = max(counts)
    if not most:
        return [{} for _ in counts]
    ids = _largest(logits, most)
    values = logprobs(logits, ids).tolist()
    return [dict(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids.tolist(), values, counts, strict=True)]
