"""Added tokens with ids of the vocabulary: words of a GGUF file, and spare control tokens that a fine-tune renames."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from transformers import AutoTokenizer

from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from mistral.formats.gguf_header import read_gguf
from mistral.formats.tokenizers import load_tokenizer
from mistral.formats.words import text_notes
from mistral.tokenizer import Tokenizer
from tests.support.folders import BUNDLED, make_folder
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf

V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? <|im_end|>"}]


def ids_of_chat(tokenizer: Tokenizer, folder: Path) -> list[int]:
    return find_template(tokenizer, folder=folder).encode_chat([Message(**message) for message in CHAT])


def of_transformers(folder: Path, chat: list[dict[str, str]]) -> Any:
    theirs = AutoTokenizer.from_pretrained(folder)
    return theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """A GGUF file whose ChatML words are of the user's, as converters write words that are not special."""
    keys = tokenizer_keys(BUNDLED / "tokenizer.model")
    for i, word in ((4090, "<|im_end|>"), (4091, "<|im_start|>")):
        keys["tokens"][i], keys["token_type"][i] = word, 4
    path = tmp_path / "tuned.gguf"
    extra = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    write_gguf(path, args=gguf_args(vocab_size=4096), extra={**extra, "tokenizer.chat_template": CHATML})
    return path


def test_a_word_of_the_users_that_is_an_end_by_its_name_is_no_text(chatml: Path) -> None:
    """llama.cpp makes a control token of it, so a text that has it does not end there; the ids are its own."""
    own = load_tokenizer(chatml, 4096)
    assert own.eos_ids == {2, 4090}
    start, end = [1, 261, 4034, 4091, 4034, 271], [63, 127, 310, 98, 679, 127, 65, 4052]
    assert own.encode("a <|im_start|> b<|im_end|>c") == start + end


def test_a_conversation_in_words_of_the_users(chatml: Path) -> None:
    own = load_tokenizer(chatml, 4096)
    pieces = own.encode_parts([4091, "user\nWho? ", 4090, "\n", 4091, "assistant\n"], {"a": 4090, "b": 4091})
    asked = [Message("user", "Who? ")]
    assert find_template(own, folder=chatml).encode_chat(asked) == pieces
    assert pieces[0] == 4091
    assert pieces[1] == Tokenizer(BUNDLED / "tokenizer.model").encode("user", bos=False)[0]
    typed = ids_of_chat(own, chatml)
    assert typed.count(4090) == 2  # what the template wrote; what was typed stays text


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_words_of_the_users_are_converted(to: str, chatml: Path, tmp_path: Path) -> None:
    own = load_tokenizer(chatml, 4096)
    convert(chatml, tmp_path / "out", to)
    there = load_tokenizer(tmp_path / "out", 4096)
    text = "a <|im_start|> b<|im_end|>c"
    assert there.encode(text) == own.encode(text)
    assert there.eos_ids == own.eos_ids
    assert ids_of_chat(there, tmp_path / "out") == ids_of_chat(own, chatml)
    if to == "hf":
        asked = [{"role": "user", "content": "Who?"}]
        assert of_transformers(tmp_path / "out", asked) == find_template(own, folder=chatml).encode_chat(
            [Message("user", "Who?")]
        )
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs(text, split_special_tokens=True)["input_ids"] == own.encode(text)


def renamed(folder: Path) -> tuple[int, int]:
    """A folder with the tokenizer of v3, in which two spare control tokens have other names."""
    make_folder(folder, tokenizer=False, vocab_size=32768)
    shutil.copy(V3, folder / "tokenizer.model")
    spare = Tokenizer(folder / "tokenizer.model").control_tokens
    start, end = spare["[IMG]"], spare["[PREFIX]"]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = {**{i: text for text, i in spare.items()}, start: "<|im_start|>", end: "<|im_end|>"}
    told = {
        "added_tokens_decoder": {str(i): {"content": text, **flags, "special": True} for i, text in names.items()},
        **{"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML},
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return start, end


def test_spare_control_tokens_that_have_other_names(tmp_path: Path) -> None:
    start, end = renamed(tmp_path / "tuned")
    own = load_tokenizer(tmp_path / "tuned", 32768)
    ids = ids_of_chat(own, tmp_path / "tuned")
    assert (ids.count(start), ids.count(end)) == (3, 2)
    assert own.control_tokens["<|im_end|>"] == end
    assert not own.has_control("[PREFIX]")
    assert end in own.eos_ids
    assert text_notes(tmp_path / "tuned", own, 32768) == []
    convert(tmp_path / "tuned", tmp_path / "out", "hf")
    there = load_tokenizer(tmp_path / "out", 32768)
    assert ids_of_chat(there, tmp_path / "out") == ids
    asked = [{"role": "user", "content": "Who?"}]
    given = find_template(own, folder=tmp_path / "tuned").encode_chat([Message("user", "Who?")])
    assert of_transformers(tmp_path / "out", asked) == given


def test_the_fixture_is_what_converters_write(chatml: Path) -> None:
    types = read_gguf(chatml).metadata["tokenizer.ggml.token_type"]
    assert [types[4090], types[4091]] == [4, 4]


def test_words_that_a_tokenizer_model_and_the_files_beside_it_have(tmp_path: Path) -> None:
    """SentencePiece's own words of the user's would have a space in front; transformers cuts a text at them first."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king and the wolf said user and no more"] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>"],
        minloglevel=2,
    )
    alone = Tokenizer(tmp_path / "tokenizer.model")
    pieces, _ = alone.pieces()
    word = pieces.index("<|im_start|>")
    assert alone.encode("<|im_start|>user", bos=False)[1] == word
    told = {"added_tokens_decoder": {str(word): {"content": "<|im_start|>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    own = Tokenizer(tmp_path / "tokenizer.model")
    assert own.encode("<|im_start|>user", bos=False) == [word, *alone.encode("user", bos=False)]
    assert own.added == {"<|im_start|>": word}


def test_ids_of_words_that_other_tokens_have(tmp_path: Path) -> None:
    """As where added_tokens.json is that of a model with fewer words."""
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 4000, "<|im_start|>": 4001}))
    own = Tokenizer(tmp_path / "tokenizer.model")
    assert own.encode("a<|im_end|>", bos=False)[-1] == 4000
    (note,) = own.notes
    assert note.startswith("the files beside tokenizer.model give ids of its words to added tokens, such as 4000 of '")
    assert "to <|im_end|>: those are used, 2 in all; if they are another model's, remove them" in note
    assert not Tokenizer(BUNDLED / "tokenizer.model").notes
    again = pickle.loads(pickle.dumps(own))  # as for a process of one's own
    assert again.encode("a<|im_end|>") == own.encode("a<|im_end|>")
