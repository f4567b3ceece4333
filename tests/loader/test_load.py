"""load: options as a parcel or flat, one name for how steps are computed, a tokenizer of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral
from mistral import backends
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.known import unknown_module
from mistral.formats.folder import BUNDLED, read_folder
from mistral.generate import complete
from mistral.loader import runtime
from mistral.loader.assemble import assemble
from mistral.loader.executions import EXECUTIONS
from mistral.loader.load import load
from mistral.loader.options import ATTENTIONS, EXECUTION_NAMES, LoadOptions, OptionError
from mistral.model import FeedForward, Transformer
from mistral.util.dtypes import DTYPE_NAMES
from tests.support.folders import make_folder, random_state
from tests.text.test_generate import Letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


def has_kernels() -> bool:
    try:
        library()
    except KernelsUnavailable:
        return False
    return True


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="no C compiler here")


def test_names_that_are_checked_without_torch_are_those_that_torch_can_do() -> None:
    assert set(ATTENTIONS) == {"auto", *backends.BACKENDS}
    assert {name: getattr(torch, full) for name, full in DTYPE_NAMES.items()} == runtime.DTYPES
    assert set(EXECUTION_NAMES) - {"auto"} == set(EXECUTIONS) - {"products"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is not one of cpu, cuda, cuda:1"),
        ({"dtype": "float33"}, "dtype 'float33' is not one of auto, float64"),
        ({"attention": "flush"}, "attention 'flush' is not one of auto, sdpa, eager, flash, xformers"),
        ({"quant": "int3"}, "quant 'int3' is not one of int8, int4"),
        ({"attention": "kernels"}, "flash, xformers; it is a value of --execution$"),
        ({"dtype": "int8"}, "fp16; it is a value of --cache_dtype and --quant$"),
        ({"execution": None}, "execution None is not one of auto, eager, kernels, cuda_graph, bitwise"),
    ],
)
def test_words_are_refused_on_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoadOptions(**options)


def test_options_whole_and_flat_are_the_same(folder: Path) -> None:
    whole = load(folder, options=LoadOptions(device="cpu", execution="eager"))
    for other in (
        load(folder, device="cpu", execution="eager"),
        load(folder, device=torch.device("cpu"), options=LoadOptions(execution="eager")),
        load(folder, device="cpu", kernels=False),
    ):
        assert type(other.model) is Transformer
        assert other.runtime.describe() == whole.runtime.describe()


@needs_kernels
def test_each_execution_on_a_cpu(folder: Path) -> None:
    found = {}
    for name in ("eager", "kernels", "bitwise"):
        loaded = load(folder, device="cpu", execution=name)
        assert (loaded.runtime.execution, type(loaded.model)) == (name, EXECUTIONS[name].transformer())
        found[name] = complete(["Hello"], loaded.model, loaded.tokenizer, max_tokens=8, temperature=0)[0].tokens
    assert found["eager"] == found["kernels"] == found["bitwise"]
    assert load(folder, device="cpu").runtime.execution == "kernels"
    assert load(folder, device="cpu", kernels=True).runtime.execution == "kernels"
    assert load(folder, device="cpu", deterministic=True).runtime.execution == "bitwise"
    assert load(folder, device="cpu", dtype="bfloat16").runtime.execution == "products"
    assert load(folder, device="cpu", attention="eager").runtime.execution == "products"
    assert load(folder, device="cpu", dtype="float64").runtime.execution == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "cuda_graph"}, "execution cuda_graph is for CUDA, not for cpu"),
        ({"execution": "kernels", "dtype": "float16"}, "execution kernels is for a CPU in float32 or bfloat16"),
        ({"execution": "bitwise", "attention": "sdpa"}, "execution bitwise has its own attention"),
        ({"execution": "eager", "deterministic": True}, "execution is given as bitwise and as eager"),
        ({"kernels": True, "deterministic": True}, "execution is given as bitwise and as kernels"),
    ],
)
def test_executions_that_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(folder, **{"device": "cpu", **options})


def test_there_is_one_cpu_device(folder: Path) -> None:
    with pytest.raises(OptionError, match="device 'cpu:3' asked for, but there is one cpu device: cpu"):
        load(folder, device="cpu:3")
    assert load(folder, device="cpu:0").runtime.device == torch.device("cpu")


def test_nothing_to_dequantize_is_a_note(folder: Path) -> None:
    assert any("quant none has no effect" in note for note in load(folder, quant="none").notes)
    assert not any("quant" in note for note in load(folder).notes)


def test_threads_are_set_at_load(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        load(folder, device="cpu", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


class Mine(Letters):
    """A tokenizer of one's own, with an id for whatever the model generates."""

    def decode(self, t: list[int]) -> str:
        return "x" * len(t)


