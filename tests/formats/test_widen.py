"""Adapters that add words: tables, tokenizer, template and ends, against PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral import load
from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats.adapter import AdapterError, read_adapter
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import read_folder
from mistral.formats.hf_tokenizer import to_tokenizer_json
from mistral.formats.merge import merge_into
from mistral.loader.options import OptionError
from mistral.oracle.verify import has_kernels
from mistral.parameters import parameters
from mistral.serve.settings import served_of
from mistral.tokenizer import Tokenizer
from tests.support.adapters import peft_tensors, write_peft
from tests.support.chatml import KINDS, MESSAGES, ROWS, TEMPLATE, WORDS, chatml, hf_base, ids_of
from tests.support.commands import in_process
from tests.support.folders import BUNDLED, PARAMS, make_folder
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf

pytest.importorskip("peft")

HEADS = ("model.embed_tokens", "lm_head")


# Other rows of a tied output than of the embeddings: see test_rows_of_an_output_that_is_tied_are_refused.
TWO_ANSWERS = ("rows of both", True)


@pytest.mark.parametrize(("kind", "tied"), [(k, t) for k in KINDS for t in (False, True) if (k, t) != TWO_ANSWERS])
def test_logits_are_pefts(tmp_path: Path, kind: str, tied: bool) -> None:
    base = hf_base(tmp_path / "base", tied)
    adapter, want = chatml(base, tmp_path / "adapter", **KINDS[kind])
    loaded = load(base, device="cpu", adapter=str(adapter))
    with torch.inference_mode():
        got = loaded.model.forward(ids_of(), [11])
    assert got.shape == want.shape == (11, ROWS + 2)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert loaded.args.vocab_size == ROWS + 2
    assert loaded.tokenizer.eos_ids == {2, ROWS + 1}
    assert loaded.args.tied_embeddings == (tied and kind != "modules_to_save")


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_a_merged_folder_is_transformers_own(tmp_path: Path, to: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = hf_base(tmp_path / "base")
    adapter, want = chatml(base, tmp_path / "adapter", multiple=64, **KINDS["modules_to_save"])
    written = convert(base, tmp_path / "merged", to, adapter=adapter)
    loaded = load(tmp_path / "merged", device="cpu")
    theirs = AutoTokenizer.from_pretrained(adapter)
    assert want.shape[1] == loaded.args.vocab_size == ROWS + 64
    assert loaded.tokenizer.eos_ids == {2, ROWS + 1}
    template = find_template(loaded.tokenizer, folder=loaded.words)
    ids = template.encode_chat([Message(one["role"], one["content"]) for one in MESSAGES])
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids.count(ROWS) == 3
    with torch.inference_mode():
        assert (loaded.model.forward(ids_of(), [11]) - want).abs().max() < 1e-5 * want.abs().max()
    assert ids == expected
    if to == "hf":
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert merged.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == expected
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        with torch.inference_mode():
            assert (model(ids_of()[None]).logits[0] - want).abs().max() < 1e-5 * want.abs().max()
        assert model.generation_config.eos_token_id == [2, ROWS + 1]
    assert any(f"2 tokens ({', '.join(WORDS)}) that base does not have" in note for note in written.notes)


UNTIES: dict[str, dict[str, Any]] = {
    "embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [5, 300]},
}


@pytest.mark.parametrize("kind", UNTIES)
def test_a_tie_ends_where_pefts_does(tmp_path: Path, kind: str) -> None:
    """Without more words; the rows of `rows` are among those of the prompt."""
    base = hf_base(tmp_path / "base", tied=True)
    adapter, want = chatml(base, tmp_path / "adapter", more=0, **UNTIES[kind])
    loaded = load(base, device="cpu", adapter=str(adapter))
    with torch.inference_mode():
        got = loaded.model.forward(ids_of(0), [11])
        plain = load(base, device="cpu").model.forward(ids_of(0), [11])
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 0.05 * want.abs().max()
    assert loaded.args.tied_embeddings == (kind in ("both, tied", "rows"))
    assert any("no longer tied" in note for note in loaded.notes) != loaded.args.tied_embeddings


# A LoRA of either table, and what recipes put beside it: arguments of PEFT, words added, whether the base is tied.
LORA: dict[str, tuple[dict[str, Any], int, tuple[bool, ...]]] = {
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, 0, (False, True)),
    "embeddings alone, rsLoRA": ({"target_modules": ["embed_tokens"], "use_rslora": True}, 0, (False,)),
    "embeddings, DoRA": ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, 0, (False, True)),
    "embeddings, words": ({"target_modules": ["embed_tokens"]}, 2, (True,)),
    "embeddings, own output": ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, 0, (True,)),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, 2, (False, True)),
    "both, tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, 0, (True,)),
    "output": ({"target_modules": ["lm_head"]}, 0, (True,)),
    "output, words": ({"target_modules": ["lm_head"]}, 2, (True,)),
    "output, own embeddings": ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, 2, (True,)),
    "output, rows": ({"target_modules": ["lm_head"], "trainable_token_indices": [5, 300]}, 0, (True,)),
    "output, new rows": ({"target_modules": ["lm_head"], **KINDS["trainable_token_indices"]}, 2, (False, True)),
}


@pytest.mark.parametrize(("kind", "tied"), [(kind, tied) for kind, found in LORA.items() for tied in found[2]])
def test_a_lora_of_a_table_is_pefts(tmp_path: Path, kind: str, tied: bool) -> None:
    lora, more, _ = LORA[kind]
    base = hf_base(tmp_path / "base", tied)
    adapter, want = chatml(base, tmp_path / "adapter", more=more, **lora)
    loaded = load(base, device="cpu", adapter=str(adapter))
    with torch.inference_mode():
        got = loaded.model.forward(ids_of(more), [11])
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert loaded.args.tied_embeddings == (kind == "both, tied")
    with pytest.raises(OptionError, match="it can only be merged, alone"):
        load(base, device="cpu", adapter=str(adapter), adapter_mode="runtime")


@pytest.mark.parametrize("tied", [False, True])
def test_a_lora_of_a_table_that_its_file_has_alone(tmp_path: Path, tied: bool) -> None:
    """As where PEFT does not save the base's tables: A is [rank, words], B is [dim, rank]."""
    at, a, b = "base_model.model.model.embed_tokens.lora_embedding_", torch.rand(3, ROWS), torch.rand(24, 3)
    adapter = write_peft(tmp_path / "adapter", {f"{at}A": a, f"{at}B": b})
    base = hf_base(tmp_path / "base", tied)
    plain = read_folder(base).weights.get("tok_embeddings.weight")
    merged = merge_into(read_folder(base), read_adapter(adapter)).weights
    torch.testing.assert_close(merged.get("tok_embeddings.weight"), plain + 2 * (b @ a).T)
    assert torch.equal(merged.get("output.weight"), plain) == tied
    with pytest.raises(OptionError, match="has a LoRA of embed_tokens, which are no product: it can only be merged"):
        load(base, device="cpu", adapter=str(adapter), adapter_mode="runtime")
    if tied:
        head = "base_model.model.lm_head.lora_"
        output = write_peft(
            tmp_path / "output", {f"{head}A.weight": b.T.contiguous(), f"{head}B.weight": a.T.contiguous()}
        )
        with pytest.raises(OptionError, match="has a LoRA of lm_head, which is tied to the embeddings of this model"):
            load(base, device="cpu", adapter=str(output), adapter_mode="runtime")
    wrong = write_peft(tmp_path / "wrong", {at.replace("embedding_", f"{one}.weight"): a.clone() for one in "AB"})
    with pytest.raises(AdapterError, match="changes model.embed_tokens by .*, as PEFT does not"):
        read_adapter(wrong)


