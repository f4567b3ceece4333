"""Other numbers, smaller: weights of 8 and 4 bits, rounded, stored and multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mistral.fast.layout import SYMMETRIC, bits_of
from mistral.model import Transformer
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter
from mistral.quant.affine import LEAST, MOST, Affine4Linear
from mistral.quant.cuda import CudaAffine4Linear, CudaInt4Linear, CudaInt8Linear, CudaLinear
from mistral.quant.linear import Int4Linear, Int8Linear, QuantizedEmbedding, QuantizedLinear
from mistral.util.english import counted
from mistral.util.errors import FormatError

Kind = Int8Linear | Affine4Linear | Int4Linear
KINDS: dict[str, type[Int8Linear] | type[Affine4Linear]] = {"int8": Int8Linear, "int4": Affine4Linear}
READ: dict[str, type[Kind]] = {**KINDS, SYMMETRIC: Int4Linear}
CPU = torch.device("cpu")


def quantize(
    parameter: Parameter, weight: Tensor, quant: str, device: torch.device = CPU, columns: Tensor | None = None
) -> QuantizedLinear:
    """A weight quantized, rounded on the CPU.

    Args:
        columns: [in_features] how much the error of each column counts in int4; None: all the same.

    Raises:
        FormatError: it holds NaN or infinite values, which would become plausible numbers, or values that the scales
            of int4 cannot express.
    """
    largest = torch.stack(torch.aminmax(weight)).abs().amax().item() if weight.numel() else 0.0
    if not math.isfinite(largest):
        count = int((~weight.isfinite()).sum())
        found = counted(count, "value that is", "values that are")
        raise FormatError(f"{parameter.name} holds {found} NaN or infinite: the weights are broken")
    if bits_of(parameter, quant) == "int8":
        return _placed(Int8Linear.of(weight), device)
    if largest and not LEAST <= largest <= MOST:
        raise FormatError(
            f"the largest value of {parameter.name} is {largest:.3g}, and the scales of int4 express {LEAST:.1g} to "
            f"{MOST:.1g}: use int8"
        )
    return _placed(Affine4Linear.of(weight, columns), device)


def from_stored(
    parameter: Parameter, quant: str, tensors: Sequence[Tensor], device: torch.device = CPU
) -> QuantizedLinear:
    """A weight whose bits are those of tensors on disk, in the order of `layout.stored_as`.

    Raises:
        FormatError: a scale is no number, or negative.
    """
    for scale in tensors[1:]:
        if not _is_sound(scale):
            raise FormatError(f"{parameter.name}: a scale of its {quant} weights is negative or no number")
    return _placed(READ[bits_of(parameter, quant)](parameter.shape[1], parameter.shape[0], *tensors), device)


def _is_sound(scale: Tensor) -> bool:
    """Whether all scales are finite and not negative. By their bits, which have the same order: of fp16 PyTorch takes
    seconds for those of 7B."""
    bits, infinite = {2: (torch.int16, 0x7C00), 4: (torch.int32, 0x7F800000)}[scale.dtype.itemsize]
    low, high = (int(x) for x in scale.contiguous().view(bits).aminmax())
    return 0 <= low <= high < infinite or bool((scale.isfinite() & (scale >= 0)).all())  # -0 is negative by its bits


def _placed(module: Kind, device: torch.device) -> QuantizedLinear:
    """The same weights as a device reads them."""
    return module if device.type == "cpu" else on_gpu(module, device)


def on_gpu(module: Kind, device: torch.device) -> CudaLinear:
    """The same weights, row by row, on another device."""
    if isinstance(module, Int8Linear):
        return CudaInt8Linear(module, device)
    if isinstance(module, Affine4Linear):
        return CudaAffine4Linear(module, device)
    return CudaInt4Linear(module, device)


def put_quantized(model: Transformer, modules: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Put quantized weights in place, by the names of the tensors they were; return their state."""
    state: dict[str, Tensor] = {}
    placed: dict[str, nn.Module] = {**modules}
    if (table := modules.get(EMBEDDINGS)) is not None:  # it is tied: one table for both
        placed |= {EMBEDDINGS: QuantizedEmbedding(table), OUTPUT: table}
    for name, module in placed.items():
        path = name.removesuffix(".weight")
        model.set_submodule(path, module)
        state |= {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    return state
