"""Guesses of the next tokens by a smaller model with the same vocabulary (arXiv 2211.17192).

It samples with the request's own parameters and the very random numbers that the request will draw, so that it
guesses the same token wherever both models think alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from mistral.cache import RollingBufferCache
from mistral.fast.draft import MOST_TOKENS, NEW, Costs, Rate, how_many, just_begun
from mistral.model import Transformer
from mistral.request import Request, common_prefix
from mistral.sampling import sample

CHUNK = 512  # tokens of a prompt that the small model takes in at once


@dataclass
class Followed:
    """How far the small model is with a request.

    Args:
        row: its own cache's.
        held: how many tokens the row holds: of the request, then guesses.
        guesses: the guesses among them, the last that were made but one.
        rate: of its guesses.
    """

    row: int
    held: int = 0
    guesses: list[int] = field(default_factory=list)
    rate: Rate = field(default_factory=Rate)


class ModelDraft:
    """Guesses with a smaller model, which keeps its own cache.

    Args:
        small: the model that guesses.
        costs: of the large model's steps, shared by all its drafts.
    """

    def __init__(self, small: Transformer, costs: Costs) -> None:
        self._small, self._costs = small, costs
        self._cache: RollingBufferCache | None = None
        self._followed: WeakKeyDictionary[Request, Followed] = WeakKeyDictionary()
        self._each = 0.0  # seconds of a guess

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        """See `Draft`."""
        for request in [request for request in self._followed if request.finish is not None]:
            del self._followed[request]  # its row is free
        counts, tokens = [], len(requests)
        for request, its_most in zip(requests, most, strict=True):
            rate = self._follow(request).rate.value
            room = max(0, min(its_most, MOST_TOKENS - tokens))
            counts.append(how_many(self._costs, tokens, rate, room, self._each / len(requests)))
            tokens += counts[-1]
        proposed: list[list[int]] = [[] for _ in requests]
        chosen = [i for i, count in enumerate(counts) if count]
        for i, ids in zip(chosen, self._guesses([(requests[i], counts[i]) for i in chosen]), strict=True):
            proposed[i] = ids
        return proposed

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        """See `Draft`."""
        if not just_begun(requests, right):
            self._costs.learn(len(requests) + sum(guessed), seconds)
        for request, its_guesses, its_right in zip(requests, guessed, right, strict=True):
            rate = self._follow(request).rate
            if its_guesses:
                rate.learn(its_guesses, its_right)
            else:
                rate.rest()

    def _follow(self, request: Request) -> Followed:
        if request not in self._followed:
            taken = {other.row for other in self._followed.values()}
            row = next(row for row in range(len(taken) + 1) if row not in taken)
            self._followed[request] = Followed(row)
        return self._followed[request]

    @torch.inference_mode()
    def _guesses(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """So many guesses for each request."""
        if not wanted:
            return []
        cache = self._cache_of(1 + max(self._follow(request).row for request, _ in wanted))
        made: list[list[int]] = [[] for _ in wanted]
        new = {self._follow(request).row: self._catch_up(request, cache) for request, _ in wanted}
        while max(map(len, new.values())) > CHUNK:
            self._forward(cache, {row: ids[:CHUNK] for row, ids in new.items() if len(ids) > CHUNK})
            new = {row: ids[CHUNK:] if len(ids) > CHUNK else ids for row, ids in new.items()}
        for guess in range(max(count for _, count in wanted)):
            going = [i for i, (_, count) in enumerate(wanted) if count > guess]
            began = time.perf_counter()
            rows = [self._follow(wanted[i][0]).row for i in going]
            logits = self._forward(cache, {row: new[row] for row in rows})
            for i, row, its_logits in zip(going, rows, logits, strict=True):
                request = wanted[i][0]
                number = 0.0 if request.rng is None else request.rng.ahead(guess + 1)[guess]
                token = int(sample(its_logits[None], torch.tensor([number], device=logits.device), request.params))
                if guess:
                    self._follow(request).guesses += new[row]
                made[i].append(token)
                new[row] = [token]
            if guess:  # the first takes in what was generated since, too
                seconds = time.perf_counter() - began
                self._each = self._each + NEW * (seconds - self._each) if self._each else seconds
        return made

    def _catch_up(self, request: Request, cache: RollingBufferCache) -> list[int]:
        """Forget guesses that were wrong; return what the small model has not seen of the request, never nothing."""
        follow, begin = self._follow(request), len(request.prompt_ids)
        if not follow.held:
            cache.reset(follow.row)
        else:
            known = follow.held - len(follow.guesses)  # of prompt and output
            generated = request.output_ids[known - begin :]
            right = common_prefix(follow.guesses, generated)
            last = begin + len(request.output_ids) - 1
            follow.held = cache.rewind(follow.row, min(known + right, last))
        follow.guesses = []
        held = follow.held
        return [*request.prompt_ids[held:], *request.output_ids[max(0, held - begin) :]]

    def _forward(self, cache: RollingBufferCache, new: dict[int, list[int]]) -> torch.Tensor:
        """Take in ids, by row; the logits of each row's last one, [R, V], in the order of `new`."""
        order = sorted(new)
        plan = cache.plan([len(new.get(row, [])) for row in range(order[-1] + 1)])
        ids = torch.tensor([i for row in order for i in new[row]], device=self._small.device)
        h = self._small.step(ids, plan, cache)
        cache.commit(plan)
        ends, end = {}, 0
        for row in order:
            end += len(new[row])
            ends[row] = end - 1
        for follow in self._followed.values():
            follow.held += len(new.get(follow.row, []))
        return self._small.logits(h[[ends[row] for row in new]])

    def _cache_of(self, rows: int) -> RollingBufferCache:
        small = self._small
        if self._cache is None:
            self._cache = small.make_cache(rows)
        elif len(self._cache.lengths) < rows:
            self._cache.grow(rows, 0)
        return self._cache