def handmade(folder: Path, embed: int | None, head: int | None, **changes: Any) -> Path:
    """An adapter with tables of so many rows, and no tokenizer."""
    rows = {"model.embed_tokens": embed, "lm_head": head}
    own = {f"base_model.model.{at}.weight": torch.rand(n, PARAMS["dim"]) for at, n in rows.items() if n is not None}
    return write_peft(folder, peft_tensors() | own, **changes)


def with_words(folder: Path, *words: str, **config: Any) -> Path:
    """A tokenizer beside an adapter: that of the tests' base, with words more."""
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    added = {str(ROWS + i): {"content": word, "special": True} for i, word in enumerate(words)}
    text = json.dumps({"added_tokens_decoder": added, **config})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


REFUSED: dict[str, tuple[tuple[int | None, int | None], dict[str, Any], str]] = {
    "fewer": ((ROWS - 1, ROWS - 1), {}, "has 4,095 rows for model.embed_tokens and 4,095 rows for lm_head, fewer than"),
    "no output": ((ROWS + 1, None), {}, "the rows of 1 word that was added are not saved for lm_head: save it again"),
    "no embeddings": ((None, ROWS + 2), {}, "2 words that were added are not saved for model.embed_tokens"),
    "not the same": ((ROWS + 2, ROWS + 64), {}, "64 words that were added are not saved for model.embed_tokens"),
    "no rows": ((None, None), {"trainable_token_indices": [3]}, "has trainable_token_indices of 'embed_tokens', which"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_do_not_go_together_are_refused(tmp_path: Path, kind: str) -> None:
    sizes, changes, message = REFUSED[kind]
    adapter = handmade(tmp_path / "adapter", *sizes, **changes)
    with pytest.raises(AdapterError, match=message):
        load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 1], "has an id twice"),
        ([1], "is .2, 24., but adapter_config.json has trainable_token_indices of 1 rows"),
        ([1, -1], "it must be a list of ids"),
        ([1, ROWS], "has single rows up to id 4,096 for model.embed_tokens, and the rows of 1 word that was added are"),
        ([1, ROWS + 1], "the rows of 2 words that were added are not saved for model.embed_tokens and lm_head"),
        (None, "but adapter_config.json has no trainable_token_indices"),
        ({"embed_tokens": [1, 2], "lm_head": [1, 3]}, "of 'lm_head', which the adapter's file does not hold"),
    ],
)
def test_rows_that_are_nobodys_are_refused(tmp_path: Path, indices: Any, message: str) -> None:
    own = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.rand(2, 24)}
    adapter = write_peft(tmp_path / "adapter", peft_tensors() | own, trainable_token_indices=indices)
    with pytest.raises(AdapterError, match=message):
        load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))


