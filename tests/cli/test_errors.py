"""Bad input: one clear line on stderr, exit code 2, no traceback, nothing half-done."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.formats.mistral import to_args
from mistral.loader.load import load
from mistral.tokenizer import NO_TOKENIZER
from mistral.util import memory
from mistral.util.memory import OutOfMemory, available_on_host
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import PARAMS, ROOT, make_folder, random_state, write_params, write_weights

GB = 1 << 30


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("good") / "tiny")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(good, tmp_path / "tiny")


def spoilt(cli: Command, folder: Path) -> str:
    """The error about a folder, which all three commands make the same, before anything is generated."""
    errors = {
        cli("demo", folder).error,
        cli("complete", folder, "Hello").error,
        cli("interactive", folder, stdin="Hello\n").error,
    }
    assert len(errors) == 1
    return errors.pop()


def test_the_good_folder_is_good(cli: Command, good: Path) -> None:
    assert cli("complete", good, "Hello", "--max_tokens", 3, "--temperature", 0).text.endswith("\n")


# --- the folder


def test_no_such_folder(cli: Command, tmp_path: Path) -> None:
    assert spoilt(cli, tmp_path / "nowhere") == f"no such folder: {tmp_path}/nowhere"
    assert "no such folder: a name with two lines" in cli("demo", "a name\nwith two lines").error
    assert "no such folder: xxx" in cli("demo", "x" * 5000).error


def test_a_file_instead_of_a_folder(cli: Command, folder: Path) -> None:
    file = folder / "consolidated.safetensors"
    assert spoilt(cli, file) == f"{file} is a file: give the folder that it is in"


def test_an_empty_folder(cli: Command, tmp_path: Path) -> None:
    error = spoilt(cli, tmp_path)
    assert f"no params.json and no config.json and no .gguf file in {tmp_path}: a model folder has" in error
    (tmp_path / "config.json").write_text("{}")
    assert "config.json describes no model_type" in spoilt(cli, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ('{"dim": 24,', "is not JSON"),
        ("[]", "holds a list, not an object"),
        ("17", "holds a int, not an object"),
        ("null", "holds a NoneType, not an object"),
        ("[" * 200_000, "is not JSON"),
        ('{"a":' * 200_000, "is not JSON"),
        ('{"dim": ' + "9" * 5000 + "}", "is not JSON"),
        ("{}", "lacks dim, n_layers, head_dim"),
    ],
)
def test_broken_params(cli: Command, folder: Path, text: str, said: str) -> None:
    (folder / "params.json").write_text(text)
    error = cli("demo", folder).error
    assert "params.json" in error
    assert said in error
    assert len(error) < 500


def test_params_that_are_no_text_or_no_file(cli: Command, folder: Path) -> None:
    (folder / "params.json").write_bytes(b"\xff\xfe\x00")
    assert "params.json cannot be read" in cli("demo", folder).error
    (folder / "params.json").unlink()
    (folder / "params.json").mkdir()
    assert "params.json cannot be read" in cli("demo", folder).error


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("n_kv_heads", 3, "n_kv_heads 3 does not divide n_heads 4"),
        ("n_kv_heads", 0, "n_kv_heads is 0; it must be at least 1"),
        ("n_kv_heads", 8, "n_kv_heads 8 does not divide n_heads 4"),
        ("sliding_window", 0, "sliding_window is 0; it must be at least 1"),
        ("sliding_window", -4096, "sliding_window is -4096"),
        ("sliding_window", [None, 0], "sliding_window is 0"),
        ("dim", -24, "dim is -24; it must be at least 1"),
        ("dim", 24.0, "dim is 24.0; it must be a whole number"),
        ("dim", "24", "dim is '24'; it must be a whole number"),
        ("dim", None, "dim is None; it must be a whole number"),
        ("dim", [24], "dim is [24]; it must be a whole number"),
        ("n_layers", True, "n_layers is True; it must be a whole number"),
        ("n_layers", 0, "n_layers is 0"),
        ("n_layers", 10**9, "n_layers 1000000000, but consolidated.safetensors holds 21 tensors"),
        ("n_layers", 10**30, "it must be at most 2,147,483,647"),
        ("head_dim", 7, "head_dim 7 is odd"),
        ("head_dim", 2**31 - 2, "params.json makes layers.0.attention.wq.weight [8589934584, 24], but"),
        ("hidden_dim", 2**31 - 1, "params.json makes layers.0.feed_forward.w1.weight [2147483647, 24], but"),
        ("dim", 2**31 - 1, "params.json makes tok_embeddings.weight [4096, 2147483647], but"),
        ("norm_eps", 0, "norm_eps is 0"),
        ("norm_eps", -1e-5, "norm_eps is -1e-05"),
        ("norm_eps", "1e-5", "norm_eps must be a number, not '1e-5'"),
        ("norm_eps", float("nan"), "norm_eps is nan"),
        ("rope_theta", float("inf"), "rope_theta is inf"),
        ("rope_theta", 10**400, "it must be a finite number above 0"),
        ("rope_theta", -1, "rope_theta is -1"),
        ("rope_theta", True, "rope_theta must be a number, not True"),
        ("vocab_size", 2**31, "vocab_size is 2147483648; it must be at most 2,147,483,647"),
        ("moe", {"num_experts": 8}, "params.json: moe lacks num_experts_per_tok"),
        ("n_experts", 8, "params.json has 'n_experts', which no supported release has"),
        ("dim", "x" * 10**5, "dim is 'xxx"),
        ("dim", [[0] * 10**5] * 9, "dim is [[0, 0,"),
        ("dim", -(10**4000), "dim is -1000"),
        ("x" * 10**5, 1, "params.json has 'xxx"),
        ("\x1b[31m", 1, "params.json has '\\x1b[31m'"),
        ("activation", "\ud800" * 999, "params.json has activation = '\\ud800"),
    ],
    ids=lambda value: str(ascii(value))[:40],
)
def test_impossible_params(cli: Command, folder: Path, key: str, value: Any, said: str) -> None:
    write_params(folder, {**PARAMS, key: value})
    error = cli("demo", folder).error
    assert said in error
    assert "params.json" in error
    assert len(error) < 500
    assert error.isprintable()


def test_a_billion_layers_cost_nothing() -> None:
    tracemalloc.start()
    try:
        assert to_args({**PARAMS, "n_layers": 10**9}).n_layers == 10**9
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


# --- weights


def test_no_weights(cli: Command, folder: Path) -> None:
    (folder / "consolidated.safetensors").unlink()
    assert f"no weights in {folder}: expected consolidated.safetensors, " in spoilt(cli, folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_weights_cut_short(cli: Command, folder: Path, size: int) -> None:
    path = folder / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert spoilt(cli, folder).startswith(f"{path} is not a complete safetensors file: ")


def test_a_safetensors_file_that_is_something_else(cli: Command, folder: Path) -> None:
    path = folder / "consolidated.safetensors"
    for content in (b"<!DOCTYPE html>" * 99, b"\xff" * 99, (9).to_bytes(8, "little") + b'{"a": 17}'):
        path.write_bytes(content)
        assert "is not a complete safetensors file" in cli("demo", folder).error


@pytest.mark.parametrize("form", ["single", "pth"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k: v.int() for k, v in s.items()}, "int32|I32"),
        (lambda s: {**s, "norm.weight": s["norm.weight"].to(torch.float8_e4m3fn)}, "norm.weight in .*(float8|F8_E4M3)"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.weight"}, "lack norm.weight$"),
        (lambda s: {k: v for k, v in s.items() if "layers.1" not in k}, "lack layers.1.*, .*, .* and 6 more$"),
        (lambda s: {**s, "rope.freqs": torch.ones(4)}, "hold unknown rope.freqs$"),
        (lambda s: {k.replace("norm.", "nrom."): v for k, v in s.items()}, "lack .* and 2 more and hold unknown .*"),
        (lambda s: {k: v[:-1].clone() for k, v in s.items()}, r"makes tok_emb\S+ \[4096, 24\], but in .* \[4095, 24\]"),
        (lambda s: {**s, "norm.weight": torch.ones(())}, r"makes norm.weight \[24\], but in \S+ it is \[\]"),
        (lambda s: {**s, "\x1b[31m" + "x" * 999: torch.ones(1)}, r"hold unknown '\\x1b\[31mx{75}\.\.\.'$"),
        (lambda s: {}, "holds 0 tensors"),
    ],
)
def test_tensors_that_do_not_fit(
    cli: Command,
    folder: Path,
    form: str,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    said: str,
) -> None:
    (folder / "consolidated.safetensors").unlink()
    write_weights(folder, change(random_state()), form)
    error = cli("demo", folder).error
    assert re.search(said, error), error
    assert "consolidated." in error


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("n_layers", 1, "hold unknown layers.1."),
        ("n_layers", 3, "lack layers.2."),
        (
            "vocab_size",
            4095,
            "makes tok_embeddings.weight [4095, 24], but in consolidated.safetensors it is [4096, 24]",
        ),
        ("dim", 26, "makes tok_embeddings.weight [4096, 26], but in consolidated.safetensors it is [4096, 24]"),
        ("hidden_dim", 24, "feed_forward.w1.weight [24, 24], but in consolidated.safetensors it is [40, 24]"),
        ("n_heads", 2, "attention.wq.weight [16, 24], but in consolidated.safetensors it is [32, 24]"),
        ("n_kv_heads", 4, "attention.wk.weight [32, 24], but in consolidated.safetensors it is [16, 24]"),
    ],
)
def test_params_that_contradict_tensors(cli: Command, folder: Path, key: str, value: int, said: str) -> None:
    write_params(folder, {**PARAMS, key: value})
    assert said in cli("demo", folder).error


def test_a_tensor_in_two_parts(cli: Command, folder: Path) -> None:
    (folder / "consolidated.safetensors").unlink()
    write_weights(folder, random_state(), "parts")
    shutil.copy(folder / "consolidated-00001-of-00003.safetensors", folder / "consolidated-00003-of-00003.safetensors")
    assert "weight is in consolidated-00003-of-00003.safetensors and in an earlier part" in spoilt(cli, folder)


def test_missing_and_mixed_parts(cli: Command, folder: Path) -> None:
    (folder / "consolidated.safetensors").unlink()
    write_weights(folder, random_state(), "parts")
    first = folder / "consolidated-00001-of-00003.safetensors"
    first.rename(folder / "elsewhere")
    assert "has 2 of 3 parts of its weights: part 1 is missing" in spoilt(cli, folder)
    shutil.copy(folder / "elsewhere", folder / "consolidated-00001-of-00002.safetensors")
    assert "mixes parts of several sets: of 2, of 3" in spoilt(cli, folder)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ("0-of-0", "a part that its own name rules out"),
        ("4-of-3", "a part that its own name rules out"),
        (f"1-of-{10**12}", "has 1 of 1000000000000 parts of its weights: part 2 is missing"),
    ],
)
def test_parts_that_cannot_be(cli: Command, folder: Path, numbers: str, said: str) -> None:
    (folder / "consolidated.safetensors").rename(folder / f"consolidated-{numbers}.safetensors")
    assert said in cli("demo", folder).error


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def only_pth(folder: Path) -> Path:
    (folder / "consolidated.safetensors").unlink()
    return folder / "consolidated.00.pth"


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_a_pth_that_carries_code_does_not_run_it(cli: Command, folder: Path, tmp_path: Path, how: str) -> None:
    path, marker = only_pth(folder), tmp_path / "ran"
    content = {**random_state(), "norm.weight": Code(marker)}
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    error = spoilt(cli, folder)
    assert str(path) in error
    assert not marker.exists()
    if how == "zip":
        assert f"asks for {os.name}.mkdir, which is code and was not run" in error
    # Nothing that torch says about trusting files.
    assert "weights_only" not in error
    pickle.loads(pickle.dumps(Code(marker)))  # the bait was live
    assert marker.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"model": random_state()},
        {**random_state(), 3: torch.ones(2)},
        {**random_state(), "step": 7},
        {**random_state(), "norm.weight": torch.ones(24).to_sparse()},
        {**random_state(), "norm.weight": torch.ones(24, device="meta")},
    ],
    ids=["list", "tensor", "nested", "number for a name", "number", "sparse", "meta"],
)
def test_a_pth_that_does_not_hold_tensors_by_name(cli: Command, folder: Path, content: Any) -> None:
    torch.save(content, only_pth(folder))
    assert "consolidated.00.pth does not hold tensors by name, and nothing else" in cli("demo", folder).error


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_pth_cut_short(cli: Command, folder: Path, share: float) -> None:
    path = only_pth(folder)
    torch.save(random_state(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "consolidated.00.pth is cut short, or was not written by torch.save" in spoilt(cli, folder)


def test_a_pth_in_several_parts(cli: Command, folder: Path) -> None:
    torch.save(random_state(), only_pth(folder))
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    assert "tensors that are split over several .pth files, which is not supported" in spoilt(cli, folder)


# --- the tokenizer


def test_no_tokenizer(cli: Command, folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    outcome = cli("complete", folder, "Hello", "--max_tokens", 2)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith(
        "error: the folder has no tokenizer, so prompts must be lists of ids"
    )


def test_no_tokenizer_and_none_needed(cli: Command, folder: Path, tmp_path: Path) -> None:
    """Ids go in and come out, and end where the folder's files say."""
    file = tmp_path / "ids.jsonl"
    file.write_text("[1, 300]\n")
    words = ("complete", folder, "--file", file, "--json", "--max_tokens", 4, "--temperature", 0)
    known = json.loads(cli(*words).out)
    (folder / "tokenizer.model").unlink()
    made = json.loads(cli(*words).out)
    assert made == {**known, "text": ""}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": made["tokens"][2]}))
    assert json.loads(cli(*words).out)["tokens"] == made["tokens"][: made["tokens"].index(made["tokens"][2])]
    refused = cli("complete", folder, "--file", file)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1] == (
        "error: the folder has no tokenizer, so answers are ids and have no text: add --json"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("complete", "FOLDER", "Hello", "--instruct"),
        ("interactive", "FOLDER", "--instruct"),
        ("serve", "FOLDER"),
        ("batch", "IN", "OUT", "--model", "FOLDER"),
    ],
)
def test_no_tokenizer_but_a_template(cli: Command, folder: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    (folder / "tokenizer.model").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    places = {"FOLDER": folder, "IN": tmp_path / "in.jsonl", "OUT": tmp_path / "out.jsonl"}
    outcome = cli(*(places.get(word, word) for word in words))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == f"error: {NO_TOKENIZER}"


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"<!DOCTYPE html>" * 99, "half"])
def test_a_corrupt_tokenizer(cli: Command, folder: Path, content: bytes | str) -> None:
    path = folder / "tokenizer.model"
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    assert "tokenizer.model" in spoilt(cli, folder)


