"""`quant` on a model whose output is tied to its embeddings: one table of int8 for both, never another beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mistral
from mistral.fast.layout import stored_as
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.formats.folder import Folder, read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.weights import WeightsError
from mistral.loader.load import load
from mistral.model import Transformer
from mistral.oracle.inputs import QuantizedReader, WeightReader
from mistral.parameters import EMBEDDINGS, OUTPUT, parameters
from mistral.quant import rounding
from mistral.quant.linear import Int8Linear, QuantizedEmbedding
from mistral.train.lora import FrozenLinear, freeze
from mistral.util.errors import UsageError
from tests.support.adapters import write_native
from tests.support.commands import in_process
from tests.support.folders import make_folder, random_state
from tests.support.tiny import distance, make_cache, play, prefill_then_decode, ragged, whole

LENS = (13, 3, 9)  # beyond the window of 5
ROUNDED_TOLERANCE = 1e-4  # inputs have 16 bits, as beside int8 and int4
PACKED = "tok_embeddings.packed"


def tied_state() -> dict[str, Tensor]:
    """A random model whose output matrix has an ordinary size."""
    return {name: 0.02 * x if name == EMBEDDINGS else x for name, x in random_state().items() if name != OUTPUT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tied") / "model", tied_state(), tied_embeddings=True)


@pytest.fixture(scope="module", params=["int8", "int4"])
def pair(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind, and the folder converted to it; made again where a test of another kind came between."""
    written = tmp_path_factory.mktemp("pair") / request.param
    convert(folder, written, "mistral", quant=request.param)
    return request.param, written


def meant(found: Folder, quant: str | None = None) -> Transformer:
    """The model in fp32 whose weights are those that the quantized ones stand for."""
    reader = WeightReader(found) if quant is None else QuantizedReader(found, quant)
    model = Transformer(found.args)
    model.load_state_dict({name: reader.get(name) for name in parameters(found.args)})
    return model.eval()


@torch.inference_mode()
def steps(model: Transformer) -> list[Tensor]:
    prompts = ragged(LENS, model.args.vocab_size)
    return play(model, prompts, prefill_then_decode(LENS, 6), make_cache(model, len(LENS)))


@pytest.mark.parametrize("execution", ["eager", "kernels", "bitwise"])
def test_it_computes_what_its_weights_mean(pair: tuple[str, Path], folder: Path, execution: str) -> None:
    quant, written = pair
    for place, option in ((folder, quant), (written, None)):
        model = load(place, device="cpu", execution=execution, quant=option).model
        assert distance(steps(model), whole(meant(read_folder(written)), ragged(LENS, 4096))) < ROUNDED_TOLERANCE


def test_one_table_of_int8_and_no_other(pair: tuple[str, Path], folder: Path) -> None:
    quant, written = pair
    for place, option in ((folder, quant), (written, None)):
        model = load(place, device="cpu", quant=option).model
        table = model.output
        assert isinstance(table, Int8Linear)
        assert isinstance(model.tok_embeddings, QuantizedEmbedding)
        assert model.tok_embeddings.table is table
        assert not [name for name, _ in model.named_parameters() if "norm" not in name]
        q, scale = rounding.int8(tied_state()[EMBEDDINGS])
        ids = torch.tensor([4095, 0, 17, 17, 2047])
        want = q[ids] * scale[ids, None]
        assert torch.equal(model.tok_embeddings(ids), want)
        assert torch.equal(table.lookup(ids), want)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            model.tok_embeddings(torch.tensor([4096]))


def test_ids_of_32_bits_are_those_of_64(pair: tuple[str, Path]) -> None:
    model = load(pair[1], device="cpu").model
    ids = torch.tensor([4095, 0, 17, 17, 2047])
    assert torch.equal(model(ids.int(), [5]), model(ids, [5]))


