"""Hugging Face's layout: every dense release in both layouts, config.json, and the files of a folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral.args import ArgsError, ModelArgs
from mistral.formats import huggingface as hf
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.huggingface import INDEX, find_hf_weights
from mistral.formats.inspect import inspect_folder
from mistral.formats.mistral import ParamsError, to_args
from mistral.formats.weights import WeightsError
from mistral.loader.load import Loaded, load
from mistral.rope import inverse_frequencies
from mistral.util.memory import OutOfMemory
from tests.support.commands import in_process
from tests.support.folders import BUNDLED, PARAMS, make_folder, random_state, write_params, write_weights
from tests.support.tiny import TOLERANCE, at_random, distance, make_cache, play, ragged, shapes_of, tiny_model, whole

LENS = [33, 1, 6, 25]
PLANTED = 1e-4  # a mutant moves log-probs by more


def params(dim: int, layers: int, hidden: int, heads: int, kv: int, vocab: int, head_dim: int = 8, **more: Any) -> dict:
    """A params.json; `more` is what not every release has."""
    names = ("dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "head_dim")
    values = (dim, layers, hidden, heads, kv, vocab, head_dim)
    return {**dict(zip(names, values, strict=True)), "norm_eps": 1e-5, **more}


# For each release: its params.json scaled down (same ratios, same spelling, windows shorter than a
# prompt), and the form of its files.
RELEASES: dict[str, tuple[dict[str, Any], str]] = {
    "v0.1": (params(64, 2, 224, 8, 2, 4096, sliding_window=5), "pth"),
    "instruct-v0.2": (params(64, 2, 224, 8, 2, 4096, rope_theta=1e6), "pth"),
    "v0.3": (params(64, 2, 224, 8, 2, 4192, rope_theta=1e6), "single"),
    "nemo": (params(80, 2, 224, 8, 2, 4608, rope_theta=1e6), "single"),
    "codestral": (params(96, 2, 256, 12, 2, 4192, rope_theta=1e6), "single"),
    "small-3": (params(80, 2, 512, 8, 2, 4608, rope_theta=1e8, max_seq_len=32768), "single"),
    "large": (params(96, 2, 224, 24, 2, 4192, head_dim=4, rope_theta=1e6), "parts"),
    "ministral": (params(64, 8, 192, 8, 2, 4608, rope_theta=1e8, sliding_window=[None, 6, 6, 6]), "single"),
    "ministral-underscore": (params(64, 4, 192, 8, 2, 4608, rope_theta=1e8, _sliding_window=[None, 6, 6, 6]), "single"),
    "small-3.1": (params(80, 2, 512, 8, 2, 4608, rope_theta=1e9), "single"),
    "mistrallite": (params(64, 2, 224, 8, 2, 4099, rope_theta=1e6, sliding_window=20), "single"),
}


# Ours, and theirs, within a layer: a second spelling of the table that is tested.
OURS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def halves(w: Tensor, heads: int) -> Tensor:
    """Rows of q or k as Hugging Face has them: of each head the even rows, then the odd ones."""
    return torch.cat([part for head in w.chunk(heads) for part in (head[0::2], head[1::2])])


def their_state(state: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names and in its row order."""
    theirs = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for i in range(args.n_layers):
        ours = {name: state[f"layers.{i}.{name}.weight"] for name in OURS}
        ours["attention.wq"] = halves(ours["attention.wq"], args.n_heads)
        ours["attention.wk"] = halves(ours["attention.wk"], args.n_kv_heads)
        theirs.update({f"model.layers.{i}.{OURS[name]}.weight": tensor for name, tensor in ours.items()})
    return theirs


