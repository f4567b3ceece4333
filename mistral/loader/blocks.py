"""Which weights of a GGUF file stay in memory as they are there: blocks of few bits, which the kernels multiply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.fast.layout import BLOCKS
from mistral.formats.folder import Folder
from mistral.formats.gguf import BlockReader, multiplied_as_they_are
from mistral.formats.layouts import LAYOUTS
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter, parameters

if TYPE_CHECKING:
    from torch import nn

    from mistral.loader.options import LoadOptions
    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer


def kept_blocks(found: Folder, options: LoadOptions, run: Runtime) -> dict[str, str]:
    """The weights that stay blocks, and their types of GGML: those that the kernels read, where they compute in fp32.

    All others are dequantized as they are read: what an adapter was merged into, other types, and everything with
    `quant="none"`, on another device, or in another dtype.
    """
    import torch

    if options.quant is not None or run.device.type != "cpu" or run.compute != torch.float32 or not run.how.products:
        return {}
    return multiplied_as_they_are(found.weights, found.args)


def reported(found: Folder, options: LoadOptions, run: Runtime, kept: dict[str, str]) -> Runtime:
    """The runtime with what is known of blocks: which types stay, and notes: on those that do not, or where there are
    none and it was asked to dequantize them."""
    if kept:
        types = [name for name, _ in Counter(kept.values()).most_common()]
        run = replace(run, blocks=tuple(types))
    rest = Counter(t.dtype_name for n, t in found.tensors.items() if t.widened and n not in kept)
    if not rest or found.layout is not LAYOUTS["gguf"]:
        idle = "quant none has no effect: it is for the blocks of few bits of a GGUF file, and there are none"
        return replace(run, notes=(*run.notes, idle)) if options.quant == "none" else run
    what = ", ".join(f"{count} tensors of {name}" for name, count in rest.most_common())
    to = str(run.weights).removeprefix("torch.") if run.quant is None else run.quant
    return replace(run, notes=(*run.notes, f"blocks of few bits dequantized to {to}: {what}"))


def blocks_bytes(parameter: Parameter, kind: str) -> int:
    """Bytes of a weight that stays blocks of a type."""
    n, columns = parameter.shape
    return BLOCKS[kind].nbytes(n, columns)


def load_blocks(found: Folder, name: str, progress: Callable[[int], object] | None) -> dict[str, nn.Module]:
    """A weight as the modules that hold its blocks, by their paths in the model: an output that is tied is another."""
    from mistral.quant.blocks import BlockLinear, repack
    from mistral.quant.linear import QuantizedEmbedding

    reader = found.weights.readers[name]
    assert isinstance(reader, BlockReader)
    n, columns = parameters(found.args)[name].shape
    raw = found.weights.read(lambda: reader.raw(progress), name)
    linear = BlockLinear(BLOCKS[reader.kind], columns, n, *repack(reader.kind, raw, n, columns))
    if name != EMBEDDINGS:
        return {name: linear}
    return {name: QuantizedEmbedding(linear)} | ({OUTPUT: linear} if found.args.tied_embeddings else {})


def put_blocks(model: Transformer, modules: dict[str, nn.Module]) -> None:
    """Put them in place."""
    for name, module in modules.items():
        model.set_submodule(name.removesuffix(".weight"), module)