def test_a_tokenizer_larger_than_the_vocabulary(cli: Command, folder: Path) -> None:
    make_folder(folder, vocab_size=4000)
    assert "tokenizer.model has 4096 words, but the model knows 4000" in spoilt(cli, folder)


# --- prompts


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "no prompts in "),
        ("\n  \n\n", "no prompts in "),
        ("[]", "line 1: the prompt is an empty list"),
        ('"a"\n{"prompt": []}', "line 2: the prompt is an empty list"),
        ("[1, 4096]", "line 1 has the id 4096, outside the vocabulary of 4096"),
        ('"a"\n[1, -1]', "line 2 has the id -1, outside the vocabulary"),
        (f"[{10**30}]", "outside the vocabulary"),
        ("[1, 2.0]", "it must be text or a list of ids"),
        ("[true]", "it must be text or a list of ids"),
        ('["a"]', "it must be text or a list of ids"),
        ("17", "it must be text or a list of ids"),
        ("{}", "it must be text or a list of ids"),
        ('{"prompt": null}', "it must be text or a list of ids"),
        ('{"prompt": "a", "max_token": 3}', "line 1 has max_token; known are prompt, suffix, max_tokens and adapter"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens must be a whole number, at least 0, not 1.5"),
        ('{"prompt": "a", "max_tokens": -1}', "max_tokens must be a whole number, at least 0, not -1"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens must be a whole number, at least 0, not True"),
        ('"a"\n"b', "line 2 is not JSON"),
        ("[" * 200_000, "line 1 is not JSON"),
        ('"\\ud800"', "not valid Unicode"),
    ],
)
@pytest.mark.parametrize("flag", [(), ("--json",)], ids=["text", "json"])
def test_bad_files_of_prompts(
    cli: Command, good: Path, tmp_path: Path, lines: str, said: str, flag: tuple[str, ...]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    assert said in cli("complete", good, "--file", file, "--max_tokens", 2, *flag).error


def test_files_of_prompts_that_cannot_be_read(cli: Command, good: Path, tmp_path: Path) -> None:
    assert "nowhere.jsonl cannot be read: No such file" in cli("complete", good, "--file", "nowhere.jsonl").error
    assert f"{tmp_path} cannot be read" in cli("complete", good, "--file", tmp_path).error
    (tmp_path / "latin.jsonl").write_bytes('"é"'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8 (byte 0xe9)" in cli("complete", good, "--file", tmp_path / "latin.jsonl").error


def test_prompts_from_two_places(cli: Command, good: Path) -> None:
    assert "a prompt and --file: give one of them" in cli("complete", good, "Hello", "--file", "x.jsonl").error


def test_no_prompt_and_not_utf8(cli: Command, good: Path) -> None:
    for command in (("complete", good), ("complete",)):
        assert "no prompt: give one in quotes, --file, or text on stdin" in cli(*command, stdin="").error
    latin = "voil\xe0".encode("latin-1")
    assert cli("complete", good, stdin=latin).error.startswith("stdin is not UTF-8 (byte 0xe0): convert it first")
    assert cli("interactive", good, stdin=latin).error.startswith("stdin is not UTF-8 (byte 0xe0): convert it first")
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    assert "not valid Unicode" in cli("complete", good, "voil\udce0").error


# --- flags


def test_a_template_that_nothing_would_hold_is_refused(cli: Command, good: Path, tmp_path: Path) -> None:
    error = cli("convert", good, tmp_path / "out", "--to", "mistral", "--instruct").error
    assert error == "--instruct is for --to hf: Mistral's layout has no template in a file; omit it"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_tokens", "-1"], "--max_tokens is -1; it must be at least 0"),
        (["--temperature", "-0.1"], "--temperature is -0.1; it must be at least 0"),
        (["--temperature", "nan"], "--temperature is nan; it must be a finite number"),
        (["--temperature", "inf"], "--temperature is inf; it must be a finite number"),
        (["--top_p", "1.01"], "--top_p is 1.01; it must be at most 1"),
        (["--top_p", "-0.1"], "--top_p is -0.1; it must be at least 0"),
        (["--top_p", "nan"], "--top_p is nan"),
        (["--top_k", "-1"], "--top_k is -1"),
        (["--top_k", "1" + "0" * 30], "--top_k is 1000"),
        (["--min_p", "2"], "--min_p is 2.0; it must be at most 1"),
        (["--min_p", "-1"], "--min_p is -1.0; it must be at least 0"),
        (["--chunk_size", "0"], "--chunk_size is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--threads", "99999999999"], "--threads is 99999999999; it must be at most 1,024"),
        (["--max_batch_size", "-1"], "--max_batch_size is -1; it must be at least 0"),
        (["--max_batch_size", "99999999999"], "--max_batch_size is 99999999999; it must be at most"),
        (["--top_logprobs", "-1", "--json"], "--top_logprobs is -1"),
        (["--top_logprobs", "3"], "--top_logprobs are printed with --json only"),
        (["--stop="], "--stop is empty"),
        (["--max_tokns", "3"], "no flag --max_tokns; did you mean --max_tokens?"),
        (["--zzz"], "no flag --zzz; see --help, and put -- before a prompt that begins so"),
        (["-max_tokens", "3"], "-max_tokens: long flags begin with two dashes"),
        (["--max_tokens", "many"], "--max_tokens must be a whole number, not 'many'"),
        (["--max_tokens", "3.5"], "--max_tokens must be a whole number, not '3.5'"),
        (["--max_tokens", "1e3"], "--max_tokens must be a whole number, not '1e3'"),
        (["--max_tokens="], "--max_tokens must be a whole number, not ''"),
        (["--max_tokens"], "--max_tokens needs a value"),
        (["--max_tokens", "--json"], "--max_tokens needs a value"),
        (["--max_tokens", "1", "--max-tokens", "2"], "--max-tokens is given twice"),
        (["--temperature", "warm"], "--temperature must be a number, not 'warm'"),
        (["--seed", "None"], "--seed must be a whole number, not 'None'"),
        (["--json=maybe"], "--json is a switch"),
        (["more", "words"], "unexpected argument 'more'"),
        (["--folder", "x"], "unexpected argument 'Hello'"),
    ],
)
def test_flags_are_refused_before_anything_is_looked_at(cli: Command, words: list[str], said: str) -> None:
    error = cli("complete", "/nowhere", "Hello", *words).error
    assert said in error
    assert "/nowhere" not in error


