"""int4: groups with scales and minima, rounded with little error, stored, read again; and folders of before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mistral import quant
from mistral.fast import layout
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.loader.load import load
from mistral.parameters import parameters
from mistral.quant import affine, rounding
from mistral.quant.affine import CODES, GROUP, LEAST, MOST, STEPS, Affine4Linear, affine4
from mistral.quant.blocks import unpack_affine4
from mistral.util.errors import FormatError
from tests.support.folders import make_folder
from tests.support.tiny import tiny_args

WQ = "layers.0.attention.wq.weight"


def built() -> bool:
    try:
        library()
    except KernelsUnavailable:
        return False
    return True


BY = [pytest.param("kernels", marks=pytest.mark.skipif(not built(), reason="no kernels here")), "plain"]


@pytest.fixture(params=BY)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(affine, "source", lambda weight: None)
    return request.param


def random(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def meant(weight: Tensor, columns: Tensor | None = None) -> Tensor:
    return Affine4Linear.of(weight, columns).rows(0, len(weight))


def ranged(weight: Tensor) -> Tensor:
    """Each group's range in fifteen steps, with scales and minima that are not rounded."""
    k = weight.shape[1]
    groups = F.pad(weight, (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    step = ((groups.amax(-1, keepdim=True) - low) / STEPS).clamp(min=1e-30)
    return (((groups - low) / step).round() * step + low).flatten(1)[:, :k]


def off(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize(("k", "most"), [(64, 0.0715), (100, 0.0705), (512, 0.0705)])
def test_the_error_is_small(k: int, most: float, by: str) -> None:
    """Q4_0 has 0.086 on normal weights, IQ4_NL 0.0755, rounding each group's range 0.075."""
    weight = random(64, k)
    assert off(meant(weight), weight) < min(most, 0.95 * off(ranged(weight), weight))


@pytest.mark.skipif(not built(), reason="no kernels here")
@given(n=st.integers(1, 40), k=st.integers(1, 300), log=st.floats(-3, 3), seed=st.integers(0, 2**20))
def test_the_kernels_round_as_well_as_the_plain_path(n: int, k: int, log: float, seed: int) -> None:
    weight = random(n, k, seed) * 10**log
    packed, scale = affine4(weight)
    plain = affine._plain(weight, F.pad(torch.ones(k), (0, -k % GROUP)))
    assert (packed.shape, scale.shape) == layout.affine4_shapes(n, k)
    found = unpack_affine4(packed, scale, n, k)
    assert [t.shape for t in found] == [t.shape for t in plain]
    assert torch.equal(found[3], plain[3]) or torch.allclose(found[3].float(), plain[3].float(), rtol=0.03)
    errors = [
        off(Affine4Linear(k, n, *packs).rows(0, n), weight) for packs in ((packed, scale), affine.pack_affine4(*plain))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.03, abs=1e-4)


@given(n=st.integers(1, 20), k=st.integers(1, 300), seed=st.integers(0, 2**20), shift=st.floats(-3, 3))
def test_no_group_is_worse_than_its_range_in_steps(n: int, k: int, seed: int, shift: float) -> None:
    weight = random(n, k, seed) + shift
    found, rough = meant(weight), ranged(weight)
    per_group = [
        F.pad((w - weight).square(), (0, -k % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1) for w in (found, rough)
    ]
    # Scales and minima in codes cost something where a neighbour is much larger.
    largest = weight.abs().amax(-1, keepdim=True) / CODES
    assert (per_group[0].sqrt() <= per_group[1].sqrt() * 1.01 + GROUP**0.5 * largest).all()


def test_weights_on_a_grid_stay_there(by: str) -> None:
    """Such as those of a Q4_1 file: only their scales and minima are rounded, to codes."""
    q = torch.randint(0, 16, (20, 256), generator=torch.Generator().manual_seed(1)).view(20, 8, 32)
    q[..., 0], q[..., 1] = 0, 15
    s = torch.rand(20, 8, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    weight = (q * s - 7.3 * s).flatten(1)
    found = unpack_affine4(*affine4(weight), 20, 256)
    assert (found[0].view(20, 8, 32) == q).float().mean() > 0.999
    assert off(meant(weight), weight) < 0.004


def test_zeros_and_groups_of_one_number(by: str) -> None:
    weight = torch.zeros(20, 300)
    weight[3, 40:60] = -2.0
    weight[4, :70] = 0.5
    found = meant(weight)
    assert torch.equal(found[:3], weight[:3])
    assert torch.equal(found[3, 64:], weight[3, 64:])
    torch.testing.assert_close(found, weight, rtol=0, atol=2e-3)


def test_columns_that_count_more_err_less(by: str) -> None:
    weight, columns = random(64, 128), torch.ones(128)
    columns[::4] = 100
    even, uneven = ((meant(weight, c) - weight).square() for c in (None, columns))
    assert (uneven * columns).sum() < 0.85 * (even * columns).sum()
    assert uneven[:, ::4].sum() < 0.7 * even[:, ::4].sum()
    assert torch.equal(meant(weight, columns * 1e-9), meant(weight, columns))  # their size does not matter
    assert torch.equal(meant(weight, torch.ones(128)), meant(weight))


def test_values_that_scales_cannot_express() -> None:
    known = parameters(tiny_args())
    for largest in (LEAST * 0.9, MOST * 1.1):
        weight = random(20, 40)
        weight *= largest / weight.abs().amax()
        with pytest.raises(FormatError, match=f"largest value of {WQ} is .*: use int8"):
            quant.quantize(known[WQ], weight, "int4")
        quant.quantize(known["output.weight"], weight, "int4")
    for largest in (LEAST * 1.1, MOST * 0.9):
        weight = random(20, 320)
        weight *= largest / weight.abs().amax()
        assert off(quant.quantize(known[WQ], weight, "int4").rows(0, 20), weight) < 0.08
    assert not quant.quantize(known[WQ], torch.zeros(20, 40), "int4").rows(0, 20).any()


def symmetric(folder: Path, source: Path) -> None:
    """A folder of int4 as it was written before there were minima."""
    convert(source, folder, "mistral", quant="int4")
    (file,) = folder.glob("*.safetensors")
    known, weights = parameters(read_folder(source).args), read_folder(source).weights
    tensors = load_file(file)
    for name, parameter in known.items():
        path = name.removesuffix(".weight")
        if parameter.role == "matrix":
            del tensors[f"{path}.scale"]
            tensors[f"{path}.packed"] = rounding.pack(*rounding.int4(weights.get(name)))
    save_file(tensors, file)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "quantization": "int4"}))


def test_folders_of_before_load_as_they_were(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "model")
    symmetric(tmp_path / "old", source)
    loaded = load(tmp_path / "old", device="cpu")
    weight = read_folder(source).weights.get(WQ)
    expected = rounding.dequantize(*rounding.int4(weight), weight.shape[1])
    assert torch.equal(loaded.model.layers[0].attention.wq.rows(0, len(weight)), expected)
    assert loaded.runtime.quant == layout.SYMMETRIC
    assert "int4-symmetric/float32/float32" in loaded.describe()
    assert any("no minima" in note for note in loaded.notes)
    load(tmp_path / "old", device="cpu", quant="int4")
    with pytest.raises(ValueError, match="already quantized to int4-symmetric: omit quant"):
        load(tmp_path / "old", device="cpu", quant="int8")
    wide = load(source, device="cpu", kernels=False)
    ids = torch.tensor([1, 5, 9, 3])
    with torch.inference_mode():
        old, true = loaded.model(ids, [4]), wide.model(ids, [4])
        new = load(source, device="cpu", quant="int4").model(ids, [4])
    assert 0 < (new - true).norm() < (old - true).norm() < 0.3 * true.norm()
