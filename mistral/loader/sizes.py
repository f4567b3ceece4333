"""How large the weights are in memory: the dtype in which each is kept there, and whether all of them fit.

`blocks` are those that stay as they are in a GGUF file, by name, and their types; see `loader.blocks`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.fast.layout import bytes_of
from mistral.formats.folder import Folder
from mistral.formats.weights import Stored
from mistral.loader.blocks import blocks_bytes
from mistral.parameters import parameters
from mistral.util import memory
from mistral.util.english import counted, some_names

if TYPE_CHECKING:
    import torch

    from mistral.loader.runtime import Runtime


def too_wide(found: Folder, run: Runtime, blocks: dict[str, str]) -> str | None:
    """A note where weights that come from blocks of few bits would take too much memory in float32."""
    from mistral.loader.runtime import WIDEN_SHARE

    left, needed = memory.available(run.device), _size_in_memory(found, run, blocks)
    wide = run.weights.itemsize > 2 and any(t.widened and name not in blocks for name, t in found.tensors.items())
    if not wide or left is None or needed <= WIDEN_SHARE * left:
        return None
    return (
        f"the weights, blocks of few bits in their file, are rounded to bfloat16: in float32 they need "
        f"{memory.as_text(needed)}, and {memory.as_text(left)} are left"
    )


def narrower(found: Folder) -> Folder:
    """The same folder, with bfloat16 as what comes of blocks of few bits."""
    tensors = {n: replace(t, dtype="bfloat16") if t.widened else t for n, t in found.weights.tensors.items()}
    return replace(found, weights=replace(found.weights, tensors=tensors))


def require_memory(found: Folder, run: Runtime, blocks: dict[str, str]) -> None:
    """Refuse weights that do not fit, with advice on what would.

    Raises:
        OutOfMemory: they do not.
    """
    import torch

    smaller = ["--dtype bfloat16"] if run.weights.itemsize > 2 and not run.quant and not blocks else []
    can_quantize = run.device.type == "cuda" or (run.how.products and run.compute == torch.float32)
    smaller += ["--quant int8"] if can_quantize and not run.quant else []
    memory.require(
        _size_in_memory(found, run, blocks),
        run.device,
        f"the weights in {run.quant or '+'.join(run.blocks) or str(run.weights).removeprefix('torch.')}",
        f"use {', '.join([*smaller, 'another --device'])}, or a smaller model",
    )


def _size_in_memory(found: Folder, run: Runtime, blocks: dict[str, str]) -> int:
    """Bytes of the weights once they are loaded."""
    if run.quant is None:
        known = parameters(found.args)
        wide = [t.parameters * kept_dtype(t, run).itemsize for n, t in found.tensors.items() if n not in blocks]
        return sum(wide) + sum(blocks_bytes(known[name], kind) for name, kind in blocks.items())
    return sum(
        bytes_of(w, run.quant if found.quant is None or found.has_quantized(w) else None, run.weights.itemsize)
        for w in parameters(found.args).values()
    )


def kept_dtype(tensor: Stored, run: Runtime) -> torch.dtype:
    """The dtype in which a tensor is kept: where weights stay as they are stored, each has its own, up to that of the
    arithmetic; a checkpoint may mix them."""
    import torch

    own: torch.dtype = getattr(torch, str(tensor.dtype))
    fits = run.weights != run.compute and torch.promote_types(own, run.compute) == run.compute
    return own if fits else run.compute


def mixed(found: Folder, run: Runtime, blocks: dict[str, str]) -> tuple[str, ...]:
    """The dtypes of weights that stay as they are stored, where there are several: what most numbers have comes first.

    Beside blocks of few bits those of matrices and tables; norms and routers always stay as they are.
    """
    if run.quant is not None:
        return ()
    known, counts = parameters(found.args), Counter[str]()
    for name, tensor in found.tensors.items():
        if name not in blocks and not (blocks and known[name].role in ("norm", "router")):
            counts[str(kept_dtype(tensor, run)).removeprefix("torch.")] += tensor.parameters
    return tuple(name for name, _ in counts.most_common()) if blocks or len(counts) > 1 else ()


def loses(dtype: torch.dtype, tensor: Stored) -> bool:
    """Whether a dtype rounds what a tensor's own has: the tensor is then wanted before it is rounded to its own."""
    import torch

    return torch.promote_types(getattr(torch, str(tensor.dtype)), dtype) != dtype


def narrowed(found: Folder, run: Runtime) -> tuple[str, ...]:
    """A note where some tensors, not all, are wider than the arithmetic: nobody chose to round those."""
    import torch

    wider = []
    for name, tensor in found.tensors.items():
        own, kept = getattr(torch, str(tensor.dtype)), kept_dtype(tensor, run)
        if own.is_floating_point and torch.promote_types(own, kept) != kept:
            wider.append(name)
    if not wider or len(wider) == len(found.tensors):
        return ()
    to = str(run.compute).removeprefix("torch.")
    return (f"rounded to {to}, but stored in more: {counted(len(wider), 'tensor')} ({some_names(wider)})",)
