"""Adapters over bases of few bits (GGUF, AWQ, GPTQ, nf4): added to the numbers that the bits mean, merged or beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral.formats.adapter import read_adapter
from mistral.formats.folder import read_folder
from mistral.formats.huggingface import heads_of, to_hf
from mistral.formats.merge import merge_into
from mistral.loader.assemble import assemble
from mistral.parameters import parameters
from tests.formats.test_adapter import paired
from tests.formats.test_quantized_hf import write
from tests.support.adapters import write_peft
from tests.support.commands import in_process
from tests.support.gguf_files import write_gguf

IDS = torch.arange(5, 28)
OF_HF = {"AWQ", "GPTQ, act order", "nf4, nested"}
OF_GGUF = {"F16", "Q8_0", "Q4_0", "Q5_0"}


def base_of(kind: str, tmp_path: Path) -> Path:
    if kind in OF_HF:
        return write(tmp_path / "base", kind)[0]
    path = tmp_path / "base.gguf"
    write_gguf(path, kind)
    return path


def adapter_of(base: Path, place: Path) -> tuple[Path, dict[str, Tensor]]:
    """One of PEFT's for all matrices of a base, and what it adds to each, in Mistral's order of rows."""
    args = read_folder(base).args
    generator, tensors, added = torch.Generator().manual_seed(9), {}, {}
    for name, parameter in parameters(args).items():
        if not parameter.quantized or name == "output.weight":
            continue
        out, inner = parameter.shape
        a, b = (torch.rand(*shape, generator=generator) / 2 - 0.25 for shape in ((3, inner), (out, 3)))
        at = f"base_model.model.{to_hf(name).removesuffix('.weight')}"
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        heads = heads_of(name, args)
        b = b if heads is None else paired(b, heads)
        added[name] = 2.0 * b.double() @ a.double()
    return write_peft(place, tensors), added


@pytest.mark.parametrize("kind", sorted(OF_HF | OF_GGUF))
def test_what_the_bits_mean_is_what_is_added_to(tmp_path: Path, kind: str) -> None:
    base = base_of(kind, tmp_path)
    adapter, added = adapter_of(base, tmp_path / "adapter")
    plain, merged = read_folder(base), merge_into(read_folder(base), read_adapter(adapter))
    for name, update in added.items():
        before, after = plain.weights.get(name), merged.weights.get(name)
        assert after.dtype == before.dtype
        want = (before.double() + update).to(after.dtype)
        close = 2 * torch.finfo(after.dtype).eps * want.double().abs().max()
        assert (after.double() - want.double()).abs().max() <= close, name
        assert (after.double() - before.double()).abs().max() > 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", sorted(OF_HF | OF_GGUF))
def test_merged_and_beside_are_the_same_model(tmp_path: Path, kind: str) -> None:
    base = base_of(kind, tmp_path)
    adapter, _ = adapter_of(base, tmp_path / "adapter")
    runtime = {"adapter": adapter, "adapter_mode": "runtime"}
    exact = kind in ("Q8_0", "Q4_0", "Q5_0")
    exactly = {"quant": "none"} if exact else {}
    ways = [{"adapter": adapter, **exactly}, {**runtime, **exactly}, exactly, runtime]
    with torch.inference_mode():
        merged, beside, plain, kept = (
            assemble(read_folder(base), device="cpu", dtype="float32", **way)[0].forward(IDS, [len(IDS)])
            for way in ways
        )
    # The merged numbers are rounded once to the dtype that the base has; inputs of blocks that are kept, to 16 bits.
    assert (kept - beside).abs().max() < 2e-4 * merged.abs().max()
    assert (merged - beside).abs().max() < (1e-5 if exact else 3e-2) * merged.abs().max()
    assert (plain - merged).abs().max() > 0.1 * merged.abs().max()


def test_a_gguf_file_and_an_adapter_become_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    base = base_of("Q4_0", tmp_path)
    adapter, _ = adapter_of(base, tmp_path / "adapter")
    done = cli("convert", base, tmp_path / "merged", "--to", "hf", "--adapter", adapter)
    assert "merged, rounded once to float32" in done.err
    written, merged = read_folder(tmp_path / "merged"), merge_into(read_folder(base), read_adapter(adapter))
    assert all(torch.equal(written.weights.get(name), merged.weights.get(name)) for name in merged.tensors)
    assert not torch.equal(
        written.weights.get("layers.1.attention.wq.weight"),
        read_folder(base).weights.get("layers.1.attention.wq.weight"),
    )
