"""Folders out: a model into the other layout, into safetensors, or into another dtype.

One tensor at a time, so memory is about one tensor's; into a folder beside the destination, which is
renamed once everything is in it, so what is at the destination is complete. Knows nothing about models.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from mistral.fast.layout import QUANTS, stored_as
from mistral.formats import huggingface as hf
from mistral.formats.folder import Folder, read_folder
from mistral.formats.hub import locate
from mistral.formats.huggingface import HF_FILES, HF_KEYS, INDEX, LENGTH, config_json
from mistral.formats.mistral import FEW_BITS, params_json
from mistral.formats.tokenizers import load_tokenizer
from mistral.formats.weights import dtype_name, file_names
from mistral.formats.writer import SHARD, PlannedTensor, as_json, header, write_text, write_weights
from mistral.parameters import parameters
from mistral.tokenizer import TokenizerError
from mistral.util import memory
from mistral.util.errors import ConvertError
from mistral.util.files import folder_atomic

LAYOUTS = {"mistral": "mistral", "hf": "huggingface"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What is carried along, as it is, into either layout, and what only Hugging Face's has a use for.
TOKENIZER_FILES = (
    "tokenizer.model*",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)


@dataclass(frozen=True)
class Converted:
    """A folder that was written.

    Args:
        path: the folder.
        layout: "mistral" or "huggingface".
        files: its weights.
        nbytes: of the weights.
        dtypes: of the weights.
        notes: what was assumed, rounded or left aside, a sentence each.
    """

    path: Path
    layout: str
    files: tuple[str, ...]
    nbytes: int
    dtypes: tuple[torch.dtype, ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line: what was written, and where."""
        layout = "Mistral's layout" if self.layout == "mistral" else "Hugging Face's layout"
        dtypes = "/".join(dtype_name(d) for d in self.dtypes)
        names = file_names(tuple(map(Path, self.files)))
        return f"{self.path}: {layout}, {memory.as_text(self.nbytes)} of {dtypes} in {names}"


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | str | None = None,
    quant: str | None = None,
    shard_size: int = SHARD,
) -> Converted:
    """Write the model of one folder into another; bit for bit the same weights unless a dtype is given.

    Args:
        src: a folder in either layout, or a hub id (see `hub.locate`).
        dst: a folder that is not there yet, or is empty.
        to: "mistral" or "hf", which may be the layout that src has.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        quant: "int8" or "int4" rounds the weights of products, in Mistral's layout, for this library alone.
        shard_size: most bytes of tensors in a file of Hugging Face's layout; a larger tensor gets its own.

    Raises:
        ConvertError: the two folders, the layout, the dtype or the disk do not allow it; or a value
            would become infinite.
        ValueError: another subclass, if src is not a model; see `read_folder`.
    """
    _layout_and_dtype(to, dtype, quant)  # before a folder is looked for
    return write_folder(read_folder(locate(src)), dst, to, dtype=dtype, quant=quant, shard_size=shard_size)


