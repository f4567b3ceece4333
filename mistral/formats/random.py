"""Models of random weights in any shape: what speed and memory are can be tried without the real ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.args import ModelArgs
from mistral.formats.folder import Folder
from mistral.formats.layouts import NATIVE
from mistral.formats.mapped_tensors import Progress
from mistral.formats.weights import Reader, Stored, WeightFiles
from mistral.parameters import Parameter, parameters

if TYPE_CHECKING:
    from torch import Tensor

STD = 0.02
# Random numbers that are drawn once. Every tensor is these over and over, from a place of its own on; the length is
# odd, so that no row of a matrix is another one's copy.
BLOCK = 2**24 - 1
STEP = 1_000_003  # from one tensor's place to the next one's


def random_folder(args: ModelArgs, path: Path, dtype: str = "bfloat16", seed: int = 0) -> Folder:
    """A folder in Mistral's layout whose weights are drawn as they are read; nothing is on disk.

    Args:
        args: the shape.
        path: where what else belongs to the folder is.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        seed: the same one gives the same weights.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(BLOCK, generator=generator) * STD).to(getattr(torch, dtype))
    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    for i, (name, parameter) in enumerate(parameters(args).items()):
        tensors[name] = Stored(parameter.shape, dtype, dtype)
        readers[name] = partial(_weight, block, i * STEP % BLOCK, parameter)
    weights = WeightFiles((), tensors, readers)
    return Folder(path, NATIVE, NATIVE.config, {}, args, weights, notes=())


def _weight(block: Tensor, place: int, parameter: Parameter, progress: Progress = None) -> Tensor:
    """A matrix of the block's numbers from `place` on, or the ones that a norm begins with."""
    if parameter.role == "norm":
        return block.new_ones(parameter.shape)
    numbers = parameter.numel
    # A copy: a view would keep the rest of the last block in memory too.
    weight = block.roll(-place).repeat(-(-numbers // len(block)))[:numbers].clone().view(parameter.shape)
    if progress is not None:
        progress(weight.nbytes)
    return weight
