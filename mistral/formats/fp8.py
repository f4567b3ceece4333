"""Weights in 8-bit floating point (e4m3) and their scales: a weight is its fp8 number times a scale.

A scale is one for the tensor, one for each row, or one for each block of rows and columns. Mistral's own files call it
`qscale_weight`, Hugging Face's `weight_scale_inv` (it multiplies all the same), vLLM and compressed-tensors
`weight_scale`. Runs without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistral.formats.quantized import E4M3, Get, Method, Parts, require
from mistral.formats.weights import FLOATS, Stored

if TYPE_CHECKING:
    from torch import Tensor

Block = tuple[int, int]


def fp8(title: str, keys: tuple[str, ...], block: Block | None = None) -> Method:
    """The method of weights `X.weight` in fp8 with scales of one of these names; each becomes 16 bits.

    Args:
        block: rows and columns that share a scale; None: a tensor or a row does.
    """

    def header(parts: Parts, get: Get) -> Stored:
        out, inner = parts["weight"].shape
        scale = next(parts[key] for key in keys if key in parts)
        require(parts["weight"].dtype == E4M3 and scale.dtype in FLOATS)
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (out,), (out, 1))
        if block is not None:
            shapes = (*shapes, (-(-out // block[0]), -(-inner // block[1])))
        require(scale.shape in shapes)
        dtype = scale.dtype if scale.dtype in ("float16", "bfloat16") else "bfloat16"
        return Stored((out, inner), dtype, parts["weight"].dtype_name)

    def read(parts: dict[str, Tensor]) -> Tensor:
        scale = next(parts[key] for key in keys if key in parts).float()
        return scaled(parts["weight"].float(), scale, block)

    return Method(title, keys, ("weight",), (), header, read)


def scaled(weight: Tensor, scale: Tensor, block: Block | None) -> Tensor:
    """A weight [out, in], multiplied in place by the scale of the tensor, of its rows or of its blocks."""
    out, inner = weight.shape
    if scale.numel() == 1:
        return weight.mul_(scale.view(()))
    if scale.dim() == 1 or scale.shape == (out, 1):
        return weight.mul_(scale.view(out, 1))
    assert block is not None
    for row, scales in zip(weight.split(block[0]), scale, strict=True):
        row.mul_(scales.repeat_interleave(block[1])[:inner])
    return weight


def block_of(given: Any) -> Block | None:
    """Rows and columns of a block, as configs give them: a list of two, or "128x128".

    Raises:
        ValueError: they are something else.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = [int(n) for n in given.split("x")]
    require(isinstance(given, list | tuple) and len(given) == 2 and all(type(n) is int and n > 0 for n in given))
    return given[0], given[1]


def mistrals_fp8() -> Method:
    """That of Mistral's own files, whose params.json has `quantization` with qformat_weight fp8_e4m3."""
    return fp8("fp8 of Mistral's", ("qscale_weight",))
