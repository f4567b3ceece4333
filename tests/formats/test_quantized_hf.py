"""Quantized folders of Hugging Face's: files that a numpy reference here writes are read as what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral import load
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.fp8 import scaled
from mistral.formats.huggingface import heads_of, rows_to_mistral
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.quant import KINDS as KINDS_OF_LINEAR
from mistral.util.errors import MistralError
from tests.support.folders import PARAMS, make_folder, random_state, write_params
from tests.support.tiny import TOLERANCE, distance

# Wider than other tests': columns of whole words.
SHAPE = {"dim": 32, "hidden_dim": 64}
GROUP = 16
Files = dict[str, Tensor]


def words(numbers: np.ndarray, bits: int, axis: int) -> Tensor:
    """Numbers packed into int32 one after the other, lowest bits first, along an axis."""
    per = 32 // bits
    lines = np.moveaxis(numbers, axis, -1)
    packed = np.zeros((*lines.shape[:-1], lines.shape[-1] // per), np.uint64)
    for i in range(per):
        packed |= lines[..., i::per].astype(np.uint64) << np.uint64(i * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32), -1, axis)).view(np.int32).copy())


class Made:
    """Random numbers of few bits, and the weight [out, in] that they mean in float64."""

    def __init__(self, shape: tuple[int, ...], seed: int, bits: int = 4, ordered: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.out, self.inner = shape
        groups = self.inner // GROUP
        self.q = rng.integers(0, 2**bits, (self.inner, self.out))
        self.zeros = rng.integers(1, 2**bits, (groups, self.out))
        self.scales = torch.from_numpy(rng.uniform(0.005, 0.02, (groups, self.out))).half()
        self.group = np.arange(self.inner) // GROUP
        if not ordered:
            self.group = rng.permutation(self.group)

    def meant(self, zeros: np.ndarray | int | None = None) -> Tensor:
        """Row by row and number by number, as slow as it is plain."""
        scales, found = self.scales.double().numpy(), np.zeros((self.out, self.inner))
        for i in range(self.inner):
            g = self.group[i]
            zero = self.zeros[g] if zeros is None else zeros
            found[:, i] = (self.q[i] - zero) * scales[g]
        return torch.from_numpy(found)


def awq(made: Made) -> tuple[Files, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i holds this column of eight

    def shuffled(n: np.ndarray) -> np.ndarray:
        return n.reshape(len(n), -1, 8)[:, :, order].reshape(n.shape)

    files = {"qweight": words(shuffled(made.q), 4, 1), "qzeros": words(shuffled(made.zeros), 4, 1)}
    return files | {"scales": made.scales}, made.meant()


def gptq(made: Made, bits: int = 4, one: int = 1) -> tuple[Files, Tensor]:
    files = {"qweight": words(made.q, bits, 0), "qzeros": words(made.zeros - one, bits, 1), "scales": made.scales}
    return files | {"g_idx": torch.from_numpy(made.group).int(), "bias": torch.zeros(made.out).half()}, made.meant()


def packed(made: Made, zeros: bool) -> tuple[Files, Tensor]:
    files = {
        "weight_packed": words(made.q.T, 4, 1),
        "weight_scale": made.scales.T.contiguous(),
        "weight_shape": torch.tensor([made.out, made.inner]),
    }
    if not zeros:
        return files, made.meant(8)
    return files | {"weight_zero_point": words(made.zeros.T, 4, 0)}, made.meant()


def whole_bytes(made: Made, kind: torch.dtype) -> tuple[Files, Tensor]:
    scale = made.scales[0].bfloat16()[:, None]
    q = torch.from_numpy(made.q.T * 9 - 70).double()
    q = q.to(kind) if kind == torch.int8 else q.to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.double() * scale.double()


def fp8(made: Made, scale: Tensor, name: str, block: tuple[int, int] = (1, 1), **more: Tensor) -> tuple[Files, Tensor]:
    """Weights in fp8 and scales of any shape; what they mean is worked out number by number."""
    q = torch.from_numpy(made.q.T * 9 - 70).float().to(torch.float8_e4m3fn).contiguous()
    wide, meant = scale.double(), q.double()
    for i in range(made.out):
        for j in range(made.inner):
            at = {0: (), 1: (i % len(wide),) if scale.dim() else ()}.get(scale.dim(), (i // block[0], j // block[1]))
            meant[i, j] *= float(wide[at])
    return {"weight": q, name: scale, **more}, meant


def random_scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) * 0.02 + 0.005).to(dtype)


def one_scale(made: Made) -> tuple[Files, Tensor]:
    return fp8(made, random_scales(), "weight_scale_inv", (10**6, 10**6), activation_scale=torch.tensor(0.5))


def in_blocks(made: Made, name: str, *block: int) -> tuple[Files, Tensor]:
    grid = -(-made.out // block[0]), -(-made.inner // block[1])
    return fp8(made, random_scales(*grid), name, (block[0], block[1]))


def of_rows(made: Made) -> tuple[Files, Tensor]:
    scale = random_scales(made.out, 1, dtype=torch.float32)
    return fp8(made, scale, "weight_scale", (1, 10**6), input_scale=torch.ones(1))


# The 16 values of nf4: quantiles of a normal distribution, as the files hold them.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def nf4(shape: tuple[int, ...], seed: int, nested: bool) -> tuple[Files, Tensor]:
    rng = np.random.default_rng(seed)
    numbers, table = rng.integers(0, 16, shape), torch.tensor(NF4)
    flat = numbers.flatten()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    files = {"weight": torch.from_numpy((flat[0::2] * 16 + flat[1::2]).astype(np.uint8))[:, None]}
    files["weight.quant_map"] = table
    blocks = len(flat) // 64
    if nested:
        codes = torch.from_numpy(rng.integers(0, 256, blocks).astype(np.uint8))
        files["weight.absmax"] = codes
        files["weight.nested_absmax"] = torch.from_numpy(rng.uniform(0.01, 0.02, -(-blocks // 8))).float()
        files["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.0421}
        scales = [
            float(files["weight.nested_quant_map"][int(codes[i])] * files["weight.nested_absmax"][i // 8] + 0.0421)
            for i in range(blocks)
        ]
    else:
        files["weight.absmax"] = torch.from_numpy(rng.uniform(0.01, 0.1, blocks)).float()
        scales = files["weight.absmax"].tolist()
    text = json.dumps(state).encode()
    files["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    meant = [float(table[n]) * scales[i // 64] for i, n in enumerate(flat)]
    return files, torch.tensor(meant, dtype=torch.float64).view(shape)


def int8_rows(made: Made) -> tuple[Files, Tensor]:
    q, scb = torch.from_numpy(made.q.T * 17 - 127).to(torch.int8), made.scales[0].float() * 50
    files = {"weight": q, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return files, q.double() * scb.double()[:, None] / 127


def compressed(form: str, bits: int = 4, kind: str = "int", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "group_size": GROUP, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "modules_to_not_convert": ["lm_head"]}
BNB = {"quant_method": "bitsandbytes"}
NF4_CONFIG = BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS: dict[str, tuple[dict[str, Any], Callable[[tuple[int, ...], int], tuple[Files, Tensor]]]] = {
    "AWQ": (AWQ, lambda shape, seed: awq(Made(shape, seed))),
    "GPTQ": (GPTQ, lambda shape, seed: gptq(Made(shape, seed))),
    "GPTQ, act order": (GPTQ, lambda shape, seed: gptq(Made(shape, seed, ordered=False))),
    "GPTQ, 8 bits": (GPTQ | {"bits": 8}, lambda shape, seed: gptq(Made(shape, seed, bits=8), 8)),
    "GPTQ v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda shape, seed: gptq(Made(shape, seed), one=0)),
    "packed": (compressed("pack-quantized"), lambda shape, seed: packed(Made(shape, seed), False)),
    "packed, zero points": (compressed("pack-quantized"), lambda shape, seed: packed(Made(shape, seed), True)),
    "int8": (compressed("int-quantized", 8), lambda shape, seed: whole_bytes(Made(shape, seed), torch.int8)),
    "fp8": (compressed("float-quantized", 8, "float"), lambda s, seed: whole_bytes(Made(s, seed), torch.float8_e4m3fn)),
    "fp8 in blocks of compressed-tensors": (
        compressed("float-quantized", 8, "float", strategy="block", block_structure=[16, 16]),
        lambda s, seed: in_blocks(Made(s, seed), "weight_scale", 16, 16),
    ),
    "fp8, one scale": (FP8 | {"weight_block_size": None}, lambda shape, seed: one_scale(Made(shape, seed))),
    "fp8, rows": (FP8 | {"ignored_layers": ["lm_head"]}, lambda shape, seed: of_rows(Made(shape, seed))),
    "fp8, even blocks": (
        FP8 | {"weight_block_size": [16, 16]},
        lambda s, seed: in_blocks(Made(s, seed), "weight_scale_inv", 16, 16),
    ),
    "fp8, blocks": (  # the last of each line is smaller
        FP8 | {"weight_block_size": [12, 20]},
        lambda s, seed: in_blocks(Made(s, seed), "weight_scale_inv", 12, 20),
    ),
    "nf4": (NF4_CONFIG, lambda shape, seed: nf4(shape, seed, False)),
    "nf4, nested": (NF4_CONFIG, lambda shape, seed: nf4(shape, seed, True)),
    "int8 of bitsandbytes": (BNB | {"load_in_8bit": True}, lambda shape, seed: int8_rows(Made(shape, seed))),
}


def write(folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A folder whose matrices are quantized, and what its tensors mean, under Hugging Face's names, in float64."""
    plain = make_folder(folder.with_name("plain"), random_state(dtype=torch.float16, **SHAPE), **SHAPE)
    convert(plain, folder, "hf")
    return folder, quantize(folder, kind)


