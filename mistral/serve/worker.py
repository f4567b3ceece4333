"""One thread owns the engine: requests of the server join its running batch, and tokens leave it.

A row keeps what it holds after its request has ended; a prompt that begins with it is not computed again. Knows
nothing about HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from mistral.detokenizer import StopStrings
from mistral.engine import Engine
from mistral.model import Transformer
from mistral.request import Finish, Request, Token, common_prefix
from mistral.sampling_params import SamplingParams
from mistral.tokenizer import TokenizerLike
from mistral.util.english import counted
from mistral.util.errors import Fatal, MistralError, Unavailable

log = logging.getLogger("mistral")
# Prompt tokens of a step on a CPU: others decode but once a step, and products of more rows are no faster there.
CPU_STEP = 512
LAST = 20.0  # seconds that a step may take once nobody waits for it


class Busy(Unavailable):
    """The queue is full; nothing was begun."""


class Ended(Unavailable):
    """The server shuts down, or its engine has died; nothing was begun."""


@dataclass(frozen=True)
class Event:
    """What happened to a job: a token, or its end.

    Args:
        text: text that is now certain; may be empty, never half a character.
        token: the token, None at the end.
        finish: set at the end.
        error: set where the job failed.
    """

    text: str = ""
    token: Token | None = None
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """One sample of a prompt that a client waits for.

    Args:
        prompt_ids, params, sample, eos_ids: as `Engine.add` takes them.
        score: whether log-probabilities of the prompt are wanted: then nothing of it is reused.
        trim: whether its text is an answer, which begins without the space that some tokenizers put first.
        markers: control ids at which a text ends and another begins, such as [TOOL_CALLS].
        tell: called with each event, in the worker's thread unless `Worker.deliver` is another.
        adapter: as `Engine.add` takes it.
        cached: tokens of the prompt that a row held already.
        cancelled: whether its client has gone.
        stopped: whether a stop string has ended its text.
        taken: tokens that its text has, of those that were generated.
        row: of the cache; -1 before it has one.
        began: when it was made, in seconds of `time.monotonic`.
        request, text: the engine's request, and what of its text may be shown, once it has a row.
    """

    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    tell: Callable[[Event], None]
    sample: int = 0
    score: bool = False
    trim: bool = False
    markers: Collection[int] = ()
    cached: int = 0
    cancelled: bool = False
    stopped: bool = False
    taken: int = 0
    row: int = -1
    began: float = field(default_factory=time.monotonic)
    request: Request | None = None
    text: StopStrings | None = None
    adapter: str | None = None


@dataclass
class Counts:
    """What the worker has done since it began, for /metrics."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    ended: int = 0
    cancelled: int = 0
    failed: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0


