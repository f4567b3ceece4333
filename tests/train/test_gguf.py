"""A GGUF file as the base: an adapter beside its blocks, which stay as the file has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral.formats.adapter import read_adapter
from mistral.loader.assemble import assemble
from mistral.loader.options import LoadOptions
from mistral.quant.blocks import BlockLinear
from mistral.quant.linear import QuantizedEmbedding
from mistral.train.lora import FrozenLinear, LoraLinear
from mistral.train.options import TrainOptions
from mistral.train.output import write_adapter
from mistral.train.setup import Setup
from mistral.train.step import Batch, add_gradients
from tests.support.gguf_files import gguf_args, write_gguf
from tests.support.tiny import ragged

OPTIONS = TrainOptions(lora=3, seed=1)
LENS = (11, 3, 17)
kernels = pytest.importorskip("mistral.fast.kernels")


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    try:
        kernels.library()
    except kernels.KernelsUnavailable as error:
        pytest.skip(str(error))


def write(path: Path, kind: str, tied: bool) -> Path:
    write_gguf(path, kind, gguf_args(tied_embeddings=tied), without=("output.weight",) if tied else ())
    return path


def gradients(path: Path, load: LoadOptions) -> tuple[Setup, dict[str, Tensor], float]:
    """Of A and B, both not zero, and the loss."""
    setup = Setup(path, OPTIONS, load)
    generator = torch.Generator().manual_seed(0)
    pairs, scale = setup.start
    setup.start = {n: (a, torch.rand(b.shape, generator=generator) - 0.5) for n, (a, b) in pairs.items()}, scale
    model, trained = setup.model()
    ids, targets = (torch.cat(ragged(LENS, 61, i)) for i in range(2))
    batch = Batch(ids, LENS, targets, torch.ones(len(ids)))
    nats = add_gradients(model, batch, batch.total)
    if load.dtype is None and load.quant is None:
        wq, output = model.layers[0].attention.wq, model.output
        assert isinstance(wq, LoraLinear)
        assert isinstance(wq.of, FrozenLinear)
        assert isinstance(wq.of.of, BlockLinear)
        assert isinstance(output, FrozenLinear)
        assert isinstance(model.tok_embeddings, QuantizedEmbedding)
    return setup, {name: weight.grad for name, weight in trained.items() if weight.grad is not None}, nats


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gradients_beside_blocks(tmp_path: Path, kind: str, tied: bool) -> None:
    """They are those beside the numbers that the blocks mean, but for inputs that products round."""
    path = write(tmp_path / "m.gguf", kind, tied)
    setup, ours, nats = gradients(path, LoadOptions(device="cpu"))
    wide, want, dense = gradients(path, LoadOptions(device="cpu", quant="none"))
    assert setup.blocks
    assert not wide.blocks
    assert ours.keys() == want.keys()
    assert len(ours) == 2 * 2 * 7
    assert nats == pytest.approx(dense, rel=1e-3)
    for name, grad in want.items():
        assert (ours[name] - grad).norm() < 5e-3 * grad.norm(), name
    small, large = (one._weights_in_memory(4) for one in (setup, wide))
    assert small < 0.5 * large


def test_blocks_are_widened_where_the_kernels_cannot_read_them(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "Q4_0", False)
    options = LoadOptions(device="cpu")
    assert Setup(path, OPTIONS, options).blocks
    assert not Setup(path, OPTIONS, replace(options, dtype="bfloat16")).blocks
    assert not Setup(path, OPTIONS, replace(options, quant="int8")).blocks
    assert not Setup(path, TrainOptions(full=True), options).blocks
    assert not Setup(write_f32(tmp_path / "f.gguf"), OPTIONS, options).blocks


def write_f32(path: Path) -> Path:
    write_gguf(path)
    return path


def test_the_adapter_goes_with_the_file(tmp_path: Path) -> None:
    """What is trained beside the blocks is what the loader puts beside them."""
    path = write(tmp_path / "m.gguf", "Q8_0", False)
    setup = Setup(path, OPTIONS, LoadOptions(device="cpu"))
    model, trained = setup.model()
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) - 0.5)
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", dict(trained), setup.base.args, OPTIONS, setup.start[1], "m.gguf")
    assert len(read_adapter(tmp_path / "out").pairs) == 14
    wanted = LoadOptions(device="cpu", adapter=(str(tmp_path / "out"),), adapter_mode="runtime")
    loaded, _ = assemble(setup.found, options=wanted)
    ids = torch.cat(ragged((19,), 61, 5))
    with torch.inference_mode():
        a, b = (one.forward(ids, [19]) for one in (model, loaded))
    assert (a - b).abs().max() < 1e-4 * b.abs().max()
