"""Prompts that begin alike, their common beginnings processed once. Knows nothing about tasks or texts.

Sorted prompts form a tree of beginnings. One row of a cache walks down it; where prompts part, the row is copied to one
of `rows` others, in which the rest of a prompt is processed and continued by the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from mistral.engine import STEP_TOKENS
from mistral.model import Transformer

Ids = Sequence[int]


class SharedPrefixes:
    """Walks over prompts; see `batches`.

    Args:
        model: the model.
        prompts: ids, each at least one.
        rows: the most prompts that are handed out together; they lie in rows 0, 1, ... of `cache`.
        more: positions that a prompt may need besides its own, for what is generated.
        progress: told after each step how many tokens of shared beginnings were processed since the last time.

    Attributes:
        cache: a row for each prompt handed out, and `branches(prompts)` more.
        shared: tokens processed in shared beginnings.
        saved: tokens of prompts that did not have to be processed again.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Ids],
        rows: int,
        *,
        more: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.prompts, self.rows = model, prompts, rows
        self.cache = model.make_cache(rows + branches(prompts), max(map(len, prompts)) + more)
        self.shared = self.saved = 0
        self._progress = progress
        self._ready: list[int] = []

    def batches(self) -> Iterator[list[int]]:
        """Which prompts have their beginnings in rows 0, 1, ... of the cache: each prompt once, in no given order.

        At least one token of each is left to process. Whoever takes a batch is done with it before asking for the next.
        """
        order = sorted(range(len(self.prompts)), key=lambda i: list(self.prompts[i]))
        yield from self._walk(order, 0, self.rows)
        if self._ready:
            yield self._take()

    def _walk(self, group: list[int], held: int, row: int) -> Iterator[list[int]]:
        """Hand out a sorted group of prompts, of whose beginning `row` holds `held` tokens."""
        while len(group) > 1:
            shared = self._shared(group)
            self._advance(self.prompts[group[0]][held:shared], row)
            self.saved += (shared - held) * (len(group) - 1)
            held = shared
            parts = self._parts(group, held)
            if len(parts) == 1:  # one of them ends here, or they are equal
                parts = [[i] for i in group]
            *others, group = sorted(parts, key=len)  # the largest one goes on in this row, so few rows do
            for part in others:
                if len(part) == 1:
                    yield from self._leave(part[0], row)
                else:
                    self.cache.copy(row, row + 1)
                    yield from self._walk(part, held, row + 1)
        yield from self._leave(group[0], row)

    def _shared(self, group: list[int]) -> int:
        """How many tokens all prompts of a sorted group begin with, but for one of the shortest of them."""
        first, last = self.prompts[group[0]], self.prompts[group[-1]]
        most = min(len(self.prompts[i]) for i in group) - 1
        return next((n for n in range(most) if first[n] != last[n]), most)

    def _parts(self, group: list[int], held: int) -> list[list[int]]:
        """A group by the token that comes next."""
        parts: dict[int, list[int]] = {}
        for i in group:
            parts.setdefault(self.prompts[i][held], []).append(i)
        return list(parts.values())

    @torch.inference_mode()
    def _advance(self, ids: Ids, row: int) -> None:
        for first in range(0, len(ids), STEP_TOKENS):
            piece = torch.tensor(list(ids[first : first + STEP_TOKENS]), device=self.model.device)
            plan = self.cache.plan([*[0] * row, len(piece)])
            self.model.step(piece, plan, self.cache)
            self.cache.commit(plan)
            self.shared += len(piece)
            if self._progress is not None:
                self._progress(len(piece))

    def _leave(self, prompt: int, row: int) -> Iterator[list[int]]:
        """Have a prompt go on from what a row holds, in a row of its own."""
        self.cache.copy(row, len(self._ready))
        self._ready.append(prompt)
        if len(self._ready) == self.rows:
            yield self._take()

    def _take(self) -> list[int]:
        ready, self._ready = self._ready, []
        return ready


def branches(prompts: Sequence[Ids]) -> int:
    """Rows that a walk over prompts needs besides: all but the largest part at a fork need one more."""
    return max(1, len(prompts).bit_length())
