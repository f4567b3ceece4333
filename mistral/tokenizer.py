"""Text to ids and back, and text that appears piece by piece.

SentencePiece models are read directly; tekken.json goes through mistral-common, imported only then.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited

# How every tekken.json that was published splits text. Others are refused: text may send one into a panic.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(FormatError):
    """A tokenizer that is missing, broken, or cannot do what was asked."""


class TokenizerLike(Protocol):
    """What generation needs of a tokenizer; anything with these will do."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, s: str) -> list[int]: ...
    def decode(self, t: list[int]) -> str: ...


class Tokenizer:
    """Mistral's tokenizers: a SentencePiece `tokenizer.model*` or a `tekken.json`.

    Raises:
        TokenizerError: no such file, or not a tokenizer.
    """

    def __init__(self, model_path: str | PathLike[str]) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise TokenizerError(f"no tokenizer at {path}")
        self.path = path
        self._model: Any = _Tekken(path) if path.suffix == ".json" else _SentencePiece(path)

    @property
    def n_words(self) -> int:
        """Size of the vocabulary."""
        return self._model.n_words

    @property
    def bos_id(self) -> int:
        """Id that begins a text."""
        return self._model.bos_id

    @property
    def eos_id(self) -> int:
        """Id that ends a text."""
        return self._model.eos_id

    @property
    def pad_id(self) -> int:
        """Padding id; -1 where there is none."""
        return self._model.pad_id

    @property
    def is_tekken(self) -> bool:
        """Whether it is a tekken.json; else it is a SentencePiece model."""
        return isinstance(self._model, _Tekken)

    @property
    def version(self) -> str:
        """Which of Mistral's it is: "v1", "v3", ... by the file's name where that says so, else by its contents."""
        if isinstance(self._model, _Tekken):
            return self._model.version
        if match := re.search(r"\.(v\d+)\w*$", self.path.name):
            return match[1]
        if self.has_control("[SYSTEM_PROMPT]"):
            return "v7"
        return "v3" if self.has_control("[INST]") else "v1"

    def has_control(self, word: str) -> bool:
        """Whether a control token, such as "[INST]", has an id of its own."""
        return self._model.has_control(word)

    def for_mistral_common(self, version: str) -> Any:
        """The same tokenizer as mistral-common's templates want it.

        Raises:
            TokenizerError: mistral-common is missing.
        """
        return self._model.for_mistral_common(version)

    def encode(self, s: str, bos: bool = True) -> list[int]:
        """Ids of a text, begun by bos. Text that looks like a control token stays text.

        Raises:
            TokenizerError: the text is not valid Unicode.
        """
        try:
            s.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode at character {error.start}") from None
        ids = self._model.encode(s)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, t: Sequence[int]) -> str:
        """Text of ids. Control ids have none, nor have ids past the last word, which a padded model may make.

        Raises:
            TokenizerError: an id below 0.
        """
        for i in t:
            if i < 0:
                raise TokenizerError(f"id {i} is below 0")
        return self._model.decode([i for i in t if i < self.n_words])


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        self._sp = SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(read_limited(path, 10_000_000))
            self.n_words = self._sp.vocab_size()
            self._sp.id_to_piece(list(range(self.n_words)))  # some may be no UTF-8
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        except (RuntimeError, ValueError):
            raise TokenizerError(f"{path} is not a SentencePiece model: fetch it again") from None
        self.bos_id, self.eos_id, self.pad_id = self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id()
        if min(self.bos_id, self.eos_id, self._sp.unk_id()) < 0:
            raise TokenizerError(f"{path} has no bos, no eos or no unk: it is not one of Mistral's")

    def encode(self, s: str) -> list[int]:
        return self._sp.encode(s)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def has_control(self, word: str) -> bool:
        return self._sp.IsControl(self._sp.piece_to_id(word))

    def for_mistral_common(self, version: str) -> Any:
        try:
            from mistral_common.tokens.tokenizers.base import TokenizerVersion
            from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
        except ImportError:
            raise TokenizerError("templates need mistral-common: pip install mistral-common") from None
        return SentencePieceTokenizer(str(self._path), tokenizer_version=TokenizerVersion(version))


class _Tekken:
    def __init__(self, path: Path) -> None:
        try:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer
        except ImportError:
            raise TokenizerError(f"{path} needs mistral-common: pip install mistral-common") from None
        tekken_words(path)
        try:
            self._tekken = Tekkenizer.from_file(path)
            self.bos_id, self.eos_id, self.pad_id = self._tekken.bos_id, self._tekken.eos_id, self._tekken.pad_id
        except Exception as error:  # whatever the library makes of a broken file
            raise TokenizerError(f"{path} is not a tekken tokenizer ({type(error).__name__}): fetch it again") from None
        self._ignore = SpecialTokenPolicy.IGNORE
        self.version = str(self._tekken.version.value)
        self.n_words = self._tekken.n_words

    def encode(self, s: str) -> list[int]:
        return self._tekken.encode(s, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        return self._tekken.decode(ids, special_token_policy=self._ignore)

    def has_control(self, word: str) -> bool:
        return bool(self._tekken.is_special(word))

    def for_mistral_common(self, version: str) -> Any:
        return self._tekken


def tekken_words(path: Path) -> int:
    """Words of a tekken.json, as it says itself; mistral-common takes a second to read it all.

    Raises:
        TokenizerError: the file cannot be read, or has what makes mistral-common panic, or take any amount of memory.
    """
    try:
        raw = json.loads(read_limited(path).decode("utf-8"))
        config, given = raw["config"], raw.get("special_tokens") or ()
        words, special = config["default_vocab_size"], config["default_num_special_tokens"]
        counted = type(words) is type(special) is int and 0 < special <= words - special <= len(raw["vocab"])
        # The first words are the bytes; the first ids are those of the special tokens, which may be left out.
        sane = counted and words - special >= 256 and all(type(t["rank"]) is int for t in given)
        sane = sane and all(0 <= t["rank"] < special for t in given)
        pattern = config.get("pattern")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} is not a tekken tokenizer ({type(error).__name__}): fetch it again") from None
    if not sane:
        raise TokenizerError(
            f"{path} is not a tekken tokenizer: it says {short_repr(words)} words and has others; fetch it again"
        )
    if pattern != PATTERN:
        raise TokenizerError(f"{path} is not a tekken tokenizer of Mistral's: it splits text by {short_repr(pattern)}")
    return words


def encode(tokenizer: TokenizerLike, text: str) -> list[int]:
    """Ids of a text with bos in front, from any tokenizer: its own `bos` and `eos` switches are used if it has them."""
    accepted = inspect.signature(tokenizer.encode).parameters
    switches = {name: value for name, value in (("bos", True), ("eos", False)) if name in accepted}
    ids = list(tokenizer.encode(text, **switches))
    return ids if "bos" in accepted else [tokenizer.bos_id, *ids]
