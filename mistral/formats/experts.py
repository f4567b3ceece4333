"""Experts that files hold stacked, as one tensor for all of a layer: taken apart while they are read, expert by expert.

The first release of Mixtral stacks along rows: `block_sparse_moe.w1` and `.w3` [E * hidden, dim], and `.w2` of the same
shape, so that each of its blocks is turned over. transformers 5 stacks along a dimension of its own, with w1 above w3:
`experts.gate_up_proj` [E, 2 * hidden, dim] and `experts.down_proj` [E, dim, hidden]. Runs without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.formats.mapped_tensors import Progress, touch
from mistral.formats.weights import Reader, Stored, WeightFiles, WeightsError, require_once
from mistral.util.errors import printable, short_repr

if TYPE_CHECKING:
    from torch import Tensor

ROUTER = re.compile(r"layers\.(\d+)\.block_sparse_moe\.gate\.weight")
STACKED = re.compile(r"layers\.(\d+)\.block_sparse_moe\.(w[123])")
FUSED_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class _Cut:
    """One expert's weight within a stack.

    Args:
        name: of the weight alone.
        shape: [out, in].
        first, last: rows of the stack, once it is seen as a matrix.
        turned: whether it lies as [in, out].
    """

    name: str
    shape: tuple[int, int]
    first: int
    last: int
    turned: bool = False


def first_release(weights: WeightFiles) -> WeightFiles:
    """Weights of Mistral's layout, those of Mixtral's first release under the names of the later ones.

    Raises:
        WeightsError: a stack that is no whole number of experts.
    """
    names = {name: ROUTER.fullmatch(name) for name in weights.tensors}
    renamed = {name: f"layers.{at[1]}.feed_forward.gate.weight" for name, at in names.items() if at}
    experts = {name.split(".")[1]: weights.tensors[name].shape[0] for name in renamed if weights.tensors[name].shape}

    def cuts(name: str, stored: Stored) -> Iterator[_Cut] | None:
        if (found := STACKED.fullmatch(name)) is None:
            return None
        count = experts.get(found[1], 0)
        if len(stored.shape) != 2 or count < 1 or stored.shape[0] % count:
            raise WeightsError(f"{printable(name)} {short_repr(list(stored.shape))} is no stack of {count} experts")
        rows, dim = stored.shape[0] // count, stored.shape[1]
        at, turned = f"layers.{found[1]}.feed_forward.experts", found[2] == "w2"
        shape = (dim, rows) if turned else (rows, dim)
        return (_Cut(f"{at}.{e}.{found[2]}.weight", shape, e * rows, (e + 1) * rows, turned) for e in range(count))

    return _apart(weights, renamed, cuts)


def fused(weights: WeightFiles) -> WeightFiles:
    """Weights of Hugging Face's layout, those that transformers 5 fuses in memory under the names that it writes.

    Raises:
        WeightsError: a stack that is none of experts.
    """
    if not any(FUSED.fullmatch(name) for name in weights.tensors):
        return weights
    names = {name: FUSED_ROUTER.fullmatch(name) for name in weights.tensors}
    renamed = {name: f"{at[1]}.block_sparse_moe.gate.weight" for name, at in names.items() if at}

    def cuts(name: str, stored: Stored) -> Iterator[_Cut] | None:
        if (found := FUSED.fullmatch(name)) is None:
            return None
        both = found[2] == "gate_up_proj"
        if len(stored.shape) != 3 or (both and stored.shape[1] % 2):
            raise WeightsError(f"{printable(name)} {short_repr(list(stored.shape))} is no stack of experts")
        count, rows, inner = stored.shape
        parts = ("w1", "w3") if both else ("w2",)
        each = rows // len(parts)
        at = f"{found[1]}.block_sparse_moe.experts"
        return (
            _Cut(f"{at}.{e}.{part}.weight", (each, inner), e * rows + i * each, e * rows + (i + 1) * each)
            for e in range(count)
            for i, part in enumerate(parts)
        )

    return _apart(weights, renamed, cuts)


def _apart(
    weights: WeightFiles, renamed: dict[str, str], cuts: Callable[[str, Stored], Iterator[_Cut] | None]
) -> WeightFiles:
    """The weights with a tensor for each expert in the place of stacks, and some names replaced.

    Raises:
        WeightsError: an expert or a router is there in both forms.
    """
    tensors: dict[str, Stored] = {}
    became: list[tuple[str, str]] = []
    readers: dict[str, Reader] = {}
    for name, stored in weights.tensors.items():
        found = cuts(name, stored)
        if found is None:
            became.append((name, renamed.get(name, name)))
            tensors[renamed.get(name, name)] = stored
            if name in weights.readers:
                readers[renamed.get(name, name)] = weights.readers[name]
            continue
        for cut in found:
            became.append((name, cut.name))
            tensors[cut.name] = replace(stored, shape=cut.shape)
            if name in weights.readers:
                readers[cut.name] = _Expert(weights.readers[name], cut)
    require_once(became)
    return WeightFiles(weights.files, tensors, readers)


@dataclass(frozen=True)
class _Expert:
    """Reads one expert's weight: only its part of the stack is brought into memory."""

    stack: Reader
    cut: _Cut

    def __call__(self, progress: Progress = None) -> Tensor:
        whole = self.stack()
        part = whole.view(-1, whole.shape[-1])[self.cut.first : self.cut.last]
        if progress is not None:
            touch(part)
            progress(part.nbytes)
        return part.T.contiguous() if self.cut.turned else part
