"""Log-probabilities of many continuations, in a running batch in which those of one context share its keys.

Knows nothing about text or tasks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mistral.cache import RollingBufferCache
from mistral.engine import Engine, rows_that_fit
from mistral.model import Transformer
from mistral.request import Request, common_prefix
from mistral.sampling_params import SamplingParams

SHORT = 16  # tokens of a context that are rather scored along than processed by themselves
CONTEXT = SamplingParams(max_tokens=1, temperature=0)
SCORE = SamplingParams(max_tokens=0, top_logprobs=1)


@dataclass(frozen=True)
class Continuation:
    """What is scored.

    Args:
        ids: of a context and its continuation.
        begin: where the continuation begins; at least 1.
    """

    ids: list[int]
    begin: int


@dataclass(frozen=True)
class Scored:
    """How a continuation was predicted.

    Args:
        logprob: the sum of the natural log-probabilities of its tokens.
        greedy: whether each of them was the most likely one.
    """

    logprob: float
    greedy: bool


@dataclass
class _Row:
    """A row of the cache: what it still has to do, and what it holds.

    Args:
        left: numbers of continuations of one context.
        held: ids whose keys it holds.
        request: what runs; None: nothing.
        context: whether that is the context alone.
    """

    left: deque[int]
    held: list[int]
    request: Request | None = None
    context: bool = False


class Scorer:
    """Scores continuations.

    Args:
        model: the model.
        rows: the most sequences in a step.

    Attributes:
        processed, shared: tokens that were processed, and that a row held already.
    """

    def __init__(self, model: Transformer, rows: int) -> None:
        self._model, self._rows = model, rows
        self.processed = self.shared = 0

    def __call__(
        self, continuations: Sequence[Continuation], told: Callable[[int], None] = lambda number: None
    ) -> list[Scored]:
        """The score of each, in the order given.

        Args:
            told: called with the number of each when its score is known.

        Raises:
            MistralError: logits that are NaN, an id outside the vocabulary, or too little memory.
        """
        found: dict[int, Scored] = {
            i: Scored(0.0, True) for i, one in enumerate(continuations) if one.begin >= len(one.ids)
        }
        for i in found:
            told(i)
        left = sorted(set(range(len(continuations))) - set(found), key=lambda i: (_context(continuations[i]), i))
        groups = deque(deque(group) for _, group in groupby(left, key=lambda i: _context(continuations[i])))
        if not groups:
            return [found[i] for i in range(len(continuations))]
        longest = max(len(one.ids) for one in continuations)
        count = rows_that_fit(self._model, min(self._rows, len(groups)), longest)
        cache = self._model.make_cache(count)
        engine = Engine(self._model, eos_ids=(), cache=cache)
        rows = [_Row(deque(), []) for _ in range(count)]
        while True:
            for number, row in enumerate(rows):
                if row.request is None and (row.left or groups):
                    row.left = row.left or groups.popleft()
                    self._begin(engine, cache, number, row, continuations[row.left[0]])
            if engine.done:
                return [found[i] for i in range(len(continuations))]
            engine.step()
            for number, row in enumerate(rows):
                if row.request is not None and row.request.finish:
                    self._end(cache.lengths[number], row, continuations, found, told)

    def _begin(self, engine: Engine, cache: RollingBufferCache, number: int, row: _Row, one: Continuation) -> None:
        """Have the context of a continuation processed, or the continuation scored behind it."""
        after_context, row.context = row.context, False
        kept = cache.rewind(number, min(common_prefix(row.held, one.ids), one.begin - 1))
        self.shared += 0 if after_context else kept
        row.context = not after_context and one.begin - 1 - kept > SHORT
        ids = one.ids[: one.begin] if row.context else one.ids
        self.processed += len(ids) - kept
        row.request = engine.add(ids, CONTEXT if row.context else SCORE, number, score=not row.context)

    def _end(
        self,
        length: int,
        row: _Row,
        continuations: Sequence[Continuation],
        found: dict[int, Scored],
        told: Callable[[int], None],
    ) -> None:
        request, row.request = row.request, None
        assert request is not None
        if request.error is not None:
            raise request.error
        row.held = list(request.prompt_ids[:length])
        if row.context:
            return
        number = row.left.popleft()
        ids = continuations[number].ids[continuations[number].begin :]
        logprobs, tops = request.prompt_logprobs[-len(ids) :], request.prompt_top[-len(ids) :]
        greedy = all(next(iter(top)) == i for top, i in zip(tops, ids, strict=True))
        found[number] = Scored(math.fsum(logprobs), greedy)
        told(number)


def _context(one: Continuation) -> list[int]:
    return one.ids[: one.begin]
