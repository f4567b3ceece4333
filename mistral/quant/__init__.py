"""Other numbers, smaller: weights of 8 and 4 bits, rounded, stored and multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.fast.layout import bits_of
from mistral.model import Transformer
from mistral.parameters import Parameter
from mistral.quant.cuda import CudaInt4Linear, CudaInt8Linear
from mistral.quant.linear import Int4Linear, Int8Linear, QuantizedLinear
from mistral.util.errors import FormatError

KINDS: dict[str, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}
CPU = torch.device("cpu")


def quantize(parameter: Parameter, weight: Tensor, quant: str, device: torch.device = CPU) -> QuantizedLinear:
    """A weight quantized, rounded on the CPU.

    Raises:
        FormatError: it holds NaN or infinite values, which would become plausible numbers.
    """
    if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
        count = int((~weight.isfinite()).sum())
        raise FormatError(f"{parameter.name} holds {count:,} values that are NaN or infinite: the weights are broken")
    return _placed(KINDS[bits_of(parameter, quant)].of(weight), device)


def from_stored(
    parameter: Parameter, quant: str, tensors: Sequence[Tensor], device: torch.device = CPU
) -> QuantizedLinear:
    """A weight whose bits are those of tensors on disk, in the order of `layout.stored_as`.

    Raises:
        FormatError: a scale is no number, or negative.
    """
    for scale in tensors[1:]:
        if not (scale.isfinite() & (scale >= 0)).all():
            raise FormatError(f"{parameter.name}: a scale of its {quant} weights is negative or no number")
    return _placed(KINDS[bits_of(parameter, quant)](parameter.shape[1], parameter.shape[0], *tensors), device)


def _placed(module: Int8Linear | Int4Linear, device: torch.device) -> QuantizedLinear:
    """The same weights as a device reads them."""
    if device.type == "cpu":
        return module
    return CudaInt8Linear(module, device) if isinstance(module, Int8Linear) else CudaInt4Linear(module, device)


def put_quantized(model: Transformer, modules: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Put quantized weights in place, by the names of the tensors they were; return their state."""
    state: dict[str, Tensor] = {}
    for name, module in modules.items():
        path = name.removesuffix(".weight")
        model.set_submodule(path, module)
        state |= {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    return state
