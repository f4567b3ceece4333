"""What a folder says about texts twice, or where nobody reads it, is a note at every door that reads a tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as JsonFile

from mistral.formats.adapter import WEIGHTS
from mistral.formats.adapter_words import unused_of
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.hf_tokenizer import to_tokenizer_json
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_adapter import report
from mistral.formats.tokenizers import chat_templates, suggested_sampling
from mistral.formats.words import words_of
from mistral.loader.load import load
from mistral.tokenizer import Tokenizer, outside
from mistral.util.errors import FormatError
from tests.support.adapters import write_peft
from tests.support.commands import Command, in_process
from tests.support.folders import BUNDLED, make_folder, random_state
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf
from tests.support.tokenizer_json import small_tekken

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ADDED = {"4096": {"content": "<|im_start|>", "special": True}, "4097": {"content": "<|im_end|>", "special": False}}
BEYOND = (
    "the model has no weights for 2 added tokens of its tokenizer (<|im_start|>, <|im_end|>): what has one is refused"
)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("words")
    convert(make_folder(place / "a", random_state(dtype=torch.bfloat16)), place / "hf", "hf")
    return place / "hf"


@pytest.fixture
def folder(hf: Path, tmp_path: Path) -> Path:
    shutil.copytree(hf, tmp_path / "folder")
    return tmp_path / "folder"


def put(path: Path, **values: Any) -> None:
    there = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(there | values))


def notes(folder: Path) -> list[str]:
    return words_of(folder, read_folder(folder).args)[1]


def test_two_templates(folder: Path) -> None:
    assert notes(folder) == []
    put(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    assert notes(folder) == []
    (folder / "chat_template.jinja").write_text(TEMPLATE + "\n")
    assert notes(folder) == []  # the same
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    said = [
        "two chat templates that differ: that of chat_template.jinja is used, that of tokenizer_config.json ignored"
    ]
    assert notes(folder) == said
    put(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": TEMPLATE}])
    assert notes(folder) == said
    assert said[0] in load(folder, device="cpu").notes
    assert said[0] in inspect_folder(folder)["suspicious"]
    assert said[0] in convert(folder, folder.with_name("out"), "mistral").notes


def test_templates_that_are_not_the_one(folder: Path) -> None:
    listed = [{"name": name, "template": TEMPLATE} for name in ("default", "tool_use", "rag")]
    put(folder / "tokenizer_config.json", chat_template=listed)
    assert notes(folder) == [
        "more chat templates: tool_use (used where tools are given), rag; --template takes one of them"
    ]
    put(folder / "tokenizer_config.json", chat_template=" ")
    assert notes(folder) == ["the chat template in tokenizer_config.json is empty: it counts as none"]
    assert inspect_folder(folder)["template"]["name"] == "v1"
    put(folder / "tokenizer_config.json", chat_template=None)
    put(folder / "chat_template.json", chat_template=TEMPLATE)
    (note,) = notes(folder)
    assert note.startswith("chat_template.json is not read: it is for models that see images; a template for text")


def test_a_tokenizer_json_with_other_words(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    told["added_tokens"].append({"id": 4095 + 1, "content": "<|x|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(told))
    put(folder / "tokenizer_config.json", added_tokens_decoder={"4097": {"content": "<|y|>", "special": True}})
    assert any(n.startswith("tokenizer.json adds 1 token (<|x|>) that tokenizer_config.json") for n in notes(folder))
    told["model"]["vocab"] = dict(list(told["model"]["vocab"].items())[:4000])
    (folder / "tokenizer.json").write_text(json.dumps(told))
    (note,) = [n for n in notes(folder) if "4,000 words" in n]
    assert note == (
        "tokenizer.json has 4,000 words and tokenizer.model, which is read, 4,096: one is another model's; remove "
        "tokenizer.model to have tokenizer.json read"
    )


def test_a_tokenizer_json_with_the_same_number_of_words(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words["\u2581king"], words["\u2581wolf"] = words["\u2581wolf"], words["\u2581king"]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    (note,) = notes(folder)
    assert note.startswith("tokenizer.json has other ids than tokenizer.model, which is read, for 2 words (")
    assert inspect_folder(folder)["suspicious"] == [note]


@pytest.mark.parametrize(("scheme", "noted"), [("never", True), ("first", False), ("always", False), (None, True)])
def test_a_tokenizer_json_that_begins_texts_otherwise(folder: Path, scheme: str | None, noted: bool) -> None:
    """What transformers writes where add_prefix_space is false; "first" differs for texts that begin with a space."""
    told = json.loads((folder / "tokenizer.json").read_text())
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    told |= {"normalizer": None, "pre_tokenizer": space if scheme else None}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    own = Tokenizer(folder / "tokenizer.model").encode("king", bos=False)
    theirs = JsonFile.from_file(str(folder / "tokenizer.json")).encode("king", add_special_tokens=False).ids
    assert (theirs != own) is noted
    said = [
        n for n in notes(folder) if n.startswith("tokenizer.json begins texts without a space, and tokenizer.model")
    ]
    assert len(said) == noted


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ids_that_a_tokenizer_has_for_something_else(folder: Path, file: str) -> None:
    put(folder / file, eos_token_id=[2, 300])
    (note,) = notes(folder)
    assert note.startswith("sequences end with id 300, which is the ordinary word '")
    put(folder / file, eos_token_id=2, bos_token_id=7)
    assert notes(folder) == [f"{file} has bos_token_id 7, and texts begin with 1 here"]
    put(folder / file, eos_token_id=2, bos_token_id=1)
    put(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    bos, eos = notes(folder)
    assert bos.startswith("tokenizer_config.json has add_bos_token false, and texts begin with bos here")
    assert eos.startswith("tokenizer_config.json has add_eos_token true, which is for training")


def test_how_an_adapters_folder_would_sample(tmp_path: Path, folder: Path) -> None:
    adapter, said = write_peft(tmp_path / "adapter"), "generation_config.json suggests temperature 0.6, which is not"
    put(adapter / "generation_config.json", temperature=0.6)
    for given in (str(adapter), [f"one={adapter}", f"two={write_peft(tmp_path / 'other')}"]):
        notes = load(folder, device="cpu", adapter=given).notes
        assert sum(note.startswith(f"adapter {adapter}: {said}") for note in notes) == 1
    assert any(said in note for note in report(adapter)["notes"])
    assert not any(said in note for note in load(folder, device="cpu", adapter=str(adapter / WEIGHTS)).notes)


def test_what_an_adapters_folder_brings(tmp_path: Path, folder: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert unused_of(adapter, folder) == []
    shutil.copy(folder / "tokenizer_config.json", adapter)
    assert unused_of(adapter, folder) == []
    put(adapter / "tokenizer_config.json", clean_up_tokenization_spaces=True)  # saved again by another version
    assert unused_of(adapter, folder) == []
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    put(adapter / "tokenizer_config.json", added_tokens_decoder=ADDED)
    (note,) = unused_of(adapter, folder)
    assert note == (
        f"adapter {adapter} has a chat template (chat_template.jinja; --template takes a file) and 2 added tokens "
        "(<|im_start|>, <|im_end|>) that folder does not have: not used"
    )
    put(folder / "tokenizer_config.json", added_tokens_decoder=ADDED)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert unused_of(adapter, folder) == []


def test_an_id_beyond_the_vocabulary_is_named_by_its_token(folder: Path) -> None:
    put(folder / "tokenizer_config.json", added_tokens_decoder=ADDED)
    tokenizer = load(folder, device="cpu").tokenizer
    assert outside([1, 2, 4095], tokenizer, 4096) is None
    assert (
        outside([1, 4097, 4096], tokenizer, 4096)
        == "the id 4097 (the token <|im_end|>), outside the vocabulary of 4096"
    )
    assert outside([1, -1], tokenizer, 4096) == "the id -1, outside the vocabulary of 4096"
    assert outside([5000], None, 4096) == "the id 5000, outside the vocabulary of 4096"


def test_finetune_names_the_line_and_the_token_before_a_plan(cli: Command, folder: Path, tmp_path: Path) -> None:
    put(folder / "tokenizer_config.json", added_tokens_decoder=ADDED)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "The king."}\n{"text": "The <|im_end|> wolf."}\n')
    done = cli("finetune", folder, "--data", data, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.splitlines() == [
        f"note: {BEYOND}",
        f"error: {data}:2: it has the id 4097 (the token <|im_end|>), outside the vocabulary of 4096: the model has no "
        "weights for that token",
    ]
    assert not (tmp_path / "out").exists()


def test_doors_name_the_token_and_print_each_note_once(cli: Command, folder: Path, tmp_path: Path) -> None:
    put(folder / "tokenizer_config.json", added_tokens_decoder=ADDED)
    text = tmp_path / "text.txt"
    text.write_text("The king had <|im_end|> daughters. " * 40)
    what = "the id 4097 (the token <|im_end|>), outside the vocabulary of 4096"
    asked = tmp_path / "asked.jsonl"
    body = {"prompt": text.read_text(), "max_tokens": 1}
    asked.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    for words, said in (
        (("complete", folder, "a <|im_end|> b", "--max_tokens", 1), f"prompt 0 has {what}"),
        (("perplexity", folder, text), f"{text} has {what}"),
        (("eval", folder, "--task", "position", "--filler", text, "--lengths", "4", "--n", "1"), f"{text} has {what}"),
        (("batch", asked, tmp_path / "answers.jsonl", "--model", folder), what),
    ):
        done = cli(*words)
        assert done.code != 0
        assert said in done.err + (tmp_path / "answers.jsonl").read_text() if words[0] == "batch" else said in done.err
        assert done.err.count(BEYOND) == 1, words[0]
    done = cli("convert", folder, tmp_path / "q", "--to", "mistral", "--quant", "int4", "--calibrate", text)
    assert f"{text} has {what}" in done.err
    done = cli("convert", folder, tmp_path / "m", "--to", "mistral")
    assert done.err.count(BEYOND) == 1
    done = cli("complete", folder, "The king", "--max_tokens", 1, "--draft", folder)
    assert done.err.count(BEYOND) == 2  # of the model, and of the one that guesses
    assert f"folder, which guesses: {BEYOND}" in done.err


def test_a_run_that_writes_a_model_prints_each_note_once(cli: Command, folder: Path, tmp_path: Path) -> None:
    put(folder / "tokenizer_config.json", added_tokens_decoder=ADDED)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "The king."}\n')
    tune = ("--data", data, "--steps", 1, "--lora", 2, "--seq_len", 32, "--merge")
    done = cli("finetune", folder, *tune, "--out", tmp_path / "out")
    assert done.code == 0, done
    assert done.err.count(BEYOND) == 1
    assert (tmp_path / "out" / "merged" / "config.json").is_file()


def test_a_template_that_is_assumed(cli: Command, folder: Path, tmp_path: Path) -> None:
    said = "note: no chat template is in the folder: v1 is assumed, as tokenizer.model has no control token [INST]"
    asked = tmp_path / "asked.jsonl"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    asked.write_text(
        json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
    )
    data = tmp_path / "train.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The king."}]}\n'
    )
    tune = ("finetune", folder, "--data", data, "--steps", 1, "--lora", 2, "--seq_len", 32)
    for words in (
        ("complete", folder, "Hi", "--instruct", "--max_tokens", 1),
        ("batch", asked, tmp_path / "answers.jsonl", "--model", folder),
        ("eval", folder, "--task", "lines", "--lengths", 256, "--n", 1, "--instruct"),
        (*tune, "--out", tmp_path / "tuned"),
    ):
        done = cli(*words)
        assert done.code == 0, done
        assert done.err.count(said) == 1, words[0]
    body = {"prompt": "Hi", "max_tokens": 1}  # no conversation: nothing is assumed
    asked.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    assert said not in cli("batch", asked, tmp_path / "texts.jsonl", "--model", folder).err
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    done = cli("complete", folder, "Hi", "--instruct", "--max_tokens", 1)
    assert "no chat template" not in done.err


def test_texts_beyond_the_trained_length(cli: Command, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a", random_state(), max_seq_len=16)
    text = tmp_path / "text.txt"
    text.write_text("The king had three daughters. " * 10)
    said = "note: the model was trained on sequences of up to 16 tokens, and the longest here has"
    for words, times in (
        (("perplexity", source, text), 1),
        (("complete", source, "The king", "--max_tokens", 4, "--temperature", 0), 0),
        (("complete", source, text.read_text(), "--max_tokens", 1, "--temperature", 0), 1),
        (("complete", source, "--file", text, "--max_tokens", 1, "--temperature", 0), 1),
        (("eval", source, "--task", "passkey", "--lengths", 256, "--n", 1), 1),
    ):
        done = cli(*words)
        assert done.code == 0, done
        assert done.err.count(said) == times, words
        if words[0] == "complete" and times:  # before the work, which may take minutes
            assert said in done.err.partition("[1 token")[0], words
    talk = cli("interactive", source, "--instruct", "--max_tokens", 4, stdin=b"The king\nhad three daughters\nHi\n")
    assert talk.code == 0, talk
    assert talk.err.count(said) == 1, talk


def test_broken_files_stop_a_run_that_would_write_a_model(cli: Command, folder: Path, tmp_path: Path) -> None:
    """A merged model would be written with them: that is said before the training, not after it."""
    (folder / "generation_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "The king."}\n')
    for flag in ("--merge", "--full"):
        done = cli("finetune", folder, "--data", data, "--out", tmp_path / "out", flag, "--steps", 1)
        assert "generation_config.json cannot be read: it is the pointer that Git LFS leaves" in done.error
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_another_models_is_named_by_convert(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a", vocab_size=4000)
    said = "the tokenizer cannot be used: "
    assert any(note.startswith(said) for note in convert(source, tmp_path / "b", "hf").notes)
    with pytest.raises(FormatError, match="has 4096 words, but the model knows 4000"):
        load(source, device="cpu")


def test_sampling_of_a_config_json(folder: Path) -> None:
    """transformers 4 wrote all values of that kind into a config.json, meant or not."""
    put(folder / "config.json", temperature=1.0, top_p=1.0, top_k=50, max_length=20, num_beams=1, typical_p=1.0)
    assert suggested_sampling(folder) == []
    put(folder / "config.json", temperature=0.3, num_beams=4)
    put(folder / "generation_config.json", top_p=0.9)
    of = "suggests {}, which is not used: give what you want of it"
    assert suggested_sampling(folder) == [
        "generation_config.json " + of.format("top_p 0.9"),
        "config.json " + of.format("temperature 0.3, num_beams"),
    ]
    assert suggested_sampling(folder)[1] in load(folder).notes


def test_what_else_changes_texts_and_is_suggested(folder: Path) -> None:
    asked = {"epsilon_cutoff": 0.1, "guidance_scale": 1.5, "exponential_decay_length_penalty": [5, 1.1]}
    put(folder / "generation_config.json", **asked, eta_cutoff=0.0, token_healing=False, num_beams=1)
    assert suggested_sampling(folder) == [
        f"generation_config.json suggests {', '.join(asked)}, which is not used: give what you want of it"
    ]


def test_an_eos_that_is_no_token(folder: Path) -> None:
    """A fine-tune's template may end turns with what nobody added to the vocabulary."""
    put(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    assert notes(folder) == [
        "tokenizer_config.json has eos_token '<|im_end|>', for which the tokenizer has no token: it ends no sequence"
    ]
    put(folder / "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    assert notes(folder) == []


def test_two_templates_called_default(folder: Path) -> None:
    inside = folder / "additional_chat_templates"
    inside.mkdir()
    for path in (inside / "default.jinja", folder / "chat_template.jinja"):
        path.write_text(TEMPLATE)
    assert notes(folder) == []
    (folder / "chat_template.jinja").write_text(TEMPLATE + "another")
    (note,) = notes(folder)
    assert note == (
        "two chat templates that differ: that of additional_chat_templates/default.jinja is used, that of "
        "chat_template.jinja ignored"
    )


@pytest.mark.parametrize("model", [True, False])
def test_an_added_word_that_is_normalized(folder: Path, model: bool) -> None:
    """Ids are transformers', by tokenizer.json alone and by a tokenizer.model beside it; where tokenizer.json puts no
    space in front, the word is found without one."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 4096, "content": "<word>", "normalized": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    if not model:
        (folder / "tokenizer.model").unlink()
    tokenizer = words_of(folder, replace(read_folder(folder).args, vocab_size=4097))[0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("a <word>b")["input_ids"]
    assert tokenizer is not None
    assert tokenizer.encode("a <word>b") == theirs
    assert 4096 in theirs
    assert not any("normalized" in note for note in notes(folder))
    raw["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert 4096 in words_of(folder, replace(read_folder(folder).args, vocab_size=4097))[0].encode("a<word>b")  # type: ignore[union-attr]


def test_ends_of_a_gguf_file(tmp_path: Path) -> None:
    path, keys = tmp_path / "a.gguf", tokenizer_keys(BUNDLED / "tokenizer.model")
    args = gguf_args(vocab_size=4096)

    def said(**changes: Any) -> list[str]:
        write_gguf(path, args=args, extra={f"tokenizer.ggml.{k}": v for k, v in {**keys, **changes}.items()})
        return words_of(path, args)[1]

    assert said() == []
    assert said(add_eos_token=True) == [
        "the file has add_eos_token true, which is for training: prompts end without eos here"
    ]
    (note,) = said(eos_token_id=300)
    assert note.startswith("sequences end with id 300, which is the ordinary word ' in': texts that hold it are split")
    (note,) = said(eot_token_id=301)
    assert note.startswith("sequences end with id 301, which is the ordinary word ")


def test_templates_as_an_object(folder: Path) -> None:
    """tokenizer_config.json may have them by name, as transformers keeps them in memory."""
    put(folder / "tokenizer_config.json", chat_template={"default": TEMPLATE, "tool_use": "T"})
    assert {name: found.text for name, found in chat_templates(folder).items()} == {
        "default": TEMPLATE,
        "tool_use": "T",
    }
    (folder / "chat_template.jinja").write_text("another")
    differ, more = notes(folder)
    assert "that of chat_template.jinja is used, that of tokenizer_config.json ignored" in differ
    assert more.startswith("more chat templates: tool_use")


def test_tokens_that_a_tekken_json_has_not(folder: Path) -> None:
    """A fine-tune renames control tokens in its tokenizer.json, and its folder has its base's tekken.json too."""
    args = read_folder(folder).args
    (folder / "tokenizer.model").unlink()
    small_tekken(folder / "tekken.json", 3000)
    text = to_tokenizer_json(Tokenizer(folder / "tekken.json"))
    assert text is not None
    (folder / "tokenizer.json").write_text(text)
    assert not [note for note in words_of(folder, args)[1] if "which is read" in note]
    raw = json.loads(text)
    (renamed,) = [token for token in raw["added_tokens"] if token["content"] == "<SPECIAL_20>"]
    renamed["content"] = "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (note,) = [note for note in words_of(folder, args)[1] if "which is read" in note]
    assert note == (
        "tokenizer.json has 1 token (<|im_end|>) that tekken.json, which is read, has not: not used; remove "
        "tekken.json to have tokenizer.json read"
    )
    assert note in inspect_folder(folder)["suspicious"]  # which does not read a tekken.json as a whole
    template = "{{ messages[0].content }}<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    tokenizer, said = words_of(folder, args)
    (told,) = [note for note in said if "which is read" in note]
    assert "which is read, has not: conversations have them, other texts do not; remove tekken.json" in told
    assert not [note for note in said if "ends no sequence" in note]
    assert tokenizer is not None
    assert 20 in tokenizer.eos_ids
    facts = inspect_folder(folder)
    assert told in facts["suspicious"]
    assert {"id": 20, "text": "<|im_end|>", "from": ["tokenizer_config.json"]} in facts["ends"]


def test_a_tekken_json_of_a_later_version(folder: Path) -> None:
    path = small_tekken(folder / "tekken.json", 3000)
    raw = json.loads(path.read_text())
    raw["config"]["version"] = "v99"
    path.write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=r"has version 'v99', which this mistral-common does not know: pip install"):
        Tokenizer(path)


def test_ends_of_a_text_model_inside_another(folder: Path, tmp_path: Path) -> None:
    """A model that reads images has its text model's config inside its own, and ids in either."""
    told = json.loads((folder / "config.json").read_text())
    del told["eos_token_id"], told["architectures"]
    whole = {"model_type": "mistral3", "text_config": {**told, "eos_token_id": [2, 307]}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole | {"eos_token_id": 308, "tie_word_embeddings": False}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    want = {2, 307, 308}
    assert load(folder).tokenizer.eos_ids == want
    for to in ("hf", "mistral"):
        convert(folder, tmp_path / to, to)
        assert load(tmp_path / to).tokenizer.eos_ids == want


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "tokenizer.model"])
def test_special_tokens_that_the_tokenizer_has_not(folder: Path, whole: bool) -> None:
    if whole:
        (folder / "tokenizer.model").unlink()
    put(folder / "tokenizer_config.json", additional_special_tokens=["</s>", "<unk>", "king"], pad_token="[PAD]")
    assert notes(folder) == []
    put(folder / "tokenizer_config.json", extra_special_tokens={"image_token": "<image>"})
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_start|>"]}')
    (note,) = notes(folder)
    assert note == (
        f"the files beside tokenizer.{'json' if whole else 'model'} name 2 special tokens (<image>, <|im_start|>) for "
        "which it has no token: text here, new ids in transformers"
    )
    if whole:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.convert_tokens_to_ids("<image>") >= 4096
