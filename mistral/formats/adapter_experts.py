"""LoRA of experts that are one parameter of a layer, as PEFT trains Mixtral in transformers 5, taken apart by expert.

A parameter [E, out, in] has A [r * E, in] and B [out, r * E] for all experts: expert e adds B[:, e::E] @ A[e * r : (e
+ 1) * r] (PEFT's ParamWrapper). gate_up_proj is w1 above w3, which so share an A. Runs without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mistral.formats.adapter_rows import AdapterError
from mistral.formats.mapped_tensors import Progress
from mistral.formats.weights import Reader, Stored, WeightFiles
from mistral.util.errors import printable, short_repr

if TYPE_CHECKING:
    from torch import Tensor

KEY = "target_parameters"
PARAMETER = re.compile(r"(?:[\w.*\\]*\.)?(gate\.weight|gate_up_proj|down_proj)")
# Of two parameters of one module, PEFT writes one as the layer below the other.
STACK = re.compile(r"(.*\.)?(layers\.\d+)\.mlp\.experts((?:\.base_layer)*)\.lora_([AB])\.weight")
ROUTER = re.compile(r"((?:.*\.)?layers\.\d+)\.mlp\.gate\.(lora_[AB]\.weight)")
UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class _Stack:
    """A and B of a parameter of all experts, by their names in the file."""

    a: str
    b: str

    def sizes(self, tensors: dict[str, Stored]) -> tuple[int, int]:
        """in, out."""
        shapes = tensors[self.a].shape, tensors[self.b].shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise AdapterError(
                f"{printable(self.a)} {short_repr([*shapes[0]])} and {short_repr([*shapes[1]])} are no pair"
            )
        return shapes[0][1], shapes[1][0]


@dataclass(frozen=True)
class _Part:
    """Reads what one expert has of A (its rows) or of B (every E-th column, of some rows)."""

    whole: Reader
    rows: slice
    columns: slice

    def __call__(self, progress: Progress = None) -> Tensor:
        part = self.whole()[self.rows, self.columns].contiguous()
        if progress is not None:
            progress(part.nbytes)
        return part


def by_expert(
    weights: WeightFiles, parameters: Any, rank_of: Callable[[str], int]
) -> tuple[WeightFiles, dict[str, str], int]:
    """An adapter's weights with a pair for each matrix of an expert; by what name PEFT's config knows each module that
    has another one there; and how many experts there are, 0 where none is changed.

    Args:
        parameters: what the config has under KEY.
        rank_of: the rank by the config of a parameter, by its name.

    Raises:
        AdapterError: parameters of other kinds, or tensors that do not fit them.
    """
    listed = parameters if isinstance(parameters, list) else [parameters]
    if strange := [one for one in listed if not (isinstance(one, str) and PARAMETER.fullmatch(one))]:
        raise AdapterError(
            f"the adapter's config has {KEY} {short_repr(strange[0])}, which is no parameter of a mixture of experts: "
            "have PEFT merge it (merge_and_unload) and give what that saves"
        )
    tensors, readers, known, counts = dict(weights.tensors), dict(weights.readers), dict[str, str](), set[int]()
    for name in weights.tensors:
        if match := ROUTER.fullmatch(name):
            module = f"{match[1]}.block_sparse_moe.gate"
            tensors[f"{module}.{match[2]}"], readers[f"{module}.{match[2]}"] = tensors.pop(name), readers.pop(name)
            known[_bare(module)] = f"{_bare(match[1])}.mlp.gate.weight"
    for layer, stack, parameter in _stacks(weights, listed):
        key = f"{_bare(layer)}.mlp.experts.{parameter}"
        a, b = tensors.pop(stack.a), tensors.pop(stack.b)
        read_a, read_b = readers.pop(stack.a), readers.pop(stack.b)
        rank, rows = rank_of(key), a.shape[0]
        if not rank or rows % rank or b.shape[1] != rows:
            raise AdapterError(
                f"{printable(stack.a)} {short_repr([*a.shape])} is no stack of rank {rank} by the config"
            )
        experts, words = rows // rank, ("w1", "w3") if parameter == UP else ("w2",)
        counts.add(experts)
        out = b.shape[0] // len(words)
        for e in range(experts):
            for i, word in enumerate(words):
                module = f"{layer}.block_sparse_moe.experts.{e}.{word}"
                known[_bare(module)] = key
                ours, theirs = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
                tensors[ours] = replace(a, shape=(rank, a.shape[1]))
                readers[ours] = _Part(read_a, slice(e * rank, (e + 1) * rank), slice(None))
                tensors[theirs] = replace(b, shape=(out, rank))
                readers[theirs] = _Part(read_b, slice(i * out, (i + 1) * out), slice(e, None, experts))
    if len(counts) > 1:
        raise AdapterError(f"the adapter changes {' and '.join(map(str, sorted(counts)))} experts of a layer")
    return WeightFiles(weights.files, tensors, readers), known, max(counts, default=0)


def _stacks(weights: WeightFiles, listed: list[str]) -> Iterator[tuple[str, _Stack, str]]:
    """The parameters of experts that are changed: the layer, the pair, and which parameter it is of."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in weights.tensors:
        if match := STACK.fullmatch(name):
            layer = f"{match[1] or ''}{match[2]}"
            found.setdefault(layer, {}).setdefault(match[3], {})[match[4]] = name
    wanted = [word for word in (UP, DOWN) if any(one.split(".")[-1] == word for one in listed)]
    for layer, wrapped in found.items():
        if any(len(pair) != 2 for pair in wrapped.values()):
            raise AdapterError(f"the adapter lacks lora_A or lora_B of the experts of {printable(layer)}")
        stacks = [_Stack(pair["A"], pair["B"]) for pair in wrapped.values()]
        sizes = [stack.sizes(weights.tensors) for stack in stacks]
        if len(stacks) != len(wanted):
            raise AdapterError(
                f"the adapter changes {len(stacks)} parameters of the experts of {printable(layer)}, and its "
                f"config has {len(wanted)} in {KEY}"
            )
        # One has twice as many rows as the other has columns: w1 above w3.
        if len(stacks) == 2 and (sizes[0][1], sizes[0][0]) != (2 * sizes[1][0], sizes[1][1]):
            stacks.reverse()
        for stack, parameter in zip(stacks, wanted, strict=True):
            yield layer, stack, parameter


def _bare(module: str) -> str:
    return module.removeprefix("base_model.model.")
