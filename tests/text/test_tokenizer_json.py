"""tokenizer.json: the ids are those of transformers with the same folder, and typed control tokens stay text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mistral.detokenizer import Detokenizer
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer, TokenizerError, encode
from tests.support.tokenizer_json import DATA, KINDS, fuzz_texts, write_tokenizer

TEXTS = fuzz_texts(3000)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, scratch: Path) -> None:
    folder = write_tokenizer(scratch / kind, kind, scratch)
    tokenizer, reference = Tokenizer(folder / "tokenizer.json"), theirs(folder)
    want = reference(TEXTS, split_special_tokens=True)["input_ids"]
    assert len(want) == len(TEXTS) == 3000
    for text, ids in zip(TEXTS, want, strict=True):
        assert tokenizer.encode(text) == encode(tokenizer, text) == ids, text
        assert tokenizer.encode(text, bos=False) == ids[tokenizer.adds_bos :]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.adds_bos == (kind != "byte level")
    assert tokenizer.n_words == len(reference)
    assert (tokenizer.eos_id, tokenizer.n_ids) == (reference.eos_token_id, len(reference))
    assert tokenizer.bos_id == (-1 if reference.bos_token_id is None else reference.bos_token_id)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_long_runs(kind: str, scratch: Path) -> None:
    folder = write_tokenizer(scratch / f"{kind} runs", kind, scratch)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for text in ("x" + " " * 1_000_000, "x" + "\n" * 100_000, "ab" * 20_000, "永" * 20_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "v3", "tekken"])
def test_the_same_ids_as_mistrals_own(kind: str, scratch: Path) -> None:
    folder = write_tokenizer(scratch / f"{kind} own", kind, scratch)
    files = {"sentencepiece": BUNDLED / "tokenizer.model", "tekken": scratch / "tekken.json"}
    own = Tokenizer(files.get(kind, DATA / "mistral_instruct_tokenizer_240323.model.v3"))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for text in TEXTS[:1000]:
        assert tokenizer.encode(text) == own.encode(text), text
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))
    assert {**own.control_tokens, "<unk>": 0} == tokenizer.control_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_stay_text_and_have_none(kind: str, scratch: Path) -> None:
    folder = write_tokenizer(scratch / f"{kind} control", kind, scratch, added=("<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    control = set(tokenizer.control_tokens.values())
    assert {tokenizer.eos_id, tokenizer.added_tokens["<|im_end|>"]} <= control
    assert tokenizer.has_control("<|im_end|>")
    assert not tokenizer.has_control("<|im_mid|>")
    for text in [*tokenizer.control_tokens, "a<|im_end|> b</s>", "<s>[INST]<s>"]:
        ids = tokenizer.encode(text, bos=False)
        assert not control & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(sorted(control)) == ""


def test_bytes_that_are_no_character_leave_their_neighbours_whole(scratch: Path) -> None:
    """The library gives up a whole run of byte tokens; SentencePiece does not, and text that streams could not."""
    tokenizer = Tokenizer(write_tokenizer(scratch / "bytes", "sentencepiece", scratch) / "tokenizer.json")
    own = Tokenizer(BUNDLED / "tokenizer.model")
    for raw in ("永".encode() + b"\xe6", b"\xe6\xb0" + "永".encode(), b"\x80\xff\xf0\x9f\x99", "🙂".encode() * 3):
        ids = [1, 300, *(3 + b for b in raw), 301]
        assert tokenizer.decode(ids) == own.decode(ids)
        decoder = Detokenizer(tokenizer)
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == own.decode(ids)


# What the files beside it say.


def test_added_tokens_of_the_files_beside_it(scratch: Path) -> None:
    added = {
        "4096": {"content": "<|im_end|>", **FLAGS, "special": True},
        "4097": {"content": "<tool>", **FLAGS},
    }
    folder = write_tokenizer(
        scratch / "beside", "sentencepiece", scratch, added_tokens_decoder=added, eos_token="<|im_end|>"
    )
    tokenizer, reference = Tokenizer(folder / "tokenizer.json"), theirs(folder)
    assert (tokenizer.eos_id, tokenizer.n_words, tokenizer.n_ids) == (4096, 4096, 4098)
    assert dict(tokenizer.added) == {"<|im_end|>": 4096, "<tool>": 4097}
    for text in ("a<tool>b <tool> <|im_end|>", "<tool>", "x <|im_end|>"):
        ids = tokenizer.encode(text)
        assert ids == reference(text, split_special_tokens=True)["input_ids"]
        assert 4096 not in ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.notes == ()
    folder = write_tokenizer(
        scratch / "other", "sentencepiece", scratch, added_tokens_decoder={"5000": {"content": "<x>"}}
    )
    assert Tokenizer(folder / "tokenizer.json").notes == (
        "tokenizer.json gives <x> the id 4096, the files beside it 5000: 4096 is used",
    )


def test_a_token_that_the_config_calls_special(scratch: Path) -> None:
    """OpenHermes and its like: the end of a turn is special in one file only."""
    folder = write_tokenizer(scratch / "flag", "sentencepiece", scratch)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 4096, "content": "<|im_end|>", **FLAGS})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert 4096 in Tokenizer(folder / "tokenizer.json").encode("a<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": {"content": "<|im_end|>"}}))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert tokenizer.eos_id == 4096
    assert 4096 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([300, 4096]) == tokenizer.decode([300])


@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize("framed", [True, False])
def test_bos_as_the_folder_has_it(scratch: Path, add: bool | None, framed: bool) -> None:
    folder = write_tokenizer(scratch / f"bos {add} {framed}", "sentencepiece", scratch)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["add_bos_token"], config["add_eos_token"]
    if add is not None:
        config["add_bos_token"] = add
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not framed:
        raw = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}))
    tokenizer = Tokenizer(folder / "tokenizer.json")
    want = theirs(folder)("The king")["input_ids"]
    assert encode(tokenizer, "The king") == want
    assert tokenizer.adds_bos == (want[0] == 1)
    assert tokenizer.adds_bos == framed
    assert bool(tokenizer.notes) == (not framed or add is False)


def test_without_a_config(scratch: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "bare", "sentencepiece", scratch)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.encode("Hi") == Tokenizer(BUNDLED / "tokenizer.model").encode("Hi")


def test_padding_and_truncation_are_not_taken_over(scratch: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "padded", "sentencepiece", scratch)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        **{"strategy": {"Fixed": 12}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    text = "Once upon a time, there was a king."
    assert Tokenizer(folder / "tokenizer.json").encode(text) == Tokenizer(BUNDLED / "tokenizer.model").encode(text)


def test_the_wrong_regex_is_named(scratch: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "regex", "tekken", scratch)
    assert Tokenizer(folder / "tokenizer.json").notes == ()
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA_3
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (note,) = Tokenizer(folder / "tokenizer.json").notes
    assert "splits text by another pattern than Mistral's tekken tokenizers" in note


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_words_that_were_added(scratch: Path, tmp_path: Path, name: str) -> None:
    """tokenizer.model and what added_tokens.json adds to it read text as the tokenizer.json of the same does."""
    folder = write_tokenizer(tmp_path, "sentencepiece", scratch, eos_token="<|im_end|>")
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 4096, "<tool>": 4097, "<tool><tool>": 4098}))
    tokenizer = Tokenizer(folder / name)
    assert tokenizer.control_tokens["<|im_end|>"] == 4096
    assert (tokenizer.n_words, tokenizer.n_ids) == (4096, 4099)
    assert (
        tokenizer.encode("a <tool>b<tool><tool><|im_end|>")[:5]
        == [
            *Tokenizer(BUNDLED / "tokenizer.model").encode("a ")[:3],
            4097,
            *Tokenizer(BUNDLED / "tokenizer.model").encode("b", bos=False),
        ][:5]
    )
    other = Tokenizer(folder / ("tokenizer.json" if name == "tokenizer.model" else "tokenizer.model"))
    for text in ("a <tool>b<tool><tool><|im_end|>", "<tool> x", " <tool>  <tool>"):
        assert tokenizer.encode(text) == other.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == other.decode(tokenizer.encode(text))
    assert tokenizer.decode([300, 4096, 4097, 5000]) == tokenizer.decode([300]) + "<tool>"


# Errors.

GOOD_END = '"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"version": "1.0", ' + b'"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        b'{"version": "1.0", ' + b'"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"version": "1.0", ' + b'"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        b'{"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", '
        b'"invert": false}, ' + GOOD_END.encode(),
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.json") as error:
        Tokenizer(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", "{", "holds no JSON"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "for the id 'x'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"additional_special_tokens": 5}', "additional_special_tokens"),
        ("special_tokens_map.json", "null", "not an object"),
        ("added_tokens.json", '{"a": "b"}', "the id 'b'"),
    ],
)
def test_broken_files_beside_it_are_named(scratch: Path, tmp_path: Path, name: str, content: str, said: str) -> None:
    folder = write_tokenizer(tmp_path, "sentencepiece", scratch)
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=said) as error:
        Tokenizer(folder / "tokenizer.json")
    assert name in str(error.value)


def test_text_that_is_not_unicode_is_refused(scratch: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, "sentencepiece", scratch) / "tokenizer.json")
    for text, place in [("\ud800", 0), ("ab\udc80c", 2)]:
        with pytest.raises(TokenizerError, match=f"at character {place}"):
            tokenizer.encode(text)
        with pytest.raises(TokenizerError, match=f"at character {place}"):
            tokenizer.encode_parts([text])
    with pytest.raises(TokenizerError, match="id -1 is below 0"):
        tokenizer.decode([-1])
    assert tokenizer.decode([300, 2**40]) == tokenizer.decode([300])


def test_what_is_for_training_is_not_used(scratch: Path, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a", "sentencepiece", scratch)
    path, plain = folder / "tokenizer.json", Tokenizer(folder / "tokenizer.json")
    raw = json.loads(path.read_text())
    raw["model"]["dropout"] = 0.9
    raw["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    raw["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer(path)
    assert tokenizer.adds_bos
    assert plain.notes == ()
    assert [note.split(", which")[0] for note in tokenizer.notes] == [
        "tokenizer.json has dropout 0.9",
        "tokenizer.json puts </s> behind a text",
    ]
    for text in TEXTS[:50]:
        assert tokenizer.encode(text) == plain.encode(text)


def test_named_tokens_are_those_that_templates_get_from_transformers(scratch: Path, tmp_path: Path) -> None:
    named = {"unk_token": "<unk>", "pad_token": "</s>", "sep_token": "<0x41>"}
    folder = write_tokenizer(tmp_path / "named", "sentencepiece", scratch, **named)
    reference = theirs(folder)
    template = "".join(f"{{{{ {name} }}}}|" for name in ("bos_token", "eos_token", *named, "cls_token"))
    want = reference.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    found = Tokenizer(folder / "tokenizer.json").named
    assert "|".join([*(found[name] for name in ("bos_token", "eos_token", *named)), "", ""]) == want