def transformers_model(state: dict[str, Tensor], args: ModelArgs, **more: Any) -> torch.nn.Module:
    """transformers' model with our weights: Mistral, or Ministral where layers have different windows."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    windows = set(args.windows)
    shape = {theirs: getattr(args, ours) for theirs, ours in hf.SHAPE.items()}
    if len(windows) > 1:
        kind, model = transformers.MinistralConfig, transformers.MinistralForCausalLM
        more["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in args.windows]
    else:
        kind, model = transformers.MistralConfig, transformers.MistralForCausalLM
    config = kind(
        **shape,
        head_dim=args.head_dim,
        sliding_window=next((w for w in windows if w is not None), None),
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attn_implementation="eager",
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        other = model(config).to(state["output.weight"].dtype).eval()
    other.load_state_dict(their_state(state, args), strict=True)
    return other


def their_logits(other: torch.nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [other(p[None], use_cache=False).logits[0] for p in prompts]


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def log_probs_apart(loaded: Loaded, want: list[Tensor], prompts: list[Tensor]) -> float:
    with torch.no_grad():
        return distance(whole(loaded.model, prompts), want)


# --- releases


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_in_both_layouts_is_transformers(tmp_path: Path, release: str) -> None:
    raw, form = RELEASES[release]
    args = to_args(raw)
    assert max(LENS) > max([w for w in args.windows if w], default=0)
    state = tiny_model(args, seed=4).state_dict()
    write_params(tmp_path, raw)
    write_weights(tmp_path, state, form)
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    other = transformers_model(state, args)
    folders = [tmp_path]
    for name, limit in (("one", "1GB"), ("sharded", "500KB")):
        folder = tmp_path / name
        other.save_pretrained(folder, max_shard_size=limit)
        shutil.copy(BUNDLED / "tokenizer.model", folder)
        assert (folder / INDEX).is_file() == (name == "sharded")
        folders.append(folder)
    prompts = ragged(LENS, args.vocab_size, seed=5)
    want = their_logits(other, prompts)
    for folder in folders:
        loaded = load(folder, device="cpu", dtype="float32")
        assert (len(loaded.files) > 1) == (folder.name == "sharded" or (form == "parts" and folder == tmp_path))
        assert loaded.args.windows == args.windows
        assert loaded.args.rope_theta == args.rope_theta
        assert not [note for note in loaded.notes if "no token for" not in note]
        assert_same(loaded.model.state_dict(), state)
        assert log_probs_apart(loaded, want, prompts) < TOLERANCE
        with torch.no_grad():
            got = play(loaded.model, prompts, at_random(LENS, 5), make_cache(loaded.model, len(LENS)))
        assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_come_through_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    args = to_args(RELEASES["nemo"][0])
    state = {name: tensor.to(dtype) for name, tensor in tiny_model(args, seed=6).state_dict().items()}
    transformers_model(state, args).save_pretrained(tmp_path)
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    assert_same(load(tmp_path, device="cpu", dtype=dtype).model.state_dict(), state)


def test_transformers_reads_these_folders_as_we_do(tmp_path: Path) -> None:
    """Those that the tests below write without it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    make_hf_folder(tmp_path, seed=7)
    prompts = ragged(LENS, PARAMS["vocab_size"], seed=7)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert log_probs_apart(load(tmp_path, device="cpu"), their_logits(other.eval(), prompts), prompts) < TOLERANCE


def test_tied_output(tmp_path: Path) -> None:
    args = to_args(RELEASES["v0.3"][0])
    state = tiny_model(args, seed=8).state_dict()
    state["tok_embeddings.weight"].copy_(state["output.weight"])
    other = transformers_model(state, args, tie_word_embeddings=True)
    other.save_pretrained(tmp_path)
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path, device="cpu")
    assert_same(loaded.model.state_dict(), state)
    prompts = ragged(LENS, args.vocab_size, seed=8)
    assert log_probs_apart(loaded, their_logits(other, prompts), prompts) < TOLERANCE


def test_a_tied_output_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_folder(tmp_path, change=lambda state: state.pop("lm_head.weight"), tie_word_embeddings=True)
    tied = PARAMS["vocab_size"] * PARAMS["dim"]
    count = sum(tensor.numel() for tensor in random_state().values()) - tied
    found = read_folder(tmp_path)
    assert found.args.tied_embeddings
    assert found.parameters == count
    assert inspect_folder(tmp_path)["parameters"] == count
    assert inspect_folder(tmp_path)["dtypes"] == {"float32": {"tensors": 20, "parameters": count}}
    monkeypatch.setattr("mistral.util.memory.available", lambda device: 4 * count)  # enough for one of them
    loaded = load(tmp_path, device="cpu")
    model = loaded.model
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count / 1e6:.1f} M parameters" in loaded.describe()
    wide = model.to(torch.bfloat16)
    assert wide.output.weight is wide.tok_embeddings.weight
    monkeypatch.setattr("mistral.util.memory.available", lambda device: 4 * count - 1)
    with pytest.raises(OutOfMemory):
        load(tmp_path, device="cpu")


def test_weights_are_read_in_the_files_order(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, shards=3)
    weights = read_folder(tmp_path).weights
    assert [hf.to_hf(name) for name in weights.readers] == list(find_hf_weights(tmp_path).readers)
    assert list(weights.readers) != list(weights.tensors)  # which have the model's


# --- mutants


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor], list[Tensor]]:
    """A folder with hidden_dim = dim, so that a table with two names swapped still fits; prompts, and log-probs."""
    folder = tmp_path_factory.mktemp("folders") / "square"
    args = to_args(params(64, 2, 64, 8, 2, 4096, sliding_window=5))
    other = transformers_model(tiny_model(args, seed=9).state_dict(), args)
    other.save_pretrained(folder)
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    prompts = ragged(LENS, args.vocab_size, seed=9)
    want = their_logits(other, prompts)
    assert log_probs_apart(load(folder, device="cpu"), want, prompts) < TOLERANCE
    return folder, prompts, want


def all_heads_of_q(name: str, args: ModelArgs) -> int | None:
    return args.n_heads if name.endswith(("wq.weight", "wk.weight")) else None


def all_heads_of_k(name: str, args: ModelArgs) -> int | None:
    return args.n_kv_heads if name.endswith(("wq.weight", "wk.weight")) else None


def q_alone(name: str, args: ModelArgs) -> int | None:
    return args.n_heads if name.endswith("wq.weight") else None


