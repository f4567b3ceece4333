"""Blocks of few bits that stay as a file has them: the same weights, bit for bit, and products with exactly these."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral.fast.decode import FastTransformer
from mistral.fast.ggml_types import BY_NAME
from mistral.fast.kernels import KernelsUnavailable, library, pointer
from mistral.fast.layout import AFFINE4, BLOCKS, ROWS, affine4_shapes, groups
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.parameters import EMBEDDINGS, OUTPUT
from mistral.quant import blocks, ggml, rounding
from mistral.quant.blocks import BlockLinear, pack_affine4, unpack_affine4
from mistral.quant.linear import QuantizedEmbedding
from tests.quant.test_ggml import HALVES, bits
from tests.quant.test_ggml import blocks as odd_blocks
from tests.support.commands import in_process
from tests.support.folders import BUNDLED
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf
from tests.support.tiny import at_random, distance, make_cache, play, prefill_then_decode, ragged, tiny_model, whole

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

ROUNDED_TOLERANCE = 1e-4  # inputs have 16 bits, as beside int8 and int4
PREFIXES = (1, 2, 3, 5, 17, 33, 40, 47)  # above 16 and 32 other loops multiply


def raw_blocks(kind: str, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Random bytes with small scales: [nbytes] of [n, k] weights."""
    about = BY_NAME[kind]
    raw = torch.randint(0, 256, (n * k // about.elements, about.nbytes), dtype=torch.uint8, generator=generator)
    for at in HALVES[kind]:
        scales = torch.rand(len(raw), 1, generator=generator) - 0.5
        raw[:, at : at + 2] = scales.half().view(torch.uint8)
    return raw.flatten()


def make_linear(kind: str, n: int, k: int, seed: int = 0) -> tuple[BlockLinear, Tensor]:
    """Random weights of a type, and the numbers that they stand for, by quant/ggml.py."""
    raw = raw_blocks(kind, n, k, torch.Generator().manual_seed(seed))
    linear = BlockLinear(BLOCKS[kind], k, n, *blocks.repack(kind, raw, n, k))
    return linear, ggml.dequantize(raw, kind, (n, k))


# --- weights


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_kept_is_the_files_weights_bit_for_bit(kind: str) -> None:
    raw = torch.from_numpy(odd_blocks(kind, rows=37)).flatten()  # odd scales, subnormal ones, every byte
    shape = 37, raw.numel() // 37 // BY_NAME[kind].nbytes * BY_NAME[kind].elements
    want = ggml.dequantize(raw, kind, shape)
    linear = BlockLinear(BLOCKS[kind], shape[1], shape[0], *blocks.repack(kind, raw, *shape))
    assert (bits(linear.rows(0, 37) + 0.0) == bits(want + 0.0)).all()  # a zero has no sign
    assert (bits(linear.rows(16, 37)) == bits(linear.rows(0, 37)[16:])).all()
    with torch.inference_mode():
        looked_up = QuantizedEmbedding(linear)(torch.arange(36, -1, -1))
    assert (bits(looked_up.flip(0) + 0.0) == bits(want + 0.0)).all()
    linear.by_kernels = False
    assert torch.equal(QuantizedEmbedding(linear)(torch.arange(36, -1, -1)), looked_up)
    linear.by_kernels = True
    wide, count = torch.empty(shape[1], 21), ctypes.c_int64(21)
    library().widen(ctypes.byref(linear.matrix()), ctypes.c_int64(16), count, pointer(wide), ctypes.c_int64(2))
    assert (bits(wide.T + 0.0) == bits(want[16:] + 0.0)).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_memory_is_about_that_of_the_file(kind: str) -> None:
    linear, _ = make_linear(kind, 64, 512)
    size = sum(x.nbytes for x in linear.state_dict().values())
    about = BY_NAME[kind]
    assert size == BLOCKS[kind].nbytes(64, 512)
    assert size <= 1.04 * (64 * 512 // about.elements * about.nbytes)  # six-bit factors take a byte


@given(n=st.integers(1, 40), k=st.integers(1, 700), seed=st.integers(0, 2**20))
def test_affine4_of_any_shape(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    sc, mn = (torch.randint(0, 256, (n, groups(k)), dtype=torch.uint8, generator=generator) for _ in range(2))
    S, M = ((torch.rand(n, -(-k // 256), generator=generator) - 0.5).half() for _ in range(2))
    packed, scale = pack_affine4(q, sc, mn, S, M)
    assert (packed.shape, scale.shape) == affine4_shapes(n, k)
    for found, given_ in zip(unpack_affine4(packed, scale, n, k), (q, sc, mn, S, M), strict=True):
        assert torch.equal(found, given_)
    linear = BlockLinear(AFFINE4, k, n, packed, scale)
    column = torch.arange(k)
    step = (S.float()[:, column // 256] * sc[:, column // 32]) * q
    want = step - M.float()[:, column // 256] * mn[:, column // 32]
    assert torch.equal(linear.rows(0, n), want)
    x = torch.rand(3, k, generator=generator) - 0.5
    with torch.inference_mode():
        near(linear, linear.rows(0, n), x)


def near(linear: BlockLinear, weight: Tensor, x: Tensor) -> None:
    """Products are those with the inputs as rounded, up to what sums in fp32 lose."""
    y, x = linear(x), rounding.rounded(x).double()
    size = x.abs() @ (weight.abs() + largest_part(linear)).double().T
    assert ((y - x @ weight.double().T).abs() <= 2e-6 * size + 1e-30).all()


def largest_part(linear: BlockLinear) -> Tensor:
    """What is taken off a weight: it cancels in the weight, and its rounding stays."""
    n = linear.out_features
    _, low = blocks._scales(
        linear.blocks, linear.packed, None if linear.scale is None else linear.scale.view(torch.float16), n
    )
    return torch.zeros(n, 1) if low is None else low.abs().flatten(1).amax(-1, keepdim=True)


# --- products


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=25)
@given(n=st.integers(1, 70), width=st.integers(1, 3), rows=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_products_of_any_shape(kind: str, n: int, width: int, rows: int, seed: int) -> None:
    k = width * BY_NAME[kind].elements
    linear, weight = make_linear(kind, n, k, seed)
    x = torch.rand(rows, k, generator=torch.Generator().manual_seed(seed + 1)) * 2 - 1
    with torch.inference_mode():
        near(linear, weight, x)
        with mock.patch("mistral.quant.linear.library", return_value=WithoutMany()):
            near(linear, weight, x)
        linear.by_kernels = False
        near(linear, weight, x)


class WithoutMany:
    """The kernels on a machine where PyTorch is better at products of many rows."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: 0) if name == "takes_many" else getattr(library(), name)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    linear, _ = make_linear(kind, 69, 768)
    x = torch.rand(PREFIXES[-1], 768, generator=torch.Generator().manual_seed(3)) - 0.5
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            alone = torch.cat([linear(row[None]) for row in x])
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for rows in PREFIXES if library().takes_many() else PREFIXES[:4]:
                    assert torch.equal(linear(x[:rows]), alone[:rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_inputs_that_are_no_numbers_stay_none(kind: str, rows: int) -> None:
    linear, _ = make_linear(kind, 20, 512)
    x = torch.rand(rows, 512)
    x[0, 7] = float("nan")
    with torch.inference_mode():
        y = linear(x)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


def test_no_change_of_dtype_rounds_a_scale() -> None:
    linear, weight = make_linear("Q4_K", 20, 512)
    assert torch.equal(linear.to(torch.bfloat16).rows(0, 20), weight)


def test_ids_outside_the_table() -> None:
    table = QuantizedEmbedding(make_linear("Q8_0", 20, 64)[0])
    assert table(torch.tensor([], dtype=torch.int64)).shape == (0, 64)
    for ids in ([3, 20], [-1]):
        with pytest.raises(ValueError, match="outside the vocabulary of 20"):
            table(torch.tensor(ids))


# --- models


TOKENIZER = {f"tokenizer.ggml.{key}": value for key, value in tokenizer_keys(BUNDLED / "tokenizer.model").items()}


def make_file(path: Path, kind: str, like: str | None = None, tied: bool = False) -> dict[str, np.ndarray]:
    """A file of a random model: rows of whole blocks (of another type's), H * D != dim, K < H."""
    large = BY_NAME[like or kind].elements == 256
    wide = {"dim": 256, "hidden_dim": 512, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128} if large else {}
    args = gguf_args(vocab_size=4096, **wide)
    state = tiny_model(args).state_dict()
    if tied:  # an output matrix of ordinary size
        state = {name: 0.05 * x if name == EMBEDDINGS else x for name, x in state.items() if name != OUTPUT}
    return write_gguf(path, kind, args, state, extra=TOKENIZER)


def allowed(model: Transformer, prompts: list[Tensor], want: list[Tensor]) -> float:
    """A few times what the plain path errs by, whose inputs are rounded as well."""
    linears = [module for module in model.modules() if isinstance(module, BlockLinear)]
    for linear in linears:
        linear.by_kernels = False
    own = distance(whole(model, prompts), want)
    for linear in linears:
        linear.by_kernels = True
    return max(ROUNDED_TOLERANCE, 4 * own)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decode steps the kernels took."""
    calls: list[int] = []
    right = FastTransformer.decode
    monkeypatch.setattr(FastTransformer, "decode", lambda *given: (calls.append(1), right(*given))[1])
    return calls


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_model_is_the_one_of_the_dequantized_weights(tmp_path: Path, kind: str, tied: bool, steps: list[int]) -> None:
    path = tmp_path / "m.gguf"
    make_file(path, kind, tied=tied)
    kept, plain = (load(path, device="cpu", sliding_window=7, quant=q) for q in (None, "none"))
    assert kept.runtime.blocks == (kind,)
    assert f"weights/compute/cache {kind}/float32" in kept.describe()
    assert not [name for name, _ in kept.model.named_parameters() if "norm" not in name]
    assert plain.runtime.blocks == ()
    assert any(note.startswith("blocks of few bits dequantized to float32: ") for note in plain.notes)
    with pytest.raises(OptionError, match=f"but the weights are in {kind}: omit it"):
        load(path, device="cpu", sliding_window=7, prompt_dtype="bfloat16")
    lens = [23, 1, 12]
    prompts = ragged(lens, kept.args.vocab_size, seed=5)
    with torch.inference_mode():
        want = whole(plain.model, prompts)
        for schedule in (prefill_then_decode(lens, 9), at_random(lens, 1)):
            got = play(kept.model, prompts, schedule, make_cache(kept.model, 3))
            assert distance(got, want) < allowed(kept.model, prompts, want)
    assert steps


def test_a_layer_of_several_types(tmp_path: Path, steps: list[int]) -> None:
    mixed = {}
    for kind in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "F16"):
        make_file(tmp_path / f"{kind}.gguf", kind, "Q4_K")
        mixed[kind] = load(tmp_path / f"{kind}.gguf", device="cpu", sliding_window=7)
    model, plain = mixed["Q4_K"].model, load(tmp_path / "Q4_K.gguf", device="cpu", sliding_window=7, quant="none").model
    for path, kind in (
        ("attention.wv", "Q6_K"),
        ("feed_forward.w2", "Q8_0"),
        ("feed_forward.w1", "F16"),
        ("feed_forward.w3", "IQ4_XS"),
    ):
        linear = mixed[kind].model.layers[0].get_submodule(path)
        model.layers[0].set_submodule(path, linear)
        meant = linear.rows(0, linear.out_features) if isinstance(linear, BlockLinear) else linear.weight
        plain.layers[0].get_submodule(path).weight.data.copy_(meant)
    prompts = ragged([40], model.args.vocab_size)
    with torch.inference_mode():
        got = play(model, prompts, prefill_then_decode([40], 12), make_cache(model, 1))
        want = whole(plain, prompts)
        assert distance(got, want) < allowed(model, prompts, want)
    assert len(steps) == 12


def test_where_blocks_are_dequantized(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make_file(path, "Q4_0")
    for options in ({"dtype": "bfloat16"}, {"execution": "eager"}, {"dtype": "float64"}, {"quant": "int8"}):
        loaded = load(path, device="cpu", **options)
        assert loaded.runtime.blocks == ()
        assert any("blocks of few bits dequantized to" in note for note in loaded.notes)
    make_file(path, "F16")
    assert not any("dequantized" in note for note in load(path, device="cpu").notes)
    with pytest.raises(OptionError, match="quant 'int3' is not one of int8, int4, none"):
        load(path, quant="int3")


def test_bitwise_execution(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make_file(path, "Q6_K")
    model = load(path, device="cpu", sliding_window=7, deterministic=True).model
    lens = [23, 1, 12]
    prompts = ragged(lens, model.args.vocab_size, seed=5)
    want = [whole(model, [p])[0] for p in prompts]
    got = play(model, prompts, at_random(lens, 3), make_cache(model, 3))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_saved_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    held = make_file(tmp_path / "m.gguf", "Q5_1")
    loaded = load(tmp_path / "m.gguf", device="cpu")
    written = loaded.save(tmp_path / "out")
    assert any(note.startswith("blocks of few bits are written as the float32 numbers") for note in written.notes)
    again: Transformer = load(tmp_path / "out", device="cpu").model
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, torch.from_numpy(held[name])), name


@pytest.mark.long
def test_the_command_line_reports_which_types_stay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_file(tmp_path / "m.gguf", "Q4_0")
    cli = in_process(capfd)
    done = cli("bench", tmp_path / "m.gguf", "--device", "cpu", "--contexts", "4", "--batches", "1", "--prompts", "4")
    assert done.code == 0
    assert "Q4_0" in done.out + done.err
    assert "stay as they are on a CPU (Q4_0): " in cli("inspect", tmp_path / "m.gguf").text


def test_rows_are_interleaved_by_sixteen() -> None:
    q = torch.arange(32 * 64).view(32, 64).remainder(16).to(torch.uint8)
    zero = torch.zeros(32, 2, dtype=torch.uint8)
    packed, _ = pack_affine4(q, zero + 3, zero + 5, torch.ones(32, 1).half(), torch.ones(32, 1).half())
    words = packed[1, 1, :256].view(torch.int32).view(4, ROWS)
    for word, row, i in ((0, 0, 0), (1, 3, 5), (3, 15, 7)):
        assert (int(words[word, row]) >> (4 * i)) & 15 == q[16 + row, 32 + 8 * word + i]
    assert (packed[..., 256:272] == 3).all()
    assert (packed[..., 272:] == 5).all()
