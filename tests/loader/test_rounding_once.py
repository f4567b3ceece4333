"""Weights that are computed while they are read, with an adapter in them: they are rounded once, to what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral import load
from mistral.formats.adapter import read_adapter
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.merge import merge_into
from mistral.quant import KINDS
from tests.support.folders import make_folder, random_state

NAME = "layers.1.attention.wv.weight"


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """A folder in bf16, a LoRA adapter on one matrix, and that matrix with it in fp32."""
    state = random_state(dtype=torch.bfloat16)
    folder, adapter = make_folder(tmp_path / "base", state), tmp_path / "adapter"
    adapter.mkdir()
    a, b = torch.rand(3, 24) - 0.5, torch.rand(16, 3) - 0.5
    at = "base_model.model.model.layers.1.self_attn.v_proj"
    save_file({f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["v_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder, adapter, state[NAME].float() + 2.0 * (b @ a)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_merged_weights_are_quantized_from_fp32(tmp_path: Path, adapted: Any, quant: str) -> None:
    folder, adapter, want = adapted
    once = KINDS[quant].of(want).rows(0, len(want))
    assert not torch.equal(KINDS[quant].of(want.bfloat16()).rows(0, len(want)), once)
    convert(folder, tmp_path / "merged", "mistral", quant=quant, adapter=adapter)
    for model in (load(folder, device="cpu", quant=quant, adapter=adapter), load(tmp_path / "merged", device="cpu")):
        module: Any = model.model.get_submodule(NAME.removesuffix(".weight"))
        assert torch.equal(module.rows(0, len(want)), once)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merged_weights_take_a_requested_dtype_from_fp32(tmp_path: Path, adapted: Any, dtype: str) -> None:
    folder, adapter, want = adapted
    kind = getattr(torch, dtype)
    assert not torch.equal(want.bfloat16().to(kind), want.to(kind))
    convert(folder, tmp_path / "merged", "mistral", dtype=dtype, adapter=adapter)
    assert torch.equal(load_file(tmp_path / "merged" / "consolidated.safetensors")[NAME], want.to(kind))
    if dtype == "float16":
        model = load(folder, device="cpu", dtype=dtype, adapter=adapter, execution="eager").model
        assert torch.equal(model.get_parameter(NAME), want.to(kind))


@pytest.mark.parametrize("to", ["int8", "float16", None])
def test_the_note_tells_what_they_are_rounded_to(tmp_path: Path, adapted: Any, to: str | None) -> None:
    folder, adapter, _ = adapted
    asked = {"quant" if to == "int8" else "dtype": to} if to else {}
    written = convert(folder, tmp_path / "merged", "mistral", adapter=adapter, **asked)
    for notes in (written.notes, load(folder, device="cpu", adapter=adapter, **asked).notes):
        (note,) = (note for note in notes if "merged" in note)
        assert f"merged, rounded once to {to or 'bfloat16'}" in note


def test_without_one_they_have_the_dtype_of_the_file(adapted: Any) -> None:
    """Whatever computes: fp32 arithmetic has the same weights as bf16 arithmetic."""
    folder, adapter, want = adapted
    assert torch.equal(merge_into(read_folder(folder), read_adapter(adapter)).weights.get(NAME), want.bfloat16())
    for execution in ("eager", "auto"):
        model = load(folder, device="cpu", adapter=adapter, execution=execution).model
        assert torch.equal(model.get_parameter(NAME).float(), want.bfloat16().float())
