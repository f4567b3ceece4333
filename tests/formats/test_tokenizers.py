"""Which tokenizer of a folder is read, where its texts end, and the chat template that it brings; loaded and used."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.chat.conversation import Chat
from mistral.chat.messages import Message
from mistral.chat.templates import TemplateError, find_template
from mistral.formats.broken import broken_notes
from mistral.formats.folder import BUNDLED
from mistral.formats.hf_tokenizer import to_tokenizer_config, to_tokenizer_json
from mistral.formats.tokenizers import chat_templates, end_beside, ends_of, eos_ids, load_tokenizer, tokenizer_files
from mistral.generate import complete
from mistral.loader.load import load
from mistral.special_tokens import read_json
from mistral.tokenizer import Tokenizer, TokenizerError
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder, random_state
from tests.support.tokenizer_json import CHATML, DATA, write_tokenizer


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


ORDER = ["tekken.json", "tokenizer.model.v11", "tokenizer.model.v7m1", "tokenizer.model.v7", "tokenizer.model.v3"]
ORDER += ["tokenizer.model", "tokenizer.json"]
NEVER = [
    *("tokenizer.model.v3.bak", "tokenizer.model.v3.sha256", "tokenizer.model.v3.aria2", "tokenizer.model.v3~"),
    *("tokenizer.model.v", "tokenizer.model.v3x", "tokenizer.model.bak", "tokenizer.json.orig", "tekken.json.part"),
    *("my_tokenizer.model.v3", "tokenizer.model.v٣", "tokenizer_config.json", "tekken_240718.json"),
]


def test_order_whatever_the_system_lists_first(tmp_path: Path) -> None:
    for n, names in enumerate((ORDER, ORDER[::-1], [*NEVER, *ORDER], [*ORDER, *NEVER])):
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert [p.name for p in tokenizer_files(folder)] == ORDER
    (tmp_path / "tekken.json").mkdir()
    for name in NEVER:
        (tmp_path / name).touch()
    assert tokenizer_files(tmp_path) == []


def test_two_that_differ_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", vocab_size=32768, state=random_state(vocab_size=32768))
    (folder / "tokenizer.model").unlink()
    v3, v7 = (DATA / f"mistral_instruct_tokenizer_{v}" for v in ("240323.model.v3", "241114.model.v7"))
    shutil.copy(v3, folder / "tokenizer.model.v3")
    shutil.copy(v3, folder / "tokenizer.model")
    shutil.copy(v7, folder / "tokenizer.model.v3.bak")
    assert load(folder, device="cpu").notes == ()
    shutil.copy(v7, folder / "tokenizer.model.v7")
    (note,) = load(folder, device="cpu").notes
    assert note.startswith(
        "several tokenizers: tokenizer.model.v7 is read, tokenizer.model.v3, tokenizer.model ignored"
    )


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, None, {2}),
        (None, 300, {2, 300}),
        (300, None, {2, 300}),
        ([300, 301], 302, {2, 300, 301, 302}),
        ([2, 300], 2, {2, 300}),
        (-1, [], {2}),
    ],
)
def test_ends_are_all_that_the_files_name(tmp_path: Path, generation: Any, config: Any, ends: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    assert eos_ids(tmp_path, tokenizer, 4096) == (frozenset(ends), [])
    named = {i for value in (generation, config) for i in (value if isinstance(value, list) else [value])}
    assert eos_ids(tmp_path, None, 4096)[0] == named - {None, -1}


def test_each_file_that_names_ends_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    read: list[str] = []

    def counted(path: Path) -> Any:
        read.append(path.name)
        return read_json(path)

    monkeypatch.setattr("mistral.formats.tokenizers.read_json", counted)
    assert load_tokenizer(tmp_path, 4096).eos_ids == {2, 7}
    names = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"]
    assert sorted(read) == names


@pytest.mark.parametrize("value", [4096, "2", 1.0, True, {"id": 2}, [2, None]])
def test_ends_that_cannot_be_are_notes(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    ends, (note,) = eos_ids(tmp_path, Tokenizer(BUNDLED / "tokenizer.model"), 4096)
    assert ends == {2}
    assert note.startswith("generation_config.json ends sequences with")
    (tmp_path / "generation_config.json").write_text("{")
    assert eos_ids(tmp_path, None, 4096) == (frozenset(), [])
    (note,) = broken_notes(tmp_path)
    assert note.startswith("generation_config.json holds no JSON object")
    assert note.endswith("whether it ends sequences, and with what, is unknown")


def test_an_end_beside_a_tekken_json_is_an_id_of_the_model(tmp_path: Path) -> None:
    told = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"9000": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    assert end_beside(tmp_path, 9001) == {9000: "tokenizer_config.json"}
    assert end_beside(tmp_path, 9000) == {}


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_generation_ends_at_each_of_them(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path)
    plain = load(folder, device="cpu")
    whole = complete([[1, 300]], plain.model, plain.tokenizer, max_tokens=12, temperature=0)[0].tokens
    assert len(whole) == 12
    (folder / name).write_text(json.dumps({"eos_token_id": [2, whole[5]]}))
    loaded = load(folder, device="cpu")
    assert loaded.tokenizer.eos_ids == {2, whole[5]}
    assert f"ends at ids 2, {whole[5]}" in loaded.describe()
    (done,) = complete([[1, 300]], loaded.model, loaded.tokenizer, max_tokens=12, temperature=0)
    assert (done.tokens, done.finish_reason) == (whole[: whole.index(whole[5])], "stop")


def test_a_folder_with_tokenizer_json_only_has_a_conversation(tmp_path: Path) -> None:
    """And its template ends an answer, though no file names that end."""
    added = ("<|im_start|>", "<|im_end|>")
    folder = make_folder(tmp_path / "model", vocab_size=4098, state=random_state(vocab_size=4098))
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "sentencepiece", tmp_path, CHATML, added)
    loaded = load(folder, device="cpu")
    assert loaded.tokenizer.path.name == "tokenizer.json"
    assert loaded.notes == ()
    template = find_template(loaded.tokenizer, folder=folder)
    chat = Chat(loaded.model, loaded.tokenizer, template, system="Be brief.", temperature=0, max_tokens=6)
    for question in ("Hi", "Bye"):
        assert "".join(p.text for p in chat.answer(question)) == chat.messages[-1].content
    want = template.encode_chat([Message("system", "Be brief."), *chat.messages[:3]])
    assert chat.prefilled_tokens + chat.cached_tokens == len(want)
    assert chat.cached_tokens > 0
    end = loaded.tokenizer.control_tokens["<|im_end|>"]
    loaded.model.logits = lambda h: torch.eye(4098)[torch.full((len(h),), end)]  # type: ignore[method-assign]
    assert list(chat.answer("More"))[-1].finish_reason == "stop"
    assert chat.messages[-1].ids == []


def test_padded_vocabularies_and_tokens_beyond_it(tmp_path: Path) -> None:
    for size, said in (
        (4098, []),
        (4097, ["the model has no weights for 1 added token of its tokenizer (<|im_end|>)"]),
    ):
        folder = make_folder(tmp_path / str(size), vocab_size=size, state=random_state(vocab_size=size))
        (folder / "tokenizer.model").unlink()
        write_tokenizer(folder, "sentencepiece", tmp_path, added=("<|im_start|>", "<|im_end|>"))
        notes = load(folder, device="cpu").notes
        assert len(notes) == len(said)
        assert all(note.startswith(start) for note, start in zip(notes, said, strict=True))
    folder = make_folder(tmp_path / "padded", vocab_size=4200, state=random_state(vocab_size=4200))
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "sentencepiece", tmp_path)
    (note,) = load(folder, device="cpu").notes
    assert note.startswith("the model has 104 ids that the tokenizer has no token for")
    folder = make_folder(tmp_path / "small", vocab_size=4000, state=random_state(vocab_size=4000))
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "sentencepiece", tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer.json has 4096 words, but the model knows 4000"):
        load(folder, device="cpu")


def test_templates_of_a_folder(tmp_path: Path) -> None:
    assert chat_templates(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert [(t.name, t.file, t.text) for t in chat_templates(tmp_path).values()] == [("default", config.name, "one")]
    config.write_text(json.dumps({"chat_template": [{"name": n, "template": n * 2} for n in "ab"]}))
    assert {name: t.text for name, t in chat_templates(tmp_path).items()} == {"a": "aa", "b": "bb"}
    (tmp_path / "chat_template.jinja").write_bytes("\ufeffthree é".encode())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "a.jinja").write_text("four")
    told = chat_templates(tmp_path)
    assert {name: t.text for name, t in told.items()} == {"a": "four", "b": "bb", "default": "three é"}
    assert told["a"].file == str(Path("additional_chat_templates", "a.jinja"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja cannot be read: it is not UTF-8"):
        chat_templates(tmp_path)
    for wrong in (3, [3], [{"name": "a"}], [{"name": 3, "template": "x"}], {"a": 3}):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(TokenizerError, match="has the chat_template"):
            chat_templates(tmp_path)


@pytest.mark.parametrize("name", ["bundled", "v1", "v3"])
def test_a_written_tokenizer_json_gives_the_same_ids_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    files = {"bundled": BUNDLED / "tokenizer.model", "v1": DATA / "tokenizer.model.v1"}
    own = Tokenizer(files.get(name, DATA / "mistral_instruct_tokenizer_240323.model.v3"))
    text = to_tokenizer_json(own)
    assert text is not None
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(to_tokenizer_config(own)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for words in itertools.product(("x", " king", "永🙂", "  "), repeat=2):
        assert theirs("".join(words))["input_ids"] == own.encode("".join(words))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (own.bos_id, own.eos_id)


def test_a_converted_folder_has_its_ids_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from mistral.formats.convert import convert

    folder = make_folder(tmp_path / "ours")
    written = convert(folder, tmp_path / "theirs", "hf")
    assert any("transformers gives the same ids" in note for note in written.notes)
    own, theirs = Tokenizer(folder / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ("The king", " a  b\n", "永🙂", "x <s> y"):
        assert theirs(text, split_special_tokens=True)["input_ids"] == own.encode(text)
    assert load(tmp_path / "theirs", device="cpu").tokenizer.path.name == "tokenizer.model"
    convert(tmp_path / "theirs", tmp_path / "back", "mistral")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_no_tokenizer_json_equals(tmp_path: Path) -> None:
    """SentencePiece's own default: texts are changed first."""
    import io

    import sentencepiece

    made, book = io.BytesIO(), Path(__file__).parents[1] / "data" / "dwarf_long_nose.txt"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(book.read_text(encoding="utf-8")[:20_000].splitlines()),
        model_writer=made,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    assert to_tokenizer_json(Tokenizer(tmp_path / "tokenizer.model")) is None


