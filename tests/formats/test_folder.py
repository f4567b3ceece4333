"""Folders that load: every form of weights, every spelling of a window, and what is said about them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats import releases
from mistral.formats.convert import convert
from mistral.formats.mistral import HARMLESS, REFUSED, REFUSED_UNLESS, ParamsError, find_weights, to_args
from mistral.formats.releases import Release, WrongCopy
from mistral.formats.tokenizers import load_tokenizer
from mistral.formats.weights import WeightsError
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.tokenizer import TokenizerError
from tests.support.folders import PARAMS, ROOT, make_folder, random_state, write_weights
from tests.support.tiny import shapes_of

FORMS = ("single", "parts", "pth")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def logits(model: Transformer) -> Tensor:
    with torch.inference_mode():
        return model.forward(torch.arange(9) * 7 % model.args.vocab_size, [4, 5])


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# --- weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_is_the_file_bit_for_bit(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    state = random_state(dtype=dtype)
    loaded = load(make_folder(tmp_path, state, form), device="cpu", dtype=dtype)
    assert_same(loaded.model.state_dict(), state)
    assert loaded.runtime.weights == loaded.runtime.compute == loaded.runtime.cache == dtype == loaded.model.dtype
    assert not loaded.model.training
    assert len(loaded.files) == (3 if form == "parts" else 1)


def test_all_forms_load_to_the_same_model(tmp_path: Path) -> None:
    state = random_state(seed=3)
    single, *others = [load(make_folder(tmp_path / form, state, form), device="cpu") for form in FORMS]
    assert_same(others[0].model.state_dict(), single.model.state_dict())
    assert_same(others[1].model.state_dict(), single.model.state_dict())
    assert logits(single.model).abs().max() > 0.01
    for other in others:
        assert torch.equal(logits(other.model), logits(single.model))


def test_the_random_folders_are_not_all_alike() -> None:
    assert not torch.equal(random_state(0)["output.weight"], random_state(1)["output.weight"])


def test_safetensors_come_before_pth_and_a_single_file_before_parts(tmp_path: Path) -> None:
    make_folder(tmp_path, random_state(0), "pth")
    write_weights(tmp_path, random_state(1), "parts")
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state(1))
    write_weights(tmp_path, random_state(2), "single")
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state(2))


@pytest.mark.parametrize(
    ("stored", "asked", "compute"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_dtype_is_the_arithmetics(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | str | None, compute: torch.dtype
) -> None:
    state = random_state(dtype=stored)
    loaded = load(make_folder(tmp_path, state), device=torch.device("cpu"), dtype=asked, kernels=False)
    assert (loaded.runtime.compute, loaded.model.dtype) == (compute, compute)
    assert loaded.runtime.cache == loaded.model.cache_dtype == compute
    assert loaded.runtime.weights == compute  # there is room to widen so few
    assert_same(loaded.model.state_dict(), {name: tensor.to(compute) for name, tensor in state.items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_progress_bar_counts_the_files_bytes(tmp_path: Path, form: str, dtype: str) -> None:
    state = random_state(dtype=torch.bfloat16)
    make_folder(tmp_path, state, form)
    with mock.patch("mistral.loader.assemble.Bar") as bar:
        load(tmp_path, device="cpu", dtype=dtype)
    told = bar.return_value.__enter__.return_value.update.call_args_list
    total = sum(tensor.nbytes for tensor in state.values())
    assert bar.call_args.args == ("loading", "B", total)
    assert sum(call.args[0] for call in told) == total


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_weights_in_their_own_dtype_are_the_files_pages(tmp_path: Path) -> None:
    """One copy, and it is the system's: nothing is allocated for them."""
    model = load(make_folder(tmp_path, random_state(dtype=torch.bfloat16)), device="cpu", dtype="bfloat16").model
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ours = [line[0].split("-") for line in mapped if line[-1] == str(tmp_path / "consolidated.safetensors")]
    places = [range(int(begin, 16), int(end, 16)) for begin, end in ours]
    assert len(places) == 1
    assert all(p.data_ptr() in places[0] and p.data_ptr() + p.nbytes - 1 in places[0] for p in model.parameters())


def test_weights_stay_narrow_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, random_state(dtype=torch.bfloat16))
    wide = load(tmp_path, device="cpu", kernels=False)
    monkeypatch.setattr("mistral.util.memory.available", lambda device: 1_200_000)
    narrow = load(tmp_path, device="cpu", kernels=False)
    assert (wide.runtime.weights, narrow.runtime.weights) == (torch.float32, torch.bfloat16)
    assert narrow.runtime.compute == torch.float32
    assert "weights/compute/cache bfloat16/float32/float32" in narrow.describe()
    assert torch.equal(logits(narrow.model), logits(wide.model))


