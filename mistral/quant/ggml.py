"""Weights of GGUF files widened to floating-point numbers, block by block: what the bits of each GGML type mean.

Every value is the fp32 number that ggml's own definition gives, bit for bit. Knows nothing about files.
Names: d is a block's scale, dmin the scale of its minima, q the small whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mistral.fast.ggml_types import BY_NAME, IQ4_VALUES
from mistral.util.errors import FormatError, Unavailable

PIECE = 2**17  # weights widened at once: they stay in a processor's cache
# The same by the package of BY_PACKAGE: NumPy asks the system for each array that is larger, which takes half the time.
SMALL_PIECE = 2**14
IQ4 = torch.tensor(IQ4_VALUES, dtype=torch.float32)
# For every byte, eight bytes in one number: 16 for each bit that is set.
FIFTH_BITS = (
    torch.tensor([[16 * (byte >> bit & 1) for bit in range(8)] for byte in range(256)], dtype=torch.uint8)
    .view(torch.int64)
    .flatten()
)


def dequantize(
    raw: Tensor,
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """The weights of one tensor.

    Args:
        raw: [nbytes] uint8, its blocks as they lie in the file.
        kind: its GGML type by name, one of DEQUANTIZED or BY_PACKAGE.
        shape: rows first; the last size is a multiple of the type's block.
        dtype: of what is returned; fp32 is exact, others are rounded once from fp32.
        progress: told how many bytes have been widened, piece by piece.

    Returns:
        [*shape] in `dtype`. Beside it and `raw`, memory is that of PIECE weights.

    Raises:
        FormatError: a type that is not read here, or bytes that do not fit the shape.
        Unavailable: it is in BY_PACKAGE, and the gguf package is missing or too old.
    """
    if kind not in (*DEQUANTIZED, *BY_PACKAGE):
        names = ", ".join((*DEQUANTIZED, *BY_PACKAGE))
        raise FormatError(f"weights of type {kind} are not read here: {names} are; use llama.cpp")
    about, widen = BY_NAME[kind], DEQUANTIZED.get(kind) or _by_package(kind)
    count = math.prod(shape)
    row = shape[-1] if shape else 1
    if row % about.elements or raw.numel() * about.elements != count * about.nbytes:
        raise FormatError(f"{raw.numel()} bytes of type {kind} are no tensor of shape {list(shape)}")
    out = torch.empty(count // about.elements, about.elements, dtype=dtype)
    blocks = raw.view(-1, about.nbytes)
    step = max(1, (PIECE if kind in DEQUANTIZED else SMALL_PIECE) // about.elements)
    for first in range(0, len(blocks), step):
        piece = blocks[first : first + step]
        out[first : first + step] = widen(piece)
        if progress is not None:
            progress(piece.numel())
    return out.view(shape)


# --- parts of blocks


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, widened: [n, 1] fp32."""
    return blocks[:, at : at + 2].clone().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., b] bytes to [..., 2, b] numbers below 16: the low halves of all bytes, then the high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """[..., b] bytes to [..., 8 / bits, b] numbers of so many bits each, the lowest bits of all bytes first."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] bytes to [n, 32] numbers, 16 where a bit is set and 0 elsewhere, each byte's lowest bit first."""
    rows = _looked_up(FIFTH_BITS, packed.contiguous())
    return rows.view(torch.uint8).flatten(1)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is nine times as fast as indexing."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima, [n, 8] each.

    The first four of both lie in the low bits of bytes 0 to 3 and 4 to 7. The others have their low four bits in
    bytes 8 to 11 (scales in the low halves, minima in the high ones) and their high two on top of the first four.
    """
    a, b, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((a & 63, (low & 15) | (a >> 6 << 4)), dim=1)
    minima = torch.cat((b & 63, (low >> 4) | (b >> 6 << 4)), dim=1)
    return scales, minima


def _affine(d: Tensor, dmin: Tensor, scales: Tensor, minima: Tensor, q: Tensor) -> Tensor:
    """d * scale * q - dmin * minimum, group by group: q [n, groups, size] to [n, groups * size]."""
    step, low = (d * scales.float())[:, :, None], (dmin * minima.float())[:, :, None]
    return q.float().mul_(step).sub_(low).flatten(1)


# --- one function a type: [n, nbytes] uint8 blocks to [n, elements] fp32


def _f32(blocks: Tensor) -> Tensor:
    return blocks.clone().view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.clone().view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.clone().view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).flatten(1).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).flatten(1).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return q.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q2_k(blocks: Tensor) -> Tensor:
    both = blocks[:, :16]
    q = _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).view(-1, 16, 16)
    return _affine(_half(blocks, 80), _half(blocks, 82), both & 15, both >> 4, q)


def _q3_k(blocks: Tensor) -> Tensor:
    # Sixteen 6-bit scales: low four bits in bytes 0 to 7, high two in bytes 8 to 11.
    packed = blocks[:, 96:108]
    low, high = _nibbles(packed[:, :8]).flatten(1), _fields(packed[:, 8:], 2).flatten(1)
    step = _half(blocks, 108) * (low | high << 4).float().sub_(32)
    q = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).view(-1, 16, 16)
    high_bit = _fields(blocks[:, :32], 1).view(-1, 16, 16)  # 4 is taken off where it is not set
    return (q | high_bit << 2).float().sub_(4).mul_(step[:, :, None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32)
    return _affine(_half(blocks, 0), _half(blocks, 2), *_scales_and_minima(blocks[:, 4:16]), q)


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    q = low | _fields(blocks[:, 16:48], 1) << 4
    return _affine(_half(blocks, 0), _half(blocks, 2), *_scales_and_minima(blocks[:, 4:16]), q)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 8, 32)
    high = _fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).view(-1, 8, 32)
    step = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (low | high << 4).view(-1, 16, 16).float().sub_(32).mul_(step[:, :, None]).flatten(1)


def _iq4(packed: Tensor) -> Tensor:
    """[..., b] bytes to [..., 2, b] of the values that their halves stand for, low halves first."""
    return _looked_up(IQ4, _nibbles(packed))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4(blocks[:, 2:]).flatten(1).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    # Eight 6-bit scales: low four bits two to a byte in bytes 4 to 7, high two in bytes 2 and 3.
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    high = (blocks[:, 2:4, None] >> torch.tensor((0, 2, 4, 6), dtype=torch.uint8) & 3).flatten(1)
    step = _half(blocks, 0) * (low | high << 4).float().sub_(32)
    return _iq4(blocks[:, 8:].unflatten(1, (8, 16))).flatten(2).mul_(step[:, :, None]).flatten(1)


DEQUANTIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

# Types whose numbers are looked up in large tables, or are powers of 3; the package of ggml's own authors reads them.
BY_PACKAGE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")


def require_package(kind: str) -> None:
    """See that the package is there which reads a type of BY_PACKAGE.

    Raises:
        Unavailable: it is missing.
    """
    if find_spec("gguf") is None:
        raise Unavailable(f"weights of type {kind} are read by the gguf package: pip install gguf")


def _by_package(kind: str) -> Callable[[Tensor], Tensor]:
    """What widens blocks of a type in BY_PACKAGE."""
    require_package(kind)
    from gguf import GGMLQuantizationType, quants

    def widen(blocks: Tensor) -> Tensor:
        try:
            return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind]))
        except (KeyError, NotImplementedError):
            raise Unavailable(f"this gguf package does not read weights of type {kind}: pip install -U gguf") from None

    return widen
