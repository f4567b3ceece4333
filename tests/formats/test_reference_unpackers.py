"""Quantized weights that compressed-tensors itself has written are read as it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mistral.formats.quantized import dequantized
from mistral.formats.quantized_hf import method_of
from mistral.formats.weights import open_safetensors

theirs = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")

OUT, INNER, GROUP = 48, 96, 32
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
# The format, its weights, and the shape of their scales.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "int4": ("pack-quantized", INT4 | {"symmetric": True}, (OUT, INNER // GROUP)),
    "int4, zero points": ("pack-quantized", INT4 | {"symmetric": False}, (OUT, INNER // GROUP)),
    "packed int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (OUT, 1)),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (OUT, 1)),
    "fp8 of a tensor": ("float-quantized", FP8 | {"strategy": "tensor"}, (1,)),
    "fp8 of rows": ("float-quantized", FP8 | {"strategy": "channel"}, (OUT, 1)),
    "fp8 in blocks": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 40]}, (2, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors(tmp_path: Path, kind: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, given, shape = KINDS[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**given))
    random = torch.Generator().manual_seed(0)
    limit = 448 if given["type"] == "float" else 2 ** (given["num_bits"] - 1) - 1
    state = {
        "weight": torch.randn(OUT, INNER, generator=random),
        "weight_scale": (torch.rand(shape, generator=random) + 3) / limit,
    }
    if given.get("symmetric") is False:
        state["weight_zero_point"] = torch.randint(-8, 8, shape, generator=random).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    files = compressor.compress(state, scheme)
    want = compressor.decompress(files, scheme)["weight"]
    save_file({f"x.{name}": tensor.contiguous() for name, tensor in files.items()}, tmp_path / "a.safetensors")
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    weights = dequantized(open_safetensors((tmp_path / "a.safetensors",)), method_of(config), "config.json")
    assert list(weights.tensors) == ["x.weight"]
    got = weights.get("x.weight", exact=True)
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want[:OUT, :INNER])
    assert got.std() > 0.3  # something was packed