def test_what_a_folder_suggests_for_sampling_is_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    suggested = {"eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": "high", "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(suggested))
    said = "generation_config.json suggests temperature 0.6, top_k 20, which is not used: give what you want of it"
    assert said in load(folder, device="cpu").notes
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert not any("suggests" in note for note in load(folder, device="cpu").notes)


def test_an_end_that_a_file_names_comes_before_a_usual_name(tmp_path: Path) -> None:
    """What a fine-tune writes behind a sample is what the folder ends sequences with."""
    folder = write_tokenizer(tmp_path / "a", "byte level", tmp_path, added=("<|im_end|>",))
    (folder / "tokenizer_config.json").unlink()
    usual = load_tokenizer(folder, 4096)
    assert usual.eos_ids == {usual.eos_id}
    assert ends_of(folder, usual, 4096)[0] == {usual.eos_id: ["its usual name"]}
    end = usual.control_tokens["<|im_end|>"]
    assert end != usual.eos_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokenizer = load_tokenizer(folder, 4096)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (end, {end})
    assert ends_of(folder, tokenizer, 4096)[0] == {end: ["generation_config.json"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))  # named, not guessed
    named = load_tokenizer(folder, 4096)
    assert (named.eos_id, named.eos_ids) == (usual.eos_id, {usual.eos_id, end})
    assert ends_of(folder, named, 4096)[0] == {
        usual.eos_id: ["tokenizer_config.json"],
        end: ["generation_config.json"],
    }


def test_an_end_by_its_usual_name_is_told(tmp_path: Path, cli: Command) -> None:
    """No file names an end: the line of what was loaded says so, and inspect says where each end is from."""
    scratch = write_tokenizer(tmp_path / "t", "byte level", tmp_path, added=("<|im_end|>",))
    folder = make_folder(tmp_path / "m", tokenizer=False)
    shutil.copy(scratch / "tokenizer.json", folder)
    words = load_tokenizer(folder, 4096)
    text, end = words.named["eos_token"], words.control_tokens["<|im_end|>"]
    assert f"tokenizer tokenizer.json, ends at id {words.eos_id}, {text}, by its usual name" in (
        load(folder, device="cpu").describe()
    )
    assert f"ends        {words.eos_id} {text} (by its usual name)" in cli("inspect", folder).text.splitlines()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, words.eos_id]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    first, second = sorted(
        [
            (words.eos_id, f"{words.eos_id} {text} (by generation_config.json)"),
            (end, f"{end} <|im_end|> (by generation_config.json and config.json)"),
        ]
    )
    assert f"ends        {first[1]}, {second[1]}" in cli("inspect", folder).text.splitlines()
    assert "usual name" not in load(folder, device="cpu").describe()


def test_a_template_that_begins_with_a_bos_needs_one(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a", "byte level", tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder, 4096)
    assert tokenizer.bos_id == -1
    with pytest.raises(TemplateError, match=r"template v1 begins with a bos, which tokenizer\.json lacks"):
        find_template(tokenizer, name="v1")
