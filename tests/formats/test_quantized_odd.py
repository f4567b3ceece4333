"""Quantized folders as they are found: older configs or none, layers left as they are, Mixtral, text inside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral.args import Moe
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.huggingface import heads_of, rows_to_mistral
from mistral.util.errors import MistralError
from tests.formats.test_quantized_hf import GROUP, KINDS, SHAPE, Q, compressed, damage, quantize, write
from tests.support.folders import make_folder
from tests.support.tiny import tiny_args, tiny_model


def test_what_older_programs_wrote_into_a_file_of_its_own(tmp_path: Path) -> None:
    """The first versions of AutoGPTQ and AutoAWQ: config.json says nothing of it."""
    for kind, name, of in (
        ("GPTQ, act order", "quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": True}),
        ("AWQ", "quant_config.json", {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}),
    ):
        folder, _ = write(tmp_path / name, kind)
        want = read_folder(folder)
        raw = json.loads((folder / "config.json").read_text())
        del raw["quantization_config"]
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(
            MistralError, match=r"qweight, a part of weights quantized by GPTQ or AWQ, but config\.json"
        ):
            read_folder(folder)
        (folder / name).write_text(json.dumps(of))
        found = read_folder(folder)
        assert found.notes == want.notes
        assert all(torch.equal(found.weights.get(n), want.weights.get(n)) for n in want.tensors)
        (folder / name).write_text(json.dumps(of | {"bits": 3, "w_bit": 3}))
        with pytest.raises(MistralError, match=f"{name} is there: a checkpoint quantized by .*, 3 bits, which is not"):
            read_folder(folder)


@pytest.mark.parametrize("kind", ["fp8, one scale", "nf4", "packed"])
def test_parts_of_quantized_weights_whose_config_says_nothing(tmp_path: Path, kind: str) -> None:
    folder, _ = write(tmp_path / "quantized", kind)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(MistralError, match=r"config\.json does not say how: fetch the one that belongs to them"):
        read_folder(folder)


def told(folder: Path, config: dict[str, Any]) -> Path:
    """The folder with another quantization_config."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folder


ASYMMETRIC = {"symmetric": False}
ORDERED = {"symmetric": True, "actorder": "group"}


@pytest.mark.parametrize(
    ("kind", "config", "part"),
    [
        ("packed", compressed("pack-quantized", **ASYMMETRIC), "weight_zero_point"),
        ("int8", compressed("int-quantized", 8, **ASYMMETRIC), "weight_zero_point"),
        ("packed", compressed("pack-quantized", **ORDERED), "weight_g_idx"),
        ("packed", compressed("pack-quantized", actorder="dynamic"), "weight_g_idx"),
    ],
)
def test_what_the_config_says_there_is_must_be_there(
    tmp_path: Path, kind: str, config: dict[str, Any], part: str
) -> None:
    """Without it the numbers were those of symmetric weights, or of another order, without a word."""
    folder, _ = write(tmp_path / "quantized", kind)
    with pytest.raises(MistralError, match=f"_proj has no {part} beside the rest: the files are incomplete"):
        read_folder(told(folder, config))


def test_groups_of_modules_may_differ_in_what_they_have(tmp_path: Path) -> None:
    """One group with zero points and one without: each module has what it has."""
    folder, _ = write(tmp_path / "quantized", "packed")
    config = compressed("pack-quantized", **ASYMMETRIC)
    config["config_groups"]["group_1"] = compressed("pack-quantized", symmetric=True)["config_groups"]["group_0"]
    assert read_folder(told(folder, config)).args
    folder, _ = write(tmp_path / "other", "packed, zero points")
    assert read_folder(told(folder, compressed("pack-quantized", **ASYMMETRIC))).args


def transform(*places: str) -> dict[str, Any]:
    apply = [{"targets": ["re:.*down_proj"], "location": place} for place in places]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply}}}


@pytest.mark.parametrize(
    ("kind", "more", "what"),
    [
        ("packed", {"transform_config": transform("weight_input", "input")}, "transforms activations too"),
        ("fp8", {"transform_config": transform("k_cache", "q_attn")}, "transforms activations too"),
        ("packed", {"transform_config": "R4"}, "transforms activations too"),
        ("GPTQ", {"rotation": "hadamard"}, r"activations that are rotated \(rotation\)"),
        ("GPTQ", {"adapter": {"name": "lora", "path": "eora"}}, r"an adapter beside the weights \(adapter\)"),
    ],
)
def test_what_is_computed_besides_is_refused(tmp_path: Path, kind: str, more: dict[str, Any], what: str) -> None:
    """Weights that go with rotated activations are another model's without the rotation."""
    folder, _ = write(tmp_path / "quantized", kind)
    config = KINDS[kind][0]
    with pytest.raises(MistralError, match=f"{what}.*, which is not read here: give the one it was made from"):
        read_folder(told(folder, config | more))
    for harmless in ({"transform_config": transform("weight_input", "weight_output")}, {"transform_config": {}}):
        read_folder(told(folder, config | harmless))
    read_folder(told(folder, config | {"rotation": None, "adapter": None}))