def test_rows_of_an_output_that_is_tied_are_refused(tmp_path: Path) -> None:
    """PEFT's own merge of that is another model than the one that was trained."""
    indices = {"embed_tokens": [3, 60], "lm_head": [4, 60]}
    own = {f"base_model.model.{at}.token_adapter.trainable_tokens_delta": torch.rand(2, 24) for at in HEADS}
    adapter = write_peft(tmp_path / "adapter", peft_tensors() | own, trainable_token_indices=indices)
    with pytest.raises(AdapterError, match="has rows of its own for lm_head, and the output of this model is tied"):
        load(hf_base(tmp_path / "base", tied=True), device="cpu", adapter=str(adapter))


def test_words_without_tables_need_rows_of_the_base(tmp_path: Path) -> None:
    """In padding of the base they have some; else the adapter is refused, and its file goes with the base's words."""
    base, padded = make_folder(tmp_path / "base"), make_folder(tmp_path / "padded", vocab_size=ROWS + 64)
    adapter = with_words(write_peft(tmp_path / "adapter"), *WORDS, eos_token="<|im_end|>")
    for mode in ("merge", "runtime"):
        loaded = load(padded, device="cpu", adapter=str(adapter), adapter_mode=mode)
        assert loaded.tokenizer.added_tokens["<|im_end|>"] == ROWS + 1
        assert loaded.tokenizer.eos_ids == {2, ROWS + 1}
        assert loaded.words == adapter
        with pytest.raises(
            AdapterError, match=r"2 tokens \(<\|im_start\|>, <\|im_end\|>\) for which there are no rows"
        ):
            load(base, device="cpu", adapter=str(adapter), adapter_mode=mode)
    alone = load(base, device="cpu", adapter=str(adapter / "adapter_model.safetensors"))
    assert alone.words == base
    assert alone.tokenizer.eos_ids == {2}


