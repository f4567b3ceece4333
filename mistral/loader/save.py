"""A model in memory to a folder, in Mistral's layout, that loads with the same bits."""

from __future__ import annotations

import tempfile
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistral.formats.convert import Converted, write_folder
from mistral.formats.folder import Folder
from mistral.formats.layout import Layout
from mistral.formats.layouts import NATIVE, find_layout
from mistral.formats.mapped_tensors import Progress
from mistral.formats.weights import Reader, Stored, WeightFiles
from mistral.parameters import parameters
from mistral.quant.blocks import BlockLinear
from mistral.quant.linear import QuantizedEmbedding
from mistral.util.arguments import require_kind
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.model import Transformer

TOGETHER = 1024  # rows that are dequantized at once


def save(
    model: Transformer,
    folder: str | PathLike[str],
    source: Path | None = None,
    words: Path | None = None,
    template: Path | None = None,
) -> Converted:
    """Write the weights of a model as they are, each in its own dtype. The folder appears when it is complete.

    Weights that are a GGUF file's blocks of few bits are written as the float32 numbers that they stand for.

    Args:
        model: anywhere, but with weights that were not rounded by `quant`.
        folder: one that is not there yet, or is empty.
        source: the folder that it was loaded from, whose tokenizer and templates are copied; None: only weights and
            shape are written.
        words: the folder of an adapter whose tokenizer and templates it has instead; None: none.
        template: that of an adapter whose chat template alone it has; None: none.

    Raises:
        UsageError: quantized weights: `convert --quant` writes those.
        ConvertError: the folder cannot be written.
    """
    require_kind("model", model, nn.Module, "a model: loaded.model")
    require_kind("source", source, Path | None, "a Path or None")
    state = dict(model.named_parameters())
    expected = parameters(model.args)
    blocks = {name: kept for name in expected if (kept := _blocks(model, name)) is not None}
    if missing := [name for name in expected if name not in state and name not in blocks]:
        raise UsageError(
            f"weights of this model are quantized, divided or beside an adapter ({missing[0]} and others): "
            "save what it was loaded from, "
            "or write a quantized folder with `convert --quant`"
        )
    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    for name, parameter in expected.items():
        if name in blocks:
            tensors[name] = Stored(parameter.shape, "float32", blocks[name].blocks.name, widened=True)
            readers[name] = partial(_dequantized, blocks[name])
        else:
            dtype = str(state[name].dtype).removeprefix("torch.")
            tensors[name] = Stored(parameter.shape, dtype, dtype)
            readers[name] = partial(_on_cpu, state[name].detach())
    weights = WeightFiles(() if source is None else _written_anew(source), tensors, readers)
    with tempfile.TemporaryDirectory() as nothing:
        path = Path(nothing) if source is None else source
        layout, raw = (NATIVE, {}) if source is None else _described(source)
        whole = Folder(
            path, layout, layout.config, raw, model.args, weights, notes=(), own_words=words, own_template=template
        )
        return write_folder(whole, folder, NATIVE.to)


def _described(source: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout of what a model was loaded from, and what gives its shape there: ends of sequence may be in it too."""
    layout, _ = find_layout(source)
    return layout, layout.read_config(source)


def _written_anew(source: Path) -> tuple[Path, ...]:
    """The files of a folder that hold its weights and its shape; none of a file."""
    if not source.is_dir():
        return ()
    layout, _ = find_layout(source)
    names = {entry.name for entry in source.iterdir()}
    weights = next((files for files in layout.weight_sets(names) if files and names.issuperset(files)), ())
    return tuple(source / name for name in (layout.config, *layout.indexes, *weights) if name in names)


def _blocks(model: Transformer, name: str) -> BlockLinear | None:
    """The weight's blocks of few bits, as a file had them; None if it has none."""
    try:
        module = model.get_submodule(name.removesuffix(".weight"))
    except AttributeError:
        return None
    table = module.table if isinstance(module, QuantizedEmbedding) else module
    return table if type(table) is BlockLinear else None  # and no kind that was rounded here


def _dequantized(weight: BlockLinear, progress: Progress = None) -> Tensor:
    wide = torch.empty(weight.out_features, weight.in_features)
    for first in range(0, len(wide), TOGETHER):
        rows = wide[first : first + TOGETHER]
        rows.copy_(weight.rows(first, first + len(rows)))
        if progress is not None:
            progress(rows.nbytes)
    return wide


def _on_cpu(tensor: Tensor, progress: Progress = None) -> Tensor:
    if progress is not None:
        progress(tensor.nbytes)
    return tensor.cpu()