def test_what_is_written(pair: tuple[str, Path], folder: Path) -> None:
    quant, written = pair
    found = read_folder(written)
    table = parameters(found.args)[EMBEDDINGS]
    held = load_file(written / "consolidated.safetensors")
    assert set(stored_as(table, quant)) == {PACKED, "tok_embeddings.scale"} < held.keys()
    assert not {EMBEDDINGS, OUTPUT, "output.packed"} & held.keys()
    assert json.loads((written / "params.json").read_text())["tied_embeddings"] is True
    assert len(fingerprint(written)) == 64
    assert inspect_folder(written)["parameters"] == sum(p.numel for p in parameters(found.args).values())
    # Rounded while it is loaded it is measured, before it is written, as after.
    source = read_folder(folder)
    for name in parameters(found.args):
        assert torch.equal(WeightReader(found).get(name), QuantizedReader(source, quant).get(name)), name
    assert torch.equal(WeightReader(found).get(OUTPUT), QuantizedReader(source, quant).get(OUTPUT))


def older(written: Path, to: Path) -> Path:
    """What `convert` wrote at first: the table as it was."""
    shutil.copytree(written, to)
    held = load_file(to / "consolidated.safetensors")
    rest = {name: x for name, x in held.items() if not name.startswith("tok_embeddings")}
    save_file({**rest, EMBEDDINGS: tied_state()[EMBEDDINGS]}, to / "consolidated.safetensors")
    return to


def test_older_folders_load(pair: tuple[str, Path], tmp_path: Path) -> None:
    """Their table stays as it is in them: it was not rounded, and is not rounded now."""
    place = older(pair[1], tmp_path / "older")
    model = load(place, device="cpu").model
    assert torch.equal(model.output.weight, tied_state()[EMBEDDINGS])
    assert model.output.weight is model.tok_embeddings.weight
    assert distance(steps(model), whole(meant(read_folder(place)), ragged(LENS, 4096))) < ROUNDED_TOLERANCE
    assert len(fingerprint(place)) == 64


def test_half_a_table_is_refused(pair: tuple[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "half"
    shutil.copytree(pair[1], place)
    held = load_file(place / "consolidated.safetensors")
    save_file({n: x for n, x in held.items() if n != "tok_embeddings.scale"}, place / "consolidated.safetensors")
    with pytest.raises(WeightsError, match="tok_embeddings.scale"):
        load(place)


def test_beside_it(pair: tuple[str, Path], tmp_path: Path) -> None:
    """Training and saving: a table is looked up, and its product lets gradients through."""
    model = load(pair[1], device="cpu", execution="eager").model
    with pytest.raises(UsageError, match="are quantized"):
        mistral.save(model, tmp_path / "saved")
    freeze(model)
    assert isinstance(model.output, FrozenLinear)
    assert isinstance(model.tok_embeddings.table, Int8Linear)
    h = torch.zeros(1, model.args.dim, requires_grad=True)
    model.output(h).sum().backward()
    assert h.grad is not None
    assert h.grad.abs().sum() > 0


def test_an_adapter_beside_it(pair: tuple[str, Path], tmp_path: Path) -> None:
    """What a LoRA adapter adds is added beside the quantized weights of layers; the table stays one."""
    adapter = str(write_native(tmp_path / "adapter"))
    models = [
        load(pair[1], device="cpu", execution=execution, adapter=adapter, adapter_mode="runtime").model
        for execution in ("eager", "kernels")
    ]
    base = load(pair[1], device="cpu").model
    assert models[1].get_submodule("tok_embeddings.table") is models[1].output
    want, got, plain = (steps(model) for model in (*models, base))
    assert distance(got, want) < ROUNDED_TOLERANCE
    assert distance(got, plain) > 0.01


def test_through_the_commands(pair: tuple[str, Path], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quant, written = pair
    run = in_process(capfd)
    assert run("verify", written).code == 0
    one = run("complete", written, "The king", "--max_tokens", 5, "--temperature", 0).text
    other = run("complete", folder, "The king", "--max_tokens", 5, "--temperature", 0, "--quant", quant)
    assert one == other.text
