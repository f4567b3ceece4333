"""tokenizer.model, read by SentencePiece, which is imported only then: the first kind of tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from mistral.util.errors import printable, short_repr
from mistral.util.files import by_utf8_name, read_limited


class SentencePiece:
    """A SentencePiece model, with the tokens that the files beside it add.

    Args:
        path: the file, or the one that has it inside; for messages, and what is beside it.
        content: of a tokenizer.model that is inside another file: nothing beside it counts then. None: of `path`.
        adds_bos: whether a text begins with bos.
        added: words that were added to such a model, by id, which it gives to no text itself.

    Attributes:
        notes: what is odd about the files, a sentence each.

    Raises:
        TokenizerError: no SentencePiece model, or one that lacks bos, eos or unk.
    """

    def __init__(
        self,
        path: Path,
        content: bytes | None = None,
        adds_bos: bool = True,
        added: Mapping[int, AddedToken] | None = None,
    ) -> None:
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
        if content is None:
            added = as_spelled(told.added or read_added_tokens(path.parent), path.parent)
        self._added = {
            i: token for i, token in (added or {}).items() if i >= self.n_words or self._is_another(i, token)
        }
        self.added = {token.content: i for i, token in self._added.items()}
        self._names, self.unnamed = told.names, told.unnamed
        self.notes = tuple(self._taken_words())
        self._made: dict[frozenset[str], tuple[WordFinder, WordFinder | None]] = {}  # a few: one for each template

    def _is_another(self, i: int, token: AddedToken) -> bool:
        """Whether an added token takes the place of a piece: a control token that has another name there, as fine-tunes
        call spare ones, or a word: texts are cut at added words first, as transformers does, and then split."""
        if self._sp.IsControl(i) or self._sp.IsUnknown(i):
            return token.content != self._pieces[i]
        return not self._sp.IsByte(i)

    def _taken_words(self) -> Iterator[str]:
        """A note where the files beside the model give ids of its words to other tokens, as another model's do."""
        words = {i: self._pieces[i].replace("\u2581", " ").strip() for i in self._added if i < self.n_words}
        taken = [i for i in words if not self._sp.IsControl(i) and words[i] != self._added[i].content.strip()]
        if taken:
            token, word = printable(self._added[taken[0]].content), short_repr(words[taken[0]])
            yield (
                f"the files beside {self._path.name} give ids of its words to added tokens, such as {taken[0]} of "
                f"{word} to {token}: those are used, {len(taken)} in all; if they are another model's, remove them"
            )

    def _finders(self, kept: frozenset[str]) -> tuple[WordFinder, WordFinder | None]:
        """What finds added words in texts, those that are `kept` as texts aside; and what finds those that are
        normalized."""
        if kept in self._made:
            return self._made[kept]
        words = {i: token for i, token in self._added.items() if not token.special and token.content not in kept}
        normalized = {i: token for i, token in words.items() if token.normalized}
        as_they_stand = WordFinder({i: token for i, token in words.items() if not token.normalized})
        self._made[kept] = as_they_stand, WordFinder(normalized) if normalized else None
        return self._made[kept]

    @property
    def named(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._sp.unk_id()}
        return {**{name: self._pieces[i] for name, i in ids.items()}, **self._names}

    def encode(self, s: str) -> list[int]:
        return self._encode(s, frozenset())

    def _encode(self, s: str, kept: frozenset[str]) -> list[int]:
        """Ids of a text in which the words that are `kept` are no tokens."""
        as_they_stand, normalized = self._finders(kept)
        ids: list[int] = []
        for text, i in as_they_stand.split(s):
            ids += [*self._encode_spaced(text, normalized), *([] if i is None else [i])]
        return ids

    def _encode_spaced(self, text: str, normalized: WordFinder | None) -> list[int]:
        """Ids of a text with a space in front, in which words that are normalized are found with theirs."""
        if normalized is None:
            return self._sp.encode(text)
        ids: list[int] = []
        for part, i in normalized.split(spaced(text)):
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
        kept = frozenset(control)
        ids: list[int] = []
        for part, before, after in zip(parts, [None, *parts], [*parts[1:], None], strict=False):
            if isinstance(part, int):
                ids.append(part)
                continue
            text = part.lstrip() if self._strips(before, "rstrip") else part
            ids += self._encode(text.rstrip() if self._strips(after, "lstrip") else text, kept)
        return ids

    def _strips(self, part: str | int | None, side: str) -> bool:
        return isinstance(part, int) and bool(getattr(self._added.get(part), side, False))

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return self._sp.decode(ids)
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and i not in self._added and i < self.n_words:
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

        places = {i: token.content for i, token in self._added.items() if i < self.n_words}
        scores = [None if i in places else score(i) for i in range(self.n_words)]
        return [places.get(i, piece) for i, piece in enumerate(self._pieces)], scores

    def token_bytes(self) -> list[bytes | None]:
        silent = {i for i in range(self.n_words) if self._sp.IsControl(i) or self._sp.IsUnknown(i)} - self._added.keys()
        silent |= {i for i, token in self._added.items() if token.special}
        added = {i: token.content.encode() for i, token in self._added.items() if not token.special}
        pieces = [piece_bytes(piece, byte=bool(self._sp.IsByte(i))) for i, piece in enumerate(self._pieces)]
        found = {**dict(enumerate(pieces)), **added}
        return [None if i in silent else found.get(i) for i in range(max(found) + 1)]

    def has_control(self, word: str) -> bool:
        if word in self.added:
            return self._added[self.added[word]].special
        i = self._sp.piece_to_id(word)
        return self._sp.IsControl(i) and i not in self._added

    def control_tokens(self) -> dict[str, int]:
        ids = {piece: i for i, piece in enumerate(self._pieces) if self._sp.IsControl(i) and i not in self._added}
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
            with by_utf8_name(self._path) as path:
                return SentencePieceTokenizer(str(path), tokenizer_version=TokenizerVersion(version))
        with tempfile.TemporaryDirectory() as folder:  # it reads files alone
            path = Path(folder) / "tokenizer.model"
            path.write_bytes(self._content)
            return SentencePieceTokenizer(str(path), tokenizer_version=TokenizerVersion(version))

    def as_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._sp.serialized_model_proto()