def test_mixed_dtypes_become_one(tmp_path: Path) -> None:
    state = random_state(dtype=torch.bfloat16)
    state["norm.weight"] = state["norm.weight"].float()
    loaded = load(make_folder(tmp_path, state), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert "weights/compute/cache bfloat16/bfloat16/bfloat16" in loaded.describe()


def test_mixed_dtypes_that_stay_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {n: t if "norm" in n else t.bfloat16() for n, t in random_state().items()}
    make_folder(tmp_path, state)
    assert "weights/compute/cache float32/float32/float32" in load(tmp_path, device="cpu", kernels=False).describe()
    monkeypatch.setattr("mistral.util.memory.available", lambda device: 1_200_000)
    loaded = load(tmp_path, device="cpu", kernels=False)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16, torch.float32}
    assert "weights/compute/cache bfloat16+float32/float32/float32" in loaded.describe()


@pytest.mark.parametrize("form", FORMS)
def test_changing_a_loaded_model_leaves_the_file_alone(tmp_path: Path, form: str) -> None:
    state = random_state()
    model = load(make_folder(tmp_path, state, form), device="cpu").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(load(tmp_path, device="cpu").model.state_dict(), state)


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    model = load(make_folder(tmp_path, form="pth"), device="cpu").model
    model.forward(torch.arange(6), [6]).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_from_folder_is_load(tmp_path: Path) -> None:
    make_folder(tmp_path)
    model = Transformer.from_folder(tmp_path, max_batch_size=2, device="cpu", dtype=torch.float64, attention="eager")
    assert (model.args.max_batch_size, model.dtype) == (2, torch.float64)
    with pytest.raises(ValueError, match="max_batch_size is 2"):
        model.forward(torch.arange(3), [1, 1, 1])
    with pytest.raises(OptionError, match=r"^max_batch_size is -1"):
        load(tmp_path, max_batch_size=-1)


SPARSE = """
import json, resource, sys
from pathlib import Path
import torch
import mistral.formats as formats
from mistral.formats.weights import WeightFiles

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

def touch(model):
    return sum(p.view(-1)[:: 1024].double().sum().item() for p in model.parameters())

touch(formats.load(sys.argv[1], device="cpu").model)  # a tiny one: whatever is allocated once

def watched(self, name, *more, **named):
    global most
    most = max(most, status("RssAnon"))
    return get(self, name, *more, **named)

get = WeightFiles.get
WeightFiles.get = watched
used, most = {}, 0
for dtype in ("bfloat16", "float64"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, anonymous, most = status("VmHWM"), status("RssAnon"), 0
    model = formats.load(sys.argv[2], device="cpu", dtype=dtype).model
    touch(model)
    used[dtype] = {"peak": status("VmHWM") - before, "anonymous": most - anonymous}
    del model
print(json.dumps(used))
"""


def sparse_folder(folder: Path) -> int:
    """A folder with 200 MB of bf16 zeros that take no room on the disk; returns their number of bytes."""
    params = {"dim": 1024, "hidden_dim": 4096, "n_layers": 5, "n_heads": 16, "n_kv_heads": 4, "head_dim": 64}
    make_folder(folder, state={}, **params)
    (folder / "consolidated.safetensors").unlink()
    header, end = {}, 0
    for name, shape in shapes_of(ModelArgs(**{**PARAMS, **params})).items():
        begin, end = end, end + 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "consolidated.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    size = sparse_folder(tmp_path / "large")
    assert 150e6 < size < 250e6
    make_folder(tmp_path / "small")
    words = [sys.executable, "-c", SPARSE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    # The file's own pages are the weights.
    assert size * 0.5 < used["bfloat16"]["peak"] < size + 100e6
    assert used["bfloat16"]["anonymous"] < 100e6
    # Widened, only the wide ones are ours; the file's pages are let go tensor by tensor.
    assert 4 * size * 0.5 < used["float64"]["anonymous"] < 4 * size + 100e6
    assert used["float64"]["peak"] < 4 * size + 100e6


# --- what is said about a release

TINY = Release(
    name="Tiny",
    variants=("Tiny",),
    dim=PARAMS["dim"],
    n_layers=PARAMS["n_layers"],
    hidden_dim=PARAMS["hidden_dim"],
    n_heads=PARAMS["n_heads"],
    n_kv_heads=PARAMS["n_kv_heads"],
    head_dim=PARAMS["head_dim"],
    vocab_size=4099,
    sliding_window=(None, 5),
    rope_theta=1e4,
    tokenizer_kind="sentencepiece",
    tokenizer_file="tokenizer.model",
    template="v1",
    files=(),
    added_words=3,
    wrong_copies=(WrongCopy({"sliding_window": 5}, "take the original"),),
)


def test_a_release_is_known_once_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, vocab_size=4099, rope_theta=1e4, sliding_window=[None, 5])
    nobodys = load(folder, device="cpu")
    assert nobodys.release is None
    assert nobodys.notes == ("the model has 3 ids that the tokenizer has no token for, and so without text",)
    monkeypatch.setattr(releases, "RELEASES", (TINY,))
    assert (load(folder, device="cpu").release, load(folder, device="cpu").notes) == (TINY, ())  # they were added