def test_flags_are_refused_without_torch() -> None:
    lines = [
        ["demo", "/nowhere", "--max_tokns", "3"],
        ["demo", "/nowhere", "--top_p", "7"],
        ["interactive", "/nowhere", "--seed", "x"],
        ["complete", "/nowhere", "Hello", "--threads", "0"],
        ["complete", "--file", "/nowhere"],
        ["complete", "a", "b", "--top_logprobs", "3"],
        ["nonsense"],
        [],
    ]
    code = f"import sys, main; print([main.main(line) for line in {lines}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"{[2] * len(lines)} False\n", done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(lines)
    assert all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "gpu"], "--device 'gpu' is not one of cpu, cuda, cuda:1 (and other numbers) or mps"),
        (["--device", ""], "--device '' is not one of"),
        (["--device", "-1"], "--device '-1' is not one of"),
        (["--device", "meta"], "--device 'meta' is not one of"),
        (["--device", "cuda:99"], "device 'cuda:99' asked for, but PyTorch"),
        (["--dtype", "float33"], "--dtype 'float33' is not one of auto, float64, float32, bfloat16, float16"),
        (["--dtype", "int8"], "dtype 'int8' is not one of"),
        (["--attention", "sdpaa"], "--attention 'sdpaa' is not one of auto, sdpa, eager, flash, xformers"),
        (["--json", "--top_logprobs", "4097"], "top_logprobs is 4097; the vocabulary has only 4096 tokens"),
    ],
)
def test_options_that_only_the_machine_or_the_model_can_refuse(
    cli: Command, good: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] != "--json":
        monkeypatch.setattr("mistral.loader.assemble._fill", None)
    assert said in cli("complete", good, "Hello", *words).error


