"""Guesses of the next tokens, so that a decode step may give several: speculation (arXiv 2211.17192, 2304.04487).

A token is sampled from the model's own logits with the request's own random number, and a guess is right if it is that
token: what is generated is what plain decoding gives. How many are guessed follows from what came of
earlier guesses and from what a step of so many tokens costs: where guessing does not pay, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from mistral.request import Request

# How many tokens of the text's end are looked for earlier in it, the longest that is there; and the share of guesses
# taken to be right then, before there is any experience.
HOPES = {1: 0.25, 2: 0.5, 3: 0.7, 4: 0.85, 5: 0.9, 6: 0.95}
MOST_TOKENS = 16  # of a step, guesses included
LONGEST, SHORTEST = max(HOPES), min(HOPES)
LOOKBACK = 1 << 16  # tokens of a request in which they are looked for, the newest
HOPE = 0.7  # the same share where a model guesses
HOPE_WEIGHT = 2.0  # as many guesses of experience as that counts for
FORGET = 0.9  # what is left of experience after each further guess
RECOVER = 0.99  # and after each step without one, so that it is tried again
STEP_COST = 0.15  # seconds of a further token in a step, over those of the first, before any was measured
NEW = 0.2  # weight of a new measurement
STALE = 50  # steps for which a measurement counts
AT_LEAST = 1.02  # times as many tokens a second as without a guess: less is not worth it


class Costs:
    """How long steps of so many tokens take, learnt from those that were made."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._last: dict[int, int] = {}  # in which step each was measured last
        self._steps = 0

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        old = self._seconds.get(tokens)
        # One that something else held up says little.
        self._seconds[tokens] = seconds if old is None else old + NEW * (min(seconds, 2 * old) - old)
        self._steps += 1
        self._last[tokens] = self._steps
        # Nor for ever: what looks dear is not tried, so nothing else would ever correct it.
        for n in [n for n, last in self._last.items() if self._steps - last > STALE]:
            del self._seconds[n], self._last[n]

    def of(self, tokens: int) -> float:
        """Seconds of a step of so many tokens: measured, or in line with the nearest that were; never more than a step
        of more tokens took."""
        known = self._seconds
        if not known:
            return 1 + STEP_COST * tokens
        below = max((n for n in known if n <= tokens), default=None)
        above = min((n for n in known if n > tokens), key=known.__getitem__, default=None)
        if below is None:
            assert above is not None
            return known[above] * _relative(tokens) / _relative(above)
        if above is None:
            return known[below] * _relative(tokens) / _relative(below)
        line = known[below] + (known[above] - known[below]) * (tokens - below) / (above - below)
        return min(line, known[above])


def just_begun(requests: Sequence[Request], right: Sequence[int]) -> bool:
    """Whether the step that had so many right guesses was the first after the prompt of one of the requests: such a
    step takes half as long again, since the processor's caches still hold what the prompt needed."""
    return any(len(request.output_ids) <= n + 2 for request, n in zip(requests, right, strict=True))


def _relative(tokens: int) -> float:
    return 1 + STEP_COST * (tokens - 1)


@dataclass
class Rate:
    """The share of guesses that turn out right, the newest counting most; `hope` until there are any."""

    hope: float = HOPE
    right: float = 0.0
    tried: float = 0.0

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guesses in a row the first so many were right; what follows a wrong one says nothing."""
        tried = min(guessed, right + 1)
        self.right = FORGET**tried * self.right + right
        self.tried = FORGET**tried * self.tried + tried

    def rest(self) -> None:
        """A step went by in which nothing was guessed."""
        self.right, self.tried = RECOVER * self.right, RECOVER * self.tried

    @property
    def value(self) -> float:
        """The share to expect."""
        return (self.right + self.hope * HOPE_WEIGHT) / (self.tried + HOPE_WEIGHT)


def how_many(costs: Costs, tokens: int, rate: float, most: int, each: float = 0.0) -> int:
    """How many guesses give the most tokens a second.

    Args:
        costs: of steps.
        tokens: that the step has anyhow, each of which gives one.
        rate: share of guesses that are right.
        most: guesses that there are.
        each: seconds that making a guess takes.
    """
    best, best_speed = 0, AT_LEAST * tokens / costs.of(tokens)
    gained, likely = 0.0, 1.0
    for guesses in range(1, most + 1):
        likely *= rate
        gained += likely
        speed = (tokens + gained) / (costs.of(tokens + guesses) + guesses * each)
        if speed > best_speed:
            best, best_speed = guesses, speed
    return best


@dataclass
class Seen:
    """The text of a request, and where in it each short run of tokens last came.

    Args:
        ids: prompt and output, the newest LOOKBACK or so of them.
        known: how many of the request's ids were taken in.
        after: for runs of each length, the place behind the last of them.
        rates: by the length of the run that was found.
        guessed_by: that length, for the guesses now out.
    """

    ids: list[int]
    known: int
    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0
    rates: dict[int, Rate] = field(default_factory=lambda: {n: Rate(hope) for n, hope in HOPES.items()})
    guessed_by: int = 0

    def take(self, request: Request) -> None:
        """Take in what was generated since."""
        generated = self.known - len(request.prompt_ids)
        self.ids += request.output_ids[generated:]
        self.known = len(request.prompt_ids) + len(request.output_ids)

    def find(self, most: int) -> list[int]:
        """What followed when the text's last tokens came before, and their number in `guessed_by` (0: never)."""
        end = len(self.ids)
        # All runs but the last ones, which would find themselves.
        for place in range(max(self.indexed, SHORTEST), end):
            for n in range(SHORTEST, min(LONGEST, place) + 1):
                self.after[tuple(self.ids[place - n : place])] = place
        self.indexed = max(self.indexed, end)
        for n in range(min(LONGEST, end), SHORTEST - 1, -1):
            found = self.after.get(tuple(self.ids[end - n :]))
            if found is not None:
                self.guessed_by = n
                period = end - found  # a text that repeats itself goes on so
                return [self.ids[found + i % period] for i in range(most)]
        self.guessed_by = 0
        return []


class NgramDraft:
    """Guesses that a request's text goes on as it did where its last tokens came before ("prompt lookup").

    Args:
        costs: of the model's steps, shared by all its drafts.
        most_tokens: of a step, guesses included.
    """

    def __init__(self, costs: Costs, most_tokens: int = MOST_TOKENS) -> None:
        self._costs, self._most_tokens = costs, most_tokens
        self._seen: WeakKeyDictionary[Request, Seen] = WeakKeyDictionary()

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        """See `Draft`."""
        tokens, proposed = len(requests), []
        for request, its_most in zip(requests, most, strict=True):
            seen = self._seen.get(request)
            if seen is None:
                newest = request.prompt_ids[-LOOKBACK:]
                seen = self._seen[request] = Seen(list(newest), len(request.prompt_ids))
            seen.take(request)
            guesses = seen.find(max(0, min(its_most, self._most_tokens - tokens)))
            if guesses:
                count = how_many(self._costs, tokens, seen.rates[seen.guessed_by].value, len(guesses))
                guesses = guesses[:count]
            tokens += len(guesses)
            proposed.append(guesses)
        return proposed

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        """See `Draft`."""
        if not just_begun(requests, right):
            self._costs.learn(len(requests) + sum(guessed), seconds)
        for request, its_guesses, its_right in zip(requests, guessed, right, strict=True):
            seen = self._seen.get(request)
            if seen is None:
                continue
            for n, rate in seen.rates.items():
                if n == seen.guessed_by and its_guesses:
                    rate.learn(its_guesses, its_right)
                else:
                    rate.rest()
