"""Folders out: a model into the other layout, into safetensors, or into another dtype.

One tensor at a time, so memory is about one tensor's; into a folder beside the destination, which is
renamed once everything is in it, so what is at the destination is complete. Knows nothing about models.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from mistral.fast.layout import QUANTS, stored_as
from mistral.formats.adapter import read_adapter
from mistral.formats.beside import about_names, describe, for_transformers, not_carried, tokenizer_of
from mistral.formats.broken import require_whole
from mistral.formats.folder import Folder, read_folder, with_window
from mistral.formats.hub import locate
from mistral.formats.layout import Layout
from mistral.formats.layouts import NATIVE, WRITABLE
from mistral.formats.merge import merge_into
from mistral.formats.tokenizers import JSON, MORE_TEMPLATES, TEMPLATE, chat_templates, tokenizer_files
from mistral.formats.unpack import GENERATION, unpacked
from mistral.formats.weights import dtype_name, file_names
from mistral.formats.writer import SHARD, PlannedTensor, as_json, header, write_text, write_weights
from mistral.parameters import parameters
from mistral.special_tokens import CONFIG
from mistral.tokenizer import Tokenizer
from mistral.util import memory
from mistral.util.arguments import path_of, require_integer, require_kind
from mistral.util.dtypes import full_name
from mistral.util.errors import ConvertError
from mistral.util.files import folder_atomic

# From a folder to how much each column of its weights counts, by their names, and a note.
Calibrate = Callable[[Folder], tuple[Mapping[str, torch.Tensor], str]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What is carried along, as it is, into either layout: with the tokenizer, which may be an adapter's, and of the model.
OF_WORDS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*")
OF_MODEL = (GENERATION, "SYSTEM_PROMPT.txt", "LICEN[CS]E*")


@dataclass(frozen=True)
class Converted:
    """A folder that was written.

    Args:
        path: the folder.
        layout: a row of LAYOUTS.
        files: its weights.
        nbytes: of the weights.
        dtypes: of the weights.
        notes: what was assumed, rounded or ignored, a sentence each.
    """

    path: Path
    layout: Layout
    files: tuple[str, ...]
    nbytes: int
    dtypes: tuple[torch.dtype, ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line: what was written, and where."""
        dtypes = "/".join(dtype_name(d) for d in self.dtypes)
        names = file_names(tuple(map(Path, self.files)))
        return f"{self.path}: {self.layout.title} layout, {memory.as_text(self.nbytes)} of {dtypes} in {names}"


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | str | None = None,
    quant: str | None = None,
    adapter: str | PathLike[str] | None = None,
    shard_size: int = SHARD,
    sliding_window: str | int | None = "auto",
    calibrate: Calibrate | None = None,
    instruct: bool = False,
) -> Converted:
    """Write the model of one folder into another; bit for bit the same weights unless a dtype is given.

    Args:
        src: a folder in either layout, a GGUF file, or a hub id (see `hub.locate`).
        dst: a folder that is not there yet, or is empty.
        to: a layout, one of WRITABLE ("mistral" or "hf"); it may be the one that src has.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        quant: "int8" or "int4" rounds the weights of products, in Mistral's layout, for this library alone.
        adapter: a LoRA adapter to merge into the weights (see `adapter.read_adapter`), rounded once to what is written.
        shard_size: most bytes of tensors in a file of Hugging Face's layout; a larger tensor gets its own.
        sliding_window: a number, or None for none, to be written in the place of what src says; "auto" keeps that.
        calibrate: gives how much each column of a weight counts in int4, see `loader.calibration`; None: all the same.
        instruct: whether src is for conversations, where neither a chat template nor its name says so.

    Raises:
        FormatError: a file of src is not what its name says; see `broken`.
        ConvertError: the two folders, the layout, the dtype or the disk do not allow it; or a value
            would become infinite.
        ValueError: another subclass, if src is not a model; see `read_folder`.
    """
    _layout_and_dtype(to, dtype, quant)  # before a folder is looked for
    found = read_folder(locate(src))
    if not isinstance(sliding_window, str):
        found = with_window(found, sliding_window)
    return write_folder(
        found,
        dst,
        to,
        dtype=dtype,
        quant=quant,
        adapter=adapter,
        shard_size=shard_size,
        calibrate=calibrate,
        instruct=instruct,
    )


