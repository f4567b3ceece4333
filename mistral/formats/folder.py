"""What a folder holds, from its headers: layout, shape, weights; everything checked, no tensor read."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.args import ModelArgs
from mistral.fast.layout import stored_as
from mistral.formats import huggingface as hf
from mistral.formats.huggingface import find_hf_weights, has_hf_weights
from mistral.formats.mapped_tensors import Progress
from mistral.formats.mistral import FEW_BITS, ParamsError, find_weights, has_mistral_weights, read_object, to_args
from mistral.formats.releases import identify
from mistral.formats.weights import Reader, Stored, WeightFiles, WeightsError, check_tensors, file_names
from mistral.parameters import OUTPUT, parameters
from mistral.util.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

# The file that gives the shape, by layout.
CONFIGS = {"mistral": "params.json", "huggingface": "config.json"}


@dataclass(frozen=True)
class Folder:
    """A model on disk.

    Args:
        path: the folder.
        layout: "mistral" or "huggingface".
        source, raw: the file that gives the shape, params.json or config.json, and what it holds.
        args: the model's shape.
        weights: under Mistral's names and in Mistral's row order, whatever the layout.
        quant: "int8" or "int4" where the weights of products are stored in few bits, under the names of
            `layout.stored_as`; else None.
        notes: what was assumed or left aside, a sentence each.
    """

    path: Path
    layout: str
    source: str
    raw: dict[str, Any]
    args: ModelArgs
    weights: WeightFiles
    notes: tuple[str, ...]
    quant: str | None = None

    @property
    def tensors(self) -> dict[str, Stored]:
        """The tensors that there are, in the files' order."""
        return {name: self.weights.tensors[name] for name in self.weights.readers}

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(parameter.numel for parameter in parameters(self.args).values())


def read_folder(folder: str | PathLike[str], max_batch_size: int = 0) -> Folder:
    """Read what a folder says of itself, and check that its parts fit together.

    Where both layouts are there, Mistral's is taken, and a note says so.

    Raises:
        FormatError, ParamsError, WeightsError: no such folder, or what is wrong in it.
    """
    path = Path(folder)
    if not os.path.isdir(path):  # not Path.is_dir, which raises where a name is too long
        if os.path.isfile(path):
            raise FormatError(f"{path} is a file: give the folder that it is in")
        raise FormatError(f"no such folder: {path}")
    notes: list[str] = []
    layout = _layout(path, notes)
    source = CONFIGS[layout]
    raw = read_object(path / source)
    if layout == "mistral":
        args = to_args(raw, max_batch_size)
        weights = find_weights(path)
    else:
        args, assumed = hf.config_to_args(raw, max_batch_size)
        notes += assumed
        weights = find_hf_weights(path)
    args = _untied(args, weights, notes)
    quant = raw.get(FEW_BITS) if layout == "mistral" else None
    try:
        weights = _checked(weights, args, layout, source, quant)
    except WeightsError as error:
        _, mistakes = identify(args)
        hints = mistakes if layout == "mistral" else map(hf.in_their_words, mistakes)
        raise WeightsError("; ".join([str(error), *hints])) from None
    return Folder(path, layout, source, raw, args, weights, tuple(notes), quant)


def _untied(args: ModelArgs, weights: WeightFiles, notes: list[str]) -> ModelArgs:
    """The args without a tie where the files hold an output matrix: what is there is what was meant."""
    own = [name for name in (OUTPUT, "output.packed", hf.to_hf(OUTPUT)) if name in weights.tensors]
    if not args.tied_embeddings or not own:
        return args
    notes.append(f"the output is said to be tied to the embeddings, but the files hold {own[0]}, which was read")
    return replace(args, tied_embeddings=False)


def _checked(weights: WeightFiles, args: ModelArgs, layout: str, source: str, quant: str | None) -> WeightFiles:
    """The weights once they are known to be those of the shape, under Mistral's names and in Mistral's row order."""
    where = file_names(weights.files)
    if args.n_layers > len(weights.tensors):
        raise WeightsError(
            f"{source} makes n_layers {args.n_layers}, but {where} holds {len(weights.tensors)} tensors in all"
        )
    if layout == "mistral":
        shapes, dtypes = stored_shapes(args, quant)
        check_tensors(weights.tensors, shapes, where, source, dtypes)
        return weights
    return _as_mistral(weights, args, where, source)


def _layout(path: Path, notes: list[str]) -> str:
    params, config = (path / "params.json").exists(), (path / "config.json").exists()
    if params and (has_mistral_weights(path) or not (config and has_hf_weights(path))):
        if config and has_hf_weights(path):
            notes.append("the folder holds both layouts: Mistral's was read, Hugging Face's left aside")
        return "mistral"
    if config:
        return "huggingface"
    raise ParamsError(
        f"no params.json and no config.json in {path}: a model folder has one of them, weights and a tokenizer"
    )


def _as_mistral(
    weights: WeightFiles,
    args: ModelArgs,
    where: str,
    source: str,
) -> WeightFiles:
    """Weights in Hugging Face's layout, checked, under Mistral's names and in Mistral's row order."""
    stored = {name: t for name, t in weights.tensors.items() if hf.to_mistral(name) is not None}
    expected = parameters(args)
    names = {ours: hf.to_hf(ours) for ours in expected}
    # Under the files' own names: they are what an error names, and Mistral's names mean another order of rows.
    check_tensors(stored, {names[ours]: parameter.shape for ours, parameter in expected.items()}, where, source)
    place = {name: i for i, name in enumerate(weights.readers)}
    readers: dict[str, Reader] = {}
    for ours, name in sorted(names.items(), key=lambda pair: place[pair[1]]):
        heads = hf.heads_of(ours, args)
        reader = weights.readers[name]
        readers[ours] = reader if heads is None else partial(_reordered, reader, heads)
    return WeightFiles(weights.files, {ours: stored[name] for ours, name in names.items()}, readers)


def _reordered(reader: Reader, heads: int, progress: Progress = None) -> Tensor:
    return hf.rows_to_mistral(reader(progress), heads)


def stored_shapes(args: ModelArgs, quant: str | None) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors in files, with the dtypes of those that are no weights of any float's size."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, parameter in parameters(args).items():
        if quant is None or not parameter.quantized:
            shapes[name] = parameter.shape
        else:
            for stored, (sizes, dtype) in stored_as(parameter, quant).items():
                shapes[stored], dtypes[stored] = sizes, dtype
    return shapes, dtypes


BUNDLED = Path(__file__).parent.parent / "bundled"


def short(folder: Path) -> Path:
    """A folder as seen from here, where that is shorter."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