MUTANTS = {
    "rows left as they are": ("rows_to_mistral", lambda w, heads: w),
    "rows reordered the other way": ("rows_to_mistral", hf.rows_to_hf),
    "heads of q for k": ("heads_of", all_heads_of_q),
    "heads of k for q": ("heads_of", all_heads_of_k),
    "q reordered, k not": ("heads_of", q_alone),
}


@pytest.mark.parametrize("plant", MUTANTS)
def test_wrong_rows_show(square: Any, plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompts, want = square
    monkeypatch.setattr(hf, *MUTANTS[plant])
    assert log_probs_apart(load(folder, device="cpu"), want, prompts) > PLANTED


def swap(monkeypatch: pytest.MonkeyPatch, one: str, other: str) -> None:
    """Swap what two of Mistral's names mean, in both directions of the table."""
    table = dict(hf.MISTRAL_NAMES)
    table[one], table[other] = table[other], table[one]
    monkeypatch.setattr(hf, "MISTRAL_NAMES", table)
    monkeypatch.setattr(hf, "NAMES", {theirs: ours for ours, theirs in table.items()})


SWAPS = [
    ("layers.N.feed_forward.w2.weight", "layers.N.feed_forward.w3.weight"),
    ("layers.N.feed_forward.w1.weight", "layers.N.feed_forward.w3.weight"),
    ("layers.N.attention.wk.weight", "layers.N.attention.wv.weight"),
    ("layers.N.attention.wq.weight", "layers.N.attention.wo.weight"),
    ("layers.N.attention_norm.weight", "layers.N.ffn_norm.weight"),
    ("tok_embeddings.weight", "output.weight"),
]


@pytest.mark.parametrize(("one", "other"), SWAPS)
def test_swapped_names_show(square: Any, one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prompts, want = square
    swap(monkeypatch, one, other)
    assert log_probs_apart(load(folder, device="cpu"), want, prompts) > PLANTED


def test_swapped_names_do_not_fit_most_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf_folder(tmp_path)
    swap(monkeypatch, *SWAPS[0])
    with pytest.raises(WeightsError, match="config.json makes model.layers.0.mlp.up_proj.weight"):
        read_folder(tmp_path)


# --- names and rows


def test_names_go_there_and_back() -> None:
    args = to_args({**PARAMS, "n_layers": 12})
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(args).items()}
    theirs = their_state(ours, args)
    assert {hf.to_hf(name) for name in ours} == set(theirs)
    assert {hf.to_mistral(name) for name in theirs} == set(ours)
    for name in ours:
        assert hf.to_mistral(hf.to_hf(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.x.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "score.weight",
        "",
    ],
)
def test_unknown_names_stay(name: str) -> None:
    assert hf.to_mistral(name) == name
    assert hf.to_hf(name) == name


@pytest.mark.parametrize(("heads", "d"), [(4, 8), (1, 8), (3, 2), (2, 4)])
def test_rows_go_there_and_back(heads: int, d: int) -> None:
    w = torch.arange(heads * d * 5).view(heads * d, 5)
    assert torch.equal(hf.rows_to_hf(w, heads), halves(w, heads))
    assert torch.equal(hf.rows_to_mistral(halves(w, heads), heads), w)


# --- config.json


def config(**changes: Any) -> dict[str, Any]:
    """The shape of tests/support/folders.py as a config.json; a change to ... leaves a key out."""
    args = to_args(PARAMS)
    raw = {
        "model_type": "mistral",
        **{theirs: getattr(args, ours) for theirs, ours in hf.SHAPE.items()},
        "head_dim": args.head_dim,
        "sliding_window": args.sliding_window,
        "rope_theta": args.rope_theta,
        **changes,
    }
    return {key: value for key, value in raw.items() if value is not ...}


def make_hf_folder(
    folder: Path,
    shards: int = 0,
    index: bool = True,
    change: Callable[[dict[str, Tensor]], Any] = lambda state: None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A folder in Hugging Face's layout, written without transformers.

    Args:
        shards: numbered files, or one if 0.
        index: whether shards have one.
        change: made to the tensors, under Hugging Face's names, before they are written.
        changes: to config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    state = their_state(random_state(seed), to_args(PARAMS))
    change(state)
    where = {}
    for i in range(max(shards, 1)):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards else "model.safetensors"
        part = {key: state[key] for key in list(state)[i :: max(shards, 1)]}
        where.update(dict.fromkeys(part, name))
        save_file(part, folder / name)
    if shards and index:
        write_index(folder, where)
    return folder


def write_index(folder: Path, where: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_a_window_that_is_not_there_is_4096() -> None:
    args, (note,) = hf.config_to_args(config(sliding_window=...))
    assert args.windows == (4096, 4096)
    assert "no sliding_window" in note
    assert "4096" in note
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    assert transformers.MistralConfig().sliding_window == transformers.MinistralConfig().sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": None}, (None, None)),
        ({"sliding_window": 7}, (7, 7)),
        ({"layer_types": None}, (5, 5)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, (None, 5)),
        ({"layer_types": ["sliding_attention", "sliding_attention"]}, (5, 5)),
        ({"layer_types": ["full_attention", "full_attention"]}, (None, None)),
        ({"layer_types": ["full_attention", "full_attention"], "sliding_window": None}, (None, None)),
    ],
)
@pytest.mark.parametrize("kind", [kind for kind in hf.MODEL_TYPES if kind != "llama"])
def test_windows(kind: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    args, notes = hf.config_to_args(config(model_type=kind, **experts, **changes))
    assert args.windows == windows
    assert not notes


@pytest.mark.parametrize(
    ("changes", "theta", "rule"),
    [
        ({"rope_theta": 1e6}, 1e6, "given in config.json"),
        ({"rope_theta": 10000}, 1e4, "given in config.json"),
        ({"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None}, 1e6, "given in config.json"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}}, 1e6, "given in config.json"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, 1e6, "given in config.json"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 1e8, "rope_type": "default"}}, 1e8, "rope_parameters"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e8}}, 1e8, "rope_parameters"),
        ({"rope_theta": ..., "rope_scaling": {"type": "default", "rope_theta": 1e8}}, 1e8, "rope_scaling"),
        ({"rope_theta": ...}, 1e4, "absent"),
        ({"rope_theta": ..., "sliding_window": None}, 1e4, "absent"),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default"}}, 1e4, "absent"),
    ],
)
def test_theta(changes: dict[str, Any], theta: float, rule: str) -> None:
    args, _ = hf.config_to_args(config(**changes))
    assert args.rope_theta == theta
    assert rule in args.theta_rule
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    given = config(**changes)
    del given["model_type"]
    assert transformers.MistralConfig(**given).rope_parameters["rope_theta"] == theta


def test_head_dim_that_is_not_there_is_a_share_of_the_width() -> None:
    assert hf.config_to_args(config(head_dim=...))[0].head_dim == 6
    assert hf.config_to_args(config(head_dim=None))[0].head_dim == 6
    assert hf.config_to_args(config())[0].head_dim == 8


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_null_key_value_heads_are_as_many_as_query_heads(kind: str) -> None:
    assert hf.config_to_args(config(model_type=kind, num_key_value_heads=None))[0].n_kv_heads == 4
    assert hf.config_to_args(config(model_type=kind))[0].n_kv_heads == 2
    if kind == "llama":
        assert hf.config_to_args(config(model_type=kind, num_key_value_heads=...))[0].n_kv_heads == 4
    else:  # transformers would take 8, whatever the query heads are
        with pytest.raises(ParamsError, match="lacks num_key_value_heads"):
            hf.config_to_args(config(num_key_value_heads=...))


def test_an_unknown_key_that_is_null_is_noted() -> None:
    args, notes = hf.config_to_args(config(vision_config=None, attn_temperature_tuning=None))
    assert args == hf.config_to_args(config())[0]
    assert "config.json has 'vision_config', 'attn_temperature_tuning', unknown here and null: ignored" in notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mixtral"}, "config.json lacks num_local_experts, num_experts_per_tok"),
        ({"num_local_experts": 8}, "has 'num_local_experts', which no supported release has"),
        ({"model_type": "pixtral"}, "a vision model (Pixtral): use transformers or vLLM"),
        ({"model_type": "llava"}, "a vision model (LLaVA, as Pixtral is exported): use transformers or vLLM"),
        ({"model_type": "mistral3"}, "is of type mistral3, but has no text_config"),
        ({"model_type": "mistral4"}, "a mixture of experts (Mistral Small 4): use transformers or vLLM"),
        ({"model_type": "voxtral"}, "an audio model (Voxtral): use transformers or vLLM"),
        ({"model_type": "mamba"}, "a Mamba model: use transformers or vLLM"),
        ({"model_type": "mamba2"}, "a Mamba model (Codestral Mamba): use transformers or vLLM"),
        ({"model_type": "gemma"}, "a model of type 'gemma': use transformers or vLLM"),
        ({"model_type": "llama", "rope_interleaved": True}, "rope_interleaved = True, which this model does not have"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"model_type": ...}, "no model_type"),
        ({"model_type": ["mistral"]}, "no model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling lacks original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 4.0, "type": "linear"}}, "rope_scaling has type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters has rope_type 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "rope_parameters has type 'yarn'"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters has rope_type ['default']"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has 'full_attention'"),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "rope_parameters has 'llama_4_scaling_beta'"),
        ({"rope_parameters": [1e6]}, "rope_parameters must be an object, not [1000000.0]"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "gives both rope_theta = 10000.0 and rope_parameters.rope_theta = 1000000.0: they differ",
        ),
        ({"rope_theta": "1e6"}, "rope_theta must be a number, not '1e6'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"partial_rotary_factor": 0.5}, "has 'partial_rotary_factor', which no supported release has"),
        ({"num_experts": 8}, "has 'num_experts', which no supported release has"),
        ({"vision_config": {}}, "has 'vision_config', which no supported release has"),
        ({"quantization_config": {"bits": 4}}, "has 'quantization_config': a quantized checkpoint"),
        ({"attention_bias": True}, "has attention_bias = True, which this model does not have"),
        ({"mlp_bias": True}, "has mlp_bias = True"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu'"),
        ({"use_sliding_window": False}, "has use_sliding_window = False"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"layer_types": []}, "0 layer_types for 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must list full_attention or "),
        ({"layer_types": [["full_attention"], {}]}, "layer_types must list full_attention or "),
        ({"layer_types": "full_attention"}, "layer_types must list full_attention or "),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "but sliding_window is null"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "5"}, "sliding_window is '5'; it must be a whole number"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"rms_norm_eps": ..., "vocab_size": ...}, "lacks rms_norm_eps, vocab_size"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it must be a whole number"),
        ({"head_dim": ..., "hidden_size": 25}, "has no head_dim, and hidden_size is no multiple"),
        ({"head_dim": ..., "num_attention_heads": 0}, "has no head_dim, and hidden_size is no multiple"),
        ({"head_dim": 0}, "head_dim is 0"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError) as error:
        hf.config_to_args(config(**changes))
    assert said in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "dim"}, "config.json: hidden_size is 'dim'; it must be a whole number"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers is 0; it must be at least 1"),
        ({"intermediate_size": True}, "config.json: intermediate_size is True; it must be a whole number"),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"rms_norm_eps": 0}, "config.json: rms_norm_eps is 0; it must be a finite number above 0"),
        ({"head_dim": 7}, "config.json: head_dim 7 is odd: RoPE turns pairs, so it must be even"),
    ],
)
def test_errors_have_the_files_own_names(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError) as error:
        hf.config_to_args(config(**changes))
    assert str(error.value) == said


