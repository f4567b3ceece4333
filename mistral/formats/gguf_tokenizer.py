"""The tokenizer that is in the metadata of a GGUF file, rebuilt: SentencePiece or byte-level; and its chat templates.

A SentencePiece model becomes the bytes of a tokenizer.model, byte-level BPE a tokenizer of the `tokenizers` library.
Source of the keys: ggml's docs/gguf.md; how text is split before BPE, which a file only names, from llama.cpp's table
of names and the tokenizer.json files behind them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.formats.gguf_header import GgufError, Metadata, StringArray
from mistral.special_tokens import AddedToken, SpecialTokens, TokenizerError
from mistral.tekken import PATTERN
from mistral.tokenizer import Tokenizer
from mistral.util.errors import short_repr

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Theirs

MOST_TOKENS = 2**21
# Types of tokens; SentencePiece has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TYPES = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
BLANK = "\u2581"  # how SentencePiece spells a space
SENTENCEPIECE, BYTE_LEVEL = "sentencepiece", "byte-level"
KINDS = {"llama": SENTENCEPIECE, "gpt2": BYTE_LEVEL}
NONE = ("no_vocab", "none")  # kinds by which llama.cpp knows a file without words
# llama.cpp ends a text at these wherever a file has them (src/llama-vocab.cpp), whatever eos_token_id it names.
ENDS_BY_NAME = frozenset(
    [
        "</s>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<EOT>",
        "_<EOT>",
        "<eos>",
    ]
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning of their own.

    Args:
        bos, eos, unk, pad: -1 where there is none.
        ends: all ids that the file names as an end (of a text, of a turn, of a message), and those of control tokens
            that are one by their names, at which llama.cpp ends too.
        add_bos: whether a text begins with bos; None where the file does not say.
    """

    bos: int
    eos: int
    unk: int
    pad: int
    ends: frozenset[int]
    add_bos: bool | None


def tokenizer_of(path: Path, metadata: Metadata) -> Tokenizer:
    """The tokenizer of a file, with all its ends of sequence.

    Args:
        path: the file, for messages.

    Raises:
        GgufError: no tokenizer, or one that cannot be rebuilt.
        TokenizerError: one that cannot be used.
    """
    special = special_ids(metadata)
    if kind_of(metadata) == SENTENCEPIECE:
        content, words = sentencepiece_model(metadata), words_of_the_user(metadata)
        made = Tokenizer.from_sentencepiece(path, content, special.add_bos is not False, words)
    else:
        made = _from_byte_level(path, metadata, special)
    made.eos_ids = special.ends
    return made


def _from_byte_level(path: Path, metadata: Metadata, special: SpecialIds) -> Tokenizer:
    from tokenizers import processors

    theirs, notes = byte_level(metadata)
    ids = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": special.unk, "pad_token": special.pad}
    names = {name: str(theirs.id_to_token(i)) for name, i in ids.items() if i >= 0}
    # llama.cpp's rule for files that do not say whether texts begin with bos.
    begins = PRE[str(metadata.get("tokenizer.ggml.pre", "default"))][1] if special.add_bos is None else special.add_bos
    if begins and "bos_token" in names:
        bos = names["bos_token"]
        try:
            theirs.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", bos, "$B:1"],
                special_tokens=[(bos, special.bos)],
            )
        except (ValueError, TypeError) as error:
            raise TokenizerError(f"{path} has a token for the start of texts that cannot be used: {error}") from None
    return Tokenizer.from_tokenizers(path, theirs, SpecialTokens(names, frozenset(names.values())), notes)


def is_there(metadata: Metadata) -> bool:
    """Whether a file has a tokenizer of any kind: some are written without, for whoever has ids."""
    return metadata.get("tokenizer.ggml.model", NONE[0]) not in NONE


def kind_of(metadata: Metadata) -> str:
    """ "sentencepiece" or "byte-level".

    Raises:
        GgufError: no tokenizer, or one of another kind.
    """
    model = metadata.get("tokenizer.ggml.model")
    if not is_there(metadata):
        raise GgufError("the file has no tokenizer: put tokenizer.model, tekken.json or tokenizer.json beside it")
    if not isinstance(model, str) or model not in KINDS:
        raise GgufError(f"the file's tokenizer is of kind {short_repr(model)}; {' and '.join(KINDS)} are read here")
    return KINDS[model]