def write_folder(
    folder: Folder,
    dst: str | PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | str | None = None,
    quant: str | None = None,
    adapter: str | PathLike[str] | None = None,
    shard_size: int = SHARD,
    calibrate: Calibrate | None = None,
    instruct: bool = False,
) -> Converted:
    """`convert` for a folder that is read already, or whose weights never were in files.

    Args:
        folder: what to write; its tokenizer is taken from its path.
        dst, to, dtype, quant, adapter, shard_size, calibrate, instruct: as in `convert`.

    Raises:
        FormatError, ConvertError: as in `convert`.
    """
    dst = path_of("the folder to write", dst, ConvertError)
    require_integer("shard_size", shard_size, 1, error=ConvertError)
    require_kind("calibrate", calibrate, Callable | None, "a function of the folder", ConvertError)
    layout, target = _layout_and_dtype(to, dtype, quant)
    if folder.quant is not None:
        raise ConvertError(
            f"the weights of {folder.path} are already quantized to {folder.quant}: convert what they were made from"
        )
    if adapter is not None:
        asked = quant or (None if target is None else dtype_name(target))
        folder = merge_into(folder, read_adapter(adapter), asked)
    place = destination(folder.path, dst)
    require_whole(folder.path, ", to convert without")
    tokenizer, about = tokenizer_of(folder)
    notes = [*folder.notes, *about]
    files = _plan(folder, layout, target, quant, shard_size)
    tensors = [tensor for part in files.values() for tensor in part]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if target is None and quant is None and any(tensor.widened for tensor in folder.tensors.values()):
        notes.append("blocks of few bits are written as the float32 numbers that they stand for: --dtype rounds them")
    described = describe(folder, layout, tensors, quant, tokenizer, notes)
    notes += about_names(folder, dst, layout)
    beside = _beside(folder, layout, described, tokenizer, notes, instruct)
    _check_disk(place, nbytes + beside.nbytes + sum(len(header(part)) for part in files.values()), notes)
    columns: Mapping[str, torch.Tensor] = {}
    if calibrate is not None:
        columns, of_text = calibrate(folder)
        notes.append(of_text)
    try:
        with folder_atomic(place) as work:
            notes += write_weights(folder, work, files, layout, columns)
            _write_index(work, layout, files)
            beside.write(work)  # last, because no folder without them is taken for a model
            read_folder(work)
    except OSError as error:
        raise ConvertError(f"{place} was not written: {error.strerror or error}") from error
    dtypes = Counter(tensor.dtype for tensor in tensors)
    return Converted(dst, layout, tuple(files), nbytes, tuple(dtypes), tuple(notes))


@dataclass(frozen=True)
class _Beside:
    """The small files of a folder that is written.

    Args:
        carried: to be copied as they are, by the names they get.
        unpacked: contents that were a part of another file, by name.
        texts: that were made, by name.
    """

    carried: Mapping[str, Path]
    unpacked: Mapping[str, bytes]
    texts: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        copied = sum(path.stat().st_size for path in self.carried.values())
        return copied + sum(map(len, self.unpacked.values())) + sum(len(t.encode()) for t in self.texts.values())

    def write(self, folder: Path) -> None:
        copy_files(self.carried, folder)
        for name, content in self.unpacked.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        for name, text in self.texts.items():
            write_text(folder / name, text)


def _beside(
    folder: Folder,
    layout: Layout,
    texts: dict[str, str],
    tokenizer: Tokenizer | None,
    notes: list[str],
    instruct: bool,
) -> _Beside:
    """What comes beside the weights: `texts`, and what a tokenizer and conversations need; notes are added to."""
    unpack, lost = unpacked(folder.words, tokenizer)
    notes += lost
    if folder.own_template is not None:  # which comes before one in tokenizer_config.json
        texts = texts | {TEMPLATE: chat_templates(folder.own_template)["default"].text}
    if layout is not NATIVE and JSON not in unpack:
        texts = for_transformers(folder, tokenizer, notes, instruct) | texts
    carried = {name: path for name, path in _carried(folder).items() if path.name not in texts}
    if folder.own_template is not None:  # and behind one of this name
        carried.pop(f"{MORE_TEMPLATES}/default.jinja", None)
    notes += not_carried(folder, carried, set(texts))
    return _Beside(carried, unpack, texts)