def test_a_word_for_padding_needs_no_row(tmp_path: Path) -> None:
    adapter = with_words(write_peft(tmp_path / "adapter"), "<pad>", pad_token="<pad>")
    loaded = load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    assert loaded.words == tmp_path / "base"
    assert any("1 added token (<pad>) that base does not have: not used" in note for note in loaded.notes)


def test_ends_of_a_tokenizer_json_alone_are_those_that_the_base_names(tmp_path: Path) -> None:
    """As in transformers, whose generate() has the base's; a usual name is for where no file has any."""
    base = hf_base(tmp_path / "base")
    adapter, _ = chatml(base, tmp_path / "adapter", **KINDS["modules_to_save"])
    (adapter / "tokenizer_config.json").unlink()
    (base / "tokenizer.model").unlink()
    for name, changes in (("config.json", {"eos_token_id": 1}), ("tokenizer_config.json", {"eos_token": "<s>"})):
        told = json.loads((base / name).read_text(encoding="utf-8"))
        (base / name).write_text(json.dumps(told | changes), encoding="utf-8")
    loaded = load(base, device="cpu", adapter=str(adapter))
    assert loaded.words == adapter
    assert loaded.tokenizer.eos_ids == {1}
    assert "usual name" not in loaded.describe()
    convert(base, tmp_path / "merged", "hf", adapter=adapter)
    assert load(tmp_path / "merged", device="cpu").tokenizer.eos_ids == {1}
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((base / name).read_text(encoding="utf-8"))
        told.pop("eos_token_id", None), told.pop("eos_token", None)
        (base / name).write_text(json.dumps(told), encoding="utf-8")
    assert "ends at id 2, </s>, by its usual name" in load(base, device="cpu", adapter=str(adapter)).describe()


def test_a_template_beside_a_tokenizer_is_the_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Conversations were written so in training; one without a tokenizer beside it goes with the base's."""
    base, form = make_folder(tmp_path / "base"), "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    adapter = with_words(write_peft(tmp_path / "adapter"), chat_template=form)
    for mode in ("merge", "runtime"):
        loaded = load(base, device="cpu", adapter=str(adapter), adapter_mode=mode)
        assert loaded.words == adapter
        assert find_template(loaded.tokenizer, folder=loaded.words).source == "tokenizer_config.json"
        said = (
            "the tokenizer is the adapter's tokenizer.model; the chat template is that of tokenizer_config.json there"
        )
        assert said in loaded.notes
    convert(base, tmp_path / "merged", "hf", adapter=adapter)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["chat_template"] == form
    shutil.copy(adapter / "tokenizer_config.json", base)
    assert load(base, device="cpu", adapter=str(adapter)).words == base
    (base / "tokenizer_config.json").unlink()
    (adapter / "tokenizer.model").unlink()
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for mode in ("merge", "runtime"):
        alone = load(base, device="cpu", adapter=str(adapter), adapter_mode=mode)
        assert (alone.words, alone.templates) == (base, adapter)
        assert "the chat template is that of tokenizer_config.json beside the adapter" in alone.notes
        done = in_process(capfd)("complete", base, "Hi", "--instruct", "--adapter", adapter, "--max_tokens", 1)
        assert done.code == 0
        assert "beside the adapter" in done.err
    for n, to in enumerate(("hf", "mistral")):
        convert(base, tmp_path / f"both{n}", to, adapter=adapter)
        assert (tmp_path / f"both{n}" / "chat_template.jinja").read_text(encoding="utf-8") == form
    load(base, device="cpu", adapter=str(adapter)).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == form
    alone = load(base, device="cpu", adapter=str(adapter / "adapter_model.safetensors"))
    assert alone.templates == base