@pytest.mark.parametrize("kind", ["mistral", "ministral"])
def test_a_wrong_copy_is_warned_about_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    convert(make_folder(tmp_path / "a", vocab_size=4099), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    monkeypatch.setattr(releases, "RELEASES", (TINY,))
    loaded = load(tmp_path / "hf", device="cpu")
    assert loaded.release == TINY
    assert loaded.notes == ("sliding_window is 5: take the original",)
    assert loaded.args.windows == (5, 5)  # as it says


# --- params


@pytest.mark.parametrize(
    ("given", "windows", "theta"),
    [
        ({"sliding_window": 7}, (7, 7), 1e4),
        ({"sliding_window": None}, (None, None), 1e6),
        ({}, (None, None), 1e6),
        ({"sliding_window": "4096"}, (4096, 4096), 1e4),
        ({"sliding_window": " null "}, (None, None), 1e6),
        ({"sliding_window": [None, 6]}, (None, 6), 1e4),
        ({"sliding_window": [9]}, (9, 9), 1e4),
        ({"sliding_window": [None]}, (None, None), 1e6),
        ({"_sliding_window": 7}, (7, 7), 1e4),
        ({"_sliding_window": [None, 6]}, (None, 6), 1e4),
        ({"_sliding_window": 7, "sliding_window": 7}, (7, 7), 1e4),
    ],
)
def test_window_and_theta(given: dict[str, Any], windows: tuple[int | None, ...], theta: float) -> None:
    bare = {key: value for key, value in PARAMS.items() if key != "sliding_window"}
    for absent in ({}, {"rope_theta": None}):
        args = to_args({**bare, **given, **absent})
        assert (args.windows, args.rope_theta) == (windows, theta)
        assert args.theta_rule == f"absent, and {'a' if theta == 1e4 else 'no'} sliding window" + (
            " is declared" if theta == 1e4 else ""
        )
    args = to_args({**bare, **given, "rope_theta": 5e5})
    assert (args.windows, args.rope_theta, args.theta_rule) == (windows, 5e5, "given in params.json")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"_sliding_window": 8, "sliding_window": 7}, "both sliding_window and _sliding_window"),
        ({"sliding_window": "many"}, "'many', neither a number nor null"),
        ({"sliding_window": "-3"}, "'-3', neither a number nor null"),
        ({"sliding_window": "9" * 5000}, "neither a number nor null"),
        ({"sliding_window": "0"}, "sliding_window is 0; it must be at least 1"),
        ({"sliding_window": ["4"]}, "sliding_window is '4'; it must be a whole number"),
        ({"sliding_window": []}, "lists 0 windows"),
        ({"sliding_window": [1, 2, 3]}, "do not repeat evenly over 2 layers"),
        ({"sliding_window": {}}, "sliding_window is {}; it must be a whole number"),
        ({"sliding_window": False}, "sliding_window is False; it must be a whole number"),
        ({"sliding_window": 4096.0}, "sliding_window is 4096.0; it must be a whole number"),
    ],
)
def test_impossible_windows(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        to_args({**PARAMS, **given})


def test_harmless_keys_change_nothing() -> None:
    assert len(HARMLESS) >= 3
    assert to_args({**PARAMS, **dict.fromkeys(HARMLESS, 32768)}) == to_args(PARAMS)
    assert to_args({**PARAMS, "max_batch_size": 1}).max_batch_size == 0  # that of the machine it came from
    unused = {key: values[-1] for key, values in REFUSED_UNLESS.items()}
    assert to_args({**PARAMS, **unused}) == to_args(PARAMS)


@pytest.mark.parametrize("key", sorted({*REFUSED, *REFUSED_UNLESS}))
def test_refused_keys_are_named_with_where_to_go(key: str) -> None:
    value = "yes" if key in REFUSED_UNLESS else {"some": 1}
    with pytest.raises(ParamsError, match=rf"params\.json has '?{key}\b.*(use|merge) \w+"):
        to_args({**PARAMS, key: value})


@pytest.mark.parametrize("key", ["ssm_config", "rope_scaling", "kv_lora_rank", "quantization_config"])
def test_keys_that_change_the_model_are_known(key: str) -> None:
    assert key in REFUSED
    with pytest.raises(ParamsError, match=f"'{key}'"):
        to_args({**PARAMS, key: {}})


def test_later_releases_are_refused_by_what_they_are() -> None:
    """Keys of their params.json, in its order, beside those that are known."""
    releases: list[tuple[dict[str, Any], str]] = [
        (
            {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128, "moe": {"num_experts": 128}},
            "latent attention",
        ),
        ({"causal": True, "multimodal": {"whisper_model_args": {}}}, "other inputs than text (Voxtral)"),
        ({"multimodal": {"vision_encoder_args": {}, "whisper_model_args": {}}}, "other inputs than text (Voxtral)"),
        ({"n_groups": 8, "rms_norm": True, "model_type": "mamba"}, "describes a Mamba model (Codestral Mamba): use"),
        ({"quantization": {"qformat_weight": "nvfp4"}}, "a quantized checkpoint: use vLLM"),
    ]
    for more, said in releases:
        with pytest.raises(ParamsError, match=re.escape(said)):
            to_args({**more, **PARAMS})
    assert to_args({**PARAMS, **dict.fromkeys(REFUSED), "model_type": "transformer"}) == to_args(PARAMS)
    assert to_args({**PARAMS, **dict.fromkeys(REFUSED, -1)}) == to_args(PARAMS)
    assert to_args({**PARAMS, "quantization": {"qformat_weight": "fp8_e4m3"}}) == to_args(PARAMS)
    for seeing in ({"vision_encoder": {"hidden_size": 1024}}, {"multimodal": {"vision_encoder_args": {}}}):
        assert to_args({**PARAMS, **seeing}) == to_args(PARAMS)


@pytest.mark.parametrize("key", ["dimm", "Dim", "", "n_experts", "sliding_windows"])
def test_unknown_keys_are_refused_by_name(key: str) -> None:
    with pytest.raises(ParamsError, match=f"'{key}', which no supported release has"):
        to_args({**PARAMS, key: 1})


# --- the folder as a whole


@pytest.mark.parametrize("form", FORMS)
def test_describe(tmp_path: Path, form: str) -> None:
    folder = make_folder(tmp_path / "some-model", random_state(dtype=torch.bfloat16), form)
    line = load(folder, device="cpu", kernels=False).describe()
    files = {"parts": "consolidated-00001-of-00003.safetensors and 2 more", "pth": "consolidated.00.pth"}
    assert "\n" not in line
    for fact in (
        str(folder),
        f"from {files.get(form, 'consolidated.safetensors')};",
        "0.2 M parameters",
        "device cpu",
        "weights/compute/cache float32/float32/float32",
        "attention sdpa",
        "window 5",
        "rope_theta 10000 (absent, and a sliding window is declared)",
        "tokenizer tokenizer.model",
    ):
        assert fact in line
    line = load(folder, device="cpu", dtype="fp64", attention="eager").describe()
    assert "weights/compute/cache float64/float64/float64; attention eager" in line


def test_describe_says_other_windows_and_thetas(tmp_path: Path) -> None:
    line = load(make_folder(tmp_path / "a", sliding_window=None), device="cpu").describe()
    assert "window none" in line
    assert "rope_theta 1e+06 (absent, and no sliding window)" in line
    line = load(make_folder(tmp_path / "b", sliding_window=[None, 6], rope_theta=2e4), device="cpu").describe()
    assert "window none x1 + 6 x1 layers" in line
    assert "rope_theta 20000 (given in params.json)" in line


def test_the_newest_tokenizer_is_taken(tmp_path: Path) -> None:
    make_folder(tmp_path)
    original = tmp_path / "tokenizer.model"
    assert load_tokenizer(tmp_path, 4096).path == original
    for version in ("v3", "v11", "v7m1"):
        shutil.copy(original, tmp_path / f"tokenizer.model.{version}")
    assert load_tokenizer(tmp_path, 4096).path.name == "tokenizer.model.v11"
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tekken.json is not a tekken tokenizer"):
        load_tokenizer(tmp_path, 4096)


def test_a_byte_order_mark_is_no_part_of_params(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "params.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(tmp_path, device="cpu").args.dim == PARAMS["dim"]


def test_reading_headers_reads_no_tensor(tmp_path: Path) -> None:
    make_folder(tmp_path, form="parts")
    weights = find_weights(tmp_path)
    assert weights.nbytes == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert {name: stored.shape for name, stored in weights.tensors.items()} == shapes_of(ModelArgs(**PARAMS))
    (tmp_path / "consolidated-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="has 2 of 3 parts of its weights: part 2 is missing"):
        find_weights(tmp_path)


def test_what_is_neither_tied_nor_not_and_zero_windows_are_refused() -> None:
    assert to_args({**PARAMS, "tied_embeddings": True}).tied_embeddings
    assert not to_args({**PARAMS, "tied_embeddings": None}).tied_embeddings
    with pytest.raises(ParamsError, match="tied_embeddings must be true or false"):
        to_args({**PARAMS, "tied_embeddings": 1})
    with pytest.raises(ParamsError, match="sliding_window is 0"):
        to_args({**PARAMS, "sliding_window": "0"})
