"""A .gguf file, or a folder with one, in every place where a folder goes: loading, templates, convert, commands."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral.args import QueryScaling, Yarn
from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.cli.prompts import folder_or_prompt, folder_or_text
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.formats.tokenizers import eos_ids, load_tokenizer
from mistral.generate import complete
from mistral.loader.load import load
from mistral.loader.options import LoadOptions, OptionError
from mistral.quant import ggml
from mistral.tokenizer import NO_TOKENIZER, Tokenizer, TokenizerError
from mistral.util import memory
from mistral.util.errors import FormatError
from mistral.util.memory import OutOfMemory
from tests.formats.test_gguf_tokenizer import trained
from tests.loader.test_load import needs_kernels
from tests.support.commands import Command, in_process
from tests.support.folders import BUNDLED
from tests.support.gguf_files import SCALES, gguf_args, tokenizer_keys, write_gguf
from tests.support.tiny import TOLERANCE, distance, ragged, tiny_model, true_logprobs, whole

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
TOKENIZER = {f"tokenizer.ggml.{key}": value for key, value in tokenizer_keys(BUNDLED / "tokenizer.model").items()}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *SCALES)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def make_gguf(
    path: Path, kind: str = "Q8_0", extra: dict[str, Any] | None = None, **more: Any
) -> dict[str, np.ndarray]:
    """A file of a random model with the bundled tokenizer; what its weights stand for."""
    # Rows of whole blocks, and H * D != dim.
    wide = {"dim": 256, "hidden_dim": 512, "n_heads": 8, "head_dim": 64} if kind in SCALES else {}
    args = gguf_args(vocab_size=4096, **wide)
    return write_gguf(path, kind, args, extra={**TOKENIZER, **(extra or {})}, **more)


# --- loading


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_each_type_loads(tmp_path: Path, kind: str) -> None:
    held = make_gguf(tmp_path / "m.gguf", kind)
    loaded = load(tmp_path / "m.gguf", device="cpu", quant="none")
    state = loaded.model.state_dict()
    assert state.keys() == held.keys()
    for name, weight in held.items():
        assert np.array_equal(state[name].float().numpy(), weight), name
    assert loaded.folder == tmp_path / "m.gguf"
    assert loaded.tokenizer.encode("The king") == Tokenizer(BUNDLED / "tokenizer.model").encode("The king")


def test_types_of_the_gguf_package_without_it(tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gguf(tmp_path / "m.gguf", "IQ2_S")
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    done = cli("inspect", tmp_path / "m.gguf")
    assert done.code == 2
    assert done.err == "error: weights of type IQ2_S are read by the gguf package: pip install gguf\n"


def test_a_folder_with_a_file_and_a_file_in_parts(tmp_path: Path) -> None:
    held = make_gguf(tmp_path / "m.gguf", split=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for path in (tmp_path, parts[0], parts[2]):
        loaded = load(path, device="cpu", quant="none")
        assert (loaded.folder, loaded.files) == (parts[0], tuple(parts))
        assert np.array_equal(loaded.model.state_dict()["output.weight"].numpy(), held["output.weight"])


def test_a_tied_file(tmp_path: Path) -> None:
    held = make_gguf(tmp_path / "m.gguf", without=("output.weight",))
    model = load(tmp_path / "m.gguf", device="cpu", quant="none").model
    assert model.args.tied_embeddings
    ids = torch.tensor([1, 5, 9, 7, 3, 2])
    h = model.forward_partial(ids, [6])
    assert torch.allclose(model.logits(h), h @ torch.from_numpy(held["tok_embeddings.weight"]).T, atol=1e-4)


def test_two_models_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        make_gguf(tmp_path / name)
    with pytest.raises(FormatError, match="several models .*: give one file"):
        load(tmp_path)
    assert load(tmp_path / "b.gguf", device="cpu").files == (tmp_path / "b.gguf",)


def test_weights_that_do_not_fit_in_float32_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = make_gguf(tmp_path / "m.gguf")
    size = 4 * sum(weight.size for weight in held.values())
    monkeypatch.setattr(memory, "available", lambda device: size)
    loaded = load(tmp_path / "m.gguf", device="cpu", quant="none")
    assert any("are rounded to bfloat16: in float32 they need" in note for note in loaded.notes)
    state = loaded.model.state_dict()
    assert state["layers.1.attention.wq.weight"].dtype == torch.bfloat16
    assert state["norm.weight"].dtype == torch.float32  # is in the file as it is
    want = torch.from_numpy(held["layers.1.attention.wq.weight"]).bfloat16()
    assert torch.equal(state["layers.1.attention.wq.weight"], want)
    monkeypatch.setattr(memory, "available", lambda device: 2 * size)
    loaded = load(tmp_path / "m.gguf", device="cpu", quant="none")
    assert loaded.model.state_dict()["layers.1.attention.wq.weight"].dtype == torch.float32
    assert not any("rounded" in note for note in loaded.notes)


@needs_kernels
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gguf(tmp_path / "m.gguf")
    size = (tmp_path / "m.gguf").stat().st_size
    for left, fits in ((size // 2, False), (2 * size, True)):
        monkeypatch.setattr(memory, "available", lambda device, left=left: left)
        if fits:
            assert load(tmp_path / "m.gguf", device="cpu").runtime.blocks
        else:
            with pytest.raises(OutOfMemory, match=r"^the weights in Q8_0 need .* left: use "):
                load(tmp_path / "m.gguf", device="cpu")


def test_quantized_again(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", "F32")
    full, rounded = (load(tmp_path / "m.gguf", device="cpu", quant=quant) for quant in (None, "int8"))
    ids = torch.tensor([1, 5, 9, 7])
    assert rounded.runtime.quant == "int8"
    difference = (full.model(ids, [4]) - rounded.model(ids, [4])).abs().max()
    assert 0 < difference < 0.05


# --- the window


def test_the_window_is_that_of_the_release_or_as_requested(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf")
    loaded = load(tmp_path / "m.gguf", device="cpu")
    assert loaded.args.sliding_window is None
    assert loaded.notes[0].startswith("sliding window none: the file does not give the sliding window")
    ids = torch.tensor([1, 5, 9, 7, 3, 8, 2, 6])
    for asked in (3, "3"):
        narrow = load(tmp_path / "m.gguf", device="cpu", sliding_window=asked)
        assert (narrow.args.sliding_window, narrow.model.args.sliding_window) == (3, 3)
        assert narrow.notes[0] == "sliding window 3: as requested, in the place of none"
        assert not any("does not give" in note for note in narrow.notes)
        assert not torch.allclose(narrow.model(ids, [8])[-1], loaded.model(ids, [8])[-1], atol=1e-3)


def test_a_window_in_the_place_of_a_folders_own() -> None:
    own = load(device="cpu")
    for asked in (None, "none"):
        found = load(device="cpu", sliding_window=asked)
        assert (found.args.sliding_window, own.args.sliding_window) == (None, own.args.sliding_window)
        assert found.notes[0] == f"sliding window none: as requested, in the place of {own.args.window_text}"


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "many", "", 2**31, "1" * 30])
def test_no_window(wrong: Any) -> None:
    with pytest.raises(OptionError, match="sliding_window is .*; it must be a number of tokens above 0, or none"):
        LoadOptions(sliding_window=wrong)


# --- tokenizer, ends, templates


def test_the_ends_and_the_template_of_a_file(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.eot_token_id": 77, "tokenizer.chat_template": CHATML}
    make_gguf(tmp_path / "m.gguf", extra=extra)
    tokenizer = load_tokenizer(tmp_path / "m.gguf", 4096)
    assert tokenizer.eos_ids == {tokenizer.eos_id, 77} == eos_ids(tmp_path / "m.gguf", tokenizer, 4096)[0]
    template = find_template(tokenizer, folder=tmp_path / "m.gguf")
    ids = template.encode_chat([Message("user", "Hi")])
    assert ids == tokenizer.encode("<|user|>Hi", bos=False) or ids == tokenizer.encode("<|user|>Hi")


def test_v1_without_a_template(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf")
    own, bundled = load_tokenizer(tmp_path / "m.gguf", 4096), Tokenizer(BUNDLED / "tokenizer.model")
    asked = [Message("user", "Who are you?")]
    found = find_template(own, folder=tmp_path / "m.gguf").encode_chat(asked)
    assert found == find_template(bundled).encode_chat(asked)


@pytest.mark.parametrize("kind", [None, "no_vocab", "none"])
def test_a_file_without_a_tokenizer_takes_ids(tmp_path: Path, cli: Command, kind: str | None) -> None:
    """As a folder without one does."""
    file = tmp_path / "m.gguf"
    write_gguf(file, args=gguf_args(vocab_size=4096), extra={"tokenizer.ggml.model": kind})
    loaded = load(file, device="cpu")
    assert loaded.tokenizer is None
    assert NO_TOKENIZER in loaded.notes
    assert complete([[1, 5, 9]], loaded.model, None, max_tokens=3)[0].text == ""
    (tmp_path / "ids.jsonl").write_text("[1, 5, 9]\n")
    done = cli("complete", file, "--file", tmp_path / "ids.jsonl", "--json", "--max_tokens", 3, "--temperature", 0)
    assert len(json.loads(done.text)["tokens"]) == 3
    refused = cli("complete", file, "The king")
    assert refused.code == 2
    assert "no tokenizer" in refused.err.splitlines()[-1]
    assert "no tokenizer" in inspect_folder(file)["tokenizer"]["error"]
    for to in ("hf", "mistral"):
        converted = convert(file, tmp_path / to, to)
        assert not list((tmp_path / to).glob("*token*"))
        assert load(tmp_path / to, device="cpu").tokenizer is None, converted.notes


def test_a_tokenizer_beside_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", args=gguf_args(vocab_size=4096))
    with pytest.raises(TokenizerError, match="the file has no tokenizer: put tokenizer.model"):
        load_tokenizer(tmp_path / "m.gguf", 4096)
    os.symlink(BUNDLED / "tokenizer.model", tmp_path / "tokenizer.model")
    loaded = load(tmp_path / "m.gguf", device="cpu")
    assert loaded.tokenizer.path == tmp_path / "tokenizer.model"
    assert "tokenizer.model beside m.gguf is read, whose own tokenizer is not" in loaded.notes
    convert(tmp_path / "m.gguf", tmp_path / "out", "mistral")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (BUNDLED / "tokenizer.model").read_bytes()
    other = load(tmp_path / "m.gguf", device="cpu", tokenizer=Tokenizer(BUNDLED / "tokenizer.model"))
    assert other.tokenizer.path.parent == BUNDLED


# --- inspect and convert


def test_inspect(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", "Q4_0", {"tokenizer.chat_template": CHATML})
    report = inspect_folder(tmp_path)
    assert report["layout"] == "gguf"
    assert report["dtypes"]["Q4_0"]["tensors"] == 16
    assert report["dtypes"]["float32"]["tensors"] == 5
    assert report["template"] == {"name": "m.gguf", "rule": "of the folder, in Jinja"}
    assert report["tokenizer"]["words"] == 4096
    assert report["trained_length"] == 512
    assert [file["role"] for file in report["files"]] == ["weights"]
    text = as_text(report)
    assert "GGUF: m.gguf" in text
    assert "the file does not give the sliding window" in text
    assert "--to hf" in text  # where vLLM reads its template
    assert "several dtypes" not in text


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_convert(tmp_path: Path, to: str) -> None:
    extra = {
        "tokenizer.ggml.eot_token_id": 77,
        "tokenizer.chat_template": CHATML,
        "tokenizer.chat_template.rag": "r",
        "tokenizer.chat_template.../x": "no file",
    }
    make_gguf(tmp_path / "m.gguf", extra=extra)
    written = convert(tmp_path / "m.gguf", tmp_path / "out", to, sliding_window=7)
    assert any("the chat template ../x, whose name cannot be" in note for note in written.notes)
    assert any(note.startswith("blocks of few bits are written as the float32 numbers") for note in written.notes)
    source, there = (load(tmp_path / name, device="cpu", quant="none") for name in ("m.gguf", "out"))
    assert there.args.sliding_window == 7
    for name, weight in source.model.state_dict().items():
        assert torch.equal(there.model.state_dict()[name], weight), name
    assert there.tokenizer.encode("The king had three sons") == source.tokenizer.encode("The king had three sons")
    assert there.tokenizer.eos_ids == source.tokenizer.eos_ids
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "r"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 77]
    assert (tmp_path / "out" / "tokenizer.json").is_file() is (to == "hf")


@pytest.mark.parametrize("begins", [True, False])
def test_whether_texts_begin_with_bos_is_written(tmp_path: Path, begins: bool) -> None:
    _, written = trained("gpt-2")
    keys = {**written, "bos_token_id": 0, "eos_token_id": 2, "add_bos_token": begins}
    extra = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    write_gguf(tmp_path / "m.gguf", "F32", gguf_args(vocab_size=len(written["tokens"])), extra=extra)
    convert(tmp_path / "m.gguf", tmp_path / "out", "hf")
    source, there = (load(tmp_path / name, device="cpu").tokenizer for name in ("m.gguf", "out"))
    assert there.encode("a king") == source.encode("a king")
    assert (source.encode("a king")[0] == 0) == begins
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is begins


def test_a_converted_file_is_the_same_model(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", "F32")
    convert(tmp_path / "m.gguf", tmp_path / "out", "mistral")
    convert(tmp_path / "out", tmp_path / "again", "hf")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "again")
    assert len(fingerprint(tmp_path / "m.gguf")) == 64


# --- commands


def test_commands(tmp_path: Path, cli: Command) -> None:
    path = tmp_path / "m.gguf"
    make_gguf(path)
    (tmp_path / "text.txt").write_text("The king had three sons.", encoding="utf-8")
    assert (
        "sliding window 5: as requested"
        in cli("complete", path, "The king", "--max_tokens", 3, "--temperature", 0, "--sliding_window", 5).err
    )
    assert "perplexity" in cli("perplexity", path, tmp_path / "text.txt").text
    assert "GGUF: m.gguf" in cli("inspect", path).text
    assert cli("convert", path, tmp_path / "out", "--to", "hf", "--sliding_window", 5).code == 0
    assert read_folder(tmp_path / "out").args.sliding_window == 5
    assert cli("compare", path, path).text.splitlines()[-1] == "the same"
    assert "sliding_window is 'x'" in cli("complete", path, "a", "--sliding_window", "x").error


@pytest.mark.long
def test_a_pack_of_a_file(tmp_path: Path, cli: Command) -> None:
    make_gguf(tmp_path / "m.gguf", extra={"llama.vocab_size": None, "llama.attention.head_count_kv": [2, 2]})
    assert cli("pack", tmp_path / "m.gguf", "-o", tmp_path / "p.safetensors", "--weights").code == 0
    assert cli("compare", tmp_path / "m.gguf", tmp_path / "p.safetensors").text.splitlines()[-1] == "the same"
    assert cli("verify", tmp_path / "m.gguf").text.splitlines()[-1].endswith("pass")


def test_a_word_that_is_a_file() -> None:
    assert folder_or_prompt("x/m.gguf") == folder_or_text("m.gguf") == "folder"


def test_a_file_that_is_none(tmp_path: Path, cli: Command) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    assert "is not a complete GGUF file" in cli("inspect", tmp_path / "m.gguf").error
    assert "no such" in cli("inspect", tmp_path / "n.gguf").error


# --- scaled positions


MINISTRAL = {"yarn": Yarn(16, 8, 32, 1, 1.0), "llama_4_scaling": QueryScaling(8, 0.1), "tied_embeddings": True}
MEDIUM = {"yarn": Yarn(64, 8, 4, 1)}


@pytest.mark.parametrize(
    ("parts", "arch"),
    [(MINISTRAL, "mistral3"), (MEDIUM, "mistral3"), ({"yarn": Yarn(4, 8)}, "llama")],
    ids=["Ministral 3", "Medium 3.5", "Yarn-Mistral"],
)
def test_a_file_with_scaled_positions(tmp_path: Path, parts: dict[str, Any], arch: str) -> None:
    """Its keys give the shape that the same model has in Mistral's layout, and the same logits."""
    args = gguf_args(vocab_size=4096, **parts)
    without = ("output.weight",) if args.tied_embeddings else ()
    held = write_gguf(tmp_path / "m.gguf", "F32", args, extra=TOKENIZER, arch=arch, without=without)
    loaded = load(tmp_path / "m.gguf", device="cpu")
    assert (loaded.args.yarn, loaded.args.llama_4_scaling) == (args.yarn, args.llama_4_scaling)
    assert loaded.args.tied_embeddings == args.tied_embeddings
    model = tiny_model(args)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in held.items()}, strict=False)
    prompts = ragged([30, 3], 4096)
    with torch.inference_mode():
        found, plain, exact = whole(loaded.model, prompts), whole(model, prompts), true_logprobs(model, prompts)
        assert distance(found, exact) <= max(TOLERANCE, 4 * distance(plain, exact))
    convert(tmp_path / "m.gguf", tmp_path / "out", "mistral")
    assert read_folder(tmp_path / "out").args.yarn == args.yarn


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rope.scaling.type", "linear", "scaled rotary positions of the kind 'linear'"),
        ("rope.scaling.factor", None, "scaled positions that cannot be"),
        ("rope.scaling.yarn_log_multiplier", -1.0, "yarn_log_multiplier is -1.0"),
        ("rope.scaling.attn_factor", 2.0, "'mistral3.rope.scaling.attn_factor', which is not known here"),
    ],
)
def test_scaled_positions_that_cannot_be(tmp_path: Path, key: str, value: Any, said: str) -> None:
    args = gguf_args(vocab_size=4096, **MINISTRAL)
    write_gguf(tmp_path / "m.gguf", "F32", args, extra={**TOKENIZER, f"mistral3.{key}": value}, arch="mistral3")
    with pytest.raises(FormatError, match=re.escape(said)):
        read_folder(tmp_path / "m.gguf")
