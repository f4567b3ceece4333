"""What vLLM would change in silence is refused, with what to do; and how many GPUs it takes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral.args import ModelArgs
from mistral.deploy.plan import GIB, Wanted, _gpus, plan
from mistral.formats import huggingface as hf
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.vllm import preflight
from mistral.util.errors import UsageError
from tests.support.commands import Command, in_process
from tests.support.folders import BUNDLED, PARAMS, make_folder, random_state, write_params
from tests.support.gguf_files import gguf_args, write_gguf


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def refusal(folder: Path, *accept: str, **wanted: Any) -> str:
    with pytest.raises(UsageError) as caught:
        plan(str(folder), Wanted(accept=accept, **wanted))
    return str(caught.value)


def test_a_window_that_vllm_drops(tmp_path: Path, cli: Command) -> None:
    folder = make_folder(tmp_path / "m")
    params = {**PARAMS, "_sliding_window": [None, 5]}
    del params["sliding_window"]
    write_params(folder, {**params, "rope_theta": 1e4})
    said = refusal(folder)
    assert "reads no _sliding_window, and drops the window of none x1 + 5 x1 layers" in said
    assert said.endswith("(--accept window to have it so)")
    assert any(note.startswith("accepted: it reads no") for note in plan(str(folder), Wanted(accept=("window",))).notes)
    command = said.partition("`")[2].partition("`")[0]
    assert cli(*shlex.split(command)[3:]).code == 0  # the advice works
    assert plan(f"{folder}-converted", Wanted()).max_model_len == 32768
    write_params(folder, {**params, "rope_theta": 1e4, "_sliding_window": None})
    plan(str(folder), Wanted())


def test_a_window_that_vllm_takes_from_the_other_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    params = {name: value for name, value in PARAMS.items() if name != "sliding_window"}
    write_params(folder, {**params, "rope_theta": 1e4})
    plan(str(folder), Wanted())
    config = {theirs: PARAMS.get(ours, 0) for theirs, ours in hf.SHAPE.items()}
    config |= {"model_type": "mistral", "rope_theta": 1e4, "sliding_window": 7, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    assert "it takes 7 from config.json" in refusal(folder)
    write_params(folder, {**params, "rope_theta": 1e4, "sliding_window": None})
    plan(str(folder), Wanted())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    write_params(folder, {**params, "rope_theta": 1e4})
    plan(str(folder), Wanted())


def test_windows_that_stop_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    write_params(folder, {**PARAMS, "sliding_window": [5, 3]})
    assert "stops at windows of several sizes" in refusal(folder, "window")
    write_params(folder, {**PARAMS, "sliding_window": "5"})
    assert "stops at a sliding_window that is text" in refusal(folder, "window")


def test_a_theta_that_is_not_written(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", sliding_window=None)
    said = refusal(folder)
    assert "no rope_theta, and it takes 10000 and not 1e+06" in said
    plan(str(folder), Wanted(accept=("theta",)))
    plan(str(make_folder(tmp_path / "n")), Wanted())  # with a window it is 10000
    config = {theirs: PARAMS.get(ours, 0) for theirs, ours in hf.SHAPE.items()}
    config |= {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    plan(str(folder), Wanted())  # vLLM takes it from there
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    assert "it takes 500000 and not 1e+06" in refusal(folder)


def test_files_that_vllm_does_not_read(tmp_path: Path, cli: Command) -> None:
    pth = make_folder(tmp_path / "pth", form="pth")
    words = f"{shlex.quote(str(pth))} {shlex.quote(f'{pth}-converted')}"
    assert f"vLLM does not read .pth files: run `python -m main convert {words} --to mistral`" in refusal(pth, "window")
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    write_gguf(tmp_path / "m.gguf", args=gguf_args(vocab_size=4096))
    assert "reads safetensors: run `python -m main convert" in refusal(tmp_path / "m.gguf")
    folder = make_folder(tmp_path / "m")
    quantized = tmp_path / "int8"
    assert cli("convert", folder, quantized, "--to", "mistral", "--quant", "int8").code == 0
    assert "does not read int8 weights of this library" in refusal(quantized)
    assert "several dtypes" not in refusal(quantized)  # which naming one by --dtype would not help
    (folder / "tokenizer.model").unlink()
    assert "it has no tokenizer: no tokenizer in" in refusal(folder)


def test_an_adapter_is_merged_first(tmp_path: Path, cli: Command) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    error = cli("deploy", tmp_path, "--target", "vllm").error
    assert "is a LoRA adapter, not a whole model: merge it first: python -m main convert" in error


def test_weights_of_several_dtypes(tmp_path: Path) -> None:
    state = {n: t.float() if "norm" in n else t for n, t in random_state(dtype=torch.bfloat16).items()}
    folder = make_folder(tmp_path / "m", state)
    assert "weights are of several dtypes" in refusal(folder)
    assert plan(str(folder), Wanted(dtype="float32")).dtype == "float32"
    assert plan(str(folder), Wanted(dtype="fp32")).dtype == "float32"
    assert plan(str(folder), Wanted(accept=("dtype",))).dtype == "bfloat16"
    assert "--dtype is 'int8'" in refusal(folder, dtype="int8")


def test_the_dtype_is_the_stored_one_or_a_note(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", random_state(dtype=torch.float16))
    one = plan(str(folder), Wanted())
    assert (one.dtype, one.weights) == ("float16", sum(2 * t.numel() for t in random_state().values()))
    assert (
        "weights are stored as float16: vLLM rounds them to bfloat16"
        in plan(str(folder), Wanted(dtype="bfloat16")).notes
    )


def as_hf(folder: Path, **config: Any) -> Path:
    """A folder in Hugging Face's layout."""
    folder.mkdir()
    state = {hf.to_hf(name): tensor for name, tensor in random_state(dtype=torch.bfloat16).items()}
    save_file(state, folder / "model.safetensors")
    shape = {theirs: PARAMS.get(ours, 0) for theirs, ours in hf.SHAPE.items()}
    whole = {**shape, "model_type": "mistral", "rope_theta": 1e4, "sliding_window": 5, "head_dim": 8, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    return folder


def test_a_template_that_vllm_has_not(tmp_path: Path) -> None:
    folder = as_hf(tmp_path / "m")
    assert "--tokenizer-mode" in plan(str(folder), Wanted()).flags
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "conversations as mistral-common does, not by chat_template.jinja" in refusal(folder)
    assert "--tokenizer-mode" in plan(str(folder), Wanted(accept=("template",))).flags


def test_mistrallites_template(tmp_path: Path) -> None:
    folder = as_hf(tmp_path / "m")
    report = inspect_folder(folder)
    report["template"] = {"name": "mistrallite", "rule": "of the release's instruct variants"}
    (finding,) = preflight(read_folder(folder), report)
    assert (finding.what, finding.fatal) == ("template", False)
    assert "has no template mistrallite" in finding.text


def test_length_and_name(tmp_path: Path, cli: Command) -> None:
    folder = as_hf(tmp_path / "odd name!", max_position_embeddings=1000)
    one = plan(str(folder), Wanted(hub_id="owner/Name-7B@main"))
    assert (one.max_model_len, one.name, one.slug) == (1000, "owner/Name-7B", "name-7b")
    assert one.flags[-2:] == ("--revision", "main")
    assert plan(str(folder), Wanted()).slug == "odd-name"
    assert [plan(str(folder), Wanted(name=name)).slug for name in ("7B", "True", "x" * 50)] == [
        "m-7b",
        "m-true",
        "x" * 40,
    ]
    with pytest.raises(UsageError, match="characters that recipes cannot hold"):
        plan(str(as_hf(tmp_path / "new\nline")), Wanted())
    assert "trained on 1000 at most" in refusal(folder, max_model_len=1001)
    for name in ("a b", "/x", "-x"):
        assert "needs a name" in refusal(folder, name=name)
    assert "must be owner/name" in refusal(folder, hub_id="name")
    assert "--accept is 'all'; it must be window, theta, dtype, template" in refusal(folder, "all")
    assert "--target is 'docker'" in cli("deploy", folder, "--target", "docker").error
    assert cli("deploy", folder).error == "missing: --target"


ARGS = ModelArgs(
    dim=64,
    n_layers=2,
    head_dim=8,
    hidden_dim=8,
    n_heads=48,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=8,
    sliding_window=4,
)


@pytest.mark.parametrize(
    ("gib", "wanted", "found"),
    [
        (14, {}, ("L4", 1)),
        (25, {}, ("L40S", 1)),
        (48, {}, ("H100", 1)),
        (100, {}, ("H200", 1)),
        (230, {}, ("H200", 2)),
        (260, {}, ("H100", 4)),
        (500, {}, ("H100", 8)),
        (14, {"gpu": "H100"}, ("H100", 1)),
        (48, {"gpu": "L4"}, ("L4", 4)),
        (48, {"gpus": 2}, ("L40S", 2)),
        (14, {"gpus": 16}, ("L4", 16)),
    ],
)
def test_the_fewest_of_the_smallest(gib: int, wanted: dict[str, Any], found: tuple[str, int]) -> None:
    assert _gpus(ARGS, gib * GIB - 100, 100, Wanted(**wanted)) == found


def test_gpus_that_are_not_enough() -> None:
    for wanted, said in (
        ({}, "do not fit 8 H200"),
        ({"gpu": "L4"}, "do not fit 8 L4"),
        ({"gpu": "T4"}, "--gpu is 'T4'; known are L4"),
        ({"gpus": 3}, "--gpus is 3; 48 heads over 8 do not split so"),
    ):
        with pytest.raises(UsageError, match=said):
            _gpus(ARGS, 2000 * GIB, 0, Wanted(**wanted))
