"""tekken.json, through mistral-common, which is imported only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mistral.special_tokens import TokenizerError
from mistral.util.errors import short_repr
from mistral.util.files import read_limited
from mistral.util.parsed import KeyTwice, parse_json

# How every tekken.json that was published splits text. Others are refused: text may send one into a panic.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Control tokens of a file that lists none.
CONTROLS_OF_2024 = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


class Tekken:
    """A tekken.json, as mistral-common reads it.

    Raises:
        TokenizerError: it cannot be read, or is none of Mistral's.
    """

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
            raise TokenizerError(
                _newer(path) or f"{path} is not a tekken tokenizer ({type(error).__name__}): fetch it again"
            ) from None
        self._ignore = SpecialTokenPolicy.IGNORE
        self.version = str(self._tekken.version.value)
        self.n_words = self._tekken.n_words

    def encode(self, s: str) -> list[int]:
        return self._tekken.encode(s, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        return self._tekken.decode(ids, special_token_policy=self._ignore)

    def has_control(self, word: str) -> bool:
        return bool(self._tekken.is_special(word))

    added: Mapping[str, int] = MappingProxyType({})
    unnamed: frozenset[str] = frozenset()

    @property
    def named(self) -> dict[str, str]:
        return {"bos_token": self._word(self.bos_id), "eos_token": self._word(self.eos_id)}

    def _word(self, i: int) -> str:
        return str(self._tekken.id_to_piece(i))

    def byte_words(self) -> list[bytes]:
        special = self._tekken.num_special_tokens
        return [self._tekken.id_to_byte_piece(i) for i in range(special, self.n_words)]

    def token_bytes(self) -> list[bytes | None]:
        return [*[None] * int(self._tekken.num_special_tokens), *self.byte_words()]

    def control_tokens(self) -> dict[str, int]:
        return {self._word(i): i for i in range(self._tekken.num_special_tokens)}

    def added_tokens(self) -> Mapping[str, int]:
        return self.added

    def encode_parts(self, parts: Sequence[str | int], control: Mapping[str, int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.encode(part)
        return ids

    def for_mistral_common(self, version: str) -> Any:
        return self._tekken


def tekken_controls(path: Path) -> dict[int, str]:
    """Texts of the control tokens by id, of a tekken.json that `tekken_words` has looked at; one that lists none has
    those of 2024."""
    told = parse_json(read_limited(path).decode("utf-8"))
    spare = {i: f"<SPECIAL_{i}>" for i in range(told["config"]["default_num_special_tokens"])}
    listed = told.get("special_tokens")
    if listed is None:
        return spare | dict(enumerate(CONTROLS_OF_2024))
    return spare | {2: "</s>"} | {token["rank"]: str(token.get("token_str")) for token in listed}


def _newer(path: Path) -> str | None:
    """What to do about a file of a version that mistral-common does not know; None for other files."""
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    version = parse_json(read_limited(path).decode("utf-8"))["config"].get("version")
    if not isinstance(version, str) or version in [known.value for known in TokenizerVersion]:
        return None
    return (
        f"{path} has version {short_repr(version)}, which this mistral-common does not know: pip install --upgrade "
        "mistral-common, or fetch the file again if no such version exists"
    )


def tekken_words(path: Path) -> int:
    """Words of a tekken.json, as it says itself; mistral-common takes a second to read it all.

    Raises:
        TokenizerError: the file cannot be read, or has what makes mistral-common panic, or take any amount of memory.
    """
    try:
        raw = parse_json(read_limited(path).decode("utf-8"))
        config, given = raw["config"], raw.get("special_tokens")
        if not isinstance(given, list | None):
            raise TypeError("special_tokens is no list")
        words, special = config["default_vocab_size"], config["default_num_special_tokens"]
        counted = type(words) is type(special) is int and 0 < special <= words - special <= len(raw["vocab"])
        # The first words are the bytes; the first ids are those of the special tokens, which may be left out.
        sane = counted and words - special >= 256
        sane = sane and all(type(t["rank"]) is int and 0 <= t["rank"] < special for t in given or ())
        pattern = config.get("pattern")
    except KeyTwice as error:
        raise TokenizerError(f"{path} {error}: fetch it again") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} is not a tekken tokenizer ({type(error).__name__}): fetch it again") from None
    if not sane:
        raise TokenizerError(
            f"{path} is not a tekken tokenizer: it says {short_repr(words)} words and has others; fetch it again"
        )
    if pattern != PATTERN:
        raise TokenizerError(f"{path} is not a tekken tokenizer of Mistral's: it splits text by {short_repr(pattern)}")
    return words
