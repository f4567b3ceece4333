"""Text to ids and back.

Which file is read by what: a SentencePiece model by `sentencepiece` (tokenizer_model.py), tekken.json by mistral-common
(tekken.py), tokenizer.json by `tokenizers` (tokenizer_json.py), each imported only then.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from mistral.special_tokens import AddedToken, SpecialTokens, TokenizerError
from mistral.tekken import Tekken
from mistral.tokenizer_json import JsonTokenizer
from mistral.tokenizer_model import SentencePiece
from mistral.util.arguments import path_of, require_kind, whole_numbers
from mistral.util.errors import printable, short_repr


class TokenizerLike(Protocol):
    """What generation needs of a tokenizer; anything with these will do.

    `encode` may put bos in front or not: `encode` below sees to it that a prompt has one. A negative id is none.
    """

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, s: str) -> list[int]: ...
    def decode(self, t: list[int]) -> str: ...


class Tokenizer:
    """A SentencePiece `tokenizer.model*` or a `tekken.json`, which are Mistral's own, or a `tokenizer.json`.

    Tokens that the files beside it add (tokenizer_config.json, added_tokens.json, else tokenizer.json) belong to it.

    Raises:
        TokenizerError: no such file, or not a tokenizer.
    """

    def __init__(self, model_path: str | PathLike[str]) -> None:
        path = path_of("the tokenizer", model_path, TokenizerError)
        if not path.is_file():
            raise TokenizerError(f"no tokenizer at {path}")
        kind: Any = SentencePiece
        if path.suffix == ".json":
            kind = JsonTokenizer if path.name.endswith("tokenizer.json") else Tekken
        self._set(path, kind(path))

    def __repr__(self) -> str:
        return f"<Tokenizer {printable(self.path.name)}: {self.kind}, {self.n_words} words>"

    def _set(self, path: Path, model: Any) -> None:
        self.path = path
        self._ends: frozenset[int] | None = None
        self._model = model

    @classmethod
    def from_sentencepiece(
        cls, path: Path, content: bytes, adds_bos: bool = True, added: Mapping[int, AddedToken] | None = None
    ) -> Tokenizer:
        """The tokenizer that a SentencePiece model in another file is.

        Args:
            path: that file, for messages.
            content: of a tokenizer.model.
            adds_bos: whether a text begins with bos.
            added: words that were added to it, by id, which it gives to no text itself.

        Raises:
            TokenizerError: no SentencePiece model, or one that lacks bos, eos or unk.
        """
        made = cls.__new__(cls)
        made._set(path, SentencePiece(path, content, adds_bos, added))
        return made

    @classmethod
    def from_tokenizers(cls, path: Path, tokenizer: Any, told: SpecialTokens, notes: Iterable[str] = ()) -> Tokenizer:
        """The tokenizer that an object of the `tokenizers` library is.

        Args:
            path: the file that it was made from, for messages.
            tokenizer: taken over, not copied; a post-processor of it puts bos in front, if any does.
            told: the names of its special tokens.
            notes: what was assumed when it was made, a sentence each.

        Raises:
            TokenizerError: the library cannot use it.
        """
        made = cls.__new__(cls)
        made._set(path, JsonTokenizer(path, tokenizer, told, notes))
        return made

    @property
    def kind(self) -> str:
        """ "sentencepiece", "tekken", or "tokenizers", which may be like either of them."""
        return "tekken" if self.is_tekken else "tokenizers" if self.is_json else "sentencepiece"

    @property
    def n_words(self) -> int:
        """Size of the vocabulary, without tokens that were added past it."""
        return self._model.n_words

    @cached_property
    def added(self) -> Mapping[str, int]:
        """Ids of the tokens that were added to the vocabulary, by text: past it, or in places of it."""
        return dict(self._model.added)

    @cached_property
    def n_ids(self) -> int:
        """One more than the largest id that has a word."""
        return max(self.n_words, *(i + 1 for i in self.added.values())) if self.added else self.n_words

    @property
    def bos_id(self) -> int:
        """Id that begins a text; -1 where there is none."""
        return self._model.bos_id

    @property
    def eos_id(self) -> int:
        """Id that ends a text; -1 where there is none."""
        return self._model.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a sequence: `eos_id`, or those that were set, as the model's other files may name more."""
        return self._ends if self._ends is not None else frozenset({self.eos_id} - {-1})

    @eos_ids.setter
    def eos_ids(self, ids: Iterable[int]) -> None:
        self._ends = frozenset(whole_numbers("eos_ids", ids, TokenizerError))

    def settle_eos(self, told: Iterable[int]) -> None:
        """Where `eos_id` is that of a usual name only, as no file of the tokenizer names one: the least of the ids that
        the model's other files name, unless it is among them."""
        if not self.guesses_eos or not (ids := set(told)):
            return
        if self.eos_id not in ids:
            self._model.eos_id = min(ids)
        self._model.guesses_eos = False

    @property
    def guesses_eos(self) -> bool:
        """Whether `eos_id` is that of a usual name, because no file names one."""
        return bool(getattr(self._model, "guesses_eos", False))

    @property
    def pad_id(self) -> int:
        """Padding id; -1 where there is none."""
        return self._model.pad_id

    @property
    def adds_bos(self) -> bool:
        """Whether texts begin with bos; a tokenizer.json may have it otherwise."""
        return bool(getattr(self._model, "adds_bos", True))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about it, a sentence each."""
        return tuple(getattr(self._model, "notes", ()))

    @property
    def is_tekken(self) -> bool:
        """Whether it is a tekken.json."""
        return isinstance(self._model, Tekken)

    @property
    def is_json(self) -> bool:
        """Whether it is a tokenizer.json, or an object of the `tokenizers` library."""
        return isinstance(self._model, JsonTokenizer)

    @property
    def is_byte_level(self) -> bool:
        """Whether words are made of bytes, as in tekken; else they are SentencePiece's."""
        return self.is_tekken or (self.is_json and self._model.is_byte_level)

    @property
    def version(self) -> str:
        """Which of Mistral's it is: "v1", "v3", ... by the file's name where that says so, else by its contents."""
        if isinstance(self._model, Tekken):
            return self._model.version
        if match := re.search(r"\.(v\d+)\w*$", self.path.name):
            return match[1]
        if self.has_control("[SYSTEM_PROMPT]"):
            return "v7"
        return "v3" if self.has_control("[INST]") else "v1"

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids of the control tokens by text: no text gives them, and they have none."""
        return self._model.control_tokens()

    @cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens by text that are no words: the control tokens, and what was added to the vocabulary."""
        return {**self._model.control_tokens(), **self._model.added_tokens()}

    @property
    def flags(self) -> Mapping[str, AddedToken]:
        """Of a SentencePiece model, the tokens that were added to it, by text."""
        return {token.content: token for token in self._model._added.values()} if self.kind == "sentencepiece" else {}

    @property
    def named(self) -> Mapping[str, str]:
        """Texts of bos_token and eos_token (unk_token, pad_token)."""
        return self._model.named

    @property
    def named_in_templates(self) -> Mapping[str, str]:
        """The same as chat templates are given them: without those of which tokenizer_config.json has none."""
        return {name: text for name, text in self.named.items() if name not in self._model.unnamed}

    def has_control(self, word: str) -> bool:
        """Whether a control token, such as "[INST]", has an id of its own."""
        _check_unicode(word)
        return self._model.has_control(word)

    def pieces(self) -> tuple[list[str], list[float | None]]:
        """The words of a SentencePiece model, and the score of each; None for those that no text is split into."""
        return self._model.pieces()

    def as_file(self) -> tuple[str, bytes]:
        """A name and a content: of a file of its own, for one that was made from a part of another file."""
        return self._model.as_file()

    def byte_words(self) -> list[bytes]:
        """The words of a tekken.json, by rank, as bytes."""
        return self._model.byte_words()

    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each id, up to the last that has a word; None for those without text: control ids, unk."""
        words: list[bytes | None] = self._model.token_bytes()
        return words + [None] * (self.n_ids - len(words))

    def for_mistral_common(self, version: str) -> Any:
        """The same tokenizer as mistral-common's templates want it.

        Raises:
            TokenizerError: mistral-common is missing.
        """
        return self._model.for_mistral_common(version)

    def encode(self, s: str, bos: bool = True) -> list[int]:
        """Ids of a text, begun by bos (unless the tokenizer begins none with it). Text that looks like a control token
        stays text.

        Raises:
            TokenizerError: it is no text, or not valid Unicode.
        """
        _check_unicode(s)
        ids = self._model.encode(s)
        return [self.bos_id, *ids] if bos and self.adds_bos else ids

    def encode_parts(self, parts: Sequence[str | int], control: Mapping[str, int] | None = None) -> list[int]:
        """Ids of texts with control ids between them, without bos. Text that looks like a control token stays text.

        Args:
            parts: texts, and ids among those of `control`.
            control: ids of control tokens by text; by default `control_tokens`.

        Raises:
            TokenizerError: a part is neither text nor an id, or not valid Unicode.
        """
        require_kind("parts", parts, list | tuple, "a list of texts and ids", TokenizerError)
        for part in parts:
            if not isinstance(part, int):
                _check_unicode(part)
        return self._model.encode_parts(parts, self.control_tokens if control is None else control)

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids. Control ids have none, nor have ids past the last word, which a padded model may make.

        Raises:
            TokenizerError: an id below 0, or something else than ids.
        """
        ids = whole_numbers("ids", t, TokenizerError)
        if ids and min(ids) < 0:
            raise TokenizerError(f"id {min(ids)} is below 0")
        return self._model.decode([i for i in ids if i < self.n_ids])


