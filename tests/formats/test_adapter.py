"""LoRA adapters: what PEFT and mistral-finetune write, merged and at run time, against PEFT and a reference here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral import load
from mistral.formats import merge
from mistral.formats.adapter import AdapterError, is_adapter, read_adapter
from mistral.formats.adapter_forms import convert_adapter
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import read_folder
from mistral.loader.options import OptionError
from mistral.util.errors import MistralError
from tests.support.adapters import SIZES, native_name, peft_tensors, place, write_native, write_peft
from tests.support.commands import in_process
from tests.support.folders import PARAMS, make_folder, random_state
from tests.support.tiny import ragged
from tests.support.writing import memory_of_convert

IDS = ragged([11], PARAMS["vocab_size"])[0]  # longer than the window


def paired(w: Tensor, heads: int) -> Tensor:
    """Rows of a head from halves to adjacent pairs, written as a loop: row 2i is row i, row 2i + 1 is row D/2 + i."""
    size, rows = len(w) // heads, []
    for head in range(heads):
        for i in range(size // 2):
            rows += [head * size + i, head * size + size // 2 + i]
    return w[torch.tensor(rows)]


def expected(
    base: dict[str, Tensor], tensors: dict[str, Tensor], scale: Callable[[int, str], float]
) -> dict[str, Tensor]:
    """W + scale B A in float64, with DoRA where there are magnitudes: PEFT's tensors over Mistral's weights."""
    state = {name: tensor.double() for name, tensor in base.items()}
    for layer in range(2):
        for target in SIZES:
            at = f"base_model.model.model.layers.{layer}.{place(target)}"
            a, b = tensors[f"{at}.lora_A.weight"].double(), tensors[f"{at}.lora_B.weight"].double()
            m = tensors.get(f"{at}.lora_magnitude_vector")
            if heads := {"q_proj": 4, "k_proj": 2}.get(target):
                b = paired(b, heads)
                m = m if m is None else paired(m, heads)
            name = f"{native_name(layer, target)}.weight"
            w = state[name] + scale(layer, target) * b @ a
            state[name] = w if m is None else m.double()[:, None] * w / w.pow(2).sum(1, keepdim=True).sqrt()
    return state


def merged_state(folder: Path, adapter: Path) -> dict[str, Tensor]:
    found = merge.merge_into(read_folder(folder), read_adapter(adapter))
    return {name: found.weights.get(name) for name in found.tensors}


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    assert got.keys() == want.keys()
    return all(bool(((got[n].double() - want[n]).abs() <= tolerance * want[n].abs().max()).all()) for n in want)


SCALES: dict[str, tuple[dict[str, Any], Callable[[int, str], float]]] = {
    "alpha / r": ({}, lambda layer, target: 2.0),
    "rsLoRA": ({"use_rslora": True}, lambda layer, target: 6 / 3**0.5),
    "alpha_pattern": (
        {"alpha_pattern": {"v_proj": 12, "layers.1.self_attn.k_proj": 3, "ayers.0.mlp.up_proj": 9}},
        lambda layer, target: 4.0 if target == "v_proj" else 1.0 if (layer, target) == (1, "k_proj") else 2.0,
    ),
    "rank_pattern": (
        {"r": 5, "rank_pattern": {r".*_proj": 3}},
        lambda layer, target: 2.0,
    ),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_the_scale_is_the_one_that_the_config_means(tmp_path: Path, kind: str, layout: str) -> None:
    changes, scale = SCALES[kind]
    folder = make_folder(tmp_path / "base")
    if layout == "hf":
        convert(folder, tmp_path / "hf", "hf")
        folder = tmp_path / "hf"
    adapter = write_peft(tmp_path / "adapter", **changes)
    want = expected(random_state(), peft_tensors(), scale)
    assert same(merged_state(folder, adapter), want)


@pytest.mark.parametrize("piece", [merge.PIECE, 100])
def test_dora_scales_rows_to_the_lengths_that_were_learned(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "PIECE", piece)  # as large matrices are merged: some rows at a time
    tensors = peft_tensors(dora=True)
    adapter = write_peft(tmp_path / "adapter", tensors, use_dora=True)
    want = expected(random_state(), tensors, lambda layer, target: 2.0)
    assert same(merged_state(make_folder(tmp_path / "base"), adapter), want)
    assert read_adapter(adapter).describe().startswith("DoRA of PEFT, rank 3, scale 2, of q_proj, ")


@pytest.mark.parametrize("tensors", [peft_tensors(), peft_tensors(dora=True)])
def test_a_merge_without_the_permutation_is_caught(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    dora = any("magnitude" in name for name in tensors)
    folder, adapter = make_folder(tmp_path / "base"), write_peft(tmp_path / "adapter", tensors, use_dora=dora)
    want = expected(random_state(), tensors, lambda layer, target: 2.0)
    monkeypatch.setattr(merge, "rows_to_mistral", lambda w, heads: w)
    got = merged_state(folder, adapter)
    wrong = {name for name in want if not same({name: got[name]}, {name: want[name]})}
    assert wrong == {f"layers.{i}.attention.{n}.weight" for i in range(2) for n in ("wq", "wk")}


def test_mistral_finetunes_form_has_its_own_scale_and_order(tmp_path: Path) -> None:
    adapter = write_native(tmp_path / "adapter", scaling=1.5)
    raw = load_file(adapter / "lora.safetensors")
    want = {name: tensor.double() for name, tensor in random_state().items()}
    for name in list(want):
        at = name.removesuffix(".weight")
        if f"{at}.lora_A.weight" in raw:
            want[name] += 1.5 * raw[f"{at}.lora_B.weight"].double() @ raw[f"{at}.lora_A.weight"].double()
    folder = make_folder(tmp_path / "base")
    assert same(merged_state(folder, adapter), want)
    assert same(merged_state(folder, adapter / "lora.safetensors"), want)


def test_a_merge_is_rounded_once_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = random_state(dtype=torch.bfloat16)
    got = merged_state(make_folder(tmp_path / "base", base), write_peft(tmp_path / "adapter"))
    want = expected(base, peft_tensors(), lambda layer, target: 2.0)
    exact = sum(int((got[n] == want[n].bfloat16()).sum()) for n in want)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    assert exact >= sum(t.numel() for t in want.values()) - 2  # fp32 may fall on the other side of a tie


# Where weights of the adapter stand in the place of the base's: PEFT also keeps what is below a changed output.
WHOLE: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]},
    "output": {"target_modules": [*SIZES, "lm_head"]},
}


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", *WHOLE])
def test_logits_are_pefts(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import MistralForCausalLM

    folder = tmp_path / "hf"
    convert(make_folder(tmp_path / "base"), folder, "hf")
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    chosen = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 7},
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        **{"target_modules": list(SIZES), **WHOLE.get(kind, {})},
    )
    theirs = peft.get_peft_model(model, chosen).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
            elif "magnitude" in name:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
            elif "modules_to_save" in name or ("base_layer" in name and "lm_head" in name):
                weight.add_(torch.rand(weight.shape, generator=generator) - 0.5)
        want = theirs(IDS[None]).logits[0]
        plain = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS[None]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    for mode in ("merge", "runtime"):
        if mode == "runtime" and kind in ("dora", *WHOLE):
            with pytest.raises(OptionError, match="it can only be merged"):
                load(folder, device="cpu", adapter=str(tmp_path / "adapter"), adapter_mode=mode)
            continue
        loaded = load(folder, device="cpu", adapter=str(tmp_path / "adapter"), adapter_mode=mode)
        with torch.inference_mode():
            got = loaded.model.forward(IDS, [len(IDS)])
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (plain - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("execution", ["eager", "kernels"])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_at_run_time_it_adds_what_a_merge_does(tmp_path: Path, execution: str, quant: str | None) -> None:
    folder, adapter = make_folder(tmp_path / "base"), str(write_native(tmp_path / "adapter"))
    options: dict[str, Any] = {"device": "cpu", "execution": execution, "adapter": adapter}
    merged = load(folder, **options)
    beside = load(folder, **options, adapter_mode="runtime", quant=quant)
    with torch.inference_mode():
        want, got = (one.model.forward(IDS[:n], [n]) for one in (merged, beside) for n in (len(IDS),))
    close = 1e-5 if quant is None else 0.05  # the error of the base's 8 bits
    assert (got - want).abs().max() < close * want.abs().max()
    assert f"adapter {adapter} merged" in merged.describe()
    assert f"adapter {adapter} at run time" in beside.describe()
    if execution == "kernels":
        assert any("does not know adapters beside the weights: steps" in note for note in beside.notes)


def test_weights_of_its_own_are_told_and_need_their_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In q the rows of heads change their order here too; embeddings that were tied are no longer, as in PEFT."""
    own = torch.rand(32, 24)
    tensors = {n: t for n, t in peft_tensors().items() if not n.startswith(AT)} | {f"{AT}.weight": own}
    changes = {"modules_to_save": ["layers.0.self_attn.q_proj"]}
    adapter = write_peft(tmp_path / "adapter", tensors, **changes)
    got = merged_state(make_folder(tmp_path / "base"), adapter)
    assert torch.equal(got["layers.0.attention.wq.weight"], paired(own, 4))
    text = in_process(capfd)("inspect", adapter).text
    assert "replaces    model.layers.0.self_attn.q_proj, by weights of its own" in text
    with pytest.raises(AdapterError, match="no place for weights of its own in the place of model.layers.0.self"):
        convert_adapter(adapter, tmp_path / "other", "mistral", tmp_path / "base")
    own = torch.rand(PARAMS["vocab_size"], 24)
    embeddings = {"base_model.model.model.embed_tokens.weight": own}
    adapter = write_peft(tmp_path / "embeddings", peft_tensors() | embeddings, modules_to_save=["embed_tokens"])
    state = {name: t for name, t in random_state().items() if name != "output.weight"}
    tied = make_folder(tmp_path / "tied", state, tied_embeddings=True)
    got = merged_state(tied, adapter)
    assert torch.equal(got["tok_embeddings.weight"], own)
    assert torch.equal(got["output.weight"], state["tok_embeddings.weight"])
    more = {"base_model.model.model.embed_tokens.weight": torch.rand(PARAMS["vocab_size"] + 2, 24)}
    adapter = write_peft(tmp_path / "more", peft_tensors() | more, modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match="2 words that were added are not saved for lm_head: save it again"):
        merged_state(tmp_path / "base", adapter)


HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight", mode)
        for part in "AB"
        for mode in ("merge", "runtime")
    ]
    + [(HEAD, "merge")],
)
def test_a_number_that_is_none_is_the_adapters(tmp_path: Path, name: str, mode: str) -> None:
    """And not the model's, which is what its results would be blamed on."""
    tensors, changes = peft_tensors(), {"modules_to_save": ["lm_head"]} if name == HEAD else {}
    tensors |= {name: torch.rand(PARAMS["vocab_size"], 24)} if name == HEAD else {}
    tensors[name][1, 1] = math.nan
    adapter = write_peft(tmp_path / "adapter", tensors, **changes)
    with pytest.raises(AdapterError, match=f"the adapter has NaN or infinity in {name} of adapter_model.safetensors"):
        load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter), adapter_mode=mode)


def test_an_adapter_in_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lora.gguf").write_bytes(b"GGUF")
    for given in (tmp_path / "lora", tmp_path / "lora" / "lora.gguf"):
        with pytest.raises(AdapterError, match="adapters in GGUF are not read: give the one of PEFT"):
            read_adapter(given)


def test_a_quantized_base_is_not_merged_into(tmp_path: Path) -> None:
    adapter = str(write_native(tmp_path / "adapter"))
    convert(make_folder(tmp_path / "base"), tmp_path / "int8", "mistral", quant="int8")
    with pytest.raises(AdapterError, match="use --adapter_mode runtime"):
        load(tmp_path / "int8", device="cpu", adapter=adapter)
    options: dict[str, Any] = {"device": "cpu", "adapter": adapter, "adapter_mode": "runtime"}
    stored = load(tmp_path / "int8", **options)
    rounded = load(tmp_path / "base", quant="int8", **options)
    with torch.inference_mode():
        assert torch.equal(stored.model.forward(IDS, [11]), rounded.model.forward(IDS, [11]))