@pytest.mark.parametrize("kind", ["GPTQ", "GPTQ v2", "AWQ"])
def test_each_name_of_the_format_is_read(tmp_path: Path, kind: str) -> None:
    """GPTQ's zeros are one less than in its version 2: by a name that was not looked at, all weights were wrong."""
    folder, _ = write(tmp_path / "quantized", kind)
    want = read_folder(folder).weights
    config = KINDS[kind][0]
    form = config.get("checkpoint_format", config.get("version", "gptq"))
    plain = {key: value for key, value in config.items() if key not in ("checkpoint_format", "version")}
    for names in (("format",), ("checkpoint_format",), ("checkpoint_format", "format")):
        found = read_folder(told(folder, plain | dict.fromkeys(names, form))).weights
        assert all(torch.equal(found.get(name), want.get(name)) for name in want.tensors), names
    with pytest.raises(MistralError, match="a checkpoint of two formats, checkpoint_format '.*' and format 'gptq_v3'"):
        read_folder(told(folder, plain | {"checkpoint_format": form, "format": "gptq_v3"}))
    with pytest.raises(MistralError, match=r"quantized by .* 'gemv'"):
        read_folder(told(folder, plain | {"format": "gemv"}))


@pytest.mark.parametrize("kind", ["GPTQ", "AWQ", "packed"])
def test_a_weight_that_is_there_quantized_and_plain_is_refused(tmp_path: Path, kind: str) -> None:
    folder, meant = write(tmp_path / "quantized", kind)
    damage(folder, lambda s: s.update({f"{Q}.weight": meant[f"{Q}.weight"].half()}))
    with pytest.raises(
        MistralError, match=r"one weight in two forms, .*q_proj\.weight and .*q_proj\..*, and do not say"
    ):
        read_folder(folder)


def test_act_order_without_its_order_is_refused(tmp_path: Path) -> None:
    """Nothing else tells which scale an input has, and the numbers would be wrong without a word."""
    folder, _ = write(tmp_path / "quantized", "GPTQ, act order")
    damage(folder, lambda s: s.pop(f"{Q}.g_idx"))
    with pytest.raises(MistralError, match="q_proj has no g_idx beside the rest"):
        read_folder(folder)


def test_layers_that_are_not_quantized_among_those_that_are(tmp_path: Path) -> None:
    """GPTQModel lists them after "-:"."""
    folder, meant = write(tmp_path / "quantized", "GPTQ")
    plain = meant[f"{Q}.weight"].half()
    damage(folder, lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{Q}.")] and s.update({f"{Q}.weight": plain}))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["dynamic"] = {"-:.*layers\\.0.*q_proj": {}}
    (folder / "config.json").write_text(json.dumps(raw))
    found = read_folder(folder)
    name = "layers.0.attention.wq.weight"
    assert torch.equal(found.weights.get(name), rows_to_mistral(plain, heads_of(name, found.args)))


def test_groups_that_agree_are_one_kind(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "quantized", "packed")
    want = read_folder(folder)
    raw = json.loads((folder / "config.json").read_text())
    (group,) = raw["quantization_config"]["config_groups"].values()
    raw["quantization_config"]["config_groups"] = {"group_0": group, "group_1": group | {"targets": ["re:.*mlp.*"]}}
    (folder / "config.json").write_text(json.dumps(raw))
    found = read_folder(folder)
    assert all(torch.equal(found.weights.get(n), want.weights.get(n)) for n in want.tensors)


IMAGES = "vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize("kind", ["AWQ", "GPTQ, act order", "fp8, rows", "packed", "nf4"])
def test_quantized_experts_and_text_models_inside_others(tmp_path: Path, kind: str) -> None:
    """Mixtral, whose experts are quantized one by one and whose router is not; and both ways to name a text inside."""
    args = tiny_args(**SHAPE, moe=Moe(4, 2), sliding_window=None)
    state = {name: tensor.half() for name, tensor in tiny_model(args).state_dict().items()}
    convert(make_folder(tmp_path / "plain", state, **args.to_params()), tmp_path / "mixtral", "hf")
    meant = quantize(tmp_path / "mixtral", kind)
    found = read_folder(tmp_path / "mixtral")
    for name in found.tensors:
        exact = found.layout.unfix(name, found.args, found.weights.get(name, exact=True))
        assert torch.allclose(exact.double(), meant[found.layout.name_of(name)], rtol=1e-6, atol=1e-9), name
    assert sum("experts" in name for name, stored in found.tensors.items() if stored.computed) == 24

    folder, _ = write(tmp_path / "text", kind)
    found, state = read_folder(folder), load_file(folder / "model.safetensors")
    want = {name: found.weights.get(name).clone() for name in found.tensors}
    raw = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "mistral3", "quantization_config": raw.pop("quantization_config")}
    whole |= {"tie_word_embeddings": False, "text_config": raw, "vision_config": {"model_type": "pixtral"}}
    (folder / "config.json").write_text(json.dumps(whole))
    for before, after, outside in (
        ("", "language_model.", ""),  # as files have it
        ("model.", "model.language_model.", "model."),  # as transformers 5 has it in memory
    ):
        inside = {after + n.removeprefix(before) if n.startswith(before) else n: t for n, t in state.items()}
        seeing = {outside + name: torch.ones(4, 4) for name in IMAGES}
        save_file(inside | seeing, folder / "model.safetensors")
        found = read_folder(folder)
        assert all(torch.equal(found.weights.get(n), want[n]) for n in want)
        assert any("2 tensors of the part that reads images" in note for note in found.notes)