def _check_unicode(text: object) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"{short_repr(text)} is no text: give a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is not valid Unicode at character {error.start}") from None


# What a folder without one lacks. Ids need none; text does.
NO_TOKENIZER = (
    "the folder has no tokenizer, so prompts must be lists of ids; for text add tokenizer.model, tokenizer.model.v3, "
    "tekken.json or tokenizer.json"
)


NEEDED = ("encode", "decode", "bos_id", "eos_id")


class NoText:
    """In the place of a tokenizer that is not there: ids go in and come out, and have no text."""

    bos_id = eos_id = -1

    def encode(self, s: str) -> list[int]:
        raise TokenizerError(NO_TOKENIZER)

    def decode(self, t: list[int]) -> str:
        return ""


def require_tokenizer(tokenizer: TokenizerLike | None) -> TokenizerLike:
    """The tokenizer, where text is read or written.

    Raises:
        TokenizerError: there is none, or it is something else.
    """
    if tokenizer is None:
        raise TokenizerError(NO_TOKENIZER)
    if lacking := [name for name in NEEDED if not hasattr(tokenizer, name)]:
        raise TokenizerError(
            f"{type(tokenizer).__name__} is no tokenizer that can be used: it lacks {', '.join(lacking)}"
        )
    return tokenizer


def encode(tokenizer: TokenizerLike, text: str) -> list[int]:
    """Ids of a text with one bos in front, from any tokenizer.

    Its own switches are used if it has them: `bos` and `eos`, or transformers' `add_special_tokens`. A tokenizer
    without any may put bos in front itself or leave it out.
    """
    require_tokenizer(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode(text)
    accepted = inspect.signature(tokenizer.encode).parameters
    wanted = {"bos": True, "eos": False, "add_special_tokens": False}
    ids = list(tokenizer.encode(text, **{name: value for name, value in wanted.items() if name in accepted}))
    bos = tokenizer.bos_id
    if "bos" in accepted or bos is None or bos < 0 or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def outside(ids: Sequence[int], tokenizer: TokenizerLike | None, vocab_size: int) -> str | None:
    """The first id that a model does not have, for a sentence that begins with what has it; None if it has all.

    Tokens that were added to a tokenizer, but not to the model, have such ids.
    """
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is None:
        return None
    names = {i: token for token, i in tokenizer.added.items()} if isinstance(tokenizer, Tokenizer) else {}
    token = f" (the token {printable(names[wrong])})" if wrong in names else ""
    return f"the id {wrong}{token}, outside the vocabulary of {vocab_size}"
