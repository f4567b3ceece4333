"""Converting: the same bytes there and back, equal in transformers, and nothing half-written at the destination."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats import huggingface, writer
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import BUNDLED, read_folder
from mistral.formats.huggingface import INDEX
from mistral.formats.mistral import ParamsError
from mistral.formats.weights import WeightsError
from mistral.loader.load import load
from mistral.tokenizer import NO_TOKENIZER, Tokenizer
from mistral.util import memory
from mistral.util.errors import ConvertError
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import PARAMS, ROOT, make_folder, random_state, write_params, write_weights
from tests.support.tiny import TOLERANCE, distance, ragged, whole
from tests.support.tokenizer_json import small_tekken
from tests.support.writing import memory_of_convert

LENS = [33, 1, 6, 21]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARTIAL = ".*.partial"

# Shapes that differ where the layouts do: K < H, H * D != dim, a window shorter than the prompts (support/folders.py).
SHAPES: dict[str, dict[str, Any]] = {
    "window": {},
    "no window": {"sliding_window": None, "rope_theta": 1e6},
    "H * D == dim": {"dim": 32, "n_kv_heads": 1, "rope_theta": 1e8},
    "H * D > dim, D = 16": {"head_dim": 16, "n_kv_heads": 4},
    "per layer": {"n_layers": 4, "sliding_window": [None, 5, 5, 5], "rope_theta": 1e8},
    "per layer, uneven": {"n_layers": 3, "sliding_window": [4, None, 4]},
}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def hashes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and SHA-256 of the bytes of each tensor in a folder's safetensors files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), digest)
    return found


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def mixed_state(seed: int = 0) -> dict[str, Tensor]:
    """A tensor of each dtype, in turn."""
    return {name: t.to(DTYPES[i % 4]) for i, (name, t) in enumerate(random_state(seed).items())}


def assert_nothing_at(*places: Path) -> None:
    for place in places:
        assert not place.exists()
        assert not list(place.parent.glob(PARTIAL))


# --- the same weights


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
def test_there_and_back_every_tensor_has_the_same_bytes(tmp_path: Path, dtype: Any) -> None:
    state = mixed_state() if dtype == "mixed" else random_state(dtype=dtype)
    # Bits that arithmetic would not keep: NaNs with a payload, both zeros, infinities, the least number.
    odd = torch.tensor([0x7FC1, 0xFFA5, 0x8000, 0x0000, 0x7F80, 0xFF80, 0x0001], dtype=torch.int32).to(torch.int16)
    for name in ("layers.0.attention.wq.weight", "layers.1.attention.wk.weight", "norm.weight"):
        state[name] = state[name].to(torch.bfloat16).contiguous()
        state[name].view(torch.int16).flatten()[: len(odd)] = odd
    src = make_folder(tmp_path / "a", state)
    there = convert(src, tmp_path / "b", "hf")
    back = convert(tmp_path / "b", tmp_path / "c", "mistral")
    assert hashes(tmp_path / "c") == hashes(src)
    assert len(hashes(src)) == len(state)
    assert (there.layout.name, there.files, back.files) == (
        "huggingface",
        ("model.safetensors",),
        ("consolidated.safetensors",),
    )
    assert there.nbytes == back.nbytes == sum(t.nbytes for t in state.values())
    convert(tmp_path / "b", tmp_path / "d", "hf")
    assert hashes(tmp_path / "d") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "b") != hashes(src)
    assert config_of(tmp_path / "d") == config_of(tmp_path / "b")


def test_only_q_and_k_are_reordered(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a")
    convert(src, tmp_path / "b", "hf")
    ours, theirs = hashes(src), set(hashes(tmp_path / "b").values())
    assert sorted(name for name, facts in ours.items() if facts not in theirs) == sorted(
        f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk")
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_both_layouts_load_to_the_same_model(tmp_path: Path, shape: str) -> None:
    src = make_folder(tmp_path / "a", **SHAPES[shape])
    convert(src, tmp_path / "b", "hf")
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    first, *others = [load(tmp_path / name, device="cpu") for name in "abc"]
    for other in others:
        assert other.args.windows == first.args.windows
        assert other.args.rope_theta == first.args.rope_theta
        state = other.model.state_dict()
        assert list(state) == list(first.model.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in first.model.state_dict().items())
        assert other.tokenizer.encode("A king") == first.tokenizer.encode("A king")
    params = {**PARAMS, "rope_theta": 1e4, **SHAPES[shape]}
    assert config_of(tmp_path / "c", "params.json") == params


@pytest.mark.parametrize("form", ["parts", "pth"])
@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_other_forms_of_the_source(tmp_path: Path, form: str, to: str) -> None:
    state = mixed_state(1)
    if form == "pth":  # torch.save keeps strides, too
        state["layers.0.attention.wq.weight"] = state["layers.0.attention.wq.weight"].T.contiguous().T
        state["output.weight"] = state["output.weight"].T.contiguous().T
    src = make_folder(tmp_path / "a", state, form)
    convert(src, tmp_path / "b", to)
    if to == "hf":
        convert(tmp_path / "b", tmp_path / "c", "mistral")
    single = make_folder(tmp_path / "single", {name: t.contiguous() for name, t in state.items()})
    assert hashes(tmp_path / ("c" if to == "hf" else "b")) == hashes(single)


def test_a_tied_output_stays_tied(tmp_path: Path) -> None:
    state = random_state()
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    convert(make_folder(tmp_path / "a", state), tmp_path / "b", "hf")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    config = {**config_of(tmp_path / "b"), "tie_word_embeddings": True}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    convert(tmp_path / "c", tmp_path / "d", "hf")
    convert(tmp_path / "b", tmp_path / "e", "mistral", quant="int8")
    assert json.loads((tmp_path / "c" / "params.json").read_text())["tied_embeddings"] is True
    assert config_of(tmp_path / "d")["tie_word_embeddings"] is True
    whole = hashes(tmp_path / "a")
    assert hashes(tmp_path / "c") == {name: digest for name, digest in whole.items() if name != "output.weight"}
    assert hashes(tmp_path / "d") == hashes(tmp_path / "b")
    for name in "bcd":
        model = load(tmp_path / name, device="cpu").model
        assert model.output.weight is model.tok_embeddings.weight
        assert torch.equal(model.output.weight, state["tok_embeddings.weight"])
    model = load(tmp_path / "e", device="cpu").model  # quantized, one table for both as well
    assert model.tok_embeddings.table is model.output
    assert len({fingerprint(tmp_path / name) for name in "abcd"}) == 1


def test_an_output_beside_a_tie_is_kept(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a", random_state(), tied_embeddings=True)
    written = convert(src, tmp_path / "b", "hf")
    assert any("tied" in note and "output.weight" in note for note in written.notes)
    assert config_of(tmp_path / "b")["tie_word_embeddings"] is False
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    assert hashes(tmp_path / "c") == hashes(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "d", "mistral", quant="int4")
    params = json.loads((tmp_path / "d" / "params.json").read_text())
    (tmp_path / "d" / "params.json").write_text(json.dumps({**params, "tied_embeddings": True}))
    found = read_folder(tmp_path / "d")
    assert not found.args.tied_embeddings
    assert "output.packed" in found.notes[-1]


def test_several_files(tmp_path: Path) -> None:
    state = mixed_state()
    src = make_folder(tmp_path / "a", state)
    written = convert(src, tmp_path / "b", "hf", shard_size=100_000)
    total = len(written.files)
    assert total > 2
    assert written.files == tuple(f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1))
    index = config_of(tmp_path / "b", INDEX)
    assert index["metadata"]["total_size"] == written.nbytes == sum(t.nbytes for t in state.values())
    for file in written.files:
        tensors = load_file(tmp_path / "b" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    assert len(index["weight_map"]) == len(state)
    convert(tmp_path / "b", tmp_path / "c", "mistral", shard_size=1)
    assert [p.name for p in (tmp_path / "c").glob("*.safetensors")] == ["consolidated.safetensors"]
    assert hashes(tmp_path / "c") == hashes(src)
    # Packed to the last byte, and one byte less.
    size = written.nbytes
    assert convert(src, tmp_path / "d", "hf", shard_size=size).files == ("model.safetensors",)
    assert len(convert(src, tmp_path / "e", "hf", shard_size=size - 1).files) == 2


@pytest.mark.parametrize(
    ("norm", "rest", "said"),
    [("float32", "bfloat16", "float32"), ("float16", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
)
def test_a_config_gives_a_dtype_that_holds_all_weights(tmp_path: Path, norm: str, rest: str, said: str) -> None:
    """transformers takes every weight to it."""
    state = random_state(dtype=getattr(torch, rest))
    state["norm.weight"] = state["norm.weight"].to(getattr(torch, norm))
    written = convert(make_folder(tmp_path / "a", state), tmp_path / "b", "hf")
    config = config_of(tmp_path / "b")
    assert (config["dtype"], config["torch_dtype"]) == (said, said)
    told = [note for note in written.notes if "several dtypes" in note]
    assert len(told) == (norm != rest)
    assert all(f"config.json has {said}, which holds them all" in note for note in told)


def test_the_file_is_as_safetensors_has_it(tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "a", mixed_state()), tmp_path / "b", "hf")
    file = tmp_path / "b" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    place = 0
    for entry in header.values():
        begin, end = entry["data_offsets"]
        assert begin == place
        assert begin % sizes[entry["dtype"]] == 0
        place = end
    assert len(data) == 8 + length + place
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


# --- in transformers


@pytest.mark.parametrize("shard_size", [writer.SHARD, 300_000], ids=["one file", "several"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_in_transformers(tmp_path: Path, shape: str, shard_size: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if "per layer" in shape and not hasattr(transformers, "MinistralForCausalLM"):
        pytest.skip("this transformers has no Ministral")
    src = make_folder(tmp_path / "a", random_state(2, **SHAPES[shape]), **SHAPES[shape])
    written = convert(src, tmp_path / "b", "hf", shard_size=shard_size)
    assert (len(written.files) > 1) == (shard_size < writer.SHARD)
    other, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # no tensor missing, unexpected or of another shape
    name = "MinistralForCausalLM" if "per layer" in shape else "MistralForCausalLM"
    assert type(other).__name__ == config_of(tmp_path / "b")["architectures"][0] == name
    model = load(src, device="cpu").model
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    with torch.no_grad():
        want = [other.eval()(p[None], use_cache=False).logits[0] for p in prompts]
        assert distance(whole(model, prompts), want) < TOLERANCE
        if shape != "no window":  # the window matters to these prompts
            none = load(
                make_folder(tmp_path / "n", random_state(2, **SHAPES[shape]), **_no_window(shape)), device="cpu"
            )
            assert distance(whole(none.model, prompts), want) > 100 * TOLERANCE


TEXTS = ("Hello world", "  two  spaces ", "Once upon a time", "na\u00efve \U0001f642\n\tx", "<s>[INST] hi </s>", "")


@pytest.mark.parametrize(
    "kind",
    ["bundled", "v3", "small tekken", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("v2", "v7", "tekken"))],
)
def test_ids_in_transformers(tmp_path: Path, kind: str) -> None:
    """A folder without tokenizer.json: AutoTokenizer gives our ids, bos and the first word included."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    common = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    vocab = {"bundled": 4096, "tekken": 131072, "small tekken": 6000}.get(kind, 32768)
    src = make_folder(tmp_path / "a", tokenizer=kind == "bundled", vocab_size=vocab)
    if kind.startswith("v"):
        (file,) = common.glob(f"mistral_instruct_tokenizer_2*.model.{kind}")
        shutil.copy(file, src / f"tokenizer.model.{kind}")
    elif kind == "tekken":
        shutil.copy(common / "tekken_240718.json", src / "tekken.json")
    elif kind == "small tekken":
        small_tekken(src / "tekken.json")
    made = "tokenizer.json and tokenizer_config.json were made from "
    assert any(note.startswith(made) for note in convert(src, tmp_path / "b", "hf", instruct=True).notes)
    for name in ("tokenizer.model", f"tokenizer.model.{kind}", "tekken.json"):
        (tmp_path / "b" / name).unlink(missing_ok=True)  # what is written is enough
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ours = load(src, device="cpu").tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        if "<s>" not in text:
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    chat = [("user", "Hi [INST]"), ("assistant", "Hello."), ("user", "Bye\n")]
    for said in (chat, [("system", "Be brief."), *chat], chat[:1]):
        if kind == "bundled" and said[0][0] == "system":
            continue  # its version has no place for one: mistral-common puts it into the first question
        dicts = [{"role": role, "content": text.replace("[INST]", "there")} for role, text in said]
        messages = [Message(one["role"], one["content"]) for one in dicts]
        ids = find_template(ours).encode_chat(messages)
        theirs_ids = theirs.apply_chat_template(dicts, tokenize=True, return_dict=False)
        assert theirs_ids == ids
        own = load(tmp_path / "b", device="cpu").tokenizer  # the folder's own template, here
        assert find_template(own, folder=tmp_path / "b").encode_chat(messages) == ids