def quantize(folder: Path, kind: str) -> dict[str, Tensor]:
    """The matrices of a folder in Hugging Face's layout; what its tensors then mean, in float64."""
    config, make = KINDS[kind]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    state = load_file(folder / "model.safetensors")
    meant = {name: tensor.double() for name, tensor in state.items()}
    for i, name in enumerate(sorted(name for name in state if "_proj" in name or ".experts." in name)):
        parts, meant[name] = make(tuple(state.pop(name).shape), i)
        state |= {f"{name.removesuffix('.weight')}.{end}": part.contiguous() for end, part in parts.items()}
    save_file(state, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_read_as_what_is_meant(tmp_path: Path, kind: str) -> None:
    folder, meant = write(tmp_path / "quantized", kind)
    found = read_folder(folder)
    assert any("computed in fp32 while they are read" in note for note in found.notes)
    aside = [note for note in found.notes if "scales for activations" in note]
    assert len(aside) == (kind in ("fp8, one scale", "fp8, rows"))
    hf = found.layout
    for name in found.tensors:
        got = hf.unfix(name, found.args, found.weights.get(name))
        exact = hf.unfix(name, found.args, found.weights.get(name, exact=True))
        want = meant[hf.name_of(name)]
        assert got.shape == exact.shape == found.weights.tensors[name].shape
        assert str(got.dtype) == f"torch.{found.weights.tensors[name].dtype}"
        assert got.dtype in (torch.float16, torch.bfloat16)
        assert torch.equal(got, want.float().to(got.dtype)), name
        assert torch.equal(exact, want.float()) or exact.dtype == got.dtype == want.half().dtype, name


@pytest.mark.parametrize("kind", ["AWQ", "fp8", "fp8, blocks", "nf4, nested"])
def test_a_model_of_them_runs_and_converts(tmp_path: Path, kind: str) -> None:
    folder, _ = write(tmp_path / "quantized", kind)
    convert(folder, tmp_path / "again", "mistral")
    ids = torch.arange(5, 16)
    with torch.inference_mode():
        one, other = (load(f, device="cpu").model.forward(ids, [11]) for f in (folder, tmp_path / "again"))
    assert one.isfinite().all()
    assert torch.equal(one, other)
    assert one.shape == (11, PARAMS["vocab_size"])


# --- one rounding


def once(want: Tensor, quant: str) -> Tensor:
    """What a quantized weight stands for, rounded from fp32."""
    module = KINDS_OF_LINEAR[quant].of(want.float())
    return module.rows(0, len(want))


@pytest.mark.parametrize("kind", ["GPTQ, act order", "fp8, rows", "nf4"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_they_are_rounded_once(tmp_path: Path, kind: str, quant: str) -> None:
    """From fp32 to 8 or 4 bits, when loaded and when converted; a stop at 16 bits would move some weights."""
    folder, meant = write(tmp_path / "quantized", kind)
    found = read_folder(folder)
    convert(folder, tmp_path / "converted", "mistral", quant=quant)
    models = [load(folder, device="cpu", quant=quant).model, load(tmp_path / "converted", device="cpu").model]
    moved = 0
    for name in (n for n in found.tensors if "feed_forward" in n or "attention.w" in n):
        want = meant[found.layout.name_of(name)]
        if (heads := heads_of(name, found.args)) is not None:
            want = rows_to_mistral(want, heads)
        for model in models:
            module: Any = model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.rows(0, len(want)), once(want, quant)), name
        moved += int((once(want.to(getattr(torch, found.tensors[name].dtype)), quant) != once(want, quant)).sum())
    assert moved


@pytest.mark.parametrize("kind", ["AWQ", "fp8, rows", "nf4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_requested_dtype_is_the_only_rounding(tmp_path: Path, kind: str, dtype: str) -> None:
    folder, meant = write(tmp_path / "quantized", kind)
    convert(folder, tmp_path / "converted", "hf", dtype=dtype)
    state, kinds = load_file(tmp_path / "converted" / "model.safetensors"), set()
    for name, tensor in state.items():
        assert torch.equal(tensor, meant[name].float().to(tensor.dtype)), name
        kinds.add(str(tensor.dtype))
    assert kinds == {f"torch.{dtype}"}
    if dtype != "float32":
        model = load(folder, device="cpu", dtype=dtype, execution="eager").model
        want = meant["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(
            model.get_parameter("layers.1.feed_forward.w3.weight"), want.float().to(getattr(torch, dtype))
        )


def test_several_dtypes_in_one_folder(tmp_path: Path) -> None:
    """Weights in fp16, norms in fp32 and an output in bf16: each as it is, and the numbers are right."""
    folder, meant = write(tmp_path / "quantized", "AWQ")
    state = load_file(folder / "model.safetensors")
    state = {n: t.float() if "norm" in n else t.bfloat16() if "lm_head" in n else t for n, t in state.items()}
    meant["lm_head.weight"] = state["lm_head.weight"].double()
    save_file(state, folder / "model.safetensors")
    plain = tmp_path / "meant"
    convert(folder, plain, "hf", dtype="float32")
    ids = torch.arange(5, 16)
    with torch.inference_mode():
        one, other = (load(f, device="cpu").model.forward(ids, [11]) for f in (folder, plain))
    assert (one - other).abs().max() < 5e-3  # fp16 against fp32 weights
    for execution in ("kernels", "eager"):
        kept = load(folder, device="cpu", execution=execution).model.state_dict()
        assert torch.equal(kept["norm.weight"].double(), meant["model.norm.weight"])
        assert torch.equal(kept["output.weight"].double(), meant["lm_head.weight"])


# --- Mistral's own fp8


def mistrals(folder: Path, rows: bool) -> tuple[Path, dict[str, Tensor]]:
    """A folder as Mistral writes them: matrices in fp8 with a scale for each or its rows, and scales of activations."""
    state = random_state(dtype=torch.bfloat16, **SHAPE)
    meant = {name: tensor.double() for name, tensor in state.items()}
    for i, name in enumerate(n for n in list(state) if n.startswith("layers") and "norm" not in n):
        made, path = Made(tuple(state.pop(name).shape), i), name.removesuffix(".weight")
        scale = random_scales(made.out, dtype=torch.float32) if rows else random_scales(dtype=torch.float32)
        parts, meant[name] = fp8(made, scale, "qscale_weight", (1, 10**6), qscale_act=torch.tensor(0.1))
        state |= {f"{path}.{end}": part for end, part in parts.items()}
    for i in range(2):
        state[f"layers.{i}.attention.k_fake_quantizer.qscale_act"] = torch.ones(1)
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return make_folder(folder, state, quantization=quantization, **SHAPE), meant


@pytest.mark.parametrize("rows", [False, True])
def test_mistrals_own_fp8(tmp_path: Path, rows: bool) -> None:
    folder, meant = mistrals(tmp_path / "fp8", rows)
    found = read_folder(folder)
    assert any("fp8 of Mistral's" in note for note in found.notes)
    assert any("16 tensors of scales for activations" in note for note in found.notes)
    assert set(found.tensors) == set(meant)
    for name, want in meant.items():
        assert torch.equal(found.weights.get(name, exact=True).double(), want.float().double()), name
    to_hf = convert(folder, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "mistral")
    assert any("fp8 of Mistral's" in note for note in to_hf.notes)
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert "quantization" not in params
    for name, tensor in load_file(tmp_path / "back" / "consolidated.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, meant[name].float().bfloat16()), name
    report = inspect_folder(folder)
    assert report["dtypes"] == {
        "bfloat16": {"tensors": 7, "parameters": report["dtypes"]["bfloat16"]["parameters"]},
        "fp8 of Mistral's": {"tensors": 14, "parameters": report["dtypes"]["fp8 of Mistral's"]["parameters"]},
    }
    assert "fp8 of Mistral's x14" in as_text(report)


@pytest.mark.parametrize(
    "given",
    [{"qformat_weight": "nvfp4"}, {"qscheme_act": "TENSOR"}, {"qformat_weight": "fp8_e4m3", "group": 2}, {}],
)
def test_other_quantization_of_mistrals_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    folder, _ = mistrals(tmp_path / "fp8", False)
    write_params(folder, json.loads((folder / "params.json").read_text()) | {"quantization": given})
    with pytest.raises(MistralError, match="params.json has 'quantization' with"):
        read_folder(folder)


# --- transformers


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_fp8_is_transformers(shape: tuple[int, ...]) -> None:
    """Its own function, which runs on a CPU: the same bits."""
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    q = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = random_scales(*shape)
    want = theirs.Fp8Dequantize(None)._dequantize_one(q, scale)
    got = scaled(q.float(), scale.float(), (16, 16) if shape else None)
    assert torch.equal(got.to(want.dtype), want)


@pytest.mark.parametrize("kind", ["fp8, one scale", "fp8, even blocks"])
def test_a_model_in_fp8_is_transformers(tmp_path: Path, kind: str) -> None:
    """transformers dequantizes to bf16 where there is no GPU, as its config asks for."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate, without which transformers reads no fp8")
    folder, _ = write(tmp_path / "quantized", kind)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().float()
    ids = torch.arange(5, 36)
    with torch.inference_mode():
        want = other(input_ids=ids[None], use_cache=False).logits[0]
        got, plain, true = (
            load(folder, device="cpu", **how).model.forward(ids, [len(ids)])
            for how in ({}, {"execution": "eager"}, {"dtype": "float64"})
        )
    # Rule 11: weights of such a size are hot, and the order of sums shows.
    most = max(TOLERANCE, 4 * distance([plain], [true]))
    assert distance([got], [true]) < most
    assert distance([got], [want]) < most


def damage(folder: Path, change: Callable[[Files], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[str, Callable[[Files], Any], str]] = {
    "no scales": ("AWQ", lambda s: s.pop(f"{Q}.scales"), "has no scales beside the rest"),
    "another shape": (
        "AWQ",
        lambda s: s.update({f"{Q}.scales": torch.ones(3, 3).half()}),
        "do not fit together as AWQ",
    ),
    "bias": ("GPTQ", lambda s: s[f"{Q}.bias"].fill_(1), "has a bias that is not 0"),
    "group": ("GPTQ", lambda s: s[f"{Q}.g_idx"].fill_(99), "g_idx names a group that has no scale"),
    "shape": ("packed", lambda s: s[f"{Q}.weight_shape"].fill_(5), "weight_shape is [5, 5]"),
    "not quantized": ("int8", lambda s: [s.pop(n) for n in list(s) if n.endswith("weight_scale")], "no weight_scale"),
    "state": (
        "nf4",
        lambda s: s.update({f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        "do not fit together as bitsandbytes in nf4",
    ),
    "deep state": (
        "nf4",
        lambda s: s.update({f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.full((9000,), 91, dtype=torch.uint8)}),
        "do not fit together as bitsandbytes in nf4",
    ),
    "words": ("AWQ", lambda s: s.update({f"{Q}.qweight": s[f"{Q}.qweight"].float()}), "do not fit together as AWQ"),
    "absmax": ("nf4", lambda s: s.update({f"{Q}.weight.absmax": torch.ones(1)}), "do not fit together"),
    "order": ("int8 of bitsandbytes", lambda s: s[f"{Q}.weight_format"].fill_(1), "in an order of one GPU"),
    "unknown": ("fp8", lambda s: s.update({f"{Q}.weight_scale_2": torch.ones(1)}), "hold unknown"),
    "grid": (
        "fp8, blocks",
        lambda s: s.update({f"{Q}.weight_scale_inv": torch.ones(2, 2)}),
        "do not fit together as fp8: weight_scale_inv F32 [2, 2], weight F8_E4M3",
    ),
    "no weight": ("fp8, one scale", lambda s: s.pop(f"{Q}.weight"), "has no weight beside the rest"),
    "another float": (
        "fp8, rows",
        lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].to(torch.float8_e5m2)}),
        "do not fit together as fp8: weight_scale F32 [32, 1], weight F8_E5M2",
    ),
    "no scale": ("fp8, one scale", lambda s: s.pop(f"{Q}.weight_scale_inv"), "is in fp8, and has no scale beside it"),
    "scale": ("fp8, one scale", lambda s: s.update({f"{Q}.weight_scale_inv": torch.ones(1).int()}), "do not fit"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused(tmp_path: Path, kind: str) -> None:
    of, change, message = BROKEN[kind]
    folder, _ = write(tmp_path / "quantized", of)
    damage(folder, change)
    with pytest.raises(MistralError) as refused:
        load(folder, device="cpu")
    assert message in str(refused.value)


OTHERS: dict[str, dict[str, Any]] = {
    "quantized by awq, version 'gemv'": AWQ | {"version": "gemv"},
    "quantized by gptq, format 'gptq', 3 bits": GPTQ | {"bits": 3},
    "quantized by gptq, format 'marlin'": GPTQ | {"checkpoint_format": "marlin"},
    "bitsandbytes, type 'fp4'": NF4_CONFIG | {"bnb_4bit_quant_type": "fp4"},
    "format 'marlin', 4 bits": GPTQ | {"is_marlin_format": True},
    "bits that differ by layer": GPTQ | {"dynamic": {"-:.*down.*": {}, "+:.*up.*": {"bits": 8}}},
    "quantized by exl2": {"quant_method": "exl2"},
    "quantized by hqq": {"quant_method": "hqq"},
    "format 'marlin-24'": compressed("marlin-24"),
    "does not tell how weights are rounded": compressed("pack-quantized") | {"config_groups": {}},
    "several kinds of weights ('pack-quantized', 4 bits and 'float-quantized', 8 bits)": compressed("mixed-precision")
    | {
        "config_groups": {
            "a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int"}},
            "b": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}},
        }
    },
    "a sparse checkpoint of compressed-tensors, format 'sparse-24-bitmask'": compressed("dense")
    | {"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}},
    "a checkpoint in fp8, in blocks of [128]": FP8 | {"weight_block_size": [128]},
    "a checkpoint in fp8, format 'e5m2'": FP8 | {"fmt": "e5m2"},
    "a quantized checkpoint": {},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_kinds_are_refused_by_name(tmp_path: Path, message: str) -> None:
    folder, _ = write(tmp_path / "quantized", "AWQ")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": OTHERS[message]}))
    with pytest.raises(MistralError) as refused:
        read_folder(folder)
    assert message in str(refused.value)
    assert "give the one it was made from" in str(refused.value)
