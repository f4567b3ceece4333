"""What the small JSON files beside a tokenizer add to it: named tokens, added tokens, whether a text begins with bos.

tokenizer_config.json comes first; special_tokens_map.json and added_tokens.json, which older exports write, fill in
what it does not say. Knows nothing about models or templates; nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited
from mistral.util.parsed import KeyTwice, parse_json

CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WHOLE = "tokenizer.json"
LETTER, SPACE = re.compile(r"\w"), re.compile(r"\s+")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
NAMELESS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes of transformers; others have <s> and </s>
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


class TokenizerError(FormatError):
    """A tokenizer that is missing, broken, or cannot do what was asked."""


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary.

    Args:
        content: its text.
        special: whether it is a control token: no text gives it, and it has no text.
        lstrip, rstrip: whether it takes the spaces before or after it along.
        normalized: whether it is looked for in a text with spaces as words have them, one in front of it too.
        single_word: whether letters and digits beside it make it an ordinary text.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


def spaced(text: str) -> str:
    """A text with spaces as the words of a SentencePiece model have them, and one in front."""
    return "\u2581" + text.replace(" ", "\u2581") if text else ""


class WordFinder:
    """Words that were added, found in texts as the `tokenizers` library does: the longest of those at one place.

    Args:
        words: by id; those that are normalized are found in texts that are `spaced`.
    """

    def __init__(self, words: Mapping[int, AddedToken]) -> None:
        texts = {spaced(token.content) if token.normalized else token.content: i for i, token in words.items()}
        self._words, self._ids = words, texts
        ordered = sorted(texts, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """What is before each word, and the word's id; last what is left, and None."""
        done = 0
        for match in self._found.finditer(text) if self._found is not None else ():
            i, (start, stop) = self._ids[match[0]], match.span()
            token = self._words[i]
            if token.single_word and LETTER.search(text[max(start - 1, 0) : start] + text[stop : stop + 1]):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip and (space := SPACE.match(text, stop)):
                stop = space.end()
            yield text[done:start], i
            done = stop
        yield text[done:], None


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside a tokenizer say.

    Args:
        names: text of each named token, such as {"bos_token": "<s>"}.
        special: texts of all control tokens that the files name.
        added: tokens by id, those of the vocabulary proper perhaps among them.
        add_bos: whether a text should begin with bos; None where no file says so.
        unnamed: those of NAMED that a chat template is not given, as in transformers: by the files there are none.
    """

    names: dict[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    added: dict[int, AddedToken] = field(default_factory=dict)
    add_bos: bool | None = None
    unnamed: frozenset[str] = frozenset()


def read_special_tokens(folder: Path) -> SpecialTokens:
    """What the files of a folder say; nothing where there are none.

    Raises:
        TokenizerError: a file that cannot be read, or holds something else.
    """
    config, named = read_json(folder / CONFIG), read_json(folder / NAMES)
    names = {key: text for key in NAMED if (text := token_text(config.get(key)) or token_text(named.get(key)))}
    special = set(names.values())
    for file, told in ((CONFIG, config), (NAMES, named)):
        for key in MORE_SPECIAL:
            listed = told.get(key) or []
            if not isinstance(listed, (list, dict)):
                raise TokenizerError(f"{folder / file} has {key} {short_repr(listed)}: fetch it again")
            special.update(filter(None, map(token_text, listed.values() if isinstance(listed, dict) else listed)))
    added: dict[int, AddedToken] = {}
    for content, i in read_json(folder / ADDED).items():
        if type(i) is not int or not content:
            raise TokenizerError(f"{folder / ADDED} gives {short_repr(content)} the id {short_repr(i)}: fetch it again")
        added[i] = AddedToken(content, content in special)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{folder / CONFIG} has added_tokens_decoder {short_repr(decoder)}: fetch it again")
    for key, token in decoder.items():
        text = token_text(token)
        if not (str(key).isdecimal() and len(str(key)) < 10 and isinstance(token, dict)):
            raise TokenizerError(
                f"{folder / CONFIG} has {short_repr(token)} for the id {short_repr(key)}: fetch it again"
            )
        if text:
            flags = _flags({"normalized": token.get("special") is not True, **token})  # transformers' default
            added[int(key)] = AddedToken(text, token.get("special") is True or text in special, **flags)
    special.update(token.content for token in added.values() if token.special)
    add_bos = config.get("add_bos_token")
    add_bos = add_bos if isinstance(add_bos, bool) else None
    return SpecialTokens(names, frozenset(special), added, add_bos, _unnamed(config, named))


def _unnamed(config: dict[str, Any], named: dict[str, Any]) -> frozenset[str]:
    """Of NAMED, what transformers takes for none: null in tokenizer_config.json, or not there where the class has no
    names of its own. It reads special_tokens_map.json only where the other file lists no tokens."""
    if not config:
        return frozenset()
    beside = {} if "added_tokens_decoder" in config else named
    nameless = config.get("tokenizer_class") in NAMELESS
    absent = (key for key in NAMED if config.get(key) is None and (key in config or nameless))
    return frozenset(key for key in absent if not token_text(beside.get(key)))


def read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Tokens by id that the tokenizer.json of a folder adds, for a tokenizer beside it; none without that file.

    transformers 5 writes them nowhere else.

    Raises:
        TokenizerError: it cannot be read, or what it adds is no token.
    """
    path = folder / WHOLE
    listed = read_json(path).get("added_tokens") or []
    added: dict[int, AddedToken] = {}
    for token in listed if isinstance(listed, list) else [listed]:
        text, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not (isinstance(text, str) and text and type(i) is int and i >= 0):
            raise TokenizerError(f"{path} has {short_repr(token)} for an added token: fetch it again")
        added[i] = AddedToken(text, token.get("special") is True, **_flags(token))
    return added


def as_spelled(added: dict[int, AddedToken], folder: Path) -> dict[int, AddedToken]:
    """Added tokens for a SentencePiece model in a folder: a normalized one is found as it stands, unless a
    tokenizer.json beside it puts a space in front of texts. (Without that file the flag does nothing in transformers.)
    """
    if '"Prepend"' in json.dumps(read_json(folder / WHOLE).get("normalizer")):
        return added
    return {i: replace(token, normalized=False) for i, token in added.items()}


def _flags(token: dict[str, Any]) -> dict[str, bool]:
    return {name: token.get(name) is True for name in FLAGS}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file; {} where there is no such file.

    Raises:
        TokenizerError: it cannot be read, or holds no object.
    """
    if not path.is_file():
        return {}
    try:
        told = parse_json(read_limited(path).decode("utf-8-sig"))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    except KeyTwice as error:
        raise TokenizerError(f"{path} {error}: mend it") from None
    except ValueError:
        raise TokenizerError(f"{path} holds no JSON: fetch it again") from None
    if not isinstance(told, dict):
        raise TokenizerError(f"{path} holds {short_repr(told)}, not an object: fetch it again")
    return told


def token_text(token: Any) -> str | None:
    """A token is written as its text, or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
