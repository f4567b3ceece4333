"""Lines of a batch answered by this library's own engine, as the server would: the same fields, the same bodies."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mistral.batch.job import Write
from mistral.batch.lines import Answered, Line, answer
from mistral.loader.load import Loaded
from mistral.serve.answers import Answer, Piece
from mistral.serve.fields import ApiError
from mistral.serve.protocol import Served, read_chat, read_completion
from mistral.serve.worker import Event, Job, Worker
from mistral.util.errors import MistralError, Unavailable

AHEAD = 2  # times the rows: jobs that are handed to the worker, so that a row that is free is taken at once
READ = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}


@dataclass
class _Running:
    """A line that is being answered."""

    line: Line
    answer: Answer
    pieces: list[list[Piece]]
    left: int  # choices that have not ended

    @property
    def jobs(self) -> list[Job]:
        return [choice.job for choice in self.answer.choices]


class LocalEngine:
    """Answers lines with a loaded model.

    Args:
        loaded, served: the model, and how requests see it.
        rows: the most sequences in a step.
        chunk_size: see `Engine`.
        fingerprint: put into answers as their system_fingerprint.
    """

    def __init__(
        self, loaded: Loaded, served: Served, *, rows: int, chunk_size: int | None = None, fingerprint: str
    ) -> None:
        self.served, self._rows, self._fingerprint = served, rows, fingerprint
        self._worker = Worker(loaded.model, loaded.tokenizer, rows=rows, max_queue=1 << 20, chunk_size=chunk_size)
        self._worker.start()
        self.on_chat: Callable[[], None] | None = None  # called before the first conversation is answered

    def close(self) -> None:
        """End the worker's thread, after the step that it is in."""
        self._worker.close()

    def __call__(self, lines: Iterator[Line], write: Write) -> None:
        """Answer all lines; see `job.Runner`.

        Raises:
            Unavailable: the engine has died. Lines that it had begun are not written.
        """
        events: queue.SimpleQueue[tuple[str, int, Event]] = queue.SimpleQueue()
        running: dict[str, _Running] = {}
        try:
            while True:
                while sum(one.left for one in running.values()) < AHEAD * self._rows:
                    line = next(lines, None)
                    if line is None:
                        break
                    begun = self._begin(line, events)
                    if isinstance(begun, Answered):
                        write(begun)
                    else:
                        running[line.id] = begun
                if not running:
                    return
                line_id, index, event = events.get()
                if line_id not in running:  # another sample of it has failed
                    continue
                ended = self._take(running[line_id], index, event)
                if ended is not None:
                    del running[line_id]
                    write(ended)
        finally:
            self._cancel(running.values())

    def _begin(self, line: Line, events: queue.SimpleQueue[tuple[str, int, Event]]) -> _Running | Answered:
        """Hand a line to the worker; or what is written for one that is refused."""
        if self.on_chat is not None and READ.get(line.url) is read_chat:
            self.on_chat()
            self.on_chat = None
        try:
            asked = READ[line.url](line.body, self.served)
        except Exception as error:
            return _refused(line, error)
        made = Answer(asked, self.served, lambda index: lambda event: events.put((line.id, index, event)))
        begun = _Running(line, made, [[] for _ in made.choices], len(made.choices))
        self._worker.submit(begun.jobs)
        return begun

    def _take(self, running: _Running, index: int, event: Event) -> Answered | None:
        """What is written once a line's last event has come, or an error."""
        if event.error is not None:
            if self._worker.dead is not None:
                raise Unavailable(f"the engine has died: {event.error}")
            self._cancel([running])
            return _refused(running.line, event.error)
        running.left -= event.last
        running.pieces[index].append(running.answer.choices[index].take(event))
        if running.left:
            return None
        body = {**running.answer.whole(running.pieces), "system_fingerprint": self._fingerprint}
        return answer(running.line, 200, body["id"], body)

    def _cancel(self, running: Collection[_Running]) -> None:
        self._worker.cancel([job for one in running for job in one.jobs])


def _refused(line: Line, error: Exception) -> Answered:
    """An error as the server answers it: ours in full, others without their insides."""
    if isinstance(error, MistralError):
        error = ApiError(str(error))
    elif not isinstance(error, ApiError):
        error = ApiError(f"the engine failed: {error!r}"[:300], status=500, kind="server_error", code="internal")
    body: dict[str, Any] = error.body
    return answer(line, error.status, None, body)