# --- memory


def nothing_more(*_: object, **__: object) -> None:
    raise AssertionError("this comes after what should have been refused")


def test_a_model_that_does_not_fit(cli: Command, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 600_000)
    monkeypatch.setattr("mistral.loader.assemble._fill", nothing_more)
    error = spoilt(cli, good)
    need = 4 * sum(tensor.numel() for tensor in random_state().values())
    assert error.startswith(f"the weights in float32 need {need / 1e3:.1f} kB, but cpu has 600.0 kB left: ")
    assert "another --device, or a smaller model" in error
    # That advice helps, and is not given to those who have taken it.
    monkeypatch.setattr(memory, "available", lambda device: need // 4)
    assert "the weights in bfloat16 need" in (error := cli("demo", good, "--dtype", "bfloat16").error)
    assert "use another --device" in error
    monkeypatch.setattr(memory, "available", lambda device: need // 2)
    with pytest.raises(AssertionError, match="this comes after"):
        load(good, device="cpu", dtype="bfloat16")


def test_the_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 15_000_000_000)
    memory.require(15_000_000_000, "cpu", "they", "less")
    with pytest.raises(OutOfMemory, match="^they need 15.0 GB, but cpu has 15.0 GB left: less$"):
        memory.require(15_000_000_001, "cpu", "they", "less")
    monkeypatch.setattr(memory, "available", lambda device: None)
    memory.require(10**18, "cpu", "they", "less")


def test_a_cache_that_does_not_fit(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(folder, sliding_window=None)
    monkeypatch.setattr(memory, "available", lambda device: 100_000_000)
    monkeypatch.setattr("mistral.generate.RollingBufferCache", nothing_more)
    error = cli("complete", folder, "Hello", "--max_tokens", 10**6).error
    # 2 layers of 2 heads of 8 fp32 keys and values each
    size = (10**6 + 1) * 2 * 2 * 2 * 8 * 4
    assert f"need {size / 1e6:.1f} MB, but cpu has 100.0 MB left" in error
    assert "lower --max_tokens" in error
    monkeypatch.undo()
    write_params(folder, {**PARAMS, "sliding_window": 5})
    assert cli("complete", folder, "Hello", "--max_tokens", 3).code == 0


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {32 * GB // 1024} kB"}


def version_2(group: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    base = f"sys/fs/cgroup{group}"
    stat = f"anon 1\ninactive_file {cache}\nactive_file 7"
    return {f"{base}/memory.max": limit, f"{base}/memory.current": used, f"{base}/memory.stat": stat}


def version_1(group: str, limit: int, used: int, cache: int = 0) -> dict[str, object]:
    base = f"sys/fs/cgroup/memory{group}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{base}/{name}": content for name, content in zip(names, (limit, used, stat), strict=True)}


V2 = {"proc/self/cgroup": "0::/user.slice/app"}
V1 = {"proc/self/cgroup": "12:cpu,cpuacct:/box\n4:memory:/docker/abc\n1:name=systemd:/box\n0::/"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 32 * GB),
        ({"proc/self/cgroup": ""}, 32 * GB),
        ({"proc/self/cgroup": "nonsense\n\n0:"}, 32 * GB),
        ({**V2, **version_2("/user.slice/app", "max", 5 * GB)}, 32 * GB),
        ({**V2, **version_2("/user.slice/app", 8 * GB, 5 * GB)}, 3 * GB),
        ({**V2, **version_2("/user.slice/app", 8 * GB, 5 * GB, cache=2 * GB)}, 5 * GB),
        ({**V2, **version_2("/user.slice/app", 99 * GB, 5 * GB)}, 32 * GB),
        ({**V2, **version_2("/user.slice/app", 8 * GB, 5 * GB), **version_2("/user.slice", 6 * GB, 5 * GB)}, 1 * GB),
        ({**V2, **version_2("", 4 * GB, 1 * GB)}, 3 * GB),  # in a container, whose path is the host's
        ({"proc/self/cgroup": "0::/../..", **version_2("", 4 * GB, 1 * GB)}, 3 * GB),
        ({**V2, **version_2("/user.slice/app", 4 * GB, 5 * GB)}, 0),
        ({**V1, **version_1("/docker/abc", 8 * GB, 5 * GB)}, 3 * GB),
        ({**V1, **version_1("/docker/abc", 8 * GB, 5 * GB, cache=1 * GB)}, 4 * GB),
        ({**V1, **version_1("/docker/abc", 9223372036854771712, 5 * GB)}, 32 * GB),
        ({**V1, **version_1("", 4 * GB, 1 * GB)}, 3 * GB),
        ({**V1, **version_2("", 4 * GB, 1 * GB), **version_1("", 6 * GB, 1 * GB)}, 3 * GB),
    ],
)
def test_memory_left_on_a_host(tmp_path: Path, files: dict[str, object], left: int) -> None:
    assert available_on_host(tree(tmp_path, {**MEMINFO, **files})) == left


def test_a_limit_holds_without_statistics(tmp_path: Path) -> None:
    tree(tmp_path, {**MEMINFO, **V2, **version_2("/user.slice/app", 8 * GB, 5 * GB)})
    stat = tmp_path / "sys/fs/cgroup/user.slice/app/memory.stat"
    stat.write_text("a b c\n")
    assert available_on_host(tmp_path) == 3 * GB
    stat.unlink()
    assert available_on_host(tmp_path) == 3 * GB


def test_memory_left_where_meminfo_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = available_on_host(tmp_path)
    assert left is None or left > 0
    assert memory.available("meta") is None
    monkeypatch.setattr(memory, "available_on_host", lambda: 5 * GB)  # it changes from one moment to the next
    assert memory.available("cpu") == 5 * GB


def test_a_full_disk_is_one_line(good: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "main", "--help"]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["error: stdout cannot be written: No space left on device"]


def test_json_lines_of_good_files_are_json(cli: Command, good: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a"\n\n[1, 5, 6]\n{"prompt": "b", "max_tokens": 0}\n', encoding="utf-8-sig")
    lines = cli("complete", good, "--file", file, "--json", "--max_tokens", 2).text.splitlines()
    assert [len(json.loads(line)["tokens"]) for line in lines] == [2, 2, 0]


def test_a_python_without_the_packages_is_named(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most often the environment is not the one in use: nothing is broken, and memory is not short."""
    monkeypatch.setattr("mistral.cli.run._dispatch", lambda words: __import__("no_such_package"))
    said = f"No module named 'no_such_package' in {sys.executable}: what requirements.txt lists is missing in it"
    assert cli("complete", "The king").error.startswith(said)
