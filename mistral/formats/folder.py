"""What a folder holds, from its headers: layout, shape, weights; everything checked, no tensor read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.fast.layout import SYMMETRIC, stored_as
from mistral.formats.adapter import adapters_inside, base_of, is_adapter
from mistral.formats.broken import broken_notes
from mistral.formats.elsewhere import ADAPTER, kind_of
from mistral.formats.layout import Layout, ParamsError
from mistral.formats.layouts import LAYOUTS, find_layout
from mistral.formats.quantized import ACTIVATIONS
from mistral.formats.releases import identify
from mistral.formats.weights import GONE, Stored, WeightFiles, WeightsError, check_tensors, file_names
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter, parameters
from mistral.util.english import counted, some_names
from mistral.util.errors import FormatError, printable
from mistral.util.files import unwritten
from mistral.util.memory import as_text

OLDER = "its 4-bit weights have no minima, as int4 was at first: convert the model that they were made from again"
BESIDE = "a LoRA adapter is in the folder too, which only --adapter with the same folder uses"


@dataclass(frozen=True)
class Folder:
    """A model on disk.

    Args:
        path: the folder; a file where the layout has the whole model in one.
        layout: a row of LAYOUTS.
        source, raw: the file that gives the shape, such as params.json, and what it holds.
        args: the model's shape.
        weights: under Mistral's names and in Mistral's row order, whatever the layout.
        quant: "int8", "int4" or `SYMMETRIC` where the matrices are stored quantized, under the names of
            `fast.layout.stored_as`; else None. Older folders have a tied table as it was: see `has_quantized`.
        notes: what was assumed or ignored, a sentence each.
        own_words: the folder of an adapter whose tokenizer and templates stand in the place of the model's; None: none.
        own_template: that of an adapter whose chat template alone does; None: none.
    """

    path: Path
    layout: Layout
    source: str
    raw: dict[str, Any]
    args: ModelArgs
    weights: WeightFiles
    notes: tuple[str, ...]
    quant: str | None = None
    own_words: Path | None = None
    own_template: Path | None = None

    @property
    def words(self) -> Path:
        """Where its tokenizer is."""
        return self.path if self.own_words is None else self.own_words

    @property
    def templates(self) -> Path:
        """Where its chat templates are."""
        return self.words if self.own_template is None else self.own_template

    @property
    def tensors(self) -> dict[str, Stored]:
        """The tensors that there are, in the files' order."""
        return {name: self.weights.tensors[name] for name in self.weights.readers}

    def has_quantized(self, parameter: Parameter) -> bool:
        """Whether a weight is stored quantized here."""
        return self.quant is not None and parameter.quantized and parameter.name not in self.weights.tensors

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(parameter.numel for parameter in parameters(self.args).values())


def read_folder(folder: str | PathLike[str], max_batch_size: int = 0) -> Folder:
    """Read what a folder says of itself, and check that its parts fit together.

    Where several layouts are there, the first in LAYOUTS is read, and a note says so.

    Raises:
        FormatError, ParamsError, WeightsError: no such folder, or what is wrong in it.
    """
    path = Path(folder)
    if not os.path.exists(path):  # not Path.exists, which raises where a name is too long
        raise FormatError(nothing_at(path))
    try:
        layout, notes = find_layout(path)
        path = layout.place(path)
        raw = layout.read_config(path)
        args, assumed = layout.to_args(raw, max_batch_size)
        weights = layout.find_weights(path)
    except (ParamsError, WeightsError) as error:
        raise type(error)(f"{error}{_what_else(path)}") from None
    weights, aside = _without(weights, layout)
    aside += layout.about_ignored(weights, args)
    args, tied = _untied(args, weights, layout)
    quant = layout.quantization(raw)
    try:
        weights = _checked(weights, args, layout, quant)
    except WeightsError as error:
        _, mistakes = identify(args)
        mistakes = [*_other_heads(weights, args, layout), *mistakes]
        raise WeightsError("; ".join([str(error), *map(layout.in_its_words, mistakes)])) from None
    source = path.name if path.is_file() else layout.config
    older = [OLDER] if quant == SYMMETRIC else []
    broken = [*broken_notes(path), *_unread(path, weights), *_holes(weights), *([BESIDE] if is_adapter(path) else [])]
    return Folder(path, layout, source, raw, args, weights, (*notes, *assumed, *aside, *tied, *older, *broken), quant)


def _unread(path: Path, weights: WeightFiles) -> list[str]:
    """A note on files that are named as those of the weights are, and are none of them: parts that no index names, or
    beside a whole file."""
    used = {file.name for file in weights.files}
    if not path.is_dir() or not used:
        return []
    stem, end = re.match(r"[a-z_]*", min(used)), Path(min(used)).suffix
    named = re.compile(rf"{stem[0] if stem else ''}([-.][0-9].*)?{re.escape(end)}")
    others = [path / name for name in sorted(os.listdir(path)) if named.fullmatch(name) and name not in used]
    if not others:
        return []
    return [f"weights that are not read: {file_names(tuple(others))}, beside {file_names(weights.files)}"]


def _holes(weights: WeightFiles) -> list[str]:
    """A note on weights that nobody wrote: what fetches a file may take its room first, and then not end."""
    holes = {file: size for file in weights.files if (size := unwritten(file))}
    if not holes:
        return []
    return [
        f"{printable(file_names(tuple(holes)))}: {as_text(sum(holes.values()))} were never written, and are read as "
        "zeros: a download that has not ended, most likely; fetch it again"
    ]


