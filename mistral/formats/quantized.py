"""Weights that a file holds quantized, computed while they are read, tensor by tensor, whatever the layout.

Several tensors of a file stand for one weight: they are known by the ends of their names, and checked before any is
read. A weight is computed in fp32; whoever keeps it rounds it once. How is a `Method`; the methods are in fp8.py and
quantized_hf.py. Runs without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.formats.weights import FLOATS, Reader, Stored, WeightFiles, WeightsError, require_once
from mistral.util.errors import printable, short_repr

if TYPE_CHECKING:
    from torch import Tensor

    from mistral.formats.mapped_tensors import Progress

E4M3 = "float8_e4m3fn"
Parts = dict[str, Stored]
Get = Callable[[str], "Tensor"]
# What activations, keys and values would be rounded with by other programs; here they are not.
ACTIVATIONS = re.compile(
    r".*\.(qscale_act|activation_scale|(input|output|[qkv])_(scale|zero_point))|.*fake_quantizer\..*"
)


@dataclass(frozen=True)
class Method:
    """How weights are stored.

    Args:
        title: human-readable.
        keys: ends of names that only quantized weights have; each has one of them.
        needed, optional: ends of the names of what else stands for a weight.
        header: shape [out, in] and dtype from the parts' headers; ValueError where they do not fit together. What is
            small and says more, it may read. The dtype is the one that a weight is rounded to unless another is asked
            for.
        read: the weight in fp32 from its parts.
    """

    title: str
    keys: tuple[str, ...]
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    header: Callable[[Parts, Get], Stored]
    read: Callable[[dict[str, Tensor]], Tensor]

    @property
    def note(self) -> str:
        """A sentence on what becomes of the weights."""
        return (
            f"the weights are quantized ({self.title}): computed in fp32 while they are read, each rounded once, "
            "to 16 bits or the dtype of its scales unless another dtype is requested (float32: by convert)"
        )


# Ends of names that only quantized weights have, and whose: where no config says how they are stored.
PARTS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "fp8 or compressed-tensors",
    "weight_scale_inv": "fp8",
    "qscale_weight": "Mistral's fp8",
    "weight.absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "q_weight": "ExLlamaV2",
    "trellis": "ExLlamaV3",
    "W_q": "HQQ",
    "Qidxs": "QuIP",
    "codes": "AQLM",
}


def check_plain(weights: WeightFiles, source: str) -> None:
    """Refuse parts of quantized weights of which nothing says how they are stored.

    Raises:
        WeightsError: there are some.
    """
    for name in weights.tensors:
        for end, whose in PARTS.items():
            if name.endswith(f".{end}"):
                raise WeightsError(
                    f"the files hold {printable(name)}, a part of weights quantized by {whose}, but {source} does not "
                    "say how: fetch the one that belongs to them, or give the model that they were made from"
                )


def dequantized(weights: WeightFiles, method: Method, source: str) -> WeightFiles:
    """The weights with one tensor, `X.weight`, in the place of those that stand for it.

    Args:
        source: the file that says how they are stored.

    Raises:
        WeightsError: a part is missing, or has a shape or dtype that cannot be; or a weight is there without them too.
    """
    ends = (*method.keys, *method.needed, *method.optional)
    modules = {
        name.removesuffix(f".{key}"): None
        for name in weights.tensors
        for key in method.keys
        if name.endswith(f".{key}")
    }
    if not modules:
        key = " or ".join(method.keys)
        raise WeightsError(
            f"the files hold no {key}, which {method.title} has: if the weights were merged or dequantized, remove "
            f"what {source}, or a file beside it, says about quantization; else fetch the quantized ones"
        )
    groups = {m: {end: f"{m}.{end}" for end in ends if f"{m}.{end}" in weights.tensors} for m in modules}
    if bare := [n for n, t in weights.tensors.items() if t.dtype == E4M3 and n.removesuffix(".weight") not in groups]:
        raise WeightsError(f"{printable(bare[0])} is in fp8, and has no scale beside it: the files are incomplete")
    used = {name for group in groups.values() for name in group.values()}
    plain = [(name, name) for name in weights.tensors if name not in used]
    require_once([*plain, *((next(iter(group.values())), f"{m}.weight") for m, group in groups.items())])
    tensors = {name: stored for name, stored in weights.tensors.items() if name not in used}
    readers: dict[str, Reader] = {name: reader for name, reader in weights.readers.items() if name not in used}
    for module, group in groups.items():
        tensors[f"{module}.weight"] = replace(_header(weights, module, group, method), computed=method.title)
        readers[f"{module}.weight"] = _Dequantized(weights, group, method)
    return WeightFiles(weights.files, tensors, readers)


def _header(weights: WeightFiles, module: str, group: dict[str, str], method: Method) -> Stored:
    """Shape and dtype of a weight, once its parts are known to fit together."""
    if lacking := [end for end in method.needed if end not in group]:
        raise WeightsError(f"{printable(module)} has no {lacking[0]} beside the rest: the files are incomplete")
    parts = {end: weights.tensors[name] for end, name in group.items()}
    try:
        found = method.header(parts, lambda end: weights.get(group[end]))
        require(found.dtype in FLOATS)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        told = ", ".join(
            f"{end} {printable(part.dtype_name)} {short_repr(list(part.shape))}" for end, part in parts.items()
        )
        raise WeightsError(f"the parts of {printable(module)} do not fit together as {method.title}: {told}") from None
    return found


@dataclass(frozen=True)
class _Dequantized:
    weights: WeightFiles
    group: dict[str, str]
    method: Method

    def __call__(self, progress: Progress = None) -> Tensor:
        return self.method.read({end: self.weights.get(name, progress) for end, name in self.group.items()})


def require(condition: bool) -> None:
    """ValueError where a header is not as it must be."""
    if not condition:
        raise ValueError
