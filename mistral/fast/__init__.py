"""The fast path on a CPU: kernels in C, weights in few bits, a whole decode step in one call.

It plugs in at load: other kinds of `Linear` and of `Transformer` are put in place, and the model never knows. The
plain path stays what all of this is compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mistral.fast.linear import FastLinear, Int4Linear, Int8Linear, QuantizedLinear
from mistral.fast.quantize import int8_shape, packed_shape
from mistral.linear import Linear
from mistral.model import Transformer

OUTPUT = "output"


def is_quantized(name: str) -> bool:
    """Whether a tensor of this name is stored in few bits: every weight of a product is."""
    return name == f"{OUTPUT}.weight" or (name.startswith("layers.") and not name.endswith("norm.weight"))


def bytes_of(name: str, shape: tuple[int, ...], quant: str, itemsize: int) -> int:
    """Bytes that a tensor takes once it is quantized; one that is not takes `itemsize` a number."""
    if not is_quantized(name):
        return math.prod(shape) * itemsize
    n, k = shape
    if _kind(name, quant) is Int8Linear:
        return math.prod(int8_shape(n, k)) + 4 * n
    return math.prod(packed_shape(n, k))


def quantized(name: str, weight: Tensor, quant: str) -> QuantizedLinear:
    """A weight in few bits. The output matrix has 8 at least: it is small, and every token's choice hangs on it."""
    return _kind(name, quant)(weight)


def _kind(name: str, quant: str) -> type[Int8Linear] | type[Int4Linear]:
    return Int8Linear if quant == "int8" or name.startswith(OUTPUT) else Int4Linear


def put_quantized(model: Transformer, modules: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Put quantized weights in place, by the names of the tensors they were; return their state."""
    state: dict[str, Tensor] = {}
    for name, module in modules.items():
        path = name.removesuffix(".weight")
        model.set_submodule(path, module)
        state |= {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    return state


def use_kernels(model: Transformer) -> None:
    """Have products of few rows made by the kernels; the weights stay what and where they are."""
    linears: list[tuple[str, nn.Module]] = [(n, m) for n, m in model.named_modules() if type(m) is Linear]
    for name, module in linears:
        assert isinstance(module, Linear)
        with torch.device("meta"):
            fast = FastLinear(module.in_features, module.out_features)
        fast.weight = module.weight
        model.set_submodule(name, fast)
