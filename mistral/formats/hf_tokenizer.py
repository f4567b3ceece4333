"""tokenizer.json from Mistral's own tokenizers: what makes transformers give the ids that they give.

Written by the `tokenizers` library, and kept only if it gives the same ids for texts that tell tokenizers apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral.formats.gguf_tokenizer import BLANK
from mistral.special_tokens import FLAGS
from mistral.tekken import PATTERN
from mistral.tokenizer import Tokenizer

# Spaces, control tokens as text, scripts, emoji, digits, code, bytes that no word has.
TEXTS = (
    *("", " ", "  a  b ", "\n\n x\r\n\ty", "Hello, World!", "<s>[INST] hi </s>", "1234567 3.14", "naïve Straße ﬁ①"),
    *(
        "永和九年，歲在癸丑龘𠮷",
        "Жили-были",
        "مرحبا שלום",
        "🙂🇫🇷👍🏽",
        "def f(x):\n    return x**2",
        "\0\x7f\u200b\ue000",
    ),
    *("\u2581x \u2581", "e\u0301 a\u0308\u0323", " " * 40 + "z"),
)


def to_tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """A tokenizer as the text of a tokenizer.json.

    Args:
        tokenizer: a SentencePiece model or a tekken.json.

    Returns:
        None where no tokenizer.json gives the same ids: a SentencePiece model that changes texts, for example.
    """
    from tokenizers import AddedToken, processors

    made = _from_tekken(tokenizer) if tokenizer.is_tekken else _from_sentencepiece(tokenizer)
    special = [(t, i) for t, i in sorted(tokenizer.control_tokens.items(), key=lambda pair: pair[1])]
    unknown = tokenizer.named.get("unk_token")
    names = [unknown, *(t for t, _ in special)] if unknown else [t for t, _ in special]

    def token(text: str) -> AddedToken:
        told = tokenizer.flags.get(text)
        flags = {name: told is not None and getattr(told, name) for name in FLAGS}
        return AddedToken(text, special=text in names, **flags)

    made.add_special_tokens([token(t) for t in dict.fromkeys(names)])
    plain = {t: i for t, i in tokenizer.added.items() if t not in tokenizer.control_tokens}
    made.add_tokens([token(t) for t in sorted(plain, key=plain.__getitem__)])
    bos = tokenizer.named["bos_token"]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    if any(made.token_to_id(t) != i for t, i in tokenizer.added_tokens.items()):
        return None
    made.encode_special_tokens = True
    with_words = [form.replace("{}", text) for text in plain for form in ("{}", "a {} b", "a{}b", "1  {}\n\n{}, {} ")]
    if any(made.encode(text).ids != tokenizer.encode(text) for text in (*TEXTS, *with_words)):
        return None
    return str(made.to_str())


def to_tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What belongs into the tokenizer_config.json beside it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokenizer.named[name] for name in ("bos_token", "eos_token", "unk_token") if name in tokenizer.named},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
    }


def as_found(told: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer_config.json for a folder that had no tokenizer.json and gets one; None where it stays as it is.

    Without that file `normalized` does nothing in transformers; with it such a token is found behind a space alone.
    """
    listed = told.get("added_tokens_decoder")
    found = {i: t for i, t in listed.items() if isinstance(t, dict)} if isinstance(listed, dict) else {}
    changed = {
        i: {**token, "normalized": False}
        for i, token in found.items()
        if token.get("normalized") is not False and token.get("content") in tokenizer.flags
    }
    return {**told, "added_tokens_decoder": {**found, **changed}} if changed else None


def added_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer_config.json says of the tokens that were added; nothing where there are none."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    decoder = {
        str(i): {"content": text, **flags, "special": text in tokenizer.control_tokens}
        for text, i in sorted(tokenizer.added.items(), key=lambda pair: pair[1])
    }
    return {"added_tokens_decoder": decoder} if decoder else {}


def _from_sentencepiece(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, normalizers

    pieces, scores = tokenizer.pieces()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[float, str, str]] = []
    for piece, score in zip(pieces, scores, strict=True):
        if score is not None:
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
            merges += [(-score, *pair) for pair in sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    merges.sort(key=lambda merge: merge[0])
    made = Theirs(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=tokenizer.named["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks, texts = normalizers.Replace(" ", BLANK), [decoders.Replace(BLANK, " "), decoders.ByteFallback()]
    if begins_with_a_space(tokenizer):
        made.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), blanks])
        made.decoder = decoders.Sequence([*texts, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        made.normalizer, made.decoder = blanks, decoders.Sequence([*texts, decoders.Fuse()])
    return made


def begins_with_a_space(tokenizer: Tokenizer) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text."""
    pieces, _ = tokenizer.pieces()
    return pieces[tokenizer.encode("a", bos=False)[0]].startswith(BLANK)


def _from_tekken(tokenizer: Tokenizer) -> Any:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs

    letters = _letters()
    words, first = tokenizer.byte_words(), tokenizer.n_words - len(tokenizer.byte_words())
    ranks = {word: rank for rank, word in enumerate(words)}
    vocab = dict(tokenizer.control_tokens)
    merges = []
    for word, rank in ranks.items():
        vocab["".join(letters[b] for b in word)] = first + rank
        if len(word) > 1:
            left, right = _last_merge(word, ranks)
            merges.append(("".join(letters[b] for b in left), "".join(letters[b] for b in right)))
    made = Theirs(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _last_merge(word: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two words that a word was made of: the bytes are joined by rank, as far as ranks below its own go."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        at = min(range(len(joined)), key=joined.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: its own where that can be seen, else from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(b) if b in seen else chr(next(others)) for b in range(256)]
