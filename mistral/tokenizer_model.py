"""tokenizer.model, read by SentencePiece, which is imported only then: the first kind of tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral.special_tokens import (
    AddedToken,
    SpecialTokens,
    TokenizerError,
    WordFinder,
    as_spelled,
    read_added_tokens,
    read_special_tokens,
    spaced,
)
from mistral.tokenizer_json import piece_bytes
from mistral.util.files import read_limited


class SentencePiece:
    """A SentencePiece model, with the tokens that the files beside it add.

    Args:
        path: the file, or the one that has it inside; for messages, and what is beside it.
        content: of a tokenizer.model that is inside another file: nothing beside it counts then. None: of `path`.
        adds_bos: whether a text begins with bos.

    Raises:
        TokenizerError: no SentencePiece model, or one that lacks bos, eos or unk.
    """

    def __init__(self, path: Path, content: bytes | None = None, adds_bos: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path, self._content, self.adds_bos = path, content, adds_bos
        self._sp = SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(read_limited(path, 10_000_000) if content is None else content)
            self.n_words = self._sp.vocab_size()
            self._pieces = self._sp.id_to_piece(list(range(self.n_words)))  # some may be no UTF-8
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        except (RuntimeError, ValueError):
            raise TokenizerError(f"{path} is not a SentencePiece model: fetch it again") from None
        self.bos_id, self.eos_id, self.pad_id = self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id()
        if min(self.bos_id, self.eos_id, self._sp.unk_id()) < 0:
            raise TokenizerError(f"{path} has no bos, no eos or no unk: it is not one of Mistral's")
        told = read_special_tokens(path.parent) if content is None else SpecialTokens()
        added = told.added or (read_added_tokens(path.parent) if content is None else {})
        added = added if content is not None else as_spelled(added, path.parent)
        self._added = {i: token for i, token in added.items() if i >= self.n_words}
        self.added = {token.content: i for i, token in self._added.items()}
        self._names = told.names
        words = {i: token for i, token in self._added.items() if not token.special}
        self._as_it_stands = WordFinder({i: token for i, token in words.items() if not token.normalized})
        normalized = {i: token for i, token in words.items() if token.normalized}
        self._normalized = WordFinder(normalized) if normalized else None

    @property
    def named(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._sp.unk_id()}
        return {**{name: self._pieces[i] for name, i in ids.items()}, **self._names}

    def encode(self, s: str) -> list[int]:
        ids: list[int] = []
        for text, i in self._as_it_stands.split(s):
            ids += [*self._encode_spaced(text), *([] if i is None else [i])]
        return ids

    def _encode_spaced(self, text: str) -> list[int]:
        """Ids of a text with a space in front, in which words that are normalized are found with theirs."""
        if self._normalized is None:
            return self._sp.encode(text)
        ids: list[int] = []
        for part, i in self._normalized.split(spaced(text)):
            # The model puts a space in front, which a part has already or has not: it goes to a letter of no word.
            ids += [*self._sp.encode(self._no_word + part)[self._skipped :], *([] if i is None else [i])]
        return ids

    @cached_property
    def _no_word(self) -> str:
        return next(letter for letter in map(chr, range(10, 200)) if not any(letter in word for word in self._pieces))

    @cached_property
    def _skipped(self) -> int:
        return len(self._sp.encode(self._no_word))

    def encode_parts(self, parts: Sequence[str | int], control: Mapping[str, int]) -> list[int]:
        """Each text is encoded by itself, with a space in front: so were the chats that such models learned from."""
        ids: list[int] = []
        for part, before, after in zip(parts, [None, *parts], [*parts[1:], None], strict=False):
            if isinstance(part, int):
                ids.append(part)
                continue
            text = part.lstrip() if self._strips(before, "rstrip") else part
            ids += self.encode(text.rstrip() if self._strips(after, "lstrip") else text)
        return ids

    def _strips(self, part: str | int | None, side: str) -> bool:
        return isinstance(part, int) and bool(getattr(self._added.get(part), side, False))

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return self._sp.decode(ids)
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and i < self.n_words:
                run.append(i)
                continue
            # A space in front is dropped at the start of a text, and only there.
            text += self._sp.decode([self._sp.piece_to_id("\u2581"), *run] if text else run)
            run = []
            token: AddedToken | None = self._added.get(i) if i is not None else None
            text += token.content if token and not token.special else ""
        return text

    def pieces(self) -> tuple[list[str], list[float | None]]:
        def score(i: int) -> float | None:
            unused = self._sp.IsControl(i) or self._sp.IsByte(i) or self._sp.IsUnknown(i)
            return None if unused else self._sp.get_score(i)

        return self._pieces, [score(i) for i in range(self.n_words)]

    def token_bytes(self) -> list[bytes | None]:
        silent = {i for i in range(self.n_words) if self._sp.IsControl(i) or self._sp.IsUnknown(i)}
        added = {i: token.content.encode() for i, token in self._added.items() if not token.special}
        pieces = [piece_bytes(piece, byte=bool(self._sp.IsByte(i))) for i, piece in enumerate(self._pieces)]
        found = {**dict(enumerate(pieces)), **added}
        return [None if i in silent else found.get(i) for i in range(max(found) + 1)]

    def has_control(self, word: str) -> bool:
        if word in self.added:
            return self._added[self.added[word]].special
        return self._sp.IsControl(self._sp.piece_to_id(word))

    def control_tokens(self) -> dict[str, int]:
        ids = {piece: i for i, piece in enumerate(self._pieces) if self._sp.IsControl(i)}
        return {**ids, **{token.content: i for i, token in self._added.items() if token.special}}

    def added_tokens(self) -> dict[str, int]:
        return self.added

    def for_mistral_common(self, version: str) -> Any:
        try:
            from mistral_common.tokens.tokenizers.base import TokenizerVersion
            from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
        except ImportError:
            raise TokenizerError("templates need mistral-common: pip install mistral-common") from None
        if self._content is None:
            return SentencePieceTokenizer(str(self._path), tokenizer_version=TokenizerVersion(version))
        with tempfile.TemporaryDirectory() as folder:  # it reads files alone
            path = Path(folder) / "tokenizer.model"
            path.write_bytes(self._content)
            return SentencePieceTokenizer(str(path), tokenizer_version=TokenizerVersion(version))

    def as_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._sp.serialized_model_proto()
