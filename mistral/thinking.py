"""Which of the generated tokens are what a model thinks before it answers: by ids alone, never by text. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ThoughtIds:
    """The ids that begin and end a thought."""

    begin: int
    end: int


class ThoughtReader:
    """Which of the tokens of an answer are thought.

    Args:
        ids: that begin and end one; None: there are none.
        prompt: ids before the answer, some of which may have begun a thought.

    Attributes:
        inside: whether what comes next is thought.
    """

    def __init__(self, ids: ThoughtIds | None, prompt: Sequence[int]) -> None:
        self._ids = ids
        marks = () if ids is None else (ids.begin, ids.end)
        last = next((i for i in reversed(prompt) if i in marks), None)
        self.inside = ids is not None and last == ids.begin

    def take(self, token: int | None, ends: bool = False) -> bool:
        """Whether the text that came with a token is thought.

        Args:
            token: None where only text was left.
            ends: whether the token begins something else, such as a call, which no thought holds.
        """
        was = self.inside
        if self._ids is not None and token is not None:
            if token == self._ids.begin:
                self.inside = True
            elif token == self._ids.end or ends:
                self.inside = False
        return was
