"""Tokenizers: Mistral's own, read by this library, against mistral-common; and text that appears bit by bit."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

import mistral.tokenizer as tokenizer_module
from mistral.chat.templates import TemplateError, find_template
from mistral.detokenizer import Detokenizer
from mistral.tekken import PATTERN, tekken_controls
from mistral.tokenizer import Tokenizer, TokenizerError, encode
from tools.fuzz.mutate import fields, join

DATA = Path(mistral_common.__file__).parent / "data"
BUNDLED = Path(tokenizer_module.__file__).parent / "bundled" / "tokenizer.model"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "tekken_240718": DATA / "tekken_240718.json",
    "tekken_240911": DATA / "tekken_240911.json",
    "bundled": BUNDLED,
}
N_WORDS = {
    "v1": 32_000,
    "v2": 32_768,
    "v3": 32_768,
    "v7": 32_768,
    "tekken_240718": 131_072,
    "tekken_240911": 131_072,
    "bundled": 4096,
}
ALL = list(FILES)
SENTENCEPIECE = [name for name in ALL if not name.startswith("tekken")]
STREAMED = ["v1", "v3", "tekken_240718", "bundled"]
CONTROL_LOOKING = ["<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<0x41>", "[INST] hi [/INST]</s>", "<pad>", "[IMG]"]
TEXTS = [
    "",
    " ",
    "Once upon a time, there was a king.",
    "  two  spaces   and three; trailing ",
    "\ttabs\n\nand\r\nnewlines\n",
    "def f(x):\n    return x**2  # ≈ 3.14e-5",
    "L’été, c'était l'œuvre d'un garçon naïf : Où ça ?",
    "Größe, Straße, Übermut; ﬁ ① ½",
    "Жили-были старик со старухой",
    "永和九年，歲在癸丑，暮春之初。龘𠮷",
    "ひらがなとカタカナ、한국어",
    "مرحبا بالعالم שלום",
    "हिन्दी में लिखा हुआ",
    "e\u0301 é a\u0308\u0323",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 🙂🙂",
    "\ufffd broken \ufffd\ufffd",
    "nul \0 and \x7f and \u200b and \ue000",
    *CONTROL_LOOKING,
]
# U+2581 is SentencePiece's own sign for a space, and reads back as one.
unicode_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30)


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer(FILES[name])


@functools.cache
def reference(name: str) -> Any:
    """mistral-common's own class. A tekken file takes seconds to read, so the one that was read serves again."""
    if name in SENTENCEPIECE:
        return SentencePieceTokenizer(str(FILES[name]))
    return load(name)._model._tekken


@functools.cache
def kinds(name: str) -> dict[str, list[int]]:
    """Ids by kind: one for each byte, and control ids."""
    if name in SENTENCEPIECE:
        sp = load(name)._model._sp
        is_byte, is_control = sp.IsByte, sp.IsControl
    else:
        special = reference(name).num_special_tokens
        is_byte, is_control = (lambda i: special <= i < special + 256), (lambda i: i < special)
    found = {
        "bytes": [i for i in range(load(name).n_words) if is_byte(i)],
        "control": [i for i in range(load(name).n_words) if is_control(i)],
    }
    assert len(found["bytes"]) == 256
    assert {1, 2} <= set(found["control"])
    return found


# Ids and text.


@pytest.mark.parametrize("name", ALL)
def test_sizes_and_special_ids(name: str) -> None:
    tokenizer = load(name)
    assert tokenizer.n_words == N_WORDS[name] == reference(name).n_words
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.pad_id == (11 if name.startswith("tekken") else -1)
    assert tokenizer.path == FILES[name]


@pytest.mark.parametrize("name", ALL)
def test_ids_are_mistral_commons(name: str) -> None:
    tokenizer, theirs = load(name), reference(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, bos=True, eos=False)
        assert ids[0] == 1
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert encode(tokenizer, text) == encode(theirs, text) == ids
        assert all(type(i) is int and 0 <= i < tokenizer.n_words for i in ids)
        assert tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("v1", [1, 22557, 28725, 1526, 28808]),
        ("v2", [1, 23325, 29493, 2294, 29576]),
        ("v3", [1, 23325, 29493, 2294, 29576]),
        ("v7", [1, 23325, 29493, 2294, 29576]),
        ("tekken_240718", [1, 22177, 1044, 4304, 1033]),
        ("tekken_240911", [1, 22177, 1044, 4304, 1033]),
    ],
)
def test_some_ids_by_hand(name: str, ids: list[int]) -> None:
    assert load(name).encode("Hello, world!") == ids