def test_what_at_run_time_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base")
    dora = write_peft(tmp_path / "dora", peft_tensors(dora=True), use_dora=True)
    with pytest.raises(OptionError, match="DoRA, which scales whole rows"):
        load(folder, device="cpu", adapter=str(dora), adapter_mode="runtime")
    with pytest.raises(OptionError, match="without an adapter"):
        load(folder, device="cpu", adapter_mode="runtime")
    adapter = str(write_native(tmp_path / "adapter"))
    with pytest.raises(OptionError, match="bitwise is not possible"):
        load(folder, device="cpu", adapter=adapter, adapter_mode="runtime", execution="bitwise")


AT = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, lambda t: None, "only LORA adapters are read here; have PEFT merge it"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, lambda t: None, "only LORA adapters are read here; use PEFT"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, lambda t: None, "modules_to_save 'lm_head', which adapter_"),
    "lora_bias": ({"lora_bias": True}, lambda t: None, "lora_bias: it adds biases"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, lambda t: None, "began from a base that was changed"),
    "OLoRA": ({"init_lora_weights": "olora"}, lambda t: None, "began from a base that was changed"),
    "LoftQ": ({"init_lora_weights": "loftq"}, lambda t: None, "began from a base that was changed"),
    "CorDA": ({"init_lora_weights": "corda"}, lambda t: None, "began from a base that was changed"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, lambda t: None, "aLoRA"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, lambda t: None, "BD-LoRA"),
    "QALoRA": ({"use_qalora": True}, lambda t: None, "QALoRA"),
    "target_parameters": ({"target_parameters": ["w"]}, lambda t: None, "no parameter of a mixture of experts"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, lambda t: None, "repeats layers"),
    "a new kind": ({"use_newlora": True}, lambda t: None, "'use_newlora', which is not known here"),
    "rank": ({"r": 4}, lambda t: None, "it must be rank 4 by adapter_config.json"),
    "no alpha": ({"lora_alpha": None}, lambda t: None, "lora_alpha = None"),
    "alpha": ({"lora_alpha": float("nan")}, lambda t: None, "it must be above 0"),
    "slow pattern": ({"alpha_pattern": {"(a+)+b": 2}}, lambda t: None, "a pattern that is not supported"),
    "no magnitude": ({"use_dora": True}, lambda t: None, "lacks the magnitude of model.layers.0"),
    "magnitude": ({}, lambda t: t.update({f"{AT}.lora_magnitude_vector": torch.ones(32)}), "has no use_dora"),
    "half": ({}, lambda t: t.pop(f"{AT}.lora_B.weight"), "lacks lora_B of model.layers.0.self_attn.q_proj"),
    "whole weights": (
        {},
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
        "is [2], but the model",
    ),
    "embeddings": (
        {},
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}),
        "lacks lora_B of model.embed_tokens",
    ),
    "DeepSpeed": ({}, lambda t: t.update({n: torch.zeros(0) for n in t}), "is empty, as DeepSpeed leaves"),
    "ints": ({}, lambda t: t.update({f"{AT}.lora_A.weight": torch.ones(3, 24).int()}), "is I32; it must be floats"),
    "another shape": (
        {},
        lambda t: t.update({f"{AT}.lora_A.weight": torch.ones(3, 32)}),
        "is [3, 32], but the model makes it [3, 24]: the adapter is of another model, mistralai/Mistral-7B-v0.1",
    ),
    "another layer": (
        {},
        lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items() if k.startswith(AT)}),
        "changes layers.9.attention.wq.weight, which the model does not have",
    ),
    "another module": (
        {},
        lambda t: t.update({k.replace("q_proj", "qkv_proj"): v.clone() for k, v in t.items() if k.startswith(AT)}),
        "changes model.layers.0.self_attn.qkv_proj, which is no matrix of this model",
    ),
    "Mistral's name": (
        {},
        lambda t: t.update({"layers.0.attention.wq.lora_A.weight": torch.ones(3, 24)}),
        "which is no matrix of this model",
    ),
    "a norm": (
        {},
        lambda t: t.update(
            {"model.norm.lora_A.weight": torch.ones(3, 24), "model.norm.lora_B.weight": torch.ones(24, 3)}
        ),
        "which is no matrix of a product",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_merged_exactly_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    changes, damage, message = BROKEN[kind]
    tensors = peft_tensors()
    damage(tensors)
    adapter = write_peft(tmp_path / "adapter", tensors, **changes)
    with pytest.raises(MistralError) as refused:
        load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    assert message in str(refused.value)


def test_values_beyond_a_dtype_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base", random_state(dtype=torch.float16))
    adapter = write_peft(tmp_path / "adapter", lora_alpha=1e7)
    with pytest.raises(AdapterError, match="with its adapter is beyond float16"):
        merged_state(folder, adapter)


def test_an_adapter_that_is_not_there_or_lacks_its_scale(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base")
    with pytest.raises(AdapterError, match="no such adapter"):
        load(folder, device="cpu", adapter=str(tmp_path / "none"))
    with pytest.raises(AdapterError, match="expected adapter_config.json"):
        load(folder, device="cpu", adapter=str(folder))
    native = write_native(tmp_path / "native", scaling=None)
    with pytest.raises(AdapterError, match="lora.scaling says by how much"):
        load(folder, device="cpu", adapter=str(native))
    (native / "params.json").unlink()
    with pytest.raises(AdapterError, match="no params.json beside it"):
        load(folder, device="cpu", adapter=str(native))
    peft = write_peft(tmp_path / "peft")
    (peft / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors in .*, and no adapter_model.bin"):
        read_adapter(peft)


def test_an_older_file_is_read_as_the_newer_one(tmp_path: Path) -> None:
    folder, new, old = make_folder(tmp_path / "base"), write_peft(tmp_path / "new"), write_peft(tmp_path / "old")
    (old / "adapter_model.safetensors").unlink()
    torch.save(peft_tensors(), old / "adapter_model.bin")
    want = merged_state(folder, new)
    for given in (old, old / "adapter_model.bin"):
        assert is_adapter(given)
        got = merged_state(folder, given)
        assert all(torch.equal(got[name], want[name]) for name in want)
    (old / "adapter_model.bin").write_bytes(b"<html>")
    with pytest.raises(MistralError, match="adapter_model.bin is cut short, or was not written by torch.save"):
        read_adapter(old)


def test_a_weight_that_was_trained_whole_may_be_there_twice_beside_the_bases(tmp_path: Path) -> None:
    """PEFT 0.21 writes all three where words were added to the vocabulary, and reads the plain one."""
    folder = make_folder(tmp_path / "base")
    own, other = torch.rand(PARAMS["vocab_size"], PARAMS["dim"]), torch.rand(PARAMS["vocab_size"], PARAMS["dim"])
    at = "base_model.model.lm_head"
    twice = {f"{at}.modules_to_save.weight": other.clone(), f"{at}.original_module.weight": other, f"{at}.weight": own}
    adapter = write_peft(tmp_path / "adapter", {**peft_tensors(), **twice}, modules_to_save=["lm_head"])
    assert torch.equal(merged_state(folder, adapter)["output.weight"], own)
    wide = {f"{at}.weight": torch.rand(PARAMS["vocab_size"] + 2, PARAMS["dim"]), f"{at}.original_module.weight": other}
    adapter = write_peft(tmp_path / "wide", {**peft_tensors(), **wide}, modules_to_save=["lm_head"])
    for mode in ("merge", "runtime"):
        with pytest.raises(AdapterError, match="that were added are not saved for model.embed_tokens: save it again"):
            load(folder, device="cpu", adapter=str(adapter), adapter_mode=mode)


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_convert_writes_what_a_load_merges(tmp_path: Path, to: str) -> None:
    folder = make_folder(tmp_path / "base", random_state(dtype=torch.bfloat16))
    adapter = write_peft(tmp_path / "adapter", peft_tensors(dora=True), use_dora=True)
    written = convert(folder, tmp_path / "out", to, adapter=adapter)
    assert any(note.startswith(f"adapter {adapter}: DoRA of PEFT, rank 3") for note in written.notes)
    found = read_folder(tmp_path / "out")
    want = merged_state(folder, adapter)
    assert {name: tensor.dtype for name, tensor in want.items()} == dict.fromkeys(want, torch.bfloat16)
    assert all(torch.equal(found.weights.get(name), want[name]) for name in want)
    assert not torch.equal(
        want["layers.1.attention.wk.weight"], read_folder(folder).weights.get("layers.1.attention.wk.weight")
    )


def test_a_conversation_with_an_adapter_is_another_models(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base")
    one, other = write_native(tmp_path / "one"), write_native(tmp_path / "other", scaling=1.0)
    kinds = {fingerprint(folder), fingerprint(folder, str(one)), fingerprint(folder, str(other))}
    assert len(kinds) == 3


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    with pytest.raises(MistralError) as refused:
        read_folder(write_peft(tmp_path / "peft"))
    assert "a PEFT adapter, not a model: give its base model, and the adapter with --adapter" in str(refused.value)
    assert str(refused.value).endswith("its base is mistralai/Mistral-7B-v0.1")


def test_inspect_describes_an_adapter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    text = cli("inspect", write_peft(tmp_path / "peft", use_rslora=True, fan_in_fan_out=True)).text
    assert "base        mistralai/Mistral-7B-v0.1\n" in text
    assert "rank        3\nscale       3.4641\n" in text
    assert "changes     14 matrices: q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj" in text
    assert "note: adapter_config.json has fan_in_fan_out" in text
    assert f"convert BASE MERGED --to hf --adapter {tmp_path / 'peft'}" in text
    assert f"convert {tmp_path / 'peft'} OTHER --to mistral" in text
    dora = write_peft(tmp_path / "dora", peft_tensors(dora=True), use_dora=True)
    assert "OTHER" not in cli("inspect", dora).text  # which has no other form
    told = json.loads(cli("inspect", write_native(tmp_path / "native"), "--json").text)
    assert (told["kind"], told["form"], told["base"]) == ("LoRA", "mistral-finetune", None)
    assert (told["ranks"], told["scales"], told["dtypes"]) == ([3], [2.0], ["bfloat16"])


def test_the_command_line_takes_an_adapter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    folder, adapter = make_folder(tmp_path / "base"), write_native(tmp_path / "adapter")
    words = ("complete", folder, "Once upon", "--max_tokens", "8", "--temperature", "0")
    plain, merged = cli(*words).text, cli(*words, "--adapter", adapter)
    assert merged.text != plain
    assert f"; adapter {adapter} merged" in merged.err
    assert "note: adapter " in merged.err
    assert "merged, rounded once to float32" in merged.err
    assert cli("convert", folder, tmp_path / "out", "--to", "hf", "--adapter", adapter).code == 0
    assert cli("complete", tmp_path / "out", *words[2:]).text == merged.text
    assert "adapter_mode 'both' is not one of" in cli(*words, "--adapter", adapter, "--adapter_mode", "both").error


def test_adapters_are_known_by_their_names(tmp_path: Path) -> None:
    peft, native = write_peft(tmp_path / "peft"), write_native(tmp_path / "native")
    assert is_adapter(peft)
    assert is_adapter(native / "lora.safetensors")
    assert not is_adapter(make_folder(tmp_path / "base"))
    told = "LoRA of mistral-finetune, rank 3, scale 2, of wq, wk, wv, wo, w1, w2, w3 in 2 layers"
    assert read_adapter(native).describe() == told
    assert read_adapter(peft).base == "mistralai/Mistral-7B-v0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_merged_folder_is_written_in_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Beside the pages of the file, which the system may drop, only stretches of it: not its fp32 form."""
    params = {"dim": 1024, "hidden_dim": 8192, "n_layers": 2, "vocab_size": 64, "n_heads": 32, "n_kv_heads": 2}
    state = random_state(dtype=torch.bfloat16, **params)
    largest = max(t.nbytes for t in state.values())
    src = make_folder(tmp_path / "a", state, tokenizer=False, **params)
    names = {f"base_model.model.model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "down_proj")}
    a, b = torch.rand(2, 8, 1024), torch.rand(2, 8192, 8)
    tensors: dict[str, Tensor] = {}
    for at in names:
        down = at.endswith("down_proj")
        tensors[f"{at}.lora_A.weight"] = b[0].T.contiguous() if down else a[0].clone()
        tensors[f"{at}.lora_B.weight"] = a[1].T.contiguous() if down else b[1].clone()
    adapter = write_peft(tmp_path / "adapter", tensors, r=8, target_modules=["gate_proj", "down_proj"])
    small = make_folder(tmp_path / "small", random_state(dtype=torch.bfloat16), tokenizer=False)
    first = {"src": small, "dst": tmp_path / "out0", "to": "hf", "adapter": write_peft(tmp_path / "its")}
    taken = memory_of_convert(first, {"src": src, "dst": tmp_path / "out", "to": "hf", "adapter": adapter})
    assert taken < largest  # the fp32 form has twice as much
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "layers.1.feed_forward.w1.weight"
    want = state[name].float() + 0.75 * (b[1] @ a[0])  # alpha 6, rank 8
    assert torch.equal(written["model.layers.1.mlp.gate_proj.weight"], want.bfloat16())