def test_the_callers_limit_is_not_the_files() -> None:
    with pytest.raises(ArgsError, match=r"^max_batch_size is -1"):
        hf.config_to_args(config(), max_batch_size=-1)


@pytest.mark.parametrize("key", [*hf.HARMLESS, "quantization_config"])
def test_known_keys_change_nothing(key: str) -> None:
    if key != "model_type":
        assert hf.config_to_args(config(**{key: None})) == hf.config_to_args(config())


@pytest.mark.parametrize("name", ["MistralConfig", "MinistralConfig"])
def test_all_that_transformers_writes_is_known(name: str) -> None:
    """Also what its defaults leave out, with architectures and dtype as a saved model has them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    made = getattr(transformers, name)(sliding_window=7, architectures=["X"], dtype="bfloat16")
    for diff in (True, False):
        args, notes = hf.config_to_args(json.loads(made.to_json_string(use_diff=diff)))
        assert args.windows == (7,) * 32
        assert not notes


def test_all_that_transformers_4_wrote_is_known() -> None:
    """The keys that it had for every kind of model, and 4.48 to 4.50 wrote the first of them into each config.json."""
    whole = {
        **{"_attn_implementation_autoset": True, "return_dict": True, "torchscript": False, "is_decoder": False},
        **{"pruned_heads": {}, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "add_cross_attention": False},
        **{"tie_encoder_decoder": False, "max_length": 20, "do_sample": False, "num_beams": 1, "temperature": 1.0},
        **{"top_k": 50, "top_p": 1.0, "bad_words_ids": None, "id2label": {"0": "LABEL_0"}, "prefix": None},
        **{"cross_attention_hidden_size": None, "tf_legacy_loss": False, "use_bfloat16": False},
    }
    assert hf.config_to_args(config(**whole)) == hf.config_to_args(config())
    with pytest.raises(ParamsError, match="pruned_heads"):
        hf.config_to_args(config(pruned_heads={"0": [1]}))


def test_yarn_of_yarn_mistral() -> None:
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192}
    assert hf.config_to_args(config(rope_scaling={**scaling, "finetuned": True})) == hf.config_to_args(
        config(rope_scaling=scaling)
    )


def published(*sizes: int, drop: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """A config.json of a release, at full size, as transformers 4 wrote them."""
    dim, layers, hidden, heads, vocab = sizes
    raw = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": vocab,
        **more,
    }
    return {key: value for key, value in raw.items() if key not in drop}


SEVEN = (4096, 32, 14336, 32, 32000)
LAYERS_OF_MINISTRAL = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 9
# config.json, and params.json of the same release, where the two say one thing.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v0.1": (
        published(*SEVEN, rope_theta=10000.0, sliding_window=4096, drop=("attention_dropout",)),
        params(4096, 32, 14336, 32, 8, 32000, 128, sliding_window=4096),
    ),
    "instruct-v0.2": (published(*SEVEN), params(4096, 32, 14336, 32, 8, 32000, 128, rope_theta=1e6)),
    "instruct-v0.3": (
        published(4096, 32, 14336, 32, 32768),
        params(4096, 32, 14336, 32, 8, 32768, 128, rope_theta=1e6),
    ),
    "nemo": (
        published(5120, 40, 14336, 32, 131072, head_dim=128, max_position_embeddings=1024000),
        params(5120, 40, 14336, 32, 8, 131072, 128, rope_theta=1e6),
    ),
    "codestral": (
        published(6144, 56, 16384, 48, 32768),
        params(6144, 56, 16384, 48, 8, 32768, 128, rope_theta=1e6),
    ),
    "small-3": (
        published(5120, 40, 32768, 32, 131072, head_dim=128, rope_theta=100000000.0),
        params(5120, 40, 32768, 32, 8, 131072, 128, rope_theta=1e8, max_seq_len=32768),
    ),
    "large": (
        published(12288, 88, 28672, 96, 32768, head_dim=128, use_cache=False),
        params(12288, 88, 28672, 96, 8, 32768, 128, rope_theta=1e6),
    ),
    "ministral": (
        published(
            *(4096, 36, 12288, 32, 131072),
            head_dim=128,
            rope_theta=100000000.0,
            sliding_window=32768,
            layer_types=LAYERS_OF_MINISTRAL,
        ),
        params(4096, 36, 12288, 32, 8, 131072, 128, rope_theta=1e8, _sliding_window=[None, 32768, 32768, 32768]),
    ),
    "mistrallite": (
        published(
            *SEVEN[:4], 32003, _name_or_path="a/folder", rope_theta=1000000, sliding_window=16384, pad_token_id=2
        ),
        params(4096, 32, 14336, 32, 8, 32003, 128, rope_theta=1e6, sliding_window=16384),
    ),
}


@pytest.mark.parametrize("release", PUBLISHED)
def test_a_published_config_says_what_params_say(release: str) -> None:
    theirs, ours = PUBLISHED[release]
    args, notes = hf.config_to_args(theirs)
    want = to_args(ours)
    assert not notes
    assert args.windows == want.windows
    for name in (*hf.SHAPE.values(), "head_dim", "rope_theta"):
        assert getattr(args, name) == getattr(want, name), name


# --- files


@pytest.mark.parametrize(("shards", "index"), [(0, False), (3, True), (3, False)])
def test_files(tmp_path: Path, shards: int, index: bool) -> None:
    loaded = load(make_hf_folder(tmp_path, shards, index, seed=1), device="cpu")
    assert_same(loaded.model.state_dict(), random_state(1))
    assert len(loaded.files) == max(shards, 1)
    found = read_folder(tmp_path)
    assert found.layout.name == "huggingface"
    assert list(found.weights.tensors) == list(loaded.model.state_dict())


def test_an_index_may_name_the_one_file(tmp_path: Path) -> None:
    make_hf_folder(tmp_path)
    write_index(tmp_path, dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors"))
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state())


def test_shards_may_have_any_name_that_the_index_gives(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 2)
    where = {}
    for name, file in read_index(tmp_path).items():
        where[name] = file.replace("model-", "part ")
        if (tmp_path / file).exists():
            (tmp_path / file).rename(tmp_path / where[name])
    (tmp_path / "model-other.safetensors").write_bytes(b"not read")
    write_index(tmp_path, where)
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state())


def test_tensors_that_the_index_leaves_out_are_read(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 2)
    where = read_index(tmp_path)
    del where["lm_head.weight"]
    write_index(tmp_path, where)
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state())


def test_buffers_of_old_exports_are_ignored(tmp_path: Path) -> None:
    def with_buffers(state: dict[str, Tensor]) -> None:
        state["model.rotary_emb.inv_freq"] = torch.ones(4)
        for i in range(2):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    found = read_folder(make_hf_folder(tmp_path, 3, change=with_buffers))
    assert list(found.weights.tensors) == list(random_state())
    assert found.parameters == sum(t.numel() for t in random_state().values())
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_buffers_of_another_theta_are_named(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    """They are not used, as config.json's is transformers' since 2023; older ones used them."""

    def said(folder: str, theta: float) -> list[str]:
        def with_buffers(state: dict[str, Tensor]) -> None:
            state["model.layers.0.self_attn.rotary_emb.inv_freq"] = inverse_frequencies(8, theta).to(dtype)

        path = make_hf_folder(tmp_path / folder, change=with_buffers, rope_theta=10000.0)
        if form == "bin":
            (weights,) = path.glob("*.safetensors")
            torch.save(load_file(weights), path / "pytorch_model.bin")
            weights.unlink()
        return [note for note in read_folder(path).notes if "inv_freq" in note]

    assert said("same", 10000.0) == []
    (note,) = said("other", 1e6)
    assert re.search(r"rope_theta (1e\+06|(9.9|1.0)\d*e\+0[56]), and config.json has 10000, which is used", note)
    assert "is that of no rope_theta" in said("none", 0.0)[0]


def test_an_output_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """As transformers 5 has it, where the files and tie_word_embeddings differ; and a note says so."""
    make_hf_folder(tmp_path, tie_word_embeddings=True)
    loaded = load(tmp_path, device="cpu")
    assert_same(loaded.model.state_dict(), random_state())
    assert not loaded.args.tied_embeddings
    assert any("tied" in note and "lm_head.weight" in note for note in loaded.notes)


@pytest.mark.parametrize(("value", "tied"), [(True, True), (False, False), (None, False)])
def test_tie_word_embeddings(value: object, tied: bool) -> None:
    assert hf.config_to_args(config(tie_word_embeddings=value))[0].tied_embeddings is tied


@pytest.mark.parametrize("value", ["true", 1, 0, []])
def test_tie_word_embeddings_must_be_true_or_false(value: object) -> None:
    with pytest.raises(ParamsError, match="tie_word_embeddings must be true or false"):
        hf.config_to_args(config(tie_word_embeddings=value))


def spoilt(folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_folder(folder)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    return str(error.value)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no output": (lambda s: s.pop("lm_head.weight"), "lack lm_head.weight"),
    "no layer": (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
    "bias": (
        lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "hold unknown model.layers.0.self_attn.q_proj.bias",
    ),
    "adapter": (
        lambda s: s.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 24)}),
        "hold model.layers.0.self_attn.q_proj.lora_A.weight: a LoRA adapter, not a model",
    ),
    "one layer more": (
        lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.ones(40, 24)}),
        "hold unknown model.layers.2.mlp.up_proj.weight",
    ),
    "a number spelled otherwise": (
        lambda s: s.update({"model.layers.00.mlp.up_proj.weight": torch.ones(40, 24)}),
        "hold unknown model.layers.00.mlp.up_proj.weight",
    ),
    "Mistral's name as well": (
        lambda s: s.update({"output.weight": torch.ones(4096, 24)}),
        "hold unknown output.weight",
    ),
    "Mistral's name alone": (
        lambda s: s.update({"norm.weight": s.pop("model.norm.weight")}),
        "lack model.norm.weight and hold unknown norm.weight",
    ),
    "shape": (
        lambda s: s.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(16, 23)}),
        "config.json makes model.layers.1.self_attn.k_proj.weight [16, 24], but in model.safetensors it is [16, 23]",
    ),
    "dtype": (
        lambda s: s.update({"lm_head.weight": torch.ones(4096, 24, dtype=torch.int8)}),
        "lm_head.weight in model.safetensors is I8",
    ),
    "no tensors": (lambda s: s.clear(), "makes n_layers 2, but model.safetensors holds 0 tensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit(tmp_path: Path, change: str) -> None:
    act, said = CHANGES[change]
    assert said in spoilt(make_hf_folder(tmp_path, change=act))


def test_mistrals_names_in_hugging_faces_files(tmp_path: Path) -> None:
    """Their rows are in Mistral's order, which a model.safetensors does not say."""
    make_hf_folder(tmp_path)
    save_file(random_state(), tmp_path / "model.safetensors")
    assert "lack model.embed_tokens.weight, " in spoilt(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-00009-of-00009.safetensors", "names 'model-00009-of-00009.safetensors', which is missing"),
        ("x" * 5000 + ".safetensors", "which is missing"),
        ("\0.safetensors", "which is missing"),
        ("\ud800.safetensors", "which is missing"),
        ("two\nlines.safetensors", "which is missing"),
        ("../model.safetensors", "names '../model.safetensors', which is no safetensors file beside it"),
        ("/etc/model.safetensors", "which is no safetensors file beside it"),
        ("sub/model.safetensors", "which is no safetensors file beside it"),
        ("./model.safetensors", "which is no safetensors file beside it"),
        ("pytorch_model.bin", "which is no safetensors file beside it"),
        ("", "which is no safetensors file beside it"),
        ("..", "which is no safetensors file beside it"),
    ],
)
def test_an_index_that_names_other_files(tmp_path: Path, name: str, said: str) -> None:
    folder = make_hf_folder(tmp_path / "folder", 2)
    make_hf_folder(tmp_path)  # where ../model.safetensors would be
    make_hf_folder(folder / "sub")
    write_index(folder, {**read_index(folder), "lm_head.weight": name})
    error = spoilt(folder)
    assert str(folder / INDEX) in error
    assert said in error


