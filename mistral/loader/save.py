"""A model in memory to a folder, in Mistral's layout, that loads with the same bits."""

from __future__ import annotations

import tempfile
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.formats.convert import Converted, write_folder
from mistral.formats.folder import Folder
from mistral.formats.layouts import NATIVE
from mistral.formats.mapped_tensors import Progress
from mistral.formats.weights import Stored, WeightFiles
from mistral.parameters import parameters
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mistral.model import Transformer


def save(model: Transformer, folder: str | PathLike[str], source: Path | None = None) -> Converted:
    """Write the weights of a model as they are, each in its own dtype. The folder appears when it is complete.

    Args:
        model: anywhere, but with weights that are not quantized.
        folder: one that is not there yet, or is empty.
        source: the folder that it was loaded from, whose tokenizer and templates are copied; None: only weights and
            shape are written.

    Raises:
        UsageError: quantized weights: `convert --quant` writes those.
        ConvertError: the folder cannot be written.
    """
    state = dict(model.named_parameters())
    expected = parameters(model.args)
    if missing := [name for name in expected if name not in state]:
        raise UsageError(
            f"the weights of this model are quantized ({missing[0]} and others): save what it was loaded from, "
            "or write a quantized folder with `convert --quant`"
        )
    dtypes = {name: str(state[name].dtype).removeprefix("torch.") for name in expected}
    weights = WeightFiles(
        (),
        {name: Stored(p.shape, dtypes[name], dtypes[name]) for name, p in expected.items()},
        {name: partial(_on_cpu, state[name].detach()) for name in expected},
    )
    with tempfile.TemporaryDirectory() as nothing:
        path = Path(nothing) if source is None else source
        found = Folder(path, NATIVE, NATIVE.config, {}, model.args, weights, notes=())
        return write_folder(found, folder, NATIVE.to)


def _on_cpu(tensor: Tensor, progress: Progress = None) -> Tensor:
    if progress is not None:
        progress(tensor.nbytes)
    return tensor.cpu()
