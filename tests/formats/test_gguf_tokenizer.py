"""Tokenizers rebuilt from the metadata of GGUF files give the ids of the tokenizers that they were written from."""

from __future__ import annotations

import base64
import json
import random
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mistral.formats.gguf_header import GgufError, Metadata, read_gguf
from mistral.formats.gguf_tokenizer import (
    byte_level,
    chat_templates,
    kind_of,
    sentencepiece_model,
    special_ids,
    tokenizer_of,
)
from mistral.formats.hf_tokenizer import to_tokenizer_json
from tests.support.folders import BUNDLED, ROOT
from tests.support.gguf_files import tokenizer_keys, write_gguf

PUBLISHED = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = [BUNDLED / "tokenizer.model", *(p for p in sorted(PUBLISHED.glob("*.model.v*")) if p.suffix != ".v7m1")]
STORY = (ROOT / "tests" / "data" / "dwarf_long_nose.txt").read_text(encoding="utf-8")
ODD = [
    "",
    " ",
    "  x  y ",
    "\n\n\t x",
    "<s>[INST] Hi </s>",
    "1234567 3.14",
    "naïve Œuvre ΑΒΓ",
    "从前有一个小女孩",
    "👨‍👩‍👧‍👦🙂",
    "\u200b\ufeffa\u0301",
    "I'm we'LL don't",
    "x" * 300,
    " " * 300 + "x",
    "a\0b\x7f",
]


def texts(seed: int, count: int = 150) -> list[str]:
    """Odd ones, pieces of a story, and random characters of many scripts."""
    rng = random.Random(seed)
    found = list(ODD)
    for _ in range(count):
        at = rng.randrange(len(STORY))
        found.append(STORY[at : at + rng.randint(1, 120)])
        alphabet = " \n\t'aZé9中ß🙂.,-\u00a0" + chr(rng.randrange(0x100, 0xD000))
        found.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 30))))
    return found


def metadata_of(tmp_path: Path, **tokenizer: Any) -> Metadata:
    """The metadata of a file with this tokenizer, as the `gguf` package writes it."""
    write_gguf(tmp_path / "m.gguf", extra={f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()})
    return read_gguf(tmp_path / "m.gguf").metadata


# --- SentencePiece


@pytest.mark.parametrize("path", SENTENCEPIECE, ids=lambda path: path.name)
def test_sentencepiece(path: Path, tmp_path: Path) -> None:
    theirs = SentencePieceProcessor(model_file=str(path))
    metadata = metadata_of(tmp_path, **tokenizer_keys(path))
    assert kind_of(metadata) == "sentencepiece"
    ours = SentencePieceProcessor()
    ours.LoadFromSerializedProto(sentencepiece_model(metadata))
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(ours, name)() == getattr(theirs, name)()
    for text in texts(seed=1):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert special_ids(metadata).bos not in ours.encode("<s></s>[INST]")
    words = [i for i in range(theirs.vocab_size()) if not theirs.IsControl(i)][:600]
    assert [ours.IdToPiece(i) for i in words] == [theirs.IdToPiece(i) for i in words]


def test_a_space_in_front_of_the_text(tmp_path: Path) -> None:
    given = tokenizer_keys(BUNDLED / "tokenizer.model")
    found = {}
    for prefix in (True, False):
        sp = SentencePieceProcessor()
        metadata = metadata_of(tmp_path, **given, add_space_prefix=prefix)
        sp.LoadFromSerializedProto(sentencepiece_model(metadata))
        found[prefix] = sp
    assert found[True].encode("king") == found[False].encode(" king") != found[False].encode("king")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_json_of_a_file_has_its_space_in_front(prefix: bool, tmp_path: Path) -> None:
    metadata = metadata_of(tmp_path, **tokenizer_keys(BUNDLED / "tokenizer.model"), add_space_prefix=prefix)
    own, sp = tokenizer_of(tmp_path / "m.gguf", metadata), SentencePieceProcessor()
    sp.LoadFromSerializedProto(sentencepiece_model(metadata))
    text = to_tokenizer_json(own)
    assert text is not None
    theirs = Tokenizer.from_str(text)
    for words in ("king", " king", "  two kings ", "永🙂 x", ""):
        ids = sp.encode(words)
        assert theirs.encode(words, add_special_tokens=False).ids == ids == own.encode(words, bos=False)
        assert theirs.decode(ids) == words