class Doubled(FeedForward):
    """A module that the decode kernel has never heard of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@needs_kernels
def test_a_fast_path_stands_aside_for_a_module_it_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral.model.FeedForward", Doubled)
    found = read_folder(folder)
    slow, _ = assemble(found, device="cpu", execution="eager")
    fast, run = assemble(found, device="cpu")
    assert type(fast) is Transformer
    assert run.execution == "products"
    (note,) = run.notes
    assert "kernels does not know the module layers.0.feed_forward (Doubled)" in note
    ids = [[1, 5, 9]]
    made = [complete(ids, m, Mine(), max_tokens=6, temperature=0)[0].tokens for m in (slow, fast)]
    assert made[0] == made[1]
    with pytest.raises(OptionError, match="bitwise is not possible: it does not know the module layers.0.feed_forward"):
        assemble(found, device="cpu", execution="bitwise")


@needs_kernels
def test_a_module_put_in_place_later_is_not_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded, plain = load(folder, device="cpu"), load(folder, device="cpu", execution="eager")
    assert isinstance(loaded.model, FastTransformer)
    for model in (loaded.model, plain.model):
        other = Doubled(model.args)
        other.load_state_dict(model.layers[1].feed_forward.state_dict())
        model.layers[1].feed_forward = other
    assert unknown_module(loaded.model) == "layers.1.feed_forward (Doubled)"
    made = [complete([[1, 5, 9]], x.model, x.tokenizer, max_tokens=6, temperature=0)[0].tokens for x in (loaded, plain)]
    assert made[0] == made[1]
    assert caplog.text.count("does not know the module") == 1


def test_the_line_of_what_was_loaded_names_what_is_done_to_positions(tmp_path: Path) -> None:
    assert "stretched" not in load(make_folder(tmp_path / "plain")).describe()
    yarn, grows = {"factor": 4, "original_max_position_embeddings": 1024}, {"beta": 0.1}
    grows["original_max_position_embeddings"] = 1024
    said = load(make_folder(tmp_path / "a", yarn=yarn, llama_4_scaling=grows)).describe()
    assert "), stretched 4 times from 1,024 (YaRN), queries grow beyond 1,024; tokenizer" in said


def test_a_tokenizer_of_ones_own(folder: Path, tmp_path: Path) -> None:
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    mine = Mine()
    loaded = load(bare, device="cpu", tokenizer=mine)
    assert loaded.tokenizer is mine
    assert "tokenizer your own" in loaded.describe()
    assert len(complete([[1, 5]], loaded.model, loaded.tokenizer, max_tokens=3, temperature=0)[0].tokens) == 3


def test_a_repr_fits_a_line(folder: Path) -> None:
    text = repr(load(folder, device="cpu"))
    assert text.startswith(f"<Loaded {folder}: 0.2 M parameters; device cpu")
    assert len(text) < 250
    assert "\n" not in text


def test_public_names_come_on_demand() -> None:
    code = (
        "import sys, mistral; from mistral import LoadOptions, SamplingParams, MistralError, UsageError, FormatError; "
        "from mistral import OutOfMemory, Unavailable; assert 'torch' not in sys.modules; "
        "from mistral import load, Chat, complete, stream; from mistral.generate import generate; "
        "l = load(device='cpu'); "
        "print(len(generate(['x'], l.model, l.tokenizer, max_tokens=2, temperature=0)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1\n", done.stderr
    assert set(mistral.__all__) <= set(dir(mistral))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mistral.nothing  # noqa: B018


def test_the_limit_of_a_batch_is_the_models(folder: Path) -> None:
    assert load(folder, device="cpu", max_batch_size=3).args.max_batch_size == 3


def test_a_loaded_model_follows_its_weights() -> None:
    model = load(device="cpu", dtype="float32").model.to(torch.float64)
    assert model.dtype == torch.float64
    assert model(torch.tensor([1, 5]), [2]).dtype == torch.float64


def test_a_model_padded_past_its_tokenizer(tmp_path: Path) -> None:
    """Ids that have no word may be made, and have no text; the note says how many there are."""
    from safetensors.torch import load_file, save_file

    state = load_file(BUNDLED / "consolidated.safetensors")
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = torch.cat([state[name], state[name][:64] * 50])
    save_file(state, tmp_path / "consolidated.safetensors")
    params = json.loads((BUNDLED / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "vocab_size": 4160}))
    (tmp_path / "tokenizer.model").write_bytes((BUNDLED / "tokenizer.model").read_bytes())
    loaded = load(tmp_path, device="cpu")
    assert any("64 ids" in note for note in loaded.notes)
    results = complete(["Once"], loaded.model, loaded.tokenizer, max_tokens=50, temperature=3.0, top_p=1.0, seed=1)
    assert any(token >= 4096 for token in results[0].tokens)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_matrices_of_zeros_are_named(tmp_path: Path, quant: str | None) -> None:
    """A row of zeros is no such matrix, wherever it is."""
    state = random_state()
    state["layers.1.attention.wo.weight"].zero_()
    state["layers.0.feed_forward.w2.weight"][12] = 0  # the one in the middle
    loaded = load(make_folder(tmp_path / "one", state), device="cpu", quant=quant)
    said = "1 matrix is all zeros (layers.1.attention.wo.weight): a merge or a download that failed"
    assert sum(note.startswith(said) for note in loaded.notes) == 1
    plain = load(make_folder(tmp_path / "none", random_state()), device="cpu", quant=quant)
    assert not any("all zeros" in note for note in plain.notes)
