"""tokenizer.json, as transformers writes it, read by the `tokenizers` library: the third kind of tokenizer.

The file is followed, never repaired: ids are those of transformers with the same folder. What tokenizer_config.json
and its like say beside it is taken in by the same rules.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from mistral.special_tokens import FLAGS, AddedToken, SpecialTokens, TokenizerError, read_special_tokens
from mistral.tekken import PATTERN
from mistral.util.errors import printable
from mistral.util.files import read_limited

# What bos and eos are called where no file names them.
USUAL = {"bos_token": ("<s>", "<|begin_of_text|>"), "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# How byte-level words are spelled: a character for each byte, its own where that can be seen.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _SEEN} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(_SEEN)))}


def piece_bytes(piece: str, byte: bool) -> bytes:
    """The bytes of a piece as SentencePiece spells them; `byte`: whether it is one byte, such as <0x0A>."""
    return bytes([int(piece[3:5], 16)]) if byte else piece.replace("\u2581", " ").encode("utf-8", "surrogateescape")


class JsonTokenizer:
    """The inside of a `Tokenizer` that reads a tokenizer.json.

    Attributes:
        n_words: size of the vocabulary, without the tokens that were added to it.
        added: ids past it, by text.
        bos_id, eos_id, pad_id: -1 where there is none.
        guesses_eos: whether eos_id is that of a usual name, because no file beside it names one.
        adds_bos: whether a text begins with bos.
        notes: what is odd about the file, a sentence each.

    Raises:
        TokenizerError: the file or one beside it is broken.
    """

    def __init__(
        self, path: Path, tok: Any = None, told: SpecialTokens | None = None, notes: Iterable[str] = ()
    ) -> None:
        self._path = path
        told = read_special_tokens(path.parent) if told is None else told
        self._lock = threading.Lock()
        self.notes: list[str] = list(notes)
        self._tok = self._read() if tok is None else tok
        self.n_words: int = self._tok.get_vocab_size(with_added_tokens=False)
        self._add(told)
        self._special: dict[int, str] = {
            i: token.content for i, token in self._tok.get_added_tokens_decoder().items() if token.special
        }
        self.bos_id, self.eos_id, self.pad_id = (self._named(told, n) for n in ("bos_token", "eos_token", "pad_token"))
        self._names, self.unnamed = told.names, told.unnamed
        self.guesses_eos = "eos_token" not in told.names
        self._begin(told)
        self._check_pattern()
        self._tok.encode_special_tokens = True  # text that looks like a control token stays text
        self._bytes = '"ByteFallback"' in _state(self._tok.decoder)
        self._encoder_between = lru_cache(maxsize=4)(self._make_encoder_between)

    def _read(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise TokenizerError(f"{self._path} needs the tokenizers library: pip install tokenizers") from None
        try:
            text = read_limited(self._path).decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise TokenizerError(f"{self._path} cannot be read: {reason}") from None
        with guard(f"{self._path} is not a tokenizer ({{}}): fetch it again"):
            tok = Tokenizer.from_str(text)
            tok.no_truncation()
            tok.no_padding()
            if getattr(tok.model, "dropout", None):  # by it ids of one text would be others each time
                self.notes.append(
                    f"{self._path.name} has dropout {tok.model.dropout:g}, which is for training: not used"
                )
                tok.model.dropout = None
            words = tok.get_vocab_size(with_added_tokens=True)
            ids = tok.get_vocab(with_added_tokens=True).values()
        if not ids or max(ids) > 2 * words + 1000:
            raise TokenizerError(f"{self._path} gives {words} words ids up to {max(ids, default=0)}: fetch it again")
        return tok

    def _add(self, told: SpecialTokens) -> None:
        """Add the tokens that only the files beside it have, and make special what they call special."""
        from tokenizers import AddedToken as TheirToken

        def theirs(token: AddedToken) -> Any:
            flags = {n: getattr(token, n) for n in FLAGS}
            return TheirToken(token.content, special=token.special, **flags)

        known = {token.content: token for token in self._tok.get_added_tokens_decoder().values()}
        for i, token in sorted(told.added.items()):
            if token.content not in known:
                self._tok.add_tokens([theirs(token)])
            if (got := self._tok.token_to_id(token.content)) != i:
                self.notes.append(
                    f"{self._path.name} gives {printable(token.content)} the id {got}, the files beside it {i}: "
                    f"{got} is used"
                )
        for content in sorted(told.special):
            there = known.get(content)
            if self._tok.token_to_id(content) is not None and not (there and there.special):
                kept = {n: getattr(there, n) for n in FLAGS} if there else {"normalized": False}
                self._tok.add_special_tokens([TheirToken(content, special=True, **kept)])

    def _named(self, told: SpecialTokens, name: str) -> int:
        if name in told.names:
            found = self._tok.token_to_id(told.names[name])
            return -1 if found is None else int(found)
        ids = {content: i for i, content in self._special.items()}
        return next((ids[word] for word in USUAL.get(name, ()) if word in ids), -1)

    def _begin(self, told: SpecialTokens) -> None:
        """Whether a text begins with bos: as the file's own post-processor has it, and as transformers follows it."""
        with guard(f"{self._path} is not a tokenizer ({{}}): fetch it again"):
            plain = self._tok.encode("a", add_special_tokens=False).ids
            framed = self._tok.encode("a", add_special_tokens=True).ids
        self.adds_bos = len(framed) > len(plain) and framed[0] in self._special and framed[0] != plain[0]
        if self.adds_bos:
            self.bos_id = framed[0]
        if len(framed) > len(plain) and framed[-1] in self._special and framed[-1] != plain[-1]:
            self.notes.append(
                f"{self._path.name} puts {printable(self._special[framed[-1]])} behind a text, which is for training: "
                "prompts end without it here"
            )
        if told.add_bos not in (None, self.adds_bos):
            self.notes.append(
                f"{self._path.name} {'puts bos' if self.adds_bos else 'puts no bos'} in front of a text, against "
                "add_bos_token in tokenizer_config.json: as in transformers, the former decides"
            )
        elif not self.adds_bos:
            self.notes.append(f"{self._path.name} puts no bos in front of a text: prompts begin without one")

    def _check_pattern(self) -> None:
        """Copies of tekken models were published with the regex of another family."""
        pattern = re.search(r'"Split","pattern":\{"Regex":("(?:[^"\\]|\\.)*")', _state(self._tok.pre_tokenizer))
        if pattern and self.has_control("[INST]") and json.loads(pattern[1]) != PATTERN:
            self.notes.append(
                f"{self._path.name} splits text by another pattern than Mistral's tekken tokenizers do, as wrong "
                "copies have it: some texts become other ids than the model was trained on; put tekken.json beside it"
            )

    @property
    def added(self) -> dict[str, int]:
        return {t.content: i for i, t in self._tok.get_added_tokens_decoder().items() if i >= self.n_words}

    @property
    def named(self) -> dict[str, str]:
        """Texts of bos, eos, padding and others that the files beside it name, as chat templates ask for them."""
        others = {name: text for name, text in self._names.items() if self._tok.token_to_id(text) is not None}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return others | {name: self._tok.id_to_token(i) for name, i in ids.items() if i >= 0}

    @property
    def is_byte_level(self) -> bool:
        """Whether words are made of bytes, as in tekken; else it is like SentencePiece."""
        return not self._bytes

    def as_file(self) -> tuple[str, bytes]:
        return "tokenizer.json", self._tok.to_str().encode("utf-8")

    def has_control(self, word: str) -> bool:
        return word in self._special.values()

    def token_bytes(self) -> list[bytes | None]:
        added = self._tok.get_added_tokens_decoder()
        vocabulary = self._tok.get_vocab(with_added_tokens=True)
        words: list[bytes | None] = [None] * (1 + max(vocabulary.values()))
        for word, i in vocabulary.items():
            if i in added:
                words[i] = None if i in self._special else word.encode()
            elif self._bytes:
                words[i] = piece_bytes(word, byte=BYTE.fullmatch(word) is not None)
            else:
                words[i] = bytes(_BYTE_OF[c] for c in word) if all(c in _BYTE_OF for c in word) else word.encode()
        return words

    def control_tokens(self) -> dict[str, int]:
        return {content: i for i, content in self._special.items()}

    def added_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self._tok.get_added_tokens_decoder().items()}

    def for_mistral_common(self, version: str) -> Any:
        return _ForMistralCommon(self, version)

    def encode(self, s: str) -> list[int]:
        with guard(f"{self._path.name} cannot split the text: {{}}"):
            return list(self._tok.encode(s, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the special ones. Bytes that are no character are U+FFFD, one by one."""
        with guard(f"{self._path.name} cannot decode the ids: {{}}"):
            if not self._bytes:
                return str(self._tok.decode(list(ids), skip_special_tokens=True))
            # The library would give up a whole run of bytes for one that is no character.
            words = (self._tok.id_to_token(i) for i in ids if i not in self._special)
            return str(self._tok.decoder.decode(list(_bytes_as_text(w for w in words if w is not None))))

    def encode_parts(self, parts: Sequence[str | int], control: Mapping[str, int]) -> list[int]:
        """Ids of texts between control ids. Where no text looks like a control token, they are the library's own for
        the whole; where one does, it stays text."""
        spelled = {i: content for content, i in control.items()}
        texts = [part for part in parts if isinstance(part, str)]
        if not any(content in text for text in texts for content in control):
            whole = "".join(part if isinstance(part, str) else spelled[part] for part in parts)
            with self._lock, guard(f"{self._path.name} cannot split the text: {{}}"):
                self._tok.encode_special_tokens = False
                try:
                    return list(self._tok.encode(whole, add_special_tokens=False).ids)
                finally:
                    self._tok.encode_special_tokens = True
        return self._encode_typed(parts, control)

    def _encode_typed(self, parts: Sequence[str | int], control: Mapping[str, int]) -> list[int]:
        """The same with another token in the place of each control token, so that no text can give one."""
        texts = [part for part in parts if isinstance(part, str)]
        candidates = (f"\U0010fffd{n}\U0010fffd" for n in count())
        between = next(candidate for candidate in candidates if not any(candidate in text for text in texts))
        tok = self._encoder_between(between, frozenset(control))
        flags = self._tok.get_added_tokens_decoder()
        whole, strip = "", False
        for part in parts:
            if isinstance(part, int):
                whole = (whole.rstrip() if flags[part].lstrip else whole) + between
                strip = flags[part].rstrip
            else:
                whole += part.lstrip() if strip else part
                strip = False
        with guard(f"{self._path.name} cannot split the text: {{}}"):
            ids = tok.encode(whole, add_special_tokens=False).ids
        marker, controls = tok.token_to_id(between), (part for part in parts if isinstance(part, int))
        return [next(controls) if i == marker else i for i in ids]

    def _make_encoder_between(self, between: str, control: frozenset[str]) -> Any:
        """The same tokenizer, for which a control token is text, and `between` stands where one was written."""
        from tokenizers import AddedToken as TheirToken
        from tokenizers import Tokenizer

        raw = json.loads(self._tok.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control
        with guard(f"{self._path.name} cannot be read again: {{}}"):
            tok = Tokenizer.from_str(json.dumps(raw))
            tok.add_tokens([TheirToken(between, special=False, normalized=False)])
        tok.encode_special_tokens = True
        return tok


class _ForMistralCommon:
    """What mistral-common's templates need of a tokenizer; it has no reader for a tokenizer.json."""

    model_settings_builder = None

    def __init__(self, words: JsonTokenizer, version: str) -> None:
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        self._words, self._control = words, words.control_tokens()
        self.version = TokenizerVersion(version)
        self.bos_id, self.eos_id = words.bos_id, words.eos_id

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [*([self.bos_id] if bos else []), *self._words.encode(s), *([self.eos_id] if eos else [])]

    def decode(self, tokens: Sequence[int], special_token_policy: object = None) -> str:
        return self._words.decode(tokens)

    def get_special_token(self, s: str) -> int:
        if s not in self._control:
            raise ValueError(f"it has no control token {s}")
        return self._control[s]


@contextmanager
def guard(message: str) -> Iterator[None]:
    """Whatever the library raises, a panic included, as a TokenizerError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # PanicException is no Exception
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise TokenizerError(message.format(reason)) from None


def _state(part: Any) -> str:
    """A part of a tokenizer as JSON; "" where there is none."""
    return part.__getstate__().decode("utf-8") if part is not None else ""


def _bytes_as_text(words: Iterator[str]) -> Iterator[str]:
    """Words, with each run of byte tokens as its characters, one a word."""
    run = bytearray()
    for word in words:
        if match := BYTE.fullmatch(word):
            run.append(int(match[1], 16))
            continue
        yield from _characters(run)
        run.clear()
        yield word
    yield from _characters(run)


def _characters(run: bytearray) -> Iterator[str]:
    for character in run.decode("utf-8", "surrogateescape"):
        yield "\ufffd" if "\udc80" <= character <= "\udcff" else character
