"""What a folder is, is said at the first try; what it holds is read as it is, and nothing of it is lost in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral.args import ModelArgs
from mistral.chat.templates import find_template
from mistral.formats.adapter import read_adapter
from mistral.formats.convert import convert
from mistral.formats.elsewhere import KINDS, kind_of
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.formats.releases import identify
from mistral.generate import generate
from mistral.loader.load import load
from mistral.parameters import parameters
from mistral.quant import quantize
from mistral.tokenizer import Tokenizer
from mistral.util.errors import FormatError
from tests.formats.test_huggingface import make_hf_folder
from tests.support.adapters import write_peft
from tests.support.folders import PARAMS, make_folder, random_state, write_params
from tests.support.tiny import tiny_args

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 493443\n"
PROMPT = [[1, *range(300, 330)]]


def scores(folder: Path, **options: Any) -> torch.Tensor:
    loaded = load(folder, device="cpu", **options)
    return torch.tensor(generate(PROMPT, loaded.model, loaded.tokenizer, max_tokens=0)[1][0])


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as refused:
        load(path, device="cpu")
    return str(refused.value)


# --- other things than models


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "a PEFT adapter, not a model"),
        (["params.json", "lora.safetensors"], "a LoRA adapter of mistral-finetune, not a model"),
        (["config.json", "weights.npz"], "MLX's weights.npz"),
        (["model.onnx"], "ONNX files"),
    ],
)
def test_what_else_it_is(tmp_path: Path, names: list[str], said: str) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    for source, name in (("hf", "config.json"), ("src", "params.json")):
        if name in names:
            shutil.copy(tmp_path / source / name, folder)
    assert f"; there is {said}" in refusal(folder)


def test_adapters_in_a_folders_folders_are_named(tmp_path: Path) -> None:
    """A trainer leaves checkpoint-10, and PEFT a folder for an adapter with a name."""
    write_peft(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-20").mkdir()
    said = "; there is an adapter in checkpoint-10: give that folder"
    assert refusal(tmp_path).endswith(said)
    with pytest.raises(FormatError, match="no adapter in") as refused:
        read_adapter(tmp_path)
    assert str(refused.value).endswith(said)


def test_a_model_given_as_an_adapter(tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    with pytest.raises(FormatError, match="no adapter in .*; it is a whole model: give it as FOLDER$"):
        read_adapter(tmp_path / "hf")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "mine.safetensors"])
def test_weights_under_another_name(tmp_path: Path, name: str) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / name)
    said = refusal(tmp_path / "hf")
    assert "or pytorch_model.bin" in said
    assert said.endswith("; there is a safetensors file under another name: rename it to one of these")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors.incomplete", "a download that did not end"),
        ("tf_model.h5", "weights for TensorFlow or Flax: have transformers save"),
        ("model.zip", "an archive: unpack it"),
        ("epoch_3.ckpt", "a file of torch.save under another name: if it holds"),
        ("optimizer.pt", None),
        ("training_args.bin", None),
    ],
)
def test_other_files_in_the_place_of_weights(tmp_path: Path, name: str, said: str | None) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / name)
    what = refusal(tmp_path / "hf")
    assert f"; there is {said}" in what if said else what.endswith("or pytorch_model-00001-of-0000N.bin")


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("zero_to_fp32.py", "there is what DeepSpeed saves while it trains: run its zero_to_fp32.py"),
        (
            "global_step10/mp_rank_00_model_states.pt",
            "there is what DeepSpeed saves while it trains: run its zero_to_fp32.py",
        ),
        ("pytorch_model_fsdp_0/__0_0.distcp", "there is what FSDP saves while it trains: run accelerate merge-weights"),
        ("hf_model_0001_0.pt", "there is a .pt file of torchtune: have it write safetensors"),
    ],
)
def test_weights_in_the_parts_of_a_training(tmp_path: Path, inside: str, said: str) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / inside).parent.mkdir(exist_ok=True)
    (tmp_path / "hf" / inside).write_bytes(b"x")
    assert said in refusal(tmp_path / "hf")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", "base_model.model.", "merge_and_unload()"),
        ("q_proj.weight", "q_proj.base_layer.weight", "merge_and_unload()"),
        ("model.", "", "save AutoModelForCausalLM's"),
    ],
)
def test_names_of_programs_that_train(tmp_path: Path, before: str, after: str, said: str) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({name.replace(before, after, 1): t for name, t in load_file(file).items()}, file)
    assert said in refusal(tmp_path / "hf")


def test_every_kind_says_what_to_do() -> None:
    assert kind_of(["README.md", "config.json"]) is None
    assert kind_of(["x/y.gguf"]) == KINDS[r".*\.gguf"]
    assert all(": " in what for what in KINDS.values())


def test_a_single_file(tmp_path: Path) -> None:
    for name, said in (
        ("a.gguf", "is not a complete GGUF file: it is empty"),
        ("a.txt", "is no model: that is a folder with"),
    ):
        (tmp_path / name).touch()
        assert said in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, "a checkpoint quantized by MLX"),
        ("quantization_config", {"quant_method": "exl2", "bits": 4}, "a checkpoint quantized by exl2"),
        ("quantization_config", {}, "a quantized checkpoint"),
        ("quip_params", {"rank": 0}, "a checkpoint quantized by QuIP#"),
    ],
)
def test_quantized_by_others(tmp_path: Path, key: str, value: Any, said: str) -> None:
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({key: value, **json.loads(path.read_text())}))
    error = refusal(tmp_path / "hf")
    assert f"config.json has {key!r}: {said}, which is not read here" in error
    assert "remove" not in error


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "consolidated.safetensors", "consolidated.00.pth"])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "a", form="pth" if name.endswith("pth") else "single")
    (folder / name).write_bytes(POINTER)
    assert f"{folder / name}" in refusal(folder)
    assert refusal(folder).endswith("it is the pointer that Git LFS leaves in its place: run git lfs pull")


# --- fine-tunes


@pytest.mark.parametrize("enabled", [True, False])
def test_a_merged_checkpoint_of_mistral_finetune(tmp_path: Path, enabled: bool) -> None:
    """Its params.json has "lora" whether the weights are merged or not; the tensors decide."""
    lora = {"enable": enabled, "rank": 16, "dropout": 0.0, "scaling": 2.0}
    tuned = make_folder(tmp_path / "tuned", lora=lora, moe=None)
    assert torch.equal(scores(tuned), scores(make_folder(tmp_path / "plain")))
    adapter = {"layers.0.attention.wq.lora_A.weight": torch.zeros(2, 2)}
    assert "a LoRA adapter, not a model" in refusal(make_folder(tmp_path / "a", adapter, lora=lora))
    both = make_folder(tmp_path / "b", random_state() | adapter, lora=lora)
    assert "a LoRA adapter, not a model" in refusal(both)


# --- dtypes and numbers


@pytest.mark.parametrize("wide", ["norm", "output", "tok_embeddings", "attention.wo", "layers.0.feed_forward"])
@pytest.mark.parametrize("most", [torch.bfloat16, torch.float16])
def test_each_tensor_keeps_its_own_dtype(tmp_path: Path, wide: str, most: torch.dtype) -> None:
    state = {name: w if wide in name else w.to(most) for name, w in random_state().items()}
    folder = make_folder(tmp_path / "a", state)
    exact = {name: w.double() for name, w in state.items()}
    truth = scores(make_folder(tmp_path / "b", exact), dtype="float64")
    for options in ({}, {"execution": "eager"}, {"execution": "bitwise"}):
        assert (scores(folder, **options) - truth).abs().max() < 1e-5
    kept = load(folder, device="cpu").model.state_dict()
    for name, tensor in state.items():
        assert kept[name].dtype in (tensor.dtype, torch.float32)  # the latter where there are no kernels
        assert torch.equal(kept[name].double(), exact[name])


def test_a_value_beyond_the_commonest_dtype(tmp_path: Path) -> None:
    state = {name: w.half() for name, w in random_state().items()}
    name = "layers.0.feed_forward.w2.weight"
    state[name] = state[name].bfloat16()
    state[name][0, 0] = 1e5  # float16 ends at 65504
    truth = scores(make_folder(tmp_path / "b", {n: w.double() for n, w in state.items()}), dtype="float64")
    assert (scores(make_folder(tmp_path / "a", state)) - truth).abs().max() < 1e-4


def test_norms_beside_quantized_weights_stay_as_they_are(tmp_path: Path) -> None:
    state = {name: w if "norm" in name else w.bfloat16() for name, w in random_state().items()}
    model = load(make_folder(tmp_path / "a", state), device="cpu", quant="int8").model
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_what_is_wider_than_the_arithmetic_is_a_note(tmp_path: Path) -> None:
    state = {name: w if "norm" in name else w.bfloat16() for name, w in random_state().items()}
    folder = make_folder(tmp_path / "a", state)
    (note,) = load(folder, device="cpu", dtype="bfloat16").notes
    assert note.startswith("rounded to bfloat16, but stored in more: 5 tensors (layers.0.attention_norm.weight, ")
    for dtype in ("float32", "float64"):
        assert load(folder, device="cpu", dtype=dtype).notes == ()
    assert (
        load(make_folder(tmp_path / "b"), device="cpu", dtype="bfloat16").notes == ()
    )  # all of them: it was asked for


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_broken_weights_are_not_quantized(quant: str, value: float, dtype: torch.dtype) -> None:
    parameter = parameters(tiny_args())["layers.1.feed_forward.w2.weight"]
    weight = torch.randn(parameter.shape).to(dtype)
    weight[3, 5] = weight[-1, -1] = value
    said = r"layers\.1\.feed_forward\.w2\.weight holds 2 values that are NaN or infinite: the weights are broken"
    with pytest.raises(FormatError, match=said):
        quantize(parameter, weight, quant)


def test_broken_weights_on_their_way_to_a_folder(tmp_path: Path) -> None:
    state = random_state()
    state["output.weight"][7] = float("nan")
    folder = make_folder(tmp_path / "a", state)
    for act in (
        lambda: load(folder, device="cpu", quant="int8"),
        lambda: convert(folder, tmp_path / "b", "mistral", quant="int4"),
    ):
        with pytest.raises(FormatError, match="output.weight holds 24 values that are NaN or infinite"):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["columns", "expanded", "transposed"])
def test_strides_in_a_pth(tmp_path: Path, kind: str) -> None:
    state = random_state()
    norms = [name for name in state if name.endswith("norm.weight")]
    if kind == "columns":
        stacked = torch.stack([state[name] for name in norms], dim=1)
        odd = state | {name: stacked[:, i] for i, name in enumerate(norms)}
    elif kind == "expanded":
        state["norm.weight"] = torch.ones(PARAMS["dim"])
        odd = state | {"norm.weight": torch.ones(1).expand(PARAMS["dim"])}
    else:
        odd = {name: w.t().contiguous().t() if w.dim() == 2 else w for name, w in state.items()}
    folder = make_folder(tmp_path / "a", odd, "pth")
    loaded = load(folder, device="cpu").model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
    assert all(read_folder(folder).weights.get(name).is_contiguous() for name in state)
    convert(folder, tmp_path / "b", "mistral")
    for name, tensor in load_file(tmp_path / "b" / "consolidated.safetensors").items():
        assert torch.equal(tensor, state[name])


# --- nothing is lost


def hf_folder(tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / "hf"
    convert(make_folder(tmp_path / "src"), folder, "hf")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_what_is_not_carried_along_is_listed(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    for name in ("README.md", "quality.txt", "LICENSE", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    for name in ("additional_chat_templates", "runs"):
        (folder / name).mkdir()
        (folder / name / "tools.jinja").write_text(name)
    for to in ("mistral", "hf"):
        written = convert(folder, tmp_path / f"to-{to}", to)
        assert "not carried along: README.md, quality.txt, runs" in written.notes
        names = {path.name for path in (tmp_path / f"to-{to}").iterdir()}
        assert {"LICENSE", "chat_template.jinja", "special_tokens_map.json"} < names
        assert not names & {"README.md", "quality.txt", "runs"}
        assert (
            tmp_path / f"to-{to}" / "additional_chat_templates" / "tools.jinja"
        ).read_text() == "additional_chat_templates"


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ([2, 1000], None, {"eos_token_id": [2, 1000]}),
        (1000, None, {"eos_token_id": 1000}),
        (1000, {"eos_token_id": 2, "do_sample": True}, {"eos_token_id": [2, 1000], "do_sample": True}),
        ([2], None, None),  # the tokenizer's own
        (1000, {"eos_token_id": [7, 1000]}, {"eos_token_id": [7, 1000]}),
    ],
)
def test_ids_that_end_a_sequence_go_along(tmp_path: Path, config: Any, generation: Any, want: Any) -> None:
    folder = hf_folder(tmp_path, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    written = convert(folder, tmp_path / "b", "mistral")
    path = tmp_path / "b" / "generation_config.json"
    assert (json.loads(path.read_text()) if path.is_file() else None) == want
    assert any("end a sequence" in note for note in written.notes) == (want is not None and want != generation)


def test_keys_without_a_place_are_named(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, pad_token_id=11, id2label={"0": "a"}, use_cache=True)
    notes = convert(folder, tmp_path / "b", "mistral").notes
    (note,) = [note for note in notes if "no place" in note]
    assert note.startswith("params.json has no place for pad_token_id, id2label, use_cache of config.json")
    (note,) = [note for note in convert(folder, tmp_path / "c", "hf").notes if "no place" in note]
    assert note.startswith("config.json has no place for id2label of config.json")


# --- what inspect reports

LARGE = {
    **{"dim": 12288, "n_layers": 88, "head_dim": 128, "hidden_dim": 28672, "n_heads": 96, "n_kv_heads": 8},
    **{"norm_eps": 1e-5, "vocab_size": 32768, "rope_theta": 1e6},
}


@pytest.mark.parametrize(
    ("release", "file", "version"),
    [("2407", "mistral_instruct_tokenizer_240323.model.v3", "v3"), ("2411", "..241114.model.v7", "v7")],
)
def test_releases_of_one_shape_are_told_apart(tmp_path: Path, release: str, file: str, version: str) -> None:
    """Large 2407 and 2411 differ in their tokenizers; what inspect says is what a conversation uses."""
    common = pytest.importorskip("mistral_common")
    data = Path(common.__file__).parent / "data"
    (tmp_path / "params.json").write_text(json.dumps(LARGE))
    name = f"tokenizer.model.{version}"
    shutil.copy(data / file.replace("..", "mistral_instruct_tokenizer_"), tmp_path / name)
    entries, at = {}, 0
    for parameter in parameters(ModelArgs(**LARGE)).values():
        begin, at = at, at + 2 * parameter.numel
        entries[parameter.name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, at]}
    head = json.dumps(entries).encode()
    with open(tmp_path / "consolidated.safetensors", "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        out.truncate(8 + len(head) + at)  # a hole: it takes no disk
    report = inspect_folder(tmp_path)
    assert report["release"]["variants"] == [f"Large Instruct {release}"]
    assert report["template"] == {"name": version, "rule": f"by {name}"}
    tokenizer = Tokenizer(tmp_path / name)
    found, odd = identify(ModelArgs(**LARGE), "sentencepiece", tokenizer.version)
    assert (found is not None and found.variants, odd) == ((f"Large Instruct {release}",), [])
    assert find_template(tokenizer, release=found.template).name == version


def test_the_trained_length(tmp_path: Path) -> None:
    for name, params, want in (("a", {"max_seq_len": 32768}, 32768), ("b", {}, None)):
        write_params(make_folder(tmp_path / name), {**PARAMS, **params})
        report = inspect_folder(tmp_path / name)
        assert report["trained_length"] == want
        assert ("trained on  sequences of up to 32,768 tokens" in as_text(report)) == (want is not None)


def test_vllm_reads_a_tokenizer_json(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    assert inspect_folder(folder)["serve"]["commands"] == [
        f"vllm serve {folder} --config_format hf --load_format safetensors --generation_config vllm"
    ]


# --- weights as training programs save them


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_from_within_a_wrapper(tmp_path: Path, wrapper: str) -> None:
    path = make_hf_folder(tmp_path) / "model.safetensors"
    want = load(tmp_path, device="cpu").model.state_dict()
    save_file({wrapper + name: tensor for name, tensor in load_file(path).items()}, path)
    got = load(tmp_path, device="cpu").model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def with_weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    """What is said of a folder in Hugging Face's layout whose weights were changed."""
    convert(make_folder(tmp_path / "src"), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "model.safetensors"
    save_file(change(load_file(path)), path)
    return refusal(tmp_path / "hf")


def test_weights_that_training_programs_leave(tmp_path: Path) -> None:
    head = {"v_head.summary.weight": torch.zeros(1, 8)}
    assert "as TRL saves it: load it with TRL, and save its" in with_weights(tmp_path / "a", lambda t: t | head)
    guesses = {"medusa_head.0.0.linear.weight": torch.zeros(8, 8)}
    assert "(Medusa): give the model that" in with_weights(tmp_path / "b", lambda t: t | guesses)
    said = with_weights(tmp_path / "c", lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    assert said.endswith(
        "lack lm_head.weight: if the output is the table of the embeddings, the file of the "
        'shape says "tie_word_embeddings": true'
    )
    said = with_weights(tmp_path / "d", lambda t: {n: torch.empty(0) for n in t})
    assert "has the shape [0]: DeepSpeed saves such in ZeRO-3 without its weights: run the zero_to_fp32.py" in said
