"""Ids to text as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mistral.tokenizer import TokenizerLike


class Detokenizer:
    """Text of a growing list of ids, handed out as soon as it is certain.

    Only the last few ids are decoded again for each new one. A character whose bytes have not all
    arrived is held back, so the pieces are valid text and join to the text of the whole.

    Args:
        tokenizer: decodes.
        context: ids that came before; their text is not handed out again, but shapes what follows.
    """

    CONTEXT = 8  # enough that the first piece is not taken for the start of a text

    def __init__(self, tokenizer: TokenizerLike, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._ids = self._window()
        self._told = len(_certain(self._text()))
        self._fresh = 0

    def _window(self) -> list[int]:
        """The last CONTEXT ids, or more until their text begins as it does in the whole.

        Without text they would be taken for the start of one, where SentencePiece drops a space; with
        U+FFFD in front they may begin within a character, which has at most four bytes.
        """
        size = self.CONTEXT
        while size < len(self._ids) and self._tokenizer.decode(self._ids[-size:])[:1] in ("", "\ufffd"):
            size += 1 if size < self.CONTEXT + 3 else size
        return self._ids[-size:]

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        """Take in one id; return the text that is now certain, often none."""
        self._ids.append(token)
        self._fresh += 1
        text = self._text()
        certain = _certain(text)
        piece = certain[self._told :]
        self._told = max(self._told, len(certain))
        if self._fresh > self.CONTEXT and text == certain:
            self._ids = self._window()
            self._told, self._fresh = len(self._text()), 0
        return piece

    def flush(self) -> str:
        """What was held back, as it stands: broken bytes come out as U+FFFD."""
        text = self._text()
        piece, self._told = text[self._told :], len(text)
        return piece


def _certain(text: str) -> str:
    return text.rstrip("\ufffd")


class StopStrings:
    """A sequence's text so far, and what of it may be shown: not the beginning of a stop string."""

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int], stop: tuple[str, ...]) -> None:
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