class Worker:
    """A thread with an engine.

    Args:
        model, tokenizer: what generates.
        rows: the most sequences in a step.
        max_queue: the most jobs that wait for a row.
        chunk_size: see `Engine`.

    Attributes:
        counts: what it has done.
        dead: what ended the thread, if anything did.
        deliver: called in the worker's thread, once a step, with the jobs that have events and those. To hand over one
            by one costs a change of threads each, while the next step waits.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TokenizerLike,
        *,
        rows: int,
        max_queue: int,
        chunk_size: int | None = None,
    ) -> None:
        self.counts = Counts()
        self.dead: BaseException | None = None
        self.rows, self.max_queue = rows, max_queue
        self._model, self._tokenizer, self._chunk_size = model, tokenizer, chunk_size
        self._cache = model.make_cache(rows)
        self._engine = self._new_engine()
        self._held: list[list[int]] = [[] for _ in range(rows)]  # ids whose keys a free row holds
        self._held_by: list[str | None] = [None] * rows  # the adapter that they were computed with
        self._used = [0] * rows  # when a row was last given away, in jobs
        self._running: list[Job] = []
        self._admitted: deque[Job] = deque()  # no longer waiting, and not yet running
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()  # guards what jobs wait, and how many do not
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._told: list[tuple[Job, Event]] = []  # since the last delivery
        self.deliver: Callable[[Sequence[tuple[Job, Event]]], None] = deliver

    def _new_engine(self) -> Engine:
        most = CPU_STEP if self._model.device.type == "cpu" else None
        return Engine(self._model, eos_ids=(), cache=self._cache, chunk_size=self._chunk_size, step_tokens=most)

    # For any thread.

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs done: all of them, or none.

        Raises:
            Busy: too many wait.
            Ended: the worker ends, or has died.
        """
        with self._changed:
            if self._closing or self.dead:
                raise Ended("the server is shutting down" if self._closing else "the server's engine has died")
            free = self.rows - len(self._running) - len(self._admitted)
            if len(self._waiting) + len(jobs) > self.max_queue + free:
                wait = max(0, len(self._waiting) - free)
                these = f", and this request asks for {len(jobs)}" if len(jobs) > 1 else ""
                waiting = f"{counted(wait, 'continuation')} {'waits' if wait == 1 else 'wait'} already, of "
                full = f"{waiting}{self.max_queue} that may" if self.max_queue else "no row is free, and none may wait"
                raise Busy(f"{full}{these}: try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Collection[Job]) -> None:
        """End jobs whose client has gone; those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    @property
    def busy(self) -> tuple[int, int]:
        """How many jobs run, and how many wait."""
        return len(self._running) + len(self._admitted), len(self._waiting)

    def close(self) -> None:
        """Take no more jobs, finish those there are, and end."""
        self._end_after(())

    def abandon(self) -> None:
        """Take no more jobs, and end after this step. A program that ended within one would be aborted."""
        self._end_after([*self._running, *self._admitted, *self._waiting], LAST)

    def _end_after(self, cancelled: Collection[Job], seconds: float | None = None) -> None:
        with self._changed:
            self._closing = True
        self.cancel(cancelled)
        if self._thread.is_alive():
            self._thread.join(seconds)

    # The worker's own thread.

    def _run(self) -> None:
        try:
            while self._next():
                self._step()
                self._hand_over()
        except BaseException as error:
            self.dead = error
            log.exception("the engine has died")
            with self._changed:
                jobs = [*self._running, *self._admitted, *self._waiting]
                self._waiting.clear()
            for job in jobs:
                self._tell(job, Event(error=error if isinstance(error, Exception) else RuntimeError(repr(error))))
            self._hand_over()

    def _next(self) -> bool:
        """Wait for something to do, and give rows to jobs; False at the end."""
        with self._changed:
            while not self._waiting and not self._running:
                if self._closing:
                    return False
                self._changed.wait()
            gone = [job for job in self._running if job.cancelled]
            kept = deque(job for job in self._waiting if not job.cancelled)
            self.counts.cancelled += len(gone) + len(self._waiting) - len(kept)
            self._waiting = kept
            for job in gone:
                self._stop(job)
            while self._waiting and len(self._running) + len(self._admitted) < self.rows:
                self._admitted.append(self._waiting.popleft())
        while self._admitted:
            begun = self._admit(self._admitted[0])
            with self._changed:
                job = self._admitted.popleft()
                if begun:
                    self._running.append(job)
        return True

    def _stop(self, job: Job) -> None:
        assert job.request is not None
        unread = job.request.prefilling
        self._engine.stop(job.request)
        self._free(job)
        if unread:  # nobody has seen whether its numbers are any
            self._forget(job.row)

    def _forget(self, row: int) -> None:
        self._cache.wipe(row)
        self._held[row] = []

    def _admit(self, job: Job) -> bool:
        """Give a job the free row that holds most of its prompt; of those that hold as much, the one unused longest.

        Returns:
            Whether it has begun; else it has failed.
        """
        taken = {other.row for other in self._running}
        ids = [] if job.score else job.prompt_ids[:-1]
        free = [row for row in range(self.rows) if row not in taken]
        common = {row: common_prefix(self._held[row], ids) if self._held_by[row] == job.adapter else 0 for row in free}
        row = max(free, key=lambda row: (common[row], -self._used[row]))
        try:
            job.cached = self._cache.rewind(row, common[row])
            self._held[row], self._held_by[row] = self._held[row][: job.cached], job.adapter
            job.text = StopStrings(self._tokenizer, job.prompt_ids, job.params.stop)
            job.request = self._engine.add(
                job.prompt_ids,
                job.params,
                row,
                eos_ids=job.eos_ids,
                index=0,
                sample=job.sample,
                score=job.score,
                adapter=job.adapter,
            )
        except Exception as error:
            if not isinstance(error, MistralError):
                log.exception("a request could not begin")
            self.counts.failed += 1
            self._tell(job, Event(error=error))
            return False
        job.row, self._used[row] = row, 1 + max(self._used)
        self.counts.prompt_tokens += len(job.prompt_ids)
        self.counts.cached_tokens += job.cached
        return True

    def _step(self) -> None:
        try:
            tokens = self._engine.step()
        except Fatal:
            raise
        except Exception as error:
            return self._start_anew(error)
        self.counts.steps += 1
        of = {job.request: job for job in self._running}
        for token in tokens:
            self._take(of[token.request], token)
        for job in [job for job in self._running if job.request is not None and job.request.finish]:
            self._end(job)

    def _take(self, job: Job, token: Token) -> None:
        assert job.text is not None
        if job.stopped:
            return  # the same step gave more, behind the stop string
        if len(token.request.output_ids) == 1:
            self.counts.first_tokens += 1
            self.counts.first_token_seconds += time.monotonic() - job.began
        self.counts.generated_tokens += 1
        job.taken += 1
        if token.id in job.markers:
            text = self._trimmed(job, job.text.flush())
            before = job.prompt_ids + token.request.output_ids[: job.taken]
            job.text = StopStrings(self._tokenizer, before, job.params.stop)
        else:
            text = self._trimmed(job, job.text.push(token.id))
        if job.text.stopped:
            job.stopped = True
            self._engine.stop(token.request)
        self._tell(job, Event(text, token))

    def _trimmed(self, job: Job, text: str) -> str:
        """Text of an answer, without a first space that its ids alone do not begin with."""
        if job.trim and text and job.request is not None:
            job.trim = False
            if text[0] == " " and self._tokenizer.decode(job.request.output_ids)[:1] != " ":
                return text[1:]
        return text

    def _end(self, job: Job) -> None:
        assert job.request is not None
        assert job.text is not None
        self._free(job)
        if job.request.error is not None:
            self.counts.failed += 1
            self._held[job.row] = []
            return self._tell(job, Event(error=job.request.error))
        self.counts.ended += 1
        rest = self._trimmed(job, job.text.flush())
        self._tell(job, Event(rest, finish="stop" if job.text.stopped else job.request.finish))

    def _free(self, job: Job) -> None:
        """Take a job off, and remember what its row holds."""
        assert job.request is not None
        self._running.remove(job)
        self._held[job.row] = (job.prompt_ids + job.request.output_ids)[: self._cache.lengths[job.row]]

    def _start_anew(self, error: Exception) -> None:
        """After a step that failed as a whole: those that ran have failed, and the next ones get an empty cache."""
        log.error("a step failed: %s", error, exc_info=error)
        jobs, self._running = self._running, []
        self._cache.reset()
        for row in range(self.rows):
            self._forget(row)
        self._engine = self._new_engine()
        self.counts.failed += len(jobs)
        for job in jobs:
            self._tell(job, Event(error=error))

    def _tell(self, job: Job, event: Event) -> None:
        self._told.append((job, event))

    def _hand_over(self) -> None:
        told, self._told = self._told, []
        try:
            if told:
                self.deliver(told)
        except RuntimeError:  # its event loop has ended: nobody listens
            for job, _ in told:
                job.cancelled = True


def deliver(told: Sequence[tuple[Job, Event]]) -> None:
    """Tell each job its event."""
    for job, event in told:
        job.tell(event)
