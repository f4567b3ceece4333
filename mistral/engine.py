"""Ids in, ids out: a running batch that requests join and leave. Knows nothing about text, files or options."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mistral.adapters import BASE, find_adapter
from mistral.cache import RollingBufferCache
from mistral.finite import why_not_finite
from mistral.logprobs import logprobs, most_likely
from mistral.model import Transformer
from mistral.request import (
    BrokenLogits,
    Finish,
    GenerationError,
    Request,
    Token,
    changed_logits,
    check_request,
    ids_of,
    require_model,
    shares,
)
from mistral.sampling import RequestRng, sample_each
from mistral.sampling_params import SamplingParams
from mistral.util import memory
from mistral.util.arguments import require_integer, require_kind, whole_numbers
from mistral.util.errors import short_repr

Progress = Callable[[int, int], None]
STEP_TOKENS = 2048  # prompt tokens that a step processes, over all rows, unless a chunk size is given
LOGIT_FLOATS = 1 << 24  # logits held at once while a prompt is scored: 64 MB
LESS = "lower --max_tokens, shorten the prompt, or use --dtype bfloat16"  # where keys and values do not fit


class Engine:
    """A batch of requests, one step at a time. Requests join with `add` and leave when they end.

    Requests without a row of the cache wait, first come first served, and take one over when its sequence has
    ended. In one step some rows may process chunks of prompts while others decode. Nothing but its own prompt, params
    and adapter decides what a request generates. A request whose logits are NaN ends with an `error`; the others go on.
    After an exception in `step` the engine is of no more use. Where the model has a `draft`, a step may give several
    tokens of a request; which tokens, no draft changes.

    Args:
        model: the model.
        eos_ids: ids that end a sequence when they are generated, for requests without ids of their own.
        chunk_size: the most prompt tokens of a sequence in a step; None: `step_tokens` of all of them.
        score_prompts: also keep the log-probabilities of the prompts' tokens, for requests that do not say.
        rows: the most sequences in a step; None: `args.max_batch_size`, or no limit.
        positions: length of a sequence to make room for from the start. The cache grows when longer ones join.
        cache: one to use; its rows are the batch. None makes one, as large as the requests need and memory allows.
        step_tokens: the most prompt tokens of a step, over all rows, where there is no chunk_size.

    Attributes:
        cache: where keys and values are; None before the first step, unless one was given.

    Raises:
        GenerationError: a number out of range, or an argument of another type.
        CacheError: a cache of another shape or device than the model.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_ids: Iterable[int],
        chunk_size: int | None = None,
        score_prompts: bool = False,
        rows: int | None = None,
        positions: int = 0,
        cache: RollingBufferCache | None = None,
        step_tokens: int | None = None,
    ) -> None:
        counts = ("chunk_size", chunk_size, 1), ("rows", rows, 1), ("positions", positions, 0)
        for name, number, least in (*counts, ("step_tokens", step_tokens, 1)):
            if number is not None:
                require_integer(name, number, least, error=GenerationError)
        require_model(model)
        if cache is not None:
            require_kind("cache", cache, RollingBufferCache, "a RollingBufferCache: model.make_cache(rows)")
            cache.check_shape(model.args, model.device)
        self.model = model
        self.eos_ids = frozenset(whole_numbers("eos_ids", eos_ids, GenerationError))
        self.chunk_size = chunk_size
        self.step_tokens = step_tokens
        self.score_prompts = score_prompts
        self.cache = cache
        self._given = cache is not None
        self._limits = [n for n in (rows, model.args.max_batch_size) if n]
        self._least_positions = positions
        self._positions = 0  # that each row has room for
        self._fits = 0  # the most positions of a sequence that was found to fit the memory
        self._rows: list[Request | None] = [None] * len(cache.lengths) if cache is not None else []
        self._waiting: deque[Request] = deque()
        self._draft = None if model.draft is None else model.draft()
        self._joined = False  # whether there are requests that no room was made for yet
        self._added = 0

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        row: int | None = None,
        *,
        eos_ids: Iterable[int] | None = None,
        index: int | None = None,
        sample: int = 0,
        score: bool | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Have a prompt continued, from the next step that has a row for it.

        Args:
            prompt_ids: ids, at least one. A list is not copied: leave it alone until the request has ended.
                `StoredIds` stay in their file.
            params: how to continue it. One request is one sample: whoever needs `n` of them adds n requests.
            row: of the cache, to continue from what it holds: the beginning of the prompt, which is not processed
                again (nor scored). None takes the next free row, from its beginning.
            eos_ids: ids that end it; None: those of the engine.
            index: the caller's number for the prompt, for tokens and errors; None counts.
            sample: which of the n samples this is, from 0; with the seed it decides the random numbers.
            score: whether to keep the log-probabilities of the prompt's tokens; None: as the engine does.
            adapter: the name of one of `model.adapters`, "" for none; None takes their default. What a row holds must
                have been computed with it.

        Raises:
            GenerationError: an empty prompt, an id outside the vocabulary, a number out of range, or a row that is
                not there, is taken, or holds all of the prompt.
            UsageError: the model has no such adapter.
            OutOfMemory: keys and values of such a sequence do not fit the memory left.
        """
        index = self._added if index is None else index
        ids = ids_of(prompt_ids, index)
        require_kind("params", params, SamplingParams, error=GenerationError)
        check_request(ids, params, index, sample, self.model.args.vocab_size)
        chosen = find_adapter(self.model.adapters, adapter)
        held = 0 if row is None else self._check_row(row, ids, index)
        ends = self.eos_ids if eos_ids is None else frozenset(whole_numbers("eos_ids", eos_ids, GenerationError))
        scored = self.score_prompts if score is None else score
        request = Request(index, ids, params, ends, None, sample, num_computed=held, score=scored, adapter=chosen)
        request.arrived = self._added
        if not params.max_tokens and not scored:
            request.finish = "length"  # nothing to generate and nothing to score
        else:
            self._check_memory(request.positions)
            if params.max_tokens and not params.greedy:
                seed = int(torch.randint(2**62, (), device="cpu")) if params.seed is None else params.seed
                request.rng = RequestRng(seed, sample)
            if row is None:
                self._waiting.append(request)
                self._joined = True
            else:
                self._place(request, row)
        self._added += 1
        return request

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return not self._waiting and not any(self._rows)

    def stop(self, request: Request) -> None:
        """End a request from outside, as if it had generated an eos id, also while it waits.

        Raises:
            GenerationError: it is no request of this engine.
        """
        require_kind("request", request, Request, "what add() gave", GenerationError)
        if request.finish is None:
            if request not in self._waiting and request not in self._rows:
                raise GenerationError(f"the request for prompt {request.index} is of another engine")
            self._end(request, "stop")

    def step(self) -> list[Token]:
        """Run one forward; return the tokens generated by rows whose prompt is processed, in row order.

        A request that has just ended has its `finish` set; the eos id itself is not among the tokens. The further
        tokens of requests that have several come after, in their order.

        Raises:
            OutOfMemory: there is too little memory left for even one of the requests that wait.
        """
        if self._waiting:
            self._admit()
        if not any(self._rows):
            return []
        with torch.inference_mode(), self.model.share_cores():
            return self._forward()

    def _adapted(self, requests: Sequence[Request | None], counts: Sequence[int]) -> AbstractContextManager[None]:
        """While open, products are of so many rows of each request."""
        if self.model.adapters is None:
            return nullcontext()
        names = [BASE if request is None else request.adapter for request in requests]
        return self.model.adapters.of(names, counts, self.model.device)

    # Rows and memory.

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        request.changes = None
        if request.row is None:
            self._waiting.remove(request)
        else:
            self._rows[request.row] = None
            request.row = None

    def _fail(self, request: Request, error: GenerationError) -> None:
        """End a request that cannot go on. Its NaN keys must not meet the row's next request, even unseen: 0 x NaN."""
        request.error, row = error, request.row
        self._end(request, "error")
        if self.cache is not None and row is not None:
            self.cache.wipe(row)

    def _place(self, request: Request, row: int) -> None:
        self._rows[row], request.row = request, row

    def _check_row(self, row: int, ids: Sequence[int], index: int) -> int:
        """How many tokens of the prompt the row holds."""
        if self.cache is None or not isinstance(row, int) or not 0 <= row < len(self._rows):
            raise GenerationError(
                f"there is no row {short_repr(row)} for prompt {index}: the cache has {len(self._rows)} rows"
            )
        if self._rows[row] is not None:
            raise GenerationError(f"row {row} is taken by a request that has not ended")
        held = self.cache.lengths[row]
        if held >= len(ids):
            raise GenerationError(f"the cache holds {held} tokens of prompt {index}, which has {len(ids)}: rewind it")
        return held

    def _check_memory(self, positions: int) -> None:
        """Refuse a sequence that does not fit, alone or (where the cache is given) in a row of its own."""
        if positions <= self._fits:
            return
        needed = self.model.cache_bytes(positions)
        what = f"keys and values of one sequence of {positions} positions"
        if self._given:
            needed, what = needed * len(self._rows), f"{positions} positions in the cache"
            self._positions = positions  # the cache itself makes room, step by step
        there = 0 if self.cache is None else self.cache.nbytes
        memory.require(max(0, needed - there), self.model.device, what, LESS)
        self._fits = positions

    def _admit(self) -> None:
        """Give rows to those that wait, in the order in which they came, as far as rows and memory go."""
        if not self._given and (self._joined or (self._waiting[0].positions > self._positions and not any(self._rows))):
            self._make_room()
        self._joined = False
        for row, held in enumerate(self._rows):
            if not self._waiting or self._waiting[0].positions > self._positions:
                return
            if held is None:
                assert self.cache is not None
                self.cache.reset(row)
                self._place(self._waiting.popleft(), row)

    def _make_room(self) -> None:
        """Make a cache for those that wait, or let it grow; where memory is short and others run, they wait."""
        running = sum(request is not None for request in self._rows)
        rows = min([running + len(self._waiting), *self._limits])
        positions = max(self._least_positions, *(request.positions for request in self._waiting))
        if rows <= len(self._rows) and positions <= self._positions:
            return
        device = self.model.device
        if not running:
            self.cache, self._rows, self._positions = None, [], 0  # its memory counts as left
            rows = rows_that_fit(self.model, rows, positions)
            self.cache = self.model.make_cache(rows, positions)
            self._rows, self._positions = [None] * rows, positions
            return
        assert self.cache is not None
        now = len(self._rows)
        positions = max(positions, self._positions)
        # Twice as many rows at least: whoever joins one by one moves the storage seldom.
        roomy = min([max(rows, 2 * now), *self._limits]) if rows > now else now
        for rows in (roomy, now):
            more, left = rows * self.model.cache_bytes(positions) - self.cache.nbytes, memory.available(device)
            if left is None or more <= left:
                self.cache.grow(rows, positions)
                self._rows += [None] * (rows - now)
                self._positions = positions
                return

    # A step.

    def _forward(self) -> list[Token]:
        assert self.cache is not None
        guessing = self._guess()
        began = time.perf_counter()
        inputs = self._next_inputs()
        ids = torch.tensor([i for its in inputs for i in its], device=self.model.device)
        continued = (r.row for r in self._rows if r is not None and r.prefilling and not r.score)
        prompts = frozenset(row for row in continued if row is not None)
        plan = replace(self.cache.plan([len(its) for its in inputs]), prompts=prompts)
        with self._adapted(self._rows, plan.seqlens):
            h = self.model.step(ids, plan, self.cache)
        self.cache.commit(plan)

        choosing: list[int] = []
        ready: list[Request] = []
        end = 0
        for request, its in zip(list(self._rows), inputs, strict=True):
            begin, end = end, end + len(its)
            if request is None:
                continue
            if request.score and request.prefilling:
                self._score(request, h[begin:end])
            request.num_computed += len(its)
            if request.prefilling or request.finish:
                continue
            if request.params.max_tokens:
                choosing += range(end - 1 - len(request.guesses), end)
                ready.append(request)
            else:
                self._end(request, "length")
        if not ready:
            return []
        guessed = [len(request.guesses) for request in ready]
        with self._adapted(ready, [1 + n for n in guessed]):
            logits = self.model.logits(h[choosing])
        tokens = self._match(logits, ready) if any(guessed) else self._sample(logits, ready)
        if guessing:
            self._learn(ready, guessed, time.perf_counter() - began)
        return tokens

    def _guess(self) -> bool:
        """Have the draft guess what follows; not beside prompts, whose tokens fill a step. Returns whether it did."""
        decoding = [request for request in self._rows if request is not None]
        if self._draft is None or self.cache is None or any(request.prefilling for request in decoding):
            return False
        # Refused guesses are rewound, and no buffer goes back further than it has slots to spare.
        spare = min(store.block for store in self.cache.layers) - 1
        most = [min(spare, r.params.max_tokens - len(r.output_ids) - 1) for r in decoding]
        for request, its, ids in zip(decoding, most, self._draft.propose(decoding, most), strict=True):
            request.guesses = ids[:its]
        return True

    def _learn(self, ready: list[Request], guessed: list[int], seconds: float) -> None:
        """Tell the draft what came of its guesses, and drop those that were not right."""
        assert self._draft is not None
        right = [n - len(request.guesses) for n, request in zip(guessed, ready, strict=True)]
        self._draft.learn(ready, guessed, right, seconds)
        for request in ready:
            request.guesses = []

    def _next_inputs(self) -> list[list[int]]:
        """The ids that each row contributes to this step."""
        waiting = [request for request in self._rows if request is not None and request.prefilling]
        if self.chunk_size is None:
            chunks = shares(waiting, self.step_tokens or STEP_TOKENS)
        else:
            chunks = dict.fromkeys(waiting, self.chunk_size)
        return [request.next_ids(chunks.get(request, 0)) if request is not None else [] for request in self._rows]

    def _score(self, request: Request, h: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the ones just processed."""
        first_id = request.num_computed + 1
        targets = request.prompt_ids[first_id : first_id + len(h)]
        rows = max(1, LOGIT_FLOATS // self.model.args.vocab_size)
        for first in range(0, len(targets), rows):
            wanted = torch.tensor(targets[first : first + rows], device=h.device)
            with self._adapted([request], [len(wanted)]):
                logits = self.model.logits(h[first : first + len(wanted)])
            found = logprobs(logits, wanted[:, None]).squeeze(-1).tolist()
            if any(logprob != logprob for logprob in found):
                return self._fail(request, self._nan_logits(request.index))
            request.prompt_logprobs += found
            if request.params.top_logprobs:
                request.prompt_top += most_likely(logits, [request.params.top_logprobs] * len(found))

    def _match(self, logits: Tensor, ready: list[Request]) -> list[Token]:
        """Choose as if token by token, for as long as a request's token is the one that was guessed.

        What lies behind a guess that was wrong, or behind the end of a request, is forgotten again. `guesses` of each
        request keeps what was not right.
        """
        assert self.cache is not None
        tokens: list[Token] = []
        rows = {request: request.row for request in ready}
        at = dict(zip(ready, accumulate([0] + [1 + len(r.guesses) for r in ready[:-1]]), strict=True))
        going = list(ready)
        while going:
            tokens += self._sample(logits[[at[request] for request in going]], going)
            going = [r for r in going if r.finish is None and r.guesses and r.guesses[0] == r.output_ids[-1]]
            for request in going:
                at[request] += 1
                del request.guesses[0]
        for request, row in rows.items():
            refused = len(request.guesses)
            if refused and request.error is None and row is not None:
                request.num_computed -= refused
                left = self.cache.rewind(row, self.cache.lengths[row] - refused)
                assert left == request.num_computed, "a guess took more slots than the buffer has to spare"
        return tokens

    def _sample(self, logits: Tensor, ready: list[Request]) -> list[Token]:
        """Choose a token for each request from its logits, [R, V], and end those that end with it."""
        draws = [0.0 if request.rng is None else request.rng() for request in ready]
        uniform = torch.tensor(draws, dtype=torch.float32, device=logits.device)
        chosen = sample_each(changed_logits(logits, ready), uniform, [request.params for request in ready])
        of_chosen = logprobs(logits, chosen[:, None]).squeeze(-1)
        tokens = []
        for request, token, logprob, top in zip(
            ready,
            chosen.tolist(),
            of_chosen.tolist(),
            most_likely(logits, [request.params.top_logprobs for request in ready]),
            strict=True,
        ):
            if logprob != logprob:
                self._fail(request, self._nan_logits(request.index))
                continue
            if token in request.eos_ids:
                self._end(request, "stop")
                continue
            request.output_ids.append(token)
            tokens.append(Token(request, token, logprob, top))
            if len(request.output_ids) == request.params.max_tokens:
                self._end(request, "length")
        return tokens

    def _nan_logits(self, index: int) -> BrokenLogits:
        """What ends a request whose logits are NaN."""
        return BrokenLogits(f"the model's logits for prompt {index} are NaN: {self._why_not_finite}")

    @cached_property
    def _why_not_finite(self) -> str:
        return why_not_finite(self.model, self.model.dtype)


def rows_that_fit(model: Transformer, rows: int, positions: int) -> int:
    """Rows for a cache of sequences of up to `positions`: as many as asked for, or as memory allows; at least one.

    Raises:
        OutOfMemory: not even one.
    """
    needed = model.cache_bytes(positions)
    memory.require(needed, model.device, f"keys and values of one sequence of {positions} positions", LESS)
    left = memory.available(model.device)
    return rows if left is None or not needed else max(1, min(rows, left // needed))