def nothing_at(path: str | PathLike[str]) -> str:
    """That there is nothing at a path, in a sentence: no file where a name is that of one, else no folder."""
    files = (".gguf", ".safetensors", ".pth")
    return f"no such {'file' if str(path).lower().endswith(files) else 'folder'}: {path}"


def with_window(folder: Folder, window: int | None) -> Folder:
    """The same model with another sliding window, and a note on the one that it had.

    Raises:
        ArgsError: a window that cannot be.
    """
    had = folder.args.window_text
    args = replace(folder.args, sliding_window=window)
    note = f"sliding window {args.window_text}: as requested, in the place of {had}"
    kept = (said for said in folder.notes if not said.startswith("sliding window "))
    return replace(folder, args=args, notes=(note, *kept))


def _what_else(path: Path) -> str:
    """What there is in the place of weights that are read here, to go behind a message; "" for nothing."""
    if any(layout.has_weights(path) for layout in LAYOUTS.values()):
        return ""
    found = kind_of(entry.name for entry in os.scandir(path)) if os.path.isdir(path) else kind_of((path.name,))
    if found is None:
        return _no_files(path) or adapters_inside(path)
    base = base_of(path)
    return f"; there is {found}" + ("" if base is None else f"; its base is {base}")


def _no_files(path: Path) -> str:
    """What is named as weights are and is no file, to go behind a message; "" for nothing."""
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        there = path / name
        if name.endswith((".safetensors", ".pth", ".bin")) and not there.is_file():
            what = GONE if there.is_symlink() else "a folder" if there.is_dir() else "a pipe or a device"
            return f"; {printable(name)} is there, and is {what}"
    return ""


def _without(weights: WeightFiles, layout: Layout) -> tuple[WeightFiles, list[str]]:
    """The weights without those of the part that reads images and scales of activations; a note on each kind."""
    seeing = [name for name in weights.tensors if layout.vision is not None and layout.vision.fullmatch(name)]
    scales = [name for name in weights.tensors if name not in set(seeing) and ACTIVATIONS.fullmatch(name)]
    notes = []
    if seeing:
        what = f"{counted(len(seeing), 'tensor')} of the part that reads images ({some_names(seeing)})"
        notes.append(f"left aside: {what}: this is the text model alone")
    if scales:
        what = f"{counted(len(scales), 'tensor')} of scales for activations ({some_names(scales)})"
        notes.append(f"left aside: {what}: activations, keys and values are not quantized here")
    gone = {*seeing, *scales}
    tensors = {name: stored for name, stored in weights.tensors.items() if name not in gone}
    readers = {name: reader for name, reader in weights.readers.items() if name not in gone}
    return WeightFiles(weights.files, tensors, readers), notes


def _untied(args: ModelArgs, weights: WeightFiles, layout: Layout) -> tuple[ModelArgs, list[str]]:
    """The args without a tie where the files hold an output matrix, and a note: what is there is what was meant."""
    own = [layout.name_of(n) for n in (OUTPUT, "output.packed") if layout.name_of(n) in weights.tensors]
    if not args.tied_embeddings or not own:
        return args, []
    note = f"the output is said to be tied to the embeddings, but the files hold {own[0]}, which was read"
    return replace(args, tied_embeddings=False), [note]


def _checked(weights: WeightFiles, args: ModelArgs, layout: Layout, quant: str | None) -> WeightFiles:
    """The weights once they are known to be those of the shape, under Mistral's names and in Mistral's row order."""
    where = file_names(weights.files)
    if adapter := [name for name in weights.tensors if ".lora_" in name]:
        what = f"a LoRA adapter, not a model: {ADAPTER}"
        raise WeightsError(f"the weights in {where} hold {some_names(adapter)}: {what}")
    if args.n_layers > len(weights.tensors):
        raise WeightsError(
            f"{layout.config} makes n_layers {args.n_layers}, but {where} holds {len(weights.tensors)} tensors in all"
        )
    shapes, dtypes = stored_shapes(args, quant, as_it_was=layout.name_of(EMBEDDINGS) in weights.tensors)
    names = {ours: layout.name_of(ours) for ours in shapes}
    stored = {name: t for name, t in weights.tensors.items() if not layout.ignores(name)}
    # Under the files' own names: they are what an error names, and Mistral's names mean another order of rows.
    check_tensors(stored, {names[ours]: shape for ours, shape in shapes.items()}, where, layout.config, dtypes)
    place = {name: i for i, name in enumerate(weights.readers)}
    in_order = sorted(names, key=lambda ours: place[names[ours]])
    readers = {ours: layout.fix(ours, args, weights.readers[names[ours]]) for ours in in_order}
    return WeightFiles(weights.files, {ours: stored[name] for ours, name in names.items()}, readers)


def _other_heads(weights: WeightFiles, args: ModelArgs, layout: Layout) -> list[str]:
    """A hint where the matrices of attention fit heads of another width: some programs leave head_dim out."""
    q, k = (weights.tensors.get(layout.name_of(f"layers.0.attention.{name}.weight")) for name in ("wq", "wk"))
    if q is None or k is None or q.shape == (args.n_heads * args.head_dim, args.dim):
        return []
    wide = q.shape[0] // args.n_heads
    if q.shape != (args.n_heads * wide, args.dim) or k.shape != (args.n_kv_heads * wide, args.dim):
        return []
    return [f"the matrices fit heads of {wide}: is head_dim {wide} missing?"]


def stored_shapes(
    args: ModelArgs, quant: str | None, as_it_was: bool = False
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors in files, with the dtypes of those that are no weights of any float's size.

    Args:
        as_it_was: whether a table that is tied is not quantized, as in older folders.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, parameter in parameters(args).items():
        if quant is None or not parameter.quantized or (parameter.tied and as_it_was):
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