def _no_window(shape: str) -> dict[str, Any]:
    return {"rope_theta": 1e4, **SHAPES[shape], "sliding_window": None}


# --- what is written beside the weights


def test_config(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a", random_state(dtype=torch.bfloat16), max_seq_len=777)
    written = convert(src, tmp_path / "b", "hf")
    made = "tokenizer.json and tokenizer_config.json were made from tokenizer.model"
    assert written.notes == (
        f"{made}, so that transformers gives the same ids",
        "no chat_template.jinja was written: nothing says that this model is for conversations; if it is, --instruct "
        "writes one for v1, the version of tokenizer.model",
    )
    assert config_of(tmp_path / "b") == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 4096,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 777,
        "rope_theta": 1e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    assert config_of(tmp_path / "c", "params.json") == {**PARAMS, "rope_theta": 1e4, "max_seq_len": 777}


def test_no_window_is_written_as_null(tmp_path: Path) -> None:
    params = {name: value for name, value in PARAMS.items() if name != "sliding_window"}
    src = make_folder(tmp_path / "a")
    write_params(src, params)
    written = convert(src, tmp_path / "b", "hf")
    config = config_of(tmp_path / "b")
    assert (config["sliding_window"], config["rope_theta"]) == (None, 1e6)
    assert config["max_position_embeddings"] == huggingface.LENGTH
    assert any("max_position_embeddings 32768" in note for note in written.notes)
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    params = config_of(tmp_path / "c", "params.json")
    assert (params["sliding_window"], params["rope_theta"]) == (None, 1e6)


def test_windows_that_no_config_can_say(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a", sliding_window=[4, 7])
    with pytest.raises(ConvertError, match="layers have windows of 4 and 7 tokens"):
        convert(src, tmp_path / "b", "hf")
    assert_nothing_at(tmp_path / "b")
    convert(src, tmp_path / "b", "mistral")
    assert load(tmp_path / "b", device="cpu").args.windows == (4, 7)


def test_what_a_config_says_of_tokens_is_kept_and_code_is_not(tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "a"), tmp_path / "b", "hf")
    said = {"bos_token_id": 5, "eos_token_id": [2, 7], "pad_token_id": 3, "max_position_embeddings": 99}
    config = {**config_of(tmp_path / "b"), **said, "auto_map": {"AutoModel": "evil.Model"}, "use_cache": None}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    told = "config.json has auto_map: code of its own, which is never run: this is computed as mistral is"
    assert told in convert(tmp_path / "b", tmp_path / "c", "hf").notes
    assert told in load(tmp_path / "b", device="cpu").notes
    written = config_of(tmp_path / "c")
    assert {name: written[name] for name in said} == said
    assert "auto_map" not in written
    del config["bos_token_id"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "b", tmp_path / "d", "hf")
    written = config_of(tmp_path / "d")
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 7])  # what is not said is the tokenizer's


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_tokenizer_files_are_carried_along(tmp_path: Path, to: str) -> None:
    src = make_folder(tmp_path / "a")
    both = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tekken.json", "tokenizer.model.v3"]
    for name in [*both, "generation_config.json", "model.py", "notes.txt", "training_args.bin"]:
        (src / name).write_text(json.dumps({"name": name}))
        (src / name).chmod(0o600)
    os.replace(src / "tokenizer.model", tmp_path / "blob")  # as in a hub's cache
    (src / "tokenizer.model").symlink_to(tmp_path / "blob")
    written = convert(src, tmp_path / "b", to)
    found = {path.name for path in (tmp_path / "b").iterdir()} - set(written.files)
    assert found == {*both, "tokenizer.model", "generation_config.json", "config.json" if to == "hf" else "params.json"}
    assert "not carried along: model.py, notes.txt, training_args.bin" in written.notes
    for name in found - {"config.json", "params.json"}:
        copy = tmp_path / "b" / name
        assert copy.read_bytes() == (src / name).read_bytes()
        assert not copy.is_symlink()


