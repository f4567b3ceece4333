"""Random LoRA adapters on disk for the tiny folders: PEFT's form and mistral-finetune's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.folders import PARAMS

SIZES = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
SIZES |= {"gate_proj": (40, 24), "up_proj": (40, 24), "down_proj": (24, 40)}
NATIVE = dict(zip(SIZES, ("wq", "wk", "wv", "wo", "w1", "w3", "w2"), strict=True))


def place(target: str) -> str:
    return ("mlp." if target in ("gate_proj", "up_proj", "down_proj") else "self_attn.") + target


def native_name(layer: int, target: str) -> str:
    part = "feed_forward" if place(target).startswith("mlp.") else "attention"
    return f"layers.{layer}.{part}.{NATIVE[target]}"


def config(**changes: Any) -> dict[str, Any]:
    base = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(SIZES), "bias": "none"}
    base |= {
        "base_model_name_or_path": "mistralai/Mistral-7B-v0.1",
        "init_lora_weights": True,
        "peft_version": "0.21.2",
    }
    return base | changes


def peft_tensors(rank: int = 3, seed: int = 7, dora: bool = False) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for target, (out, inner) in SIZES.items():
            at = f"base_model.model.model.layers.{layer}.{place(target)}"
            found[f"{at}.lora_A.weight"] = torch.rand(rank, inner, generator=generator) - 0.5
            found[f"{at}.lora_B.weight"] = torch.rand(out, rank, generator=generator) - 0.5
            if dora:
                found[f"{at}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    return found


def write_peft(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)), encoding="utf-8")
    save_file(peft_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def write_native(folder: Path, scaling: Any = 2.0, seed: int = 7) -> Path:
    """mistral-finetune's form, rows in Mistral's order."""
    folder.mkdir()
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for target, (out, inner) in SIZES.items():
            at = native_name(layer, target)
            found[f"{at}.lora_A.weight"] = (torch.rand(3, inner, generator=generator) - 0.5).bfloat16()
            found[f"{at}.lora_B.weight"] = (torch.rand(out, 3, generator=generator) - 0.5).bfloat16()
    save_file(found, folder / "lora.safetensors")
    lora = {"enable": True, "rank": 3, "dropout": 0.0, "scaling": scaling}
    (folder / "params.json").write_text(json.dumps({**PARAMS, "lora": lora}), encoding="utf-8")
    return folder