def test_a_word_that_the_base_has_no_row_for_either_is_no_news(tmp_path: Path) -> None:
    base = with_words(make_folder(tmp_path / "base"), "<odd>")
    loaded = load(base, device="cpu", adapter=str(with_words(write_peft(tmp_path / "adapter"), "<odd>")))
    assert loaded.words == base
    assert any("the model has no weights for 1 added token of its tokenizer (<odd>)" in note for note in loaded.notes)


def test_several_adapters_leave_the_words_to_the_base(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", vocab_size=ROWS + 64)
    words = with_words(write_peft(tmp_path / "words"), *WORDS)
    loaded = load(base, device="cpu", adapter=[str(words), str(write_peft(tmp_path / "plain"))])
    assert loaded.words == base
    assert any("that base does not have: not used" in note for note in loaded.notes)
    tables = with_words(handmade(tmp_path / "tables", ROWS + 128, ROWS + 128), *WORDS)
    with pytest.raises(OptionError, match="in the place of lm_head, model.embed_tokens: it can only be merged, alone"):
        load(base, device="cpu", adapter=[str(words), str(tables)])


def test_tables_without_a_tokenizer_keep_the_bases_words(tmp_path: Path) -> None:
    adapter = handmade(tmp_path / "adapter", ROWS + 2, ROWS + 2)
    loaded = load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    assert loaded.args.vocab_size == ROWS + 2
    assert loaded.tokenizer.n_ids == ROWS
    merged = merge_into(read_folder(tmp_path / "base"), read_adapter(adapter))
    assert {name: tensor.shape for name, tensor in merged.tensors.items()} == {
        name: parameter.shape for name, parameter in parameters(loaded.args).items()
    }
    assert "the adapter's folder has no tokenizer: the words that it adds have ids, and no text" in loaded.notes
    assert "the model has 2 ids that the tokenizer has no token for, and so without text" in loaded.notes


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_while_it_is_read_is_quantized_afterwards(tmp_path: Path, quant: str) -> None:
    base, adapter = make_folder(tmp_path / "base"), handmade(tmp_path / "adapter", ROWS + 2, ROWS + 2)
    convert(base, tmp_path / "merged", "mistral", adapter=adapter)
    with torch.inference_mode():
        one, other = (
            load(folder, device="cpu", quant=quant, **more).model.forward(ids_of(), [11])
            for folder, more in ((base, {"adapter": str(adapter)}), (tmp_path / "merged", {}))
        )
    assert torch.equal(one, other)
    convert(base, tmp_path / "few", "mistral", quant=quant)
    with pytest.raises(AdapterError, match="merge into what they were made from$"):
        load(tmp_path / "few", device="cpu", adapter=str(adapter))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_gets_words_too(tmp_path: Path, kind: str) -> None:
    args = gguf_args(vocab_size=ROWS, n_layers=2, tied_embeddings=True)
    words = {f"tokenizer.ggml.{key}": value for key, value in tokenizer_keys(BUNDLED / "tokenizer.model").items()}
    write_gguf(tmp_path / "base.gguf", kind, args, extra=words, without=("output.weight",))
    base = tmp_path / "base.gguf"
    own = torch.rand(ROWS + 2, args.dim)
    tensors = {"base_model.model.model.embed_tokens.weight": own}
    at = "base_model.model.model.layers.0.mlp.up_proj"
    tensors |= {f"{at}.lora_A.weight": torch.rand(3, args.dim), f"{at}.lora_B.weight": torch.rand(args.hidden_dim, 3)}
    adapter = with_words(write_peft(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"]), *WORDS)
    made = to_tokenizer_json(Tokenizer(adapter / "tokenizer.model"))
    assert made is not None
    (adapter / "tokenizer.json").write_text(made, encoding="utf-8")
    (adapter / "tokenizer.model").unlink()
    loaded = load(base, device="cpu", adapter=str(adapter), quant="none")
    assert loaded.args.tied_embeddings
    assert any(note.startswith("the output stays tied to the embeddings") for note in loaded.notes)
    assert torch.equal(loaded.model.output.weight, own)
    assert loaded.words == adapter
    if kind != "F32" and has_kernels():  # the table is most of its numbers, and no longer blocks
        blocks = load(base, device="cpu", adapter=str(adapter))
        assert "cache Q8_0+float32/float32/float32;" in blocks.runtime.describe()
    convert(base, tmp_path / "merged", "hf", adapter=adapter)
    merged = load(tmp_path / "merged", device="cpu")
    assert merged.tokenizer.added_tokens[WORDS[0]] == loaded.tokenizer.added_tokens[WORDS[0]] == ROWS
    assert merged.tokenizer.eos_ids == loaded.tokenizer.eos_ids == {2}
    assert not (tmp_path / "merged" / "tokenizer.model").exists()  # that of the GGUF file
    with torch.inference_mode():
        assert torch.equal(*(one.model.forward(ids_of(), [11]) for one in (loaded, merged)))


def test_a_conversation_with_other_words_is_another_models(tmp_path: Path) -> None:
    base, adapter = make_folder(tmp_path / "base"), handmade(tmp_path / "adapter", ROWS + 2, ROWS + 2)
    before = fingerprint(base, str(adapter))
    with_words(adapter, *WORDS)
    assert fingerprint(base, str(adapter)) != before


def test_an_added_tokens_json_that_is_left_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A word with another id is that of tokenizer.json, as in transformers; one that is there alone has no row."""
    cli, base = in_process(capfd), hf_base(tmp_path / "base")
    adapter, _ = chatml(base, tmp_path / "adapter", **KINDS["modules_to_save"])
    (adapter / "added_tokens.json").write_text(json.dumps({WORDS[1]: ROWS + 4}))
    said = f"tokenizer.json gives {WORDS[1]} the id {ROWS + 1}, the files beside it {ROWS + 4}: {ROWS + 1} is used"
    loaded = load(base, device="cpu", adapter=str(adapter))
    assert said in loaded.notes
    assert any(f"which has 2 tokens ({', '.join(WORDS)}) that base" in note for note in loaded.notes)
    assert f"note: {said}\n" in cli("inspect", adapter).text
    (adapter / "added_tokens.json").write_text(json.dumps({"<old>": ROWS + 2}))
    left = "; nothing but added_tokens.json there names <old>: if it is left over from before, remove it"
    with pytest.raises(AdapterError, match=left):
        load(base, device="cpu", adapter=str(adapter))
    inspected = cli("inspect", adapter).text
    assert f"note: its tokenizer has 1 token (<old>) for which it has no row: refused{left}\n" in inspected


def test_inspect_says_which_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli, base = in_process(capfd), make_folder(tmp_path / "base")
    adapter = handmade(tmp_path / "adapter", ROWS + 64, ROWS + 64, base_model_name_or_path=str(base))
    assert (
        "\nvocabulary  4,160 rows, 64 more than its base; no tokenizer is beside it\n" in cli("inspect", adapter).text
    )
    with_words(adapter, *WORDS, chat_template="{{ messages }}")
    said = "tokenizer.model beside it adds 2 words (<|im_start|>, <|im_end|>), with the chat template"
    assert f"4,160 rows, 64 more than its base; {said} tokenizer_config.json\n" in cli("inspect", adapter).text
    told = json.loads(cli("inspect", with_words(write_peft(tmp_path / "words"), *WORDS), "--json").text)["vocabulary"]
    assert told == {
        "rows": None,
        "base_rows": 32000,
        "tokenizer": "tokenizer.model",
        "words": WORDS,
        "template": None,
    } | {"words_beyond_base": []}
    own = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.rand(1, 24)}
    changes = {"base_model_name_or_path": str(base), "trainable_token_indices": [ROWS]}
    single = write_peft(tmp_path / "single", peft_tensors() | own, **changes)
    assert "\nvocabulary  4,097 rows, 1 more than its base" in cli("inspect", single).text
    few = write_peft(tmp_path / "few", base_model_name_or_path=str(base))
    assert "; no rows for them are in it\n" in cli("inspect", with_words(few, *WORDS)).text
    assert json.loads(cli("inspect", write_peft(tmp_path / "plain"), "--json").text)["vocabulary"] is None
    (adapter / "tokenizer.model").write_bytes(b"<html>")
    assert "note: its tokenizer cannot be used: " in cli("inspect", adapter).text


def test_the_command_line_writes_in_the_adapters_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli, base = in_process(capfd), make_folder(tmp_path / "base")
    adapter = with_words(
        handmade(tmp_path / "adapter", ROWS + 2, ROWS + 2), *WORDS, eos_token=WORDS[1], chat_template=TEMPLATE
    )
    assert cli("convert", base, tmp_path / "merged", "--to", "mistral", "--adapter", adapter).code == 0
    asked = ("Who?", "--instruct", "--temperature", "0", "--max_tokens", "9", "--json")
    one, other = cli("complete", base, *asked, "--adapter", adapter), cli("complete", tmp_path / "merged", *asked)
    assert one.text == other.text
    assert json.loads(one.text)["prompt_tokens"].count(ROWS) == 2
    assert (
        "the tokenizer is the adapter's tokenizer.model, which has 2 tokens (<|im_start|>, <|im_end|>) that base"
        in (one.err)
    )
    assert "ends at ids 2, 4097" in one.err
    for whose, place in (("adapter", (base, "--adapter", adapter)), ("folder", (tmp_path / "merged",))):
        assert f"this chat template is the {whose}'s own" in cli("interactive", *place, "--instruct").err
    raw = cli("complete", base, "Who?", "--max_tokens", "1", "--adapter", adapter)
    assert "this is an instruct model, and the prompt is continued as raw text" in raw.err
    refused = cli("finetune", base, "--data", "none.jsonl", "--out", tmp_path / "out", "--adapter", adapter)
    assert f"merge it first (convert {base} MERGED --to hf --adapter {adapter}), and train that" in refused.err


def test_a_server_has_the_adapters_template(tmp_path: Path) -> None:
    adapter = with_words(handmade(tmp_path / "adapter", ROWS + 2, ROWS + 2), *WORDS, chat_template=TEMPLATE)
    loaded = load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    served = served_of(loaded, rows=1, most=64, name=None, template=None)
    assert served.template is not None
    assert served.template.encode_chat([Message("user", "Hi")])[0] == ROWS
    written = loaded.save(tmp_path / "saved").path
    assert load(written, device="cpu").tokenizer.added_tokens.keys() >= set(WORDS)
    assert find_template(loaded.tokenizer, folder=written).encode_chat([Message("user", "Hi")])[0] == ROWS


def test_words_may_be_in_the_vocabulary_proper(tmp_path: Path) -> None:
    """A tokenizer that was trained further adds no tokens: its own vocabulary is larger."""
    adapter = handmade(tmp_path / "adapter", ROWS + 64, ROWS + 64)
    made = to_tokenizer_json(Tokenizer(BUNDLED / "tokenizer.model"))
    assert made is not None
    told = json.loads(made)
    told["model"]["vocab"]["\u2581永和"] = ROWS
    (adapter / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    loaded = load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    assert loaded.words == adapter
    assert loaded.tokenizer.n_words == ROWS + 1