def test_an_absolute_path_in_an_index_is_refused_even_if_it_is_there(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, 2)
    where = {name: str(folder / file) for name, file in read_index(folder).items()}
    write_index(folder, where)
    assert "which is no safetensors file beside it" in spoilt(folder)


def test_what_to_do_with_files_that_are_laid_over_others(tmp_path: Path) -> None:
    """The advice is run: transformers takes the last file's tensor, and writes a folder that is read."""
    transformers = pytest.importorskip("transformers")
    where, name = read_index(make_hf_folder(tmp_path / "a", 2)), "model.layers.0.mlp.up_proj.weight"
    own = load_file(tmp_path / "a" / where[name])[name] + 1
    save_file({name: own}, tmp_path / "a" / "model-overlay.safetensors", {"format": "pt"})
    said = f"{name} is in model-overlay.safetensors and in an earlier part: {INDEX} gives "
    write_index(tmp_path / "a", {**where, name: "model-overlay.safetensors"})
    assert f"{said}the last file for it, which transformers reads: have it write one set" in spoilt(tmp_path / "a")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b")
    whole = read_folder(tmp_path / "b").weights.get("layers.0.feed_forward.w3.weight")
    assert torch.equal(whole, own)
    write_index(tmp_path / "a", {**where, "lm_head.weight": "model-overlay.safetensors"})
    assert f"{said}{where[name]} for it, and transformers reads the last file: remove the" in spoilt(tmp_path / "a")