def test_without_a_tokenizer(tmp_path: Path) -> None:
    written = convert(make_folder(tmp_path / "a", random_state(), tokenizer=False, max_seq_len=9), tmp_path / "b", "hf")
    assert len(written.notes) == 2
    assert written.notes[0] == NO_TOKENIZER
    assert written.notes[1].endswith("as all releases do: no tokenizer says otherwise")
    config = config_of(tmp_path / "b")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_what_only_begins_like_a_tokenizer_is_none(tmp_path: Path, to: str) -> None:
    src = make_folder(tmp_path / "a", random_state(), max_seq_len=9)
    (src / "tokenizer.model").rename(src / "tokenizer.model.bak")
    written = convert(src, tmp_path / "b", to)
    assert written.notes[0] == NO_TOKENIZER
    assert "not carried along: tokenizer.model.bak" in written.notes
    assert not list((tmp_path / "b").glob("tokenizer*"))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_new_files(tmp_path: Path, umask: int) -> None:
    src = make_folder(tmp_path / "a")
    before = os.umask(umask)
    try:
        convert(src, tmp_path / "b", "hf", shard_size=300_000)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "b").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# --- another dtype


@pytest.mark.parametrize("to", ["mistral", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype(tmp_path: Path, to: str, dtype: str) -> None:
    state = mixed_state()
    wanted = getattr(torch, dtype)
    written = convert(make_folder(tmp_path / "a", state), tmp_path / "b", to, dtype=dtype)
    narrowed = {name: tensor.to(wanted) for name, tensor in state.items()}
    found = load(tmp_path / "b", device="cpu", dtype=dtype).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in narrowed.items())
    assert {facts[0] for facts in hashes(tmp_path / "b").values()} == {f"torch.{dtype}"}
    assert written.nbytes == sum(t.nbytes for t in narrowed.values())
    if to == "hf":
        assert config_of(tmp_path / "b")["dtype"] == dtype
        assert config_of(tmp_path / "b")["torch_dtype"] == dtype


def test_values_that_become_infinite_are_counted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE", 50)  # several pieces a tensor
    state = random_state(dtype=torch.bfloat16)
    state["layers.0.attention.wk.weight"][:3, 1] = -7e4
    state["output.weight"][100:104, 2] = 1e30
    state["output.weight"][7, 3] = float("inf")  # was so before
    state["output.weight"][8, 3] = float("nan")
    src = make_folder(tmp_path / "a", state)
    values = sum(t.numel() for t in state.values())
    for to in ("mistral", "hf"):
        with pytest.raises(ConvertError) as refused:
            convert(src, tmp_path / "b", to, dtype="float16")
        assert str(refused.value) == (
            f"7 of {values:,} values are beyond float16, which ends at 65504 "
            "(the first in layers.0.attention.wk.weight): choose another --dtype"
        )
        assert_nothing_at(tmp_path / "b")
    convert(src, tmp_path / "b", "hf", dtype="bfloat16")
    convert(src, tmp_path / "c", "hf", dtype=torch.float32)
    state["layers.0.attention.wk.weight"][:3, 1] = 65504 * 0.99
    state["output.weight"][100:104, 2] = 1e-30
    written = convert(make_folder(tmp_path / "e", state), tmp_path / "f", "mistral", dtype="float16")
    assert written.notes == (
        "2 values are NaN or infinite (the first in output.weight), and copied so: the weights are broken",
        f"4 of {values:,} values are so small that they are 0 in float16",
    )
    found = load_file(tmp_path / "f" / "consolidated.safetensors")
    for name, tensor in state.items():
        assert torch.equal(found[name].nan_to_num(1), tensor.half().nan_to_num(1))


def test_float64_beyond_float32(tmp_path: Path) -> None:
    state = random_state(dtype=torch.float64)
    state["norm.weight"][0] = 1e39
    src = make_folder(tmp_path / "a", state)
    with pytest.raises(ConvertError, match="1 of .* beyond float32"):
        convert(src, tmp_path / "b", "hf", dtype="float32")
    with pytest.raises(ConvertError, match="1 of .* beyond bfloat16"):
        convert(src, tmp_path / "b", "hf", dtype="bfloat16")


# --- killed, interrupted, no room

KILLED = """
import os, signal, sys
from mistral.formats import convert as module, writer
after, write, done = int(sys.argv[3]), writer._write_tensor, []
def write_tensor(file, *rest):
    if len(done) == after:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(None)
    write(file, *rest)
writer._write_tensor = write_tensor
rename = os.rename
os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
module.convert(sys.argv[1], sys.argv[2], sys.argv[4], shard_size=300_000)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(("to", "after"), [("hf", 0), ("mistral", 11), ("hf", 20), ("hf", 999)])
def test_a_killed_run_leaves_nothing_at_the_destination(tmp_path: Path, to: str, after: int) -> None:
    src = make_folder(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    words = [sys.executable, "-c", KILLED, str(src), str(tmp_path / "b"), str(after), to]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=600)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "b").exists()
    (left,) = tmp_path.glob(PARTIAL)
    assert any(left.glob("*.safetensors"))
    if after < 999:  # not even what is left passes for a model
        with pytest.raises((WeightsError, ParamsError)):
            read_folder(left)
    written = convert(src, tmp_path / "b", to, shard_size=300_000)
    assert len(hashes(tmp_path / "b")) == len(hashes(src))
    assert any(left.name in note and "killed" in note for note in written.notes)
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("fails_at", [0, 9, 20])
def test_a_run_that_stops_cleans_up(tmp_path: Path, error: BaseException, fails_at: int) -> None:
    src = make_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write, done = writer._write_tensor, []

    def write_tensor(*args: Any) -> None:
        if len(done) == fails_at:
            raise error
        done.append(None)
        write(*args)

    expected = pytest.raises((ConvertError, KeyboardInterrupt))
    with mock.patch.object(writer, "_write_tensor", write_tensor), expected as stopped:
        convert(src, tmp_path / "b", "hf", shard_size=300_000)
    if isinstance(error, OSError):
        assert str(stopped.value) == f"{tmp_path / 'b'} was not written: No space left on device"
    assert list((tmp_path / "b").iterdir()) == []
    assert not list(tmp_path.glob(PARTIAL))
    convert(src, tmp_path / "b", "hf")  # an empty folder is room enough
    assert len(hashes(tmp_path / "b")) == 21


def test_ctrl_c_on_the_command_line(cli: Command, tmp_path: Path) -> None:
    with mock.patch.object(writer, "_write_tensor", side_effect=KeyboardInterrupt):
        done = cli("convert", make_folder(tmp_path / "a"), tmp_path / "b", "--to", "hf")
    assert (done.code, done.out, done.err) == (130, "", "")
    assert_nothing_at(tmp_path / "b")


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a")
    real = writer.write_weights

    def meanwhile(*args: Any) -> list[str]:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "theirs").write_text("kept")
        return real(*args)

    theirs = mock.patch("mistral.formats.convert.write_weights", meanwhile)
    with theirs, pytest.raises(ConvertError, match="was not written"):
        convert(src, tmp_path / "b", "hf")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(PARTIAL))


def test_a_disk_with_too_little_room(cli: Command, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a")
    asked: list[Path] = []

    def usage(free: int) -> Any:
        return mock.patch.object(shutil, "disk_usage", lambda path: asked.append(path) or mock.Mock(free=free))

    convert(src, tmp_path / "full", "hf")
    needed = sum(path.stat().st_size for path in (tmp_path / "full").iterdir())
    with usage(needed - 1):
        error = cli("convert", src, tmp_path / "b", "--to", "hf").error
    need, free = memory.as_text(needed), memory.as_text(needed - 1)
    assert error.startswith(f"{tmp_path / 'b'} needs {need}, but its disk has {free} free: ")
    assert asked == [tmp_path]
    assert_nothing_at(tmp_path / "b")
    (tmp_path / ".b.0123.partial").mkdir()
    with usage(3_000):
        error = cli("convert", src, tmp_path / "b", "--to", "hf").error
    assert "but its disk has 3.0 kB free" in error
    assert f".b.0123.partial in {tmp_path}, left by a killed run" in error
    (tmp_path / ".b.0123.partial").rmdir()
    with usage(needed):
        convert(src, tmp_path / "b", "hf")


# --- refusals


def refused(cli: Command, *words: object) -> str:
    return cli("convert", *words).error


def test_places_that_are_refused(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(src)
    for same in (src, "a", "./a/", "a/../a", "link"):
        assert refused(cli, src, same, "--to", "hf") == f"{Path(same)} is the folder to convert: give another one"
        assert refused(cli, same, src, "--to", "hf") == f"{src} is the folder to convert: give another one"
    for inside in ("a/hf", "a/x/hf", "link/hf"):
        assert refused(cli, src, inside, "--to", "hf").startswith(f"{inside} is inside {src}, the folder to convert")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for full in ("full", tmp_path):
        assert "is there already and not empty" in refused(cli, src, full, "--to", "hf")
    (tmp_path / "file").touch()
    assert refused(cli, src, "file", "--to", "hf") == "file is a file: give a folder that is not there yet"
    assert refused(cli, src, "no/where", "--to", "hf").startswith(f"no such folder: {tmp_path / 'no'}")
    (tmp_path / "circle").symlink_to("circle")
    assert refused(cli, src, "circle", "--to", "hf").startswith("circle ")
    refused(cli, src, "x" * 300, "--to", "hf")
    refused(cli, src, "file/x", "--to", "hf")
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "circle", "file", "full", "link"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_place_that_may_not_be_written(cli: Command, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a")
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "was not written: Permission denied" in refused(cli, src, tmp_path / "locked" / "b", "--to", "hf")


def test_words_that_are_refused(cli: Command, tmp_path: Path) -> None:
    src, dst = make_folder(tmp_path / "a"), tmp_path / "b"
    assert refused(cli) == "missing: SRC, DST, --to"
    assert refused(cli, src, dst) == "missing: --to"
    assert refused(cli, src, dst, "--to", "gguf") == "no layout is called 'gguf': mistral or hf"
    error = refused(cli, src, dst, "--to", "hf", "--dtype", "int8")
    assert error == "dtype 'int8' is not one of float32, bfloat16, float16"
    assert cli("convert", src, tmp_path / "short", "--to", "hf", "--dtype", "bf16").code == 0, "as complete takes it"
    assert refused(cli, tmp_path / "none", dst, "--to", "hf") == f"no such folder: {tmp_path / 'none'}"
    assert_nothing_at(dst)


def test_a_broken_source_writes_nothing(cli: Command, tmp_path: Path) -> None:
    state = random_state()
    del state["norm.weight"]
    src = make_folder(tmp_path / "a", state)
    assert "lack norm.weight" in refused(cli, src, tmp_path / "b", "--to", "hf")
    write_weights(src, random_state())
    with (src / "consolidated.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert "is not a complete safetensors file" in refused(cli, src, tmp_path / "b", "--to", "hf")
    assert_nothing_at(tmp_path / "b")


# --- the command, and its memory


def test_the_command_says_what_it_wrote(cli: Command, tmp_path: Path) -> None:
    src = make_folder(tmp_path / "a", random_state(dtype=torch.bfloat16), max_seq_len=9)
    (src / "tokenizer.json").write_text("{}")
    done = cli("convert", src, tmp_path / "b", "--to", "hf", "--dtype", "float32")
    assert done.text == ""
    assert done.err == f"wrote {tmp_path / 'b'}: Hugging Face's layout, 828.4 kB of float32 in model.safetensors\n"
    done = cli("convert", f"--src={tmp_path / 'b'}", f"--dst={tmp_path / '1e5'}", "--to=mistral")
    assert done.text == ""
    assert done.err == f"wrote {tmp_path / '1e5'}: Mistral's layout, 828.4 kB of float32 in consolidated.safetensors\n"
    assert cli("complete", tmp_path / "1e5", "Hi", "--max_tokens", 2).code == 0


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "to", "dtype"), [("single", "hf", ""), ("pth", "hf", ""), ("pth", "mistral", "float32")]
)
def test_memory_is_about_one_tensor(tmp_path: Path, form: str, to: str, dtype: str) -> None:
    params = {"dim": 256, "n_layers": 40, "hidden_dim": 1024, "vocab_size": 64}
    state = random_state(**params)
    largest, total = max(t.nbytes for t in state.values()), sum(t.nbytes for t in state.values())
    assert total > 100 * largest
    src = make_folder(tmp_path / "a", state, form, tokenizer=False, **params)
    small = make_folder(tmp_path / "small", form=form)
    how = {"to": to, **({"dtype": dtype} if dtype else {})}
    taken = memory_of_convert({"src": small, "dst": tmp_path / "b0", **how}, {"src": src, "dst": tmp_path / "b", **how})
    assert taken < 3 * largest + 2**23 < total / 8


def test_transformers_gives_our_ids_of_what_was_written(tmp_path: Path) -> None:
    """A folder with tokenizer.model alone: AutoTokenizer would leave BOS out, and split the first word differently."""
    source = shutil.copytree(
        BUNDLED, tmp_path / "source", ignore=shutil.ignore_patterns("*.md", "pr*.json", "tr*.json")
    )
    converted = convert(source, tmp_path / "hf", "hf")
    assert any("transformers gives the same ids" in note for note in converted.notes)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(source / "tokenizer.model")
    for text in ("Once upon a time", " a  b", "Straße\n\n🙂", ""):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
