"""Every GGML type that is read, bit for bit what the `gguf` package makes of the same blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from mistral.fast.ggml_types import BY_NAME, REMOVED, TYPES
from mistral.quant import ggml
from mistral.quant.ggml import BY_PACKAGE, DEQUANTIZED, dequantize
from mistral.util.errors import FormatError, Unavailable

# Where the fp16 scales of a block lie.
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
# Odd and extreme: signed zeros, the smallest and largest subnormals, the smallest normal number, the largest.
SCALES = np.array(
    [0.0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, -(2**-14), 65504, -65504, 1.0, -1.0, 0.333, -0.0123, 1e-3],
    dtype=np.float16,
)
WIDTH = 1024  # of a row


def blocks(name: str, rows: int = 128, seed: int = 0) -> np.ndarray:
    """Random bytes of `rows` rows, with finite scales; the first 256 blocks hold one byte value each."""
    kind = BY_NAME[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * WIDTH // kind.elements, kind.nbytes), dtype=np.uint8)
    same = min(256, len(raw) // 2)
    raw[:same] = np.arange(same, dtype=np.uint8)[:, None]
    for at in HALVES.get(name, ()):
        bits = rng.integers(0, 2**16, len(raw), dtype=np.uint16)
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)  # no infinity, no NaN
        odd = rng.permutation(np.tile(SCALES, 4))[: len(bits)]
        bits[: len(odd)] = odd.view(np.uint16)
        bits[rng.integers(0, len(bits), len(bits) // 8)] &= 0x83FF  # many subnormals
        raw[:, at : at + 2] = bits.view(np.uint8).reshape(-1, 2)
    if name not in HALVES:  # plain numbers
        words = raw.reshape(-1).view({2: np.uint16, 4: np.uint32}[kind.nbytes])
        exponent = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[name]
        words[words & exponent == exponent] &= ~np.array(exponent, words.dtype)
    return raw.reshape(rows, -1)


def bits(x: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy() if isinstance(x, torch.Tensor) else x).view(np.uint32)


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_bits_of_the_gguf_package(name: str) -> None:
    raw = blocks(name)
    expected = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
    assert np.isfinite(expected).all()
    assert expected.shape == (128, WIDTH)
    assert len(np.unique(expected)) > 500
    found = dequantize(torch.from_numpy(raw).flatten(), name, expected.shape)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_every_type_of_the_issue_is_there() -> None:
    wanted = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
    assert set(wanted.split()) == set(DEQUANTIZED)
    assert set(HALVES) | {"F32", "F16", "BF16"} == set(DEQUANTIZED)


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(blocks(name, rows=7, seed=1)).flatten()
    whole = dequantize(raw, name, (7, WIDTH))
    sizes: list[int] = []
    widen = DEQUANTIZED[name]
    monkeypatch.setitem(DEQUANTIZED, name, lambda piece: (sizes.append(piece.numel()), widen(piece))[1])
    monkeypatch.setattr(ggml, "PIECE", 768)  # no divisor of 7 * 1024
    done: list[int] = []
    pieces = dequantize(raw, name, (7, WIDTH), progress=done.append)
    np.testing.assert_array_equal(bits(pieces), bits(whole))
    kind = BY_NAME[name]
    assert len(sizes) == -(-7 * WIDTH // 768)
    assert max(sizes) * kind.elements == 768 * kind.nbytes
    assert done == sizes
    assert sum(done) == raw.numel()


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_one_block_and_odd_places(name: str) -> None:
    kind = BY_NAME[name]
    raw = blocks(name, rows=1, seed=2).reshape(-1)[: kind.nbytes]
    expected = gguf.quants.dequantize(raw[None], GGMLQuantizationType[name])[0]
    shifted = torch.zeros(kind.nbytes + 1, dtype=torch.uint8)
    shifted[1:] = torch.from_numpy(raw)
    np.testing.assert_array_equal(bits(dequantize(shifted[1:], name, (kind.elements,))), bits(expected))


def test_other_dtypes_are_rounded_once_from_fp32() -> None:
    raw = torch.from_numpy(blocks("Q4_K", rows=4)).flatten()
    fp32 = dequantize(raw, "Q4_K", (4, WIDTH))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(raw, "Q4_K", (4, WIDTH), dtype), fp32.to(dtype))


@pytest.mark.parametrize("name", BY_PACKAGE)
def test_types_that_the_gguf_package_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any bytes, in pieces that do not divide them, and from a place where no number may begin."""
    kind, rows = BY_NAME[name], 5
    raw = np.random.default_rng(0).integers(0, 256, (rows, 3 * kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
        monkeypatch.setattr(ggml, "SMALL_PIECE", 4 * kind.elements)
        shifted = torch.from_numpy(np.concatenate([np.zeros(1, np.uint8), raw.reshape(-1)]))[1:]
        found = dequantize(shifted, name, expected.shape)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_without_the_gguf_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="weights of type IQ3_S are read by the gguf package: pip install gguf"):
        dequantize(torch.zeros(110, dtype=torch.uint8), "IQ3_S", (256,))
    monkeypatch.undo()

    def old(*_: object) -> np.ndarray:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", old)
    with pytest.raises(Unavailable, match=r"does not read weights of type IQ3_S: pip install -U gguf"):
        dequantize(torch.zeros(110, dtype=torch.uint8), "IQ3_S", (256,))


def test_refused_by_name() -> None:
    with pytest.raises(FormatError, match="Q8_K are not read here: F32, F16"):
        dequantize(torch.zeros(292, dtype=torch.uint8), "Q8_K", (256,))
    for shape in ((2, 32), (64,), (32, 1), (0,)):
        with pytest.raises(FormatError, match="18 bytes of type Q4_0 are no tensor"):
            dequantize(torch.zeros(18, dtype=torch.uint8), "Q4_0", shape)


def test_the_table_of_types_is_the_gguf_packages() -> None:
    sizes = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    del sizes["Q8_1"]  # the package has 40 bytes; ggml's block has 36, and no file holds one
    ours = {kind.name: (kind.number, kind.elements, kind.nbytes) for kind in TYPES.values()}
    assert {name: ours[name] for name in sizes} == sizes
    assert not set(REMOVED) & set(TYPES)
    assert len(BY_NAME) == len(TYPES)
