"""Adapters from one form into the other and back: the same bits, the same numbers, and what has no place is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mistral import load
from mistral.formats.adapter import AdapterError, read_adapter
from mistral.formats.adapter_forms import alpha_of, convert_adapter
from mistral.formats.convert import convert
from mistral.util.errors import ConvertError
from tests.support.adapters import SIZES, peft_tensors, write_native, write_peft
from tests.support.commands import in_process
from tests.support.folders import PARAMS, make_folder
from tests.support.tiny import ragged

IDS = ragged([11], PARAMS["vocab_size"])[0]


def merged_logits(folder: Path, adapter: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder, device="cpu", execution="eager", adapter=adapter).model.forward(IDS, [len(IDS)])


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_form_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_folder(tmp_path / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in peft_tensors().items()}
    peft = write_peft(tmp_path / "peft", tensors, use_rslora=True)
    convert_adapter(peft, tmp_path / "native", "mistral", base)
    convert_adapter(tmp_path / "native", tmp_path / "again", "hf")  # params.json has the shape
    assert same_tensors(peft / "adapter_model.safetensors", tmp_path / "again" / "adapter_model.safetensors")
    want = merged_logits(base, peft)
    for folder in ("native", "again"):
        assert torch.equal(merged_logits(base, tmp_path / folder), want)
    a, b = load_file(peft / "adapter_model.safetensors"), load_file(tmp_path / "native" / "lora.safetensors")
    name = "layers.1.attention.wk"
    theirs = "base_model.model.model.layers.1.self_attn.k_proj"
    assert torch.equal(a[f"{theirs}.lora_A.weight"], b[f"{name}.lora_A.weight"])
    assert not torch.equal(a[f"{theirs}.lora_B.weight"], b[f"{name}.lora_B.weight"])
    params = json.loads((tmp_path / "native" / "params.json").read_text(encoding="utf-8"))
    assert params["lora"] == {"enable": True, "rank": 3, "dropout": 0.0, "scaling": 6 / 3**0.5}
    assert (params["dim"], params["moe"]) == (24, None)


def test_mistral_finetunes_form_there_and_back_and_as_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import MistralForCausalLM

    base = make_folder(tmp_path / "base")
    native = write_native(tmp_path / "native", scaling=0.7)
    notes = convert_adapter(native, tmp_path / "peft", "hf", base).notes
    assert [note.split(":")[1] for note in notes] == [" no lora_alpha gives it with a rank of 3"]
    convert_adapter(tmp_path / "peft", tmp_path / "again", "mistral")  # adapter_config.json names the base
    assert same_tensors(native / "lora.safetensors", tmp_path / "again" / "lora.safetensors")
    (scale,) = {pair.scale for pair in read_adapter(tmp_path / "peft").pairs.values()}
    assert scale == pytest.approx(0.7, rel=2**-52)
    convert(base, tmp_path / "hf", "hf")
    model = MistralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        want = theirs(IDS[None]).logits[0]
    got = merged_logits(base, native)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_some_matrices_only(tmp_path: Path) -> None:
    """PEFT's short names mean every layer, so the names are whole where a layer is left out."""
    base = make_folder(tmp_path / "base")
    few = {n: t for n, t in peft_tensors().items() if "layers.1" in n and ("q_proj" in n or "down" in n)}
    convert_adapter(write_peft(tmp_path / "peft", few), tmp_path / "native", "mistral", base)
    convert_adapter(tmp_path / "native", tmp_path / "again", "hf")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    whole = {n: t for n, t in peft_tensors().items() if "q_proj" in n or "down" in n}
    convert_adapter(write_peft(tmp_path / "w", whole), tmp_path / "wn", "mistral", base)
    convert_adapter(tmp_path / "wn", tmp_path / "wa", "hf")
    config = json.loads((tmp_path / "wa" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "q_proj"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "no place for DoRA"),
    "scales": ({"alpha_pattern": {"q_proj": 9}}, "no place for scales of 2 and 3, where it has one for all"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_place_is_refused(tmp_path: Path, kind: str) -> None:
    changes, said = REFUSED[kind]
    base = make_folder(tmp_path / "base")
    peft = write_peft(tmp_path / "peft", peft_tensors(dora=kind == "dora"), **changes)
    with pytest.raises(AdapterError, match=said):
        convert_adapter(peft, tmp_path / "out", "mistral", base)
    assert not (tmp_path / "out").exists()


def test_ranks_and_the_output_have_no_place(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    tensors = peft_tensors()
    for name in [n for n in tensors if "v_proj" in n]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2].contiguous()
    peft = write_peft(tmp_path / "peft", tensors, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})
    with pytest.raises(AdapterError, match="ranks of 2 and 3"):
        convert_adapter(peft, tmp_path / "out", "mistral", base)
    tensors = peft_tensors() | {
        "base_model.model.lm_head.lora_A.weight": torch.ones(3, 24),
        "base_model.model.lm_head.lora_B.weight": torch.ones(4096, 3),
    }
    with pytest.raises(AdapterError, match=r"a LoRA of output\.weight"):
        convert_adapter(write_peft(tmp_path / "head", tensors), tmp_path / "out", "mistral", base)


def test_a_base_that_is_not_known(tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    with pytest.raises(ConvertError, match=r"mistralai/Mistral-7B-v0.1 is no folder here: give it with --base FOLDER"):
        convert_adapter(peft, tmp_path / "out", "mistral")
    native = write_native(tmp_path / "native")
    (native / "params.json").write_text(json.dumps({"lora": {"scaling": 2.0}}), encoding="utf-8")
    with pytest.raises(ConvertError, match=r"params.json lacks dim.*give it with --base"):
        convert_adapter(native, tmp_path / "out", "hf")
    other = make_folder(tmp_path / "other", dim=32)
    with pytest.raises(AdapterError, match="the adapter is of another model"):
        convert_adapter(peft, tmp_path / "out", "mistral", other)
    with pytest.raises(ConvertError, match="is in the form of PEFT already"):
        convert_adapter(peft, tmp_path / "out", "hf", other)


@settings(max_examples=300)
@given(st.integers(1, 1024), st.floats(1e-3, 1e3), st.booleans())
def test_the_scale_survives_or_a_note_says_so(rank: int, alpha: float, rooted: bool) -> None:
    scale, notes = alpha / rank**0.5 if rooted else alpha / rank, list[str]()
    got = alpha_of(scale, rank, notes) / rank
    assert got == pytest.approx(scale, rel=2**-51)
    assert bool(notes) == (got != scale)
    if not rooted or rank & (rank - 1) == 0:  # what PEFT wrote, and every scale with a usual rank
        assert got == scale


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    base, native = make_folder(tmp_path / "base"), write_native(tmp_path / "native")
    done = cli("convert", native, tmp_path / "peft", "--to", "hf")
    assert f"wrote {tmp_path / 'peft'}: an adapter of {2 * len(SIZES)} matrices in the form of PEFT" in done.err
    done = cli("convert", tmp_path / "peft", tmp_path / "again", "--to", "mistral", "--base", base)
    assert done.err.endswith("in the form of mistral-finetune\n")
    words = ("convert", native, tmp_path / "x", "--to", "hf")
    assert "whose numbers stay the same: omit --dtype" in cli(*words, "--dtype", "float16").error
    assert "is there already and not empty" in cli("convert", native, base, "--to", "hf").error
    assert "SRC is none" in cli("convert", base, tmp_path / "x", "--to", "hf", "--base", base).error