@pytest.mark.parametrize("word", ["<|im_end|>", "two words", "\u2581x"])
def test_words_of_the_users(word: str, tmp_path: Path) -> None:
    """A text is cut at them, and what is between them is split as a text of its own: llama.cpp and transformers."""
    given = tokenizer_keys(BUNDLED / "tokenizer.model")
    sp = SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    given["tokens"][4090], given["token_type"][4090] = word, 4
    own = tokenizer_of(tmp_path / "m.gguf", metadata_of(tmp_path, **given))
    for before, behind in (("say ", " then"), ("", ""), ("", "then"), ("say", "\n")):
        text = f"{before}{word}{behind}"
        ids = [*(sp.encode(before)), 4090, *sp.encode(behind)]
        assert own.encode(text, bos=False) == ids
        assert own.encode_parts([text, 2, text]) == [*ids, 2, *ids]
        assert own.encode_parts([text], {word: 4090}).count(4090) == 0  # a word that a template alone may write
    assert own.token_bytes()[4090] == word.encode()
    assert own.decode([4090]) == word
    assert own.n_words == own.n_ids == 4096


def test_a_word_of_the_users_that_ends_sequences_is_a_control_token(tmp_path: Path) -> None:
    given = {**tokenizer_keys(BUNDLED / "tokenizer.model"), "eot_token_id": 4090}
    given["tokens"][4090], given["token_type"][4090] = "<|im_end|>", 4
    own = tokenizer_of(tmp_path / "m.gguf", metadata_of(tmp_path, **given))
    assert own.has_control("<|im_end|>")
    assert own.control_tokens["<|im_end|>"] == 4090
    assert 4090 not in own.encode("a <|im_end|> b")
    assert own.token_bytes()[4090] is None


def test_two_words_that_are_the_same(tmp_path: Path) -> None:
    given = tokenizer_keys(BUNDLED / "tokenizer.model")
    given["tokens"][4090] = given["tokens"][4089]
    with pytest.raises(GgufError, match=r"tokenizer has '.*' twice"):
        sentencepiece_model(metadata_of(tmp_path, **given))


# --- byte-level