def test_an_index_that_promises_more_than_the_files_hold(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 2)
    where = read_index(tmp_path)
    write_index(tmp_path, {**where, "model.layers.2.mlp.up_proj.weight": next(iter(where.values()))})
    assert "promises model.layers.2.mlp.up_proj.weight, which the files do not hold" in spoilt(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 10**5],
)
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    make_hf_folder(tmp_path, 2)
    (tmp_path / INDEX).write_text(text)
    assert f"{tmp_path / INDEX} " in spoilt(tmp_path)
    assert "fetch it again" in spoilt(tmp_path)


def test_an_index_that_is_no_text(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 2)
    (tmp_path / INDEX).write_bytes(b"\xff\xfe{")
    assert "fetch it again" in spoilt(tmp_path)


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "names 'model-00002-of-00003.safetensors', which is missing" in spoilt(tmp_path)
    (tmp_path / INDEX).unlink()
    assert "has 2 of 3 parts of its weights: part 2 is missing" in spoilt(tmp_path)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, 2)
    state = load_file(tmp_path / "model-00002-of-00002.safetensors")
    save_file(
        {**state, "model.embed_tokens.weight": torch.ones(4096, 24)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert "model.embed_tokens.weight is in model-00002-of-00002.safetensors and in an earlier part" in spoilt(tmp_path)


def test_one_file_and_an_index_of_others(tmp_path: Path) -> None:
    """transformers reads the one file, vLLM the others: which is meant cannot be known."""
    make_hf_folder(tmp_path, 2, seed=0)
    make_hf_folder(tmp_path, seed=1)
    assert "holds model.safetensors and an index of other files" in spoilt(tmp_path)
    (tmp_path / INDEX).unlink()
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state(1))


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = make_hf_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a complete safetensors file" in spoilt(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (make_hf_folder(tmp_path) / "model.safetensors").unlink()
    assert spoilt(tmp_path).startswith(f"no weights in {tmp_path}: expected model.safetensors, or ")


def test_neither_params_nor_config(tmp_path: Path) -> None:
    (make_hf_folder(tmp_path) / "config.json").unlink()
    with pytest.raises(ParamsError, match="no params.json and no config.json and no .gguf file in "):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (make_hf_folder(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ParamsError, match="config.json"):
        read_folder(tmp_path)


# --- both layouts


def test_where_both_layouts_are_there_mistrals_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_hf_folder(tmp_path, 2, seed=0)
    make_folder(tmp_path, random_state(1))
    loaded = load(tmp_path, device="cpu")
    assert_same(loaded.model.state_dict(), random_state(1))
    (note,) = loaded.notes
    assert note == "the folder holds several layouts: Mistral's was read, Hugging Face's was ignored"
    outcome = in_process(capfd)("complete", tmp_path, "--max_tokens", 1, "--temperature", 0, stdin="a")
    assert note not in outcome.text
    assert f"note: {note}" in outcome.err.splitlines()


def test_half_of_a_layout_does_not_count(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, seed=0)
    write_params(tmp_path, PARAMS)
    assert read_folder(tmp_path).layout.name == "huggingface"
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state(0))
    write_weights(tmp_path, random_state(1))
    (tmp_path / "model.safetensors").unlink()
    found = read_folder(tmp_path)
    assert (found.layout.name, found.notes) == ("mistral", ())
    assert_same(load(tmp_path, device="cpu").model.state_dict(), random_state(1))


def test_a_note_of_an_assumed_window_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_hf_folder(tmp_path, sliding_window=...)
    outcome = in_process(capfd)("complete", tmp_path, "--max_tokens", 1, "--temperature", 0, stdin="a")
    assert outcome.text
    assert "note: config.json has no sliding_window, which means 4096 to transformers" in outcome.err.splitlines()


@pytest.mark.parametrize("kind", ["mistral4", "pixtral", "mamba"])
def test_other_models_are_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    make_hf_folder(tmp_path, model_type=kind)
    error = in_process(capfd)("demo", tmp_path).error
    assert ("small 4" if kind == "mistral4" else kind) in error.lower()
    assert "use transformers or vLLM" in error


@pytest.mark.parametrize("old", [True, False])
def test_llama_is_this_model_without_a_window(tmp_path: Path, old: bool) -> None:
    """Exports of the family say llama, with keys of its time; transformers' Llama has the same logits."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    heads = {} if old else {"num_key_value_heads": 1, "head_dim": 10}
    config = transformers.LlamaConfig(**shape, **heads, vocab_size=61, rms_norm_eps=1e-5)
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    raw = json.loads(path.read_text())
    if old:
        for key in ("num_key_value_heads", "head_dim"):
            del raw[key]
        raw |= {"sliding_window": 4, "is_llama_config": True, "rope_interleaved": False}
    path.write_text(json.dumps(raw))
    loaded = load(tmp_path / "a", device="cpu")
    assert loaded.args.sliding_window is None
    said = "model_type is llama: this model without a sliding window"
    assert said + ("; transformers ignores its sliding_window" if old else "") in loaded.notes
    ids = torch.randint(61, (23,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids, [23]), theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-5)
    convert(tmp_path / "a", tmp_path / "b", "hf")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None)