@pytest.mark.parametrize("name", ALL)
@given(text=unicode_text)
def test_any_text_comes_back(name: str, text: str) -> None:
    tokenizer = load(name)
    for s in [text, *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(s)) == s
        assert tokenizer.decode(tokenizer.encode(s, bos=False)) == s


@pytest.mark.parametrize("name", ALL)
def test_text_that_looks_like_a_control_token_stays_text(name: str) -> None:
    tokenizer, control = load(name), set(kinds(name)["control"])
    for text in CONTROL_LOOKING:
        ids = tokenizer.encode(text, bos=False)
        assert not control & set(ids), text
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ALL)
def test_control_ids_have_no_text(name: str) -> None:
    tokenizer, control = load(name), kinds(name)["control"]
    assert tokenizer.decode(control) == ""
    assert tokenizer.decode([]) == ""
    ids = tokenizer.encode("two words")
    assert tokenizer.decode([*control, *ids, 2, 1]) == "two words"
    assert tokenizer.decode(tuple(ids)) == "two words"


# Errors.


def broken(folder: Path) -> list[Path]:
    """Files that are not tokenizers, though they are called so."""
    whole = BUNDLED.read_bytes()
    contents = {
        "empty.model": b"",
        "noise.model": bytes(range(256)) * 20,
        "cut.model": whole[: len(whole) // 2],
        "empty.json": b"",
        "noise.json": b"\xff\xfe\x00",
        "cut.json": b'{"config": {"pattern": "',
        "other.json": b'{"model_type": "mistral"}',
        "list.json": b"[]",
        "version.json": json.dumps({"config": {"version": "v999"}, "vocab": []}).encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_broken_files_are_named(tmp_path: Path) -> None:
    for path in broken(tmp_path):
        with pytest.raises(TokenizerError, match="fetch it again") as error:
            Tokenizer(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_missing_files_and_folders_are_named(tmp_path: Path, name: str) -> None:
    for make in (lambda path: None, Path.mkdir):
        make(tmp_path / name)
        with pytest.raises(TokenizerError, match="no tokenizer at") as error:
            Tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    assert issubclass(TokenizerError, ValueError)


def test_a_model_without_bos_is_not_mistrals(tmp_path: Path) -> None:
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g", "g f e d c b a"]),
        model_writer=made,
        vocab_size=16,
        model_type="bpe",
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(made.getvalue())
    with pytest.raises(TokenizerError, match="no bos, no eos or no unk"):
        Tokenizer(str(path))


def pieces(*changes: tuple[int, bytes]) -> bytes:
    """The tokenizer that ships, with other pieces or settings at some places of its vocabulary."""
    message = fields(BUNDLED.read_bytes())
    for place, value in changes:
        message[place] = (*message[place][:2], value)
    return join(message)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((300, join([(1, 2, b"\xff\xfe"), (2, 5, b"\0\0\0\0")])), "is not a SentencePiece model: fetch it again"),
        ((0, join([(1, 2, b"<unk>"), (2, 5, b"\0\0\0\0")])), "is not a SentencePiece model|no bos, no eos or no unk"),
    ],
    ids=["a piece that is no text", "no unk"],
)
def test_vocabularies_that_cannot_be(tmp_path: Path, change: tuple[int, bytes], said: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(pieces())
    assert Tokenizer(path).n_words == 4096
    path.write_bytes(pieces(change))
    with pytest.raises(TokenizerError, match=said):
        Tokenizer(path)


SPECIAL = Tekkenizer.DEPRECATED_SPECIAL_TOKENS


def small_tekken(path: Path, special: Sequence[Any] = SPECIAL, **config: Any) -> Path:
    """A tekken.json of single bytes."""
    told = {
        "pattern": PATTERN,
        "num_vocab_tokens": 256,
        "default_vocab_size": 256 + len(special),
        "default_num_special_tokens": len(special),
        "version": "v3",
        **config,
    }
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    path.write_text(json.dumps({"config": told, "vocab": vocab, "special_tokens": list(special)}))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": "x*"}, "splits text by 'x\\*'"),  # matches nothing, of which no word can be made
        ({"pattern": None}, "splits text by None"),
        ({"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + 256}, "says 1000000256 words"),
        ({"default_vocab_size": 255 + len(SPECIAL)}, "words and has others"),  # without a word for the last byte
        ({"special": [*SPECIAL[:-1], {**SPECIAL[-1], "rank": 10**6}]}, "words and has others"),
        ({"special": [*SPECIAL[:-1], {**SPECIAL[-1], "rank": 1.0}]}, "words and has others"),
        ({"special": [*SPECIAL[:-1], {**SPECIAL[-1], "rank": -1}]}, "words and has others"),
        ({"special": [*SPECIAL[:1], *SPECIAL[2:]]}, "fetch it again"),  # no bos
    ],
    ids=str,
)
def test_tekkens_that_cannot_be(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "tekken.json"
    assert Tokenizer(small_tekken(path)).n_words == 256 + len(SPECIAL)
    small_tekken(path, **changes)
    with pytest.raises(TokenizerError, match=said):
        Tokenizer(path)


def test_a_template_that_mistral_common_cannot_make(tmp_path: Path) -> None:
    without = [{**token, "rank": i} for i, token in enumerate(t for t in SPECIAL if t["rank"] != 5)]
    tokenizer = Tokenizer(small_tekken(tmp_path / "tekken.json", without))
    assert tokenizer.has_control("[INST]")
    with pytest.raises(TemplateError, match=r"template v3 does not go with tekken.json: .*\[AVAILABLE_TOOLS\]"):
        find_template(tokenizer)


@pytest.mark.parametrize("name", ["v1", "tekken_240718"])
def test_text_that_is_not_unicode_is_refused(name: str) -> None:
    for text, place in [("\ud800", 0), ("ab\udc80c", 2), ("\ud83d", 0)]:
        with pytest.raises(TokenizerError, match=f"at character {place}"):
            load(name).encode(text)


@pytest.mark.parametrize("name", ALL)
def test_ids_without_a_word(name: str) -> None:
    """A padded model may make ids past the last word: they have no text. None is below 0."""
    tokenizer = load(name)
    last = tokenizer.n_words - 1
    assert isinstance(tokenizer.decode([last]), str)
    ids = tokenizer.encode("Hello there")
    for padding in (last + 1, 2**40):
        assert tokenizer.decode([*ids, padding]) == tokenizer.decode([padding, *ids]) == "Hello there"
    with pytest.raises(TokenizerError, match="id -1 is below 0"):
        tokenizer.decode([1, -1])


class Plain:
    """A tokenizer of one's own, which leaves bos out."""

    bos_id: Any = 1
    eos_id = 2

    def encode(self, s: str) -> list[int]:
        return load("bundled").encode(s, bos=False)

    def decode(self, t: list[int]) -> str:
        return load("bundled").decode(t)


class AsTransformers(Plain):
    def encode(self, s: str, add_special_tokens: bool = True) -> list[int]:
        return load("bundled").encode(s, bos=add_special_tokens)


class WithBos(Plain):
    def encode(self, s: str) -> list[int]:
        return load("bundled").encode(s)


class WithSwitches(Plain):
    def encode(self, s: str, bos: bool = False, eos: bool = True) -> list[int]:
        return [*load("bundled").encode(s, bos=bos), *([2] if eos else [])]


class WithoutAny(Plain):
    bos_id = None


@pytest.mark.parametrize("kind", [Plain, AsTransformers, WithBos, WithSwitches, WithoutAny])
def test_a_prompt_has_one_bos_whoever_puts_it_there(kind: type[Plain]) -> None:
    want = load("bundled").encode("The king", bos=kind is not WithoutAny)
    assert encode(kind(), "The king") == want
    assert encode(kind(), "") == ([] if kind is WithoutAny else [1])


# Text that appears bit by bit.


def streamed(tokenizer: Any, context: Sequence[int], ids: Sequence[int]) -> tuple[list[str], str]:
    """The pieces, and what was left at the end."""
    decoder = Detokenizer(tokenizer, context)
    return [decoder.push(i) for i in ids], decoder.flush()


def check_stream(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> None:
    before = tokenizer.decode(context)
    if before.endswith("\ufffd"):
        return  # the context ends in the middle of a character: whose text it is cannot be said
    want = tokenizer.decode([*context, *ids])[len(before) :]
    pieces, rest = streamed(tokenizer, context, ids)
    assert "".join(pieces) + rest == want
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert not rest.strip("\ufffd"), "text was held back that was certain"


def some_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Ids of every kind, in runs: words, bytes that are and are not characters, control ids, emoji, CJK."""
    tokenizer = load(name)
    byte, control = kinds(name)["bytes"], kinds(name)["control"]
    text = st.one_of(unicode_text, st.sampled_from(TEXTS))
    run = st.one_of(
        st.lists(st.integers(0, tokenizer.n_words - 1), max_size=12),
        st.lists(st.sampled_from(byte), max_size=8),
        st.lists(st.sampled_from(control), max_size=20),
        text.map(lambda s: tokenizer.encode(s, bos=False)),
        text.map(lambda s: [byte[b] for b in s.encode()]),
        text.map(lambda s: [byte[b] for b in s.encode()[1:]]),
    )
    return st.lists(run, max_size=6).map(lambda runs: [i for r in runs for i in r])


@pytest.mark.parametrize("name", STREAMED)
@given(data=st.data())
def test_pieces_join_to_the_text_of_the_whole(name: str, data: st.DataObject) -> None:
    ids = data.draw(some_ids(name))
    cut = data.draw(st.integers(0, len(ids)))
    check_stream(load(name), ids[:cut], ids[cut:])


@pytest.mark.parametrize("name", ALL)
def test_each_text_at_each_cut(name: str) -> None:
    tokenizer = load(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for cut in {0, 1, len(ids) // 2, len(ids)}:
            check_stream(tokenizer, ids[:cut], ids[cut:])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("run", [1, Detokenizer.CONTEXT - 1, Detokenizer.CONTEXT, 3 * Detokenizer.CONTEXT, 100])
def test_a_space_after_a_run_of_control_ids_is_kept(name: str, run: int) -> None:
    """SentencePiece drops a space at the start of a text: a window of control ids alone is taken for the start."""
    tokenizer, control = load(name), kinds(name)["control"]
    ids = tokenizer.encode("there was a king and he had a very long beard indeed", bos=False)
    silent = (control * run)[:run]
    for before in ([], [1], ids[:4], ids):
        want = tokenizer.decode([*before, *silent, *ids])[len(tokenizer.decode(before)) :]
        assert want.startswith(" ") == (name in SENTENCEPIECE and len(before) > 1)
        check_stream(tokenizer, [*before, *silent], ids)
        check_stream(tokenizer, before, [*silent, *ids])


@pytest.mark.parametrize("name", STREAMED)
def test_a_character_appears_with_its_last_byte(name: str) -> None:
    tokenizer, byte = load(name), kinds(name)["bytes"]
    start = tokenizer.encode("so:")
    text = "é永🙂"
    pieces, rest = streamed(tokenizer, start, [byte[b] for b in text.encode()])
    assert (pieces, rest) == (["", "é", "", "", "永", "", "", "", "🙂"], "")


@pytest.mark.parametrize("name", STREAMED)
def test_a_window_does_not_begin_within_a_character(name: str) -> None:
    """Control ids behind a character can push its first bytes out of the last CONTEXT ids."""
    tokenizer, byte = load(name), kinds(name)["bytes"]
    for run in range(Detokenizer.CONTEXT + 4):
        ids = [*tokenizer.encode("so: "), *(byte[b] for b in "🙂".encode()), *[1] * run]
        for after in ([], [2], tokenizer.encode(" and on", bos=False)):
            check_stream(tokenizer, ids, after)
            check_stream(tokenizer, ids[:1], [*ids[1:], *after])


@pytest.mark.parametrize("name", STREAMED)
def test_half_a_character_at_the_end_comes_out_with_flush(name: str) -> None:
    tokenizer, byte = load(name), kinds(name)["bytes"]
    start, half = tokenizer.encode("so:"), [byte[b] for b in "🙂".encode()[:3]]
    decoder = Detokenizer(tokenizer, start)
    assert [decoder.push(i) for i in half] == ["", "", ""]
    rest = decoder.flush()
    assert rest
    assert set(rest) == {"\ufffd"}
    assert rest == tokenizer.decode(start + half)[len("so:") :]
    assert decoder.flush() == ""
    check_stream(tokenizer, start, [*half, *tokenizer.encode(" and on", bos=False)])


def test_text_is_shown_at_once() -> None:
    tokenizer = load("v1")
    text = "a king and his daughter lived in a castle by the sea, and " * 3
    ids = tokenizer.encode(text.strip())
    pieces, rest = streamed(tokenizer, ids[:1], ids[1:])
    assert all(pieces)
    assert rest == ""


class Counting:
    """Counts what is decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.lengths: list[int] = []

    bos_id, eos_id = 1, 2

    def encode(self, s: str) -> list[int]:
        raise AssertionError("nothing is encoded")

    def decode(self, t: list[int]) -> str:
        self.lengths.append(len(t))
        return self._tokenizer.decode(t)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("name", STREAMED)
def test_the_cost_of_a_token_does_not_grow(name: str, as_bytes: bool) -> None:
    tokenizer, byte = load(name), kinds(name)["bytes"]
    text = "The 永 king 🙂🙂 was naïf. " * 60
    ids = [byte[b] for b in text.encode()] if as_bytes else tokenizer.encode(text, bos=False)
    assert len(ids) > 600
    counting = Counting(tokenizer)
    decoder = Detokenizer(counting, ids)
    assert sum(counting.lengths) <= 8 * Detokenizer.CONTEXT  # of a context of any length
    counting.lengths.clear()
    shown = "".join(decoder.push(i) for i in ids) + decoder.flush()
    # At most CONTEXT + 3 old ids, CONTEXT + 1 new ones, and the bytes of a character that is not whole.
    assert max(counting.lengths) <= 2 * Detokenizer.CONTEXT + 7
    assert len(counting.lengths) <= 1.6 * len(ids)
    assert shown == tokenizer.decode([*ids, *ids])[len(tokenizer.decode(ids)) :]


ADDED = [
    {"id": 2, "content": "</s>", "special": True},
    {"id": 4096, "content": "<|im_end|>", "special": True},
    {"id": 4097, "content": "<note>", "special": False},
]


def test_tokens_that_only_tokenizer_json_adds(tmp_path: Path) -> None:
    """transformers 5 saves a fine-tune's tokens there alone, beside the tokenizer.model that it began with."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(load("bundled").path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": ADDED}))
    made = Tokenizer(path)
    assert made.added == {"<|im_end|>": 4096, "<note>": 4097}
    assert made.n_ids == 4098
    king = load("bundled").encode("The king", bos=False)
    assert made.decode([*king, 4096]) == "The king"
    assert made.decode([*king, 4097]) == "The king<note>"
    assert 4097 in made.encode("a<note>")
    assert 4096 not in made.encode("a<|im_end|>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<other>": 4096}))  # what older exports say comes first
    assert Tokenizer(path).added == {"<other>": 4096}


@pytest.mark.parametrize("added", [[{"content": "x"}], ["x"], [{"id": True, "content": "x"}], {"x": 4096}])
def test_added_tokens_that_are_none(tmp_path: Path, added: Any) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(load("bundled").path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(TokenizerError, match="for an added token: fetch it again"):
        Tokenizer(path)


def test_a_tokenizer_in_one_line() -> None:
    assert repr(load("bundled")) == "<Tokenizer tokenizer.model: sentencepiece, 4096 words>"


def test_control_tokens_of_a_tekken_json_without_reading_its_words() -> None:
    for name in ("tekken_240718", "tekken_240911"):
        path = DATA / f"{name}.json"
        assert {text: i for i, text in tekken_controls(path).items()} == Tokenizer(path).control_tokens