def gpt2_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For every word of a tekken.json the two words that are merged last, best words first."""
    pairs = []
    for word in sorted(ranks, key=lambda w: ranks[w]):
        parts = [bytes([b]) for b in word]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            best = min(ranks[word], min(joined))
            if best >= ranks[word]:
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def test_tekken(tmp_path: Path) -> None:
    raw = json.loads((PUBLISHED / "tekken_240911.json").read_text(encoding="utf-8"))
    words, special = 6000, raw["config"]["default_num_special_tokens"]
    raw["vocab"] = raw["vocab"][:words]
    raw["config"] |= {"default_vocab_size": words + special}
    (tmp_path / "tekken.json").write_text(json.dumps(raw), encoding="utf-8")
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in raw["vocab"]}
    letter = gpt2_alphabet()
    written = {word: "".join(letter[b] for b in word) for word in ranks}
    names = {
        token["rank"]: token["token_str"] for token in raw.get("special_tokens") or Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    }
    control = [names.get(i, f"<SPECIAL_{i}>") for i in range(special)]
    metadata = metadata_of(
        tmp_path,
        model="gpt2",
        pre="tekken",
        tokens=[*control, *written.values()],
        token_type=[*[3] * special, *[1] * words],
        merges=[f"{written[a]} {written[b]}" for a, b in merges_of(ranks)],
        bos_token_id=1,
        eos_token_id=2,
    )
    ours, notes = byte_level(metadata)
    ours.encode_special_tokens = True
    assert notes == []
    assert ours.get_vocab_size() == theirs.n_words == words + special
    for text in texts(seed=2):
        ids = theirs.encode(text, bos=False, eos=False)
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == text
    assert ours.token_to_id("[INST]") == theirs.get_special_token("[INST]")
    assert ours.token_to_id("[INST]") not in ours.encode("[INST]").ids
    ours.encode_special_tokens = False
    assert ours.encode("[INST]").ids == [ours.token_to_id("[INST]")]


# The parts of the tokenizer.json files behind the names.
DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "smollm": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "gpt-2": GPT2,
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
}


def trained(pre: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A small byte-level tokenizer, and what a converter writes of it."""
    theirs = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer, theirs.decoder = SPLITS[pre], decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([STORY + " 2024 1999 12345"], trainer)
    theirs.add_tokens([AddedToken("<tool>", normalized=False)])
    state = json.loads(theirs.to_str())
    vocabulary = theirs.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    kinds = [3 if token in special else 4 if token == "<tool>" else 1 for token in tokens]
    return theirs, {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    theirs, written = trained(pre)
    ours, notes = byte_level(metadata_of(tmp_path, **written))
    assert notes == []
    for spelled in (False, True):
        theirs.encode_special_tokens = ours.encode_special_tokens = spelled
        for text in [*texts(seed=3), "a<|im_end|>b", "<tool> 2024<|im_start|>"]:
            ids = theirs.encode(text).ids
            assert ours.encode(text).ids == ids
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_split_that_is_not_named_is_noted(tmp_path: Path) -> None:
    _, written = trained("gpt-2")
    for changes in ({"pre": "default"}, {"pre": None}):
        tokenizer, notes = byte_level(metadata_of(tmp_path, **{**written, **changes}))
        assert notes == ["the file does not name how its tokenizer splits text: it is split as llama.cpp does"]
        assert tokenizer.decode(tokenizer.encode(STORY[:3000]).ids) == STORY[:3000]


BROKEN: dict[str, dict[str, Any]] = {
    "splits text as 'qwen35'": {"pre": "qwen35"},
    "lacks its merges": {"merges": None},
    "merges 'a zz', of which a part is no token": {"merges": ["a zz"]},
    "merges 'ab', of which a part is no token": {"merges": ["ab"]},
    "lacks its tokens or their types": {"token_type": None},
    "has 701 tokens and 3 types": {"token_type": [1, 1, 1]},
    "token 1 of the file has type 9": {"token_type": [1, 9, *[1] * 699]},
    "of kind 'bert'; llama and gpt2 are read here": {"model": "bert"},
    "has no tokenizer: put tokenizer.model": {"model": None},
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_byte_level(message: str, tmp_path: Path) -> None:
    _, written = trained("gpt-2")
    with pytest.raises(GgufError) as error:
        byte_level(metadata_of(tmp_path, **{**written, **BROKEN[message]}))
    assert message in str(error.value)


def test_a_token_twice(tmp_path: Path) -> None:
    _, written = trained("gpt-2")
    written["tokens"][9] = written["tokens"][300]
    with pytest.raises(GgufError, match=r"tokenizer has '.*' twice"):
        byte_level(metadata_of(tmp_path, **written))


def test_broken_sentencepiece(tmp_path: Path) -> None:
    given = tokenizer_keys(BUNDLED / "tokenizer.model")
    two = [2, 2, *given["token_type"][2:]]
    for changes, message in (
        ({"scores": None}, "no score for each"),
        ({"scores": [1.0]}, "no score for each"),
        ({"token_type": two, "bos_token_id": 2}, r"\[0, 1\] as unknown tokens"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000, but it has 4096 tokens"),
        ({"model": "gpt2"}, "is no SentencePiece model"),
    ):
        with pytest.raises(GgufError, match=message):
            sentencepiece_model(metadata_of(tmp_path, **{**given, **changes}))
    with pytest.raises(GgufError, match="is no byte-level one"):
        byte_level(metadata_of(tmp_path, **given))


# --- what else the metadata gives


def test_special_ids() -> None:
    metadata: Metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.token_type": array("i", [1])}
    assert special_ids(metadata).ends == frozenset()
    metadata |= {"tokenizer.ggml.bos_token_id": 2**32 - 1}
    found = special_ids(metadata)
    assert (found.bos, found.eos, found.unk, found.pad, found.add_bos) == (-1, -1, -1, -1, None)


def test_ends_are_a_set(tmp_path: Path) -> None:
    _, written = trained("gpt-2")
    metadata = metadata_of(tmp_path, **written, eos_token_id=0, eot_token_id=2, padding_token_id=0, add_bos_token=False)
    found = special_ids(metadata)
    assert (found.ends, found.eos, found.pad, found.add_bos) == ({0, 2}, 0, 0, False)


def test_chat_templates(tmp_path: Path) -> None:
    metadata = metadata_of(tmp_path)
    assert chat_templates(metadata) == {}
    metadata |= {"tokenizer.chat_template": "{{ a }}", "tokenizer.chat_template.tool_use": "{{ b }}"}
    assert chat_templates(metadata) == {"default": "{{ a }}", "tool_use": "{{ b }}"}
    assert chat_templates({"tokenizer.chat_template": 3}) == {}
