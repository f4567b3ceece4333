"""Adapters of experts and routers that are parameters of a layer, as PEFT trains Mixtral in transformers 5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from mistral.formats.adapter import AdapterError, read_adapter
from mistral.formats.folder import read_folder
from mistral.formats.merge import updates
from mistral.loader.load import load

IDS = torch.tensor([1, *range(30, 60)])


def mixtral(folder: Path, experts: int = 3, hidden: int = 24) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": hidden, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 7, "initializer_range": 0.3}
    config = MixtralConfig(**shape, **heads, num_local_experts=experts, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["narrow", "wide"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Experts of fewer numbers than half of the model's, and of twice as many as it has."""
    return mixtral(tmp_path_factory.mktemp("base"), hidden={"narrow": 16, "wide": 64}[request.param])


def trained(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """An adapter whose numbers are all random; the logits of PEFT's model with it."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    with torch.no_grad():
        for name, number in model.named_parameters():
            if "lora_" in name:
                number.copy_(torch.randn_like(number) * 0.1)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.inference_mode():
        return again(IDS[None]).logits[0]


CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "old names": {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"], "use_rslora": True},
    "up": {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
    "router": {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]},
    "other ranks": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 5},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_pefts(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = trained(base, tmp_path / "adapter", **config)
    assert (tmp_path / "adapter" / "adapter_config.json").read_text().count("target_parameters") == 1
    for mode in ("merge", "runtime"):
        model = load(base, adapter=tmp_path / "adapter", adapter_mode=mode, device="cpu").model
        with torch.inference_mode():
            assert (model(IDS, seqlens=[len(IDS)]) - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_either_parameter_may_be_below_the_other(base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path / "a", **CONFIGS["all"])
    path, below = tmp_path / "a" / "adapter_model.safetensors", "experts.base_layer.lora_"
    names = {name: name.replace("experts.lora_", below) for name in load_file(path) if "experts.lora_" in name}
    names |= {there: name for name, there in names.items()}
    save_file({names.get(name, name): tensor for name, tensor in load_file(path).items()}, path)
    model = load(base, adapter=tmp_path / "a", device="cpu").model
    with torch.inference_mode():
        assert (model(IDS, seqlens=[len(IDS)]) - theirs).abs().max() < 2e-5 * theirs.abs().max()


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, **config}))
    return folder


A = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "another parameter": (lambda t: None, {"target_parameters": ["x.w"]}, "'x.w', which is no parameter of a mixture"),
    "no text": (lambda t: None, {"target_parameters": 5}, "5, which is no parameter of a mixture"),
    "a rank that does not fit": (lambda t: None, {"r": 2}, "is no stack of rank 2 by the config"),
    "a part that is missing": (lambda t: t.pop(A), {}, "lacks lora_A or lora_B of the experts of"),
    "one parameter too few": (
        lambda t: None,
        {"target_parameters": ["down_proj"]},
        "changes 2 parameters of the",
    ),
    "no pair": (lambda t: t.update({A: torch.zeros(4, 24)}), {}, "are no pair"),
}


@pytest.mark.parametrize(("change", "config", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], config: dict[str, Any], said: str
) -> None:
    base = mixtral(tmp_path / "base")
    trained(base, tmp_path / "a", target_parameters=["experts.down_proj", "experts.gate_up_proj"], target_modules=[])
    read_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match=said):
        read_adapter(changed(tmp_path / "a", change, **config))


def test_a_model_with_more_experts(tmp_path: Path) -> None:
    base = mixtral(tmp_path / "base")
    trained(base, tmp_path / "a", target_parameters=["experts.down_proj", "experts.gate_up_proj"], target_modules=[])
    adapter = read_adapter(tmp_path / "a")
    assert len(updates(adapter, read_folder(base).args)) == 2 * 3 * 3
    with pytest.raises(AdapterError, match="changes 3 experts of each layer, but the model has 4: the adapter is of"):
        updates(adapter, read_folder(mixtral(tmp_path / "b", experts=4)).args)
