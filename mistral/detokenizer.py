"""Ids to text as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mistral.tokenizer import TokenizerLike


class Detokenizer:
    """Text of a growing list of ids, handed out as soon as it is certain.

    Only the last few ids are decoded again for each new one, whatever the ids are: those without text (control ids,
    ids past the last word) are skipped, and bytes that never complete a character are not decoded for ever. A
    character whose bytes have not all arrived is held back, so the pieces are valid text and join to the text of the
    whole.

    Args:
        tokenizer: decodes.
        context: ids that came before; their text is not handed out again, but shapes what follows.
    """

    CONTEXT = 8  # enough that the first piece is not taken for the start of a text
    LONGEST = 4 * CONTEXT  # ids without a whole character after which the oldest are given up
    PARTIAL = 3  # bytes of a character of which the last is missing, at most; each may show as one U+FFFD

    def __init__(self, tokenizer: TokenizerLike, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._without_text: dict[int, bool] = {}
        self._held = ""  # U+FFFD of bytes that can no longer complete a character
        recent = self._recent(context, 2 * self.CONTEXT + 3)
        self._ids, text = self._window(recent, self._decode(recent))
        self._told = len(whole_characters(text))
        self._fresh = 0
        self._pending = len(text) > self._told

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def _is_silent(self, token: int) -> bool:
        """Whether an id has no text. Twice, because SentencePiece drops a space at the start of a text."""
        if token not in self._without_text:
            self._without_text[token] = self._decode([token, token]) == ""
        return self._without_text[token]

    def _recent(self, context: Sequence[int], most: int) -> list[int]:
        """The last ids that have text."""
        found: list[int] = []
        for token in reversed(context):
            if len(found) == most:
                break
            if not self._is_silent(token):
                found.append(token)
        return found[::-1]

    def _window(self, ids: list[int], text: str) -> tuple[list[int], str]:
        """The last CONTEXT ids and their text, or a few more, until that is the end of the text of all of them.

        Without text they would be taken for the start of one, where SentencePiece drops a space; and they may begin
        within a character, which has at most four bytes.
        """
        for size in range(self.CONTEXT, self.CONTEXT + self.PARTIAL + 1):
            if size >= len(ids):
                break
            end = self._decode(ids[-size:])
            if end and text.endswith(end):
                return ids[-size:], end
        return ids, text

    def push(self, token: int) -> str:
        """Process one id; return the text that is now certain, often none."""
        if self._is_silent(token) and not (self._pending and not self._is_silent(self._ids[-1])):
            return ""  # only the first one within a character may change what its bytes mean
        self._ids.append(token)
        self._fresh += 1
        text = self._decode(self._ids)
        whole = whole_characters(text)
        self._pending = len(whole) < len(text)
        piece = whole[self._told :]
        if piece:
            piece, self._held = self._held + piece, ""
        self._told = max(self._told, len(whole))
        if self._fresh > (self.LONGEST if self._pending else self.CONTEXT):
            self._shorten(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Keep the last ids alone. What they leave behind of broken bytes is held, as its text is certain."""
        self._ids, end = self._window(self._ids, text)
        waiting = max(0, len(text) - self._told)
        live = min(self.PARTIAL, len(end) - len(whole_characters(end)), waiting)
        self._held += "\ufffd" * (waiting - live)
        self._told, self._fresh = len(end) - live, 0

    def flush(self) -> str:
        """What was held back, as it stands: broken bytes come out as U+FFFD."""
        text = self._decode(self._ids)
        piece = self._held + text[self._told :]
        self._told, self._held = max(self._told, len(text)), ""
        return piece


def whole_characters(text: str) -> str:
    """A text without U+FFFD at its end, where bytes of a character may be missing."""
    return text.rstrip("\ufffd")


class StopStrings:
    """A sequence's text so far, and what of it may be shown: not the beginning of a stop string."""

    def __init__(self, tokenizer: TokenizerLike, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._decoder = Detokenizer(tokenizer, prompt)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._show(self._decoder.push(token), ended=False)

    def flush(self) -> str:
        return "" if self.stopped else self._show(self._decoder.flush(), ended=True)

    def _show(self, new: str, ended: bool) -> str:
        text = self._held + new
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if ended else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
