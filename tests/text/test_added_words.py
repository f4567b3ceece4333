"""Words that were added to a SentencePiece model, with the flags that they may have: ids are those of `tokenizers`."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.formats.convert import convert
from mistral.formats.hf_tokenizer import to_tokenizer_json
from mistral.special_tokens import FLAGS
from mistral.tokenizer import Tokenizer
from tests.support.folders import BUNDLED, make_folder

pytest.importorskip("tokenizers")

WORDS = ("<w>", "qking", "<w>x")
FLAGGED = st.fixed_dictionaries({name: st.booleans() for name in FLAGS})
TEXT = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "a", "the king", "\u2581", "é", "1", "_"]), max_size=8)


def with_words(folder: Path, *flags: dict[str, bool], special: bool = False) -> Path:
    """A tokenizer.model, and words with such flags in the tokenizer_config.json beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    told = {
        str(4096 + i): {"content": word, "special": special, **flags[i]} for i, word in enumerate(WORDS[: len(flags)])
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": told}), encoding="utf-8")
    return folder / "tokenizer.model"


@cache
def plain() -> str:
    """The tokenizer.json of the tokenizer.model alone, which tests of its own compare."""
    made = to_tokenizer_json(Tokenizer(BUNDLED / "tokenizer.model"))
    assert made is not None
    return made


@given(flags=st.tuples(FLAGGED, FLAGGED, FLAGGED), texts=st.lists(TEXT.map("".join), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_ids_are_those_of_tokenizers(flags: tuple[dict[str, bool], ...], texts: list[str]) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Theirs

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(plain(), encoding="utf-8")  # or `normalized` does nothing
        ours = Tokenizer(with_words(Path(folder), *flags))
    theirs = Theirs.from_str(plain())
    theirs.encode_special_tokens = True
    for word, given_flags in zip(WORDS, flags, strict=True):
        theirs.add_tokens([AddedToken(word, special=False, **given_flags)])
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert not set(ours.encode(text)) & {0}


@pytest.mark.parametrize("flag", [*FLAGS, "none given"])
def test_a_converted_folder_gives_transformers_the_same_ids(tmp_path: Path, flag: str) -> None:
    """As the note says; without a tokenizer.json in the source a word is found everywhere, normalized or not."""
    transformers = pytest.importorskip("transformers")
    flags = {} if flag == "none given" else {name: name == flag for name in FLAGS}
    base = make_folder(tmp_path / "base", vocab_size=4160)
    ours = Tokenizer(with_words(base, flags, flags))
    written = convert(base, tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert any("tokenizer.json was made from tokenizer.model, so that" in note for note in written.notes)
    there = Tokenizer(tmp_path / "hf" / "tokenizer.model")
    for text in ("a <w> b", "a<w>b", "x  <w>  y\n<w> z qking", " <w>", "qkings"):
        assert ours.encode(text) == theirs(text).input_ids == there.encode(text)
    assert 4096 in ours.encode("a\n<w>b") or flag == "single_word"
    assert any("no longer normalized" in note for note in written.notes) == (flag in ("normalized", "none given"))


def test_words_in_a_conversation_are_those_of_a_text(tmp_path: Path) -> None:
    ours = Tokenizer(with_words(tmp_path, dict.fromkeys(FLAGS, False)))
    assert ours.encode_parts(["a <w>b", 2]) == [*ours.encode("a <w>b", bos=False), 2]
    assert 4096 in ours.encode("a <w>b")


def test_spaces_beside_a_control_token_that_takes_them_along(tmp_path: Path) -> None:
    ours = Tokenizer(with_words(tmp_path, {"rstrip": True}, {"lstrip": True}, special=True))
    assert ours.encode_parts(["a ", 4096, " \n b ", 4097, " c"]) == [
        *ours.encode("a ", bos=False),
        4096,
        *ours.encode("b", bos=False),
        4097,
        *ours.encode(" c", bos=False),
    ]