def write_folder(
    folder: Folder,
    dst: str | PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | str | None = None,
    quant: str | None = None,
    shard_size: int = SHARD,
) -> Converted:
    """`convert` for a folder that is read already, or whose weights never were in files.

    Args:
        folder: what to write; its tokenizer is taken from its path.
        dst, to, dtype, quant, shard_size: as in `convert`.

    Raises:
        ConvertError: as in `convert`.
    """
    target = _layout_and_dtype(to, dtype, quant)
    if folder.quant is not None:
        raise ConvertError(f"the weights of {folder.path} have been rounded to {folder.quant}: convert what they were")
    place = _destination(folder.path, Path(dst))
    notes = list(folder.notes)
    files = _plan(folder, to, target, quant, shard_size)
    tensors = [tensor for part in files.values() for tensor in part]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    described = _describe(folder, to, tensors, quant, notes)
    patterns = TOKENIZER_FILES + (HF_FILES if to == "hf" else ())
    carried = sorted({path for pattern in patterns for path in folder.path.glob(pattern) if path.is_file()})
    if to == "hf" and carried and not (folder.path / "tokenizer.json").is_file():
        notes.append("there is no tokenizer.json to carry along: transformers' AutoTokenizer may want one")
    rest = sum(path.stat().st_size for path in carried) + sum(len(text) for text in described.values())
    _check_disk(place, nbytes + rest + sum(len(header(part)) for part in files.values()), notes)
    try:
        with folder_atomic(place) as work:
            notes += write_weights(folder, work, files, to)
            if len(files) > 1:
                names = {tensor.name: file for file, part in files.items() for tensor in part}
                write_text(work / INDEX, as_json({"metadata": {"total_size": nbytes}, "weight_map": names}))
            for path in carried:
                shutil.copyfile(path, work / path.name)  # what a link leads to, with the modes of a new file
            for name, text in described.items():  # last, because no folder without them is taken for a model
                write_text(work / name, text)
            read_folder(work)
    except OSError as error:
        raise ConvertError(f"{place} was not written: {error.strerror or error}") from error
    dtypes = Counter(tensor.dtype for tensor in tensors)
    return Converted(Path(dst), LAYOUTS[to], tuple(files), nbytes, tuple(dtypes), tuple(notes))


def _layout_and_dtype(to: str, dtype: torch.dtype | str | None, quant: str | None) -> torch.dtype | None:
    if to not in LAYOUTS:
        raise ConvertError(f"no layout is called {to!r}: {' or '.join(LAYOUTS)}")
    if quant is not None and quant not in QUANTS:
        raise ConvertError(f"quant {quant!r} is not one of {', '.join(QUANTS)}")
    if quant is not None and to != "mistral":
        raise ConvertError("rounded weights are written in Mistral's layout, for this library alone: --to mistral")
    target = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and target not in DTYPES.values():
        raise ConvertError(f"dtype {str(dtype)!r} is not one of {', '.join(DTYPES)}")
    return target


# --- where to


def _destination(src: Path, dst: Path) -> Path:
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
    folder: Folder, to: str, target: torch.dtype | None, quant: str | None, shard_size: int
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
        tensor = PlannedTensor(source, hf.to_hf(source.name) if to == "hf" else source.name, source.shape, dtype)
        if to == "hf" and parts[-1] and size + tensor.nbytes > shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    for part in parts:
        # So that every tensor is aligned to its own dtype. What is in few bits comes in multiples of four bytes.
        part.sort(key=lambda tensor: -4 if tensor.quant else -tensor.dtype.itemsize)
    if to == "mistral":
        return {"consolidated.safetensors": parts[0]}
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


# --- what else is in a folder


def _describe(
    folder: Folder, to: str, tensors: list[PlannedTensor], quant: str | None, notes: list[str]
) -> dict[str, str]:
    """The file that gives the shape: its name and its text."""
    raw = folder.raw
    given = (raw.get("max_position_embeddings"), raw.get("max_seq_len"))
    length = next((n for n in given if type(n) is int and n > 0), None)
    if to == "mistral":
        return {"params.json": as_json(params_json(folder.args, length) | ({FEW_BITS: quant} if quant else {}))}
    if length is None:
        length = LENGTH
        notes.append(f"how long texts may be is not said; config.json has max_position_embeddings {length}")
    (dtype, _), *_ = Counter(tensor.dtype for tensor in tensors).most_common()
    kept = {} if folder.layout == "mistral" else {key: raw[key] for key in HF_KEYS if raw.get(key) is not None}
    if "bos_token_id" not in kept or "eos_token_id" not in kept:
        kept = {**_special_tokens(folder, notes), **kept}
    return {"config.json": as_json(config_json(folder.args, length, dtype, kept))}


def _special_tokens(folder: Folder, notes: list[str]) -> dict[str, int]:
    try:
        tokenizer = load_tokenizer(folder.path, folder.args.vocab_size)
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    except TokenizerError as error:
        notes.append(f"config.json has bos_token_id 1 and eos_token_id 2, as all releases do: {error}")
        return {"bos_token_id": 1, "eos_token_id": 2}