def special_ids(metadata: Metadata) -> SpecialIds:
    """The ids of bos, eos and others.

    Raises:
        GgufError: an id outside of the vocabulary, or a value of another type.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if isinstance(tokens, StringArray) else 0

    def named(name: str, default: int = -1) -> int:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        # -1 as an unsigned number is how some writers leave an id out.
        if type(value) is not int or not (0 <= value < count or value in (default, -1, 2**32 - 1)):
            raise GgufError(f"the file's {name}_token_id is {short_repr(value)}, but it has {count} tokens")
        return -1 if value == 2**32 - 1 else value

    usual = kind_of(metadata) == SENTENCEPIECE
    unk, bos, eos = (
        named("unknown", 0 if usual else -1),
        named("bos", 1 if usual else -1),
        named("eos", 2 if usual else -1),
    )
    ends = frozenset({eos, named("eot"), named("eom")} - {-1}) | _ends_by_name(metadata)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    return SpecialIds(bos, eos, unk, named("padding"), ends, add_bos if isinstance(add_bos, bool) else None)


def _ends_by_name(metadata: Metadata) -> frozenset[int]:
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not (isinstance(tokens, StringArray) and isinstance(types, array) and len(types) == tokens.count <= MOST_TOKENS):
        return frozenset()  # whoever needs the tokens refuses them
    try:
        texts = tokens.decode()
    except GgufError:
        return frozenset()
    named = (i for i, text in enumerate(texts) if text in ENDS_BY_NAME)
    return frozenset(i for i in named if types[i] in (CONTROL, USER_DEFINED))


def notes_on_ends(metadata: Metadata) -> list[str]:
    """What a file says about ends of texts that is odd, or not followed, a sentence each.

    Raises:
        GgufError: as `special_ids`, and without tokens.
    """
    texts, types = _tokens(metadata)
    notes = [
        f"sequences end with id {i}, which is the ordinary word {short_repr(texts[i].replace(BLANK, ' '))}: texts "
        "that hold it are split without it; see eos_token_id and its like in the file"
        for i in sorted(special_ids(metadata).ends)
        if types[i] in (NORMAL, BYTE)
    ]
    if metadata.get("tokenizer.ggml.add_eos_token") is True:
        notes.append("the file has add_eos_token true, which is for training: prompts end without eos here")
    return notes


def chat_templates(metadata: Metadata) -> dict[str, str]:
    """The chat templates of a file by name, as text that nothing has run; "default" is the unnamed one."""
    start = "tokenizer.chat_template"
    named = {key.removeprefix(f"{start}."): v for key, v in metadata.items() if key.startswith(f"{start}.")}
    found = {"default": metadata[start], **named} if start in metadata else named
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _tokens(metadata: Metadata) -> tuple[list[str], Sequence[int]]:
    """Texts and types of all tokens."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, StringArray) or not isinstance(types, array):
        raise GgufError("the file's tokenizer lacks its tokens or their types")
    if not 0 < tokens.count <= MOST_TOKENS or len(types) != tokens.count:
        raise GgufError(f"the file's tokenizer has {tokens.count:,} tokens and {len(types):,} types")
    texts, known = tokens.decode(), [int(kind) for kind in types]
    if strange := next((i for i, kind in enumerate(known) if kind not in TYPES), None):
        raise GgufError(f"token {strange} of the file has type {known[strange]}, which is none")
    return texts, known


def _require_different(texts: Sequence[str]) -> dict[str, int]:
    """Ids of tokens by text, of which no two are the same."""
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) < len(texts):
        twice = next(text for i, text in enumerate(texts) if vocabulary[text] != i)
        raise GgufError(f"the file's tokenizer has {short_repr(twice)} twice")
    return vocabulary


# --- SentencePiece