def _layout_and_dtype(to: str, dtype: torch.dtype | str | None, quant: str | None) -> tuple[Layout, torch.dtype | None]:
    if to not in WRITABLE:
        raise ConvertError(f"no layout is called {to!r}: {' or '.join(WRITABLE)}")
    layout = WRITABLE[to]
    if quant is not None and quant not in QUANTS:
        raise ConvertError(f"quant {quant!r} is not one of {', '.join(QUANTS)}")
    if quant is not None and layout is not NATIVE:
        raise ConvertError(
            f"quantized weights are written in {NATIVE.title} layout, for this library alone: --to {NATIVE.to}"
        )
    target = DTYPES.get(full_name(dtype)) if isinstance(dtype, str) else dtype
    if dtype is not None and target not in DTYPES.values():
        raise ConvertError(f"dtype {str(dtype)!r} is not one of {', '.join(DTYPES)}")
    return layout, target


def _carried(folder: Folder) -> dict[str, Path]:
    """The files that are copied as they are, by their names in the destination."""
    return dict(sorted((_matching(folder.path, OF_MODEL) | files_of_words(folder.words)).items()))


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder, by the names they get there: what a link leads to, with the modes of a new file."""
    for name, path in files.items():
        copy = folder / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def files_of_words(folder: Path) -> dict[str, Path]:
    """The tokenizers and chat templates of a folder, and what is said of them, by their names; none of a file."""
    return _matching(folder, OF_WORDS) | {path.name: path for path in tokenizer_files(folder)}


def _matching(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    paths = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


# --- where to


def destination(src: Path, dst: Path) -> Path:
    """Where the folder will be, without links, once it is sure that nothing is there."""
    try:
        origin, place = src.resolve(), dst.resolve()
        if place == origin:
            raise ConvertError(f"{dst} is the folder to convert: give another one")
        if origin in place.parents:
            raise ConvertError(f"{dst} is inside {src}, the folder to convert: give one beside it")
        if os.path.isdir(place):
            if any(place.iterdir()):
                raise ConvertError(f"{dst} is there already and not empty: give another folder, or remove it first")
        elif os.path.lexists(place):
            raise ConvertError(f"{dst} is a file: give a folder that is not there yet")
        if not os.path.isdir(place.parent):
            raise ConvertError(f"no such folder: {place.parent}, in which to make {place.name}")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConvertError(f"{dst} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return place


def _check_disk(place: Path, needed: int, notes: list[str]) -> None:
    left = sorted(path.name for path in place.parent.glob(f".{glob.escape(place.name)}.*.partial"))
    remains = f"{' and '.join(left)} in {place.parent}, left by a killed run or still being written"
    if left:
        notes.append(remains)
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        advice = f" (there is {remains})" if left else ""
        raise ConvertError(
            f"{place} needs {memory.as_text(needed)}, but its disk has {memory.as_text(free)} free: "
            f"free some, or give a folder on another disk{advice}"
        )


# --- weights


def _plan(
    folder: Folder, layout: Layout, target: torch.dtype | None, quant: str | None, shard_size: int
) -> dict[str, list[PlannedTensor]]:
    """The files to write, by name, and what goes into each."""
    parts: list[list[PlannedTensor]] = [[]]
    size = 0
    for source in parameters(folder.args).values():
        dtype = target or getattr(torch, folder.weights.tensors[source.name].dtype)
        if quant is not None and source.quantized:
            for name, (sizes, code) in stored_as(source, quant).items():
                parts[-1].append(PlannedTensor(source, name, sizes, getattr(torch, code), quant))
            continue
        tensor = PlannedTensor(source, layout.name_of(source.name), source.shape, dtype)
        if layout.shards and parts[-1] and size + tensor.nbytes > shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    for part in parts:
        # So that every tensor is aligned to its own dtype. What is quantized comes in multiples of four bytes.
        part.sort(key=lambda tensor: -4 if tensor.quant else -tensor.dtype.itemsize)
    return {layout.file_name(i, len(parts)): part for i, part in enumerate(parts, 1)}


def _write_index(place: Path, layout: Layout, files: dict[str, list[PlannedTensor]]) -> None:
    """Write which file holds which tensor, where there are several and the layout says so."""
    if len(files) > 1 and layout.index is not None:
        total = sum(tensor.nbytes for part in files.values() for tensor in part)
        names = {tensor.name: file for file, part in files.items() for tensor in part}
        write_text(place / layout.index, as_json({"metadata": {"total_size": total}, "weight_map": names}))