def sentencepiece_model(metadata: Metadata) -> bytes:
    """The contents of a tokenizer.model, for SentencePieceProcessor.LoadFromSerializedProto.

    It splits no text into a word of the user's: see `words_of_the_user`.

    Raises:
        GgufError: not a SentencePiece tokenizer, or a part of it is missing.
    """
    if kind_of(metadata) != SENTENCEPIECE:
        raise GgufError("the file's tokenizer is no SentencePiece model")
    texts, types = _tokens(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, array) or len(scores) != len(texts):
        raise GgufError(f"the file's tokenizer has {len(texts):,} tokens, and no score for each")
    special = special_ids(metadata)
    # SentencePiece has exactly one unknown token, and knows bos and eos by their type alone.
    unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN] or [special.unk]
    if len(unknown) > 1 or unknown[0] < 0 or unknown[0] in (special.bos, special.eos):
        raise GgufError(f"the file's tokenizer has {short_repr(unknown)} as unknown tokens: exactly one is needed")
    control = {i for i in (special.bos, special.eos) if i >= 0}
    _require_different(texts)
    proto = bytearray()
    for i, (text, score, kind) in enumerate(zip(texts, scores, types, strict=True)):
        kind = UNKNOWN if i == unknown[0] else CONTROL if i in control else UNUSED if kind == USER_DEFINED else kind
        proto += _message(1, _text(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
    trainer = _number(3, 2) + _number(4, len(texts)) + _number(35, int(BYTE in types))  # BPE, size, byte fallback
    for i, number, piece in ((unknown[0], 40, 45), (special.bos, 41, 46), (special.eos, 42, 47), (special.pad, 43, 48)):
        trainer += _number(number, i) + (_text(piece, texts[i]) if 0 <= i < len(texts) else b"")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    collapse = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False) is True
    normalizer = _text(1, "identity") + _number(3, int(prefix)) + _number(4, int(collapse)) + _number(5, 1)
    return bytes(proto + _message(2, trainer) + _message(3, normalizer))


def words_of_the_user(metadata: Metadata) -> dict[int, AddedToken]:
    """The words of a SentencePiece tokenizer that were added to it, by id; those that end sequences are control tokens.

    A text is cut at them first, and each stretch between them split by itself, as llama.cpp and transformers do it: in
    SentencePiece itself such a word would have a space in front, and the text behind it none.

    Raises:
        GgufError: as `special_ids`, and without tokens.
    """
    (texts, types), ends = _tokens(metadata), special_ids(metadata).ends
    return {i: AddedToken(texts[i], i in ends) for i, kind in enumerate(types) if kind == USER_DEFINED}


def _varint(number: int) -> bytes:
    number &= 2**64 - 1  # negative numbers are written as if they had 64 bits
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _message(field, content.encode("utf-8"))


# --- byte-level BPE

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
# How text is split before BPE, by the name in tokenizer.ggml.pre: patterns, each of which splits what the one before
# left; and whether a piece that is a token as a whole is taken as it is, whatever the merges give.
PRE: dict[str, tuple[tuple[str, ...], bool]] = {
    "tekken": ((PATTERN,), True),
    **dict.fromkeys(("smollm", "minerva-7b", "starcoder", "refact", "command-r"), ((r"\p{N}", GPT2), False)),
    **dict.fromkeys(("gpt-2", "mpt"), ((GPT2,), False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), ((LLAMA3,), True)),
    "qwen2": ((QWEN2,), False),
    "default": ((PUNCTUATION, GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"), False),
}


def byte_level(metadata: Metadata) -> tuple[Theirs, list[str]]:
    """A tokenizer of the `tokenizers` library, and what was assumed, a sentence each.

    Control tokens are special tokens of it, so `encode_special_tokens = True` keeps text that looks like one as text.

    Raises:
        GgufError: not a byte-level tokenizer, a split of text that is not known here, or a part is missing or broken.
    """
    if kind_of(metadata) != BYTE_LEVEL:
        raise GgufError("the file's tokenizer is no byte-level one")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in PRE:
        raise GgufError(
            f"the file's tokenizer splits text as {short_repr(pre)}; {', '.join(PRE)} are known: put tokenizer.json "
            "beside it"
        )
    texts, types = _tokens(metadata)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, StringArray) or merges.count > MOST_TOKENS:
        raise GgufError("the file's tokenizer lacks its merges")
    patterns, whole = PRE[pre]
    vocabulary = _require_different(texts)
    pairs = [_pair(merge, vocabulary) for merge in merges.decode()]
    added = [(text, kind) for text, kind in zip(texts, types, strict=True) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    assumed = "the file does not name how its tokenizer splits text: it is split as llama.cpp does"
    return _tokenizer(vocabulary, pairs, patterns, whole, added), [assumed] if pre == "default" else []


def _pair(merge: str, vocabulary: dict[str, int]) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise GgufError(f"the file's tokenizer merges {short_repr(merge)}, of which a part is no token")
    return left, right


def _tokenizer(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    patterns: Sequence[str],
    whole: bool,
    added: Sequence[tuple[str, int]],
) -> Theirs:
    try:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Theirs
    except ImportError:
        raise GgufError("the file's tokenizer needs the tokenizers library: pip install tokenizers") from None

    split: Callable[[str], Any] = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")  # noqa: E731
    tokenizer = Theirs(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*map(split, patterns), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # A token of the vocabulary keeps its id.
    special = [AddedToken(text, special=True, normalized=False) for text, kind in added if kind != USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in added if kind == USER_DEFINED])
    return tokenizer
