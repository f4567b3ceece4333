"""Files out: safetensors written at once or a piece at a time, and small JSON files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mistral import quant
from mistral.formats.folder import Folder
from mistral.formats.layout import Layout
from mistral.formats.weights import CODES, dtype_name
from mistral.parameters import Parameter
from mistral.util.errors import ConvertError
from mistral.util.progress import Bar
from mistral.util.threads import Sharing

SHARD = 5_000_000_000  # bytes of a file in Hugging Face's layout; Mistral's has one file
PIECE = 2**24  # weights written at a time


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: the weight that it is, its name in the layout, shape, dtype.

    Of a quantized weight, one of the parts that stand for it.
    """

    source: Parameter
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of tensors that are in memory, on any device, contiguous or not.

    Raises:
        OSError: it cannot be written, with the system's reason; the library's own error is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(found, path, metadata=dict(metadata or {}))
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error)) from None


def header(tensors: list[PlannedTensor]) -> bytes:
    """The start of a safetensors file: length (8 bytes, little-endian), then JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": CODES[dtype_name(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_weights(
    folder: Folder, work: Path, files: dict[str, list[PlannedTensor]], to: Layout, columns: Mapping[str, Tensor]
) -> list[str]:
    """Write all files, a tensor at a time.

    Args:
        columns: how much each column of a weight counts where it is quantized; see `quant.quantize`.
    """
    rounding, quantized, sharing = Rounding(), Quantized(folder, columns), Sharing()
    total = sum(tensor.nbytes for part in files.values() for tensor in part)
    with Bar("writing", "B", total) as bar:
        for name, part in files.items():
            with open(work / name, "wb") as file:
                file.write(header(part))
                for tensor in part:
                    with sharing():
                        if tensor.quant is not None:
                            rounded = quantized.part(tensor)
                            file.write(rounded.view(torch.uint8).numpy().data)
                            bar.update(rounded.nbytes)
                        else:
                            _write_tensor(file, tensor, folder, to, rounding, bar)
    return rounding.verdict()


class Quantized:
    """Weights that are quantized as they are written. The last one is kept: its parts follow each other."""

    def __init__(self, folder: Folder, columns: Mapping[str, Tensor]) -> None:
        self.folder, self.columns = folder, columns
        self.last: tuple[str, quant.QuantizedLinear] | None = None

    def part(self, tensor: PlannedTensor) -> Tensor:
        """The tensor of that name."""
        name = tensor.source.name
        assert tensor.quant is not None
        if self.last is None or self.last[0] != name:
            self.last = None  # let go before the next is read
            weight = self.folder.weights.get(name, exact=True)
            self.last = name, quant.quantize(tensor.source, weight, tensor.quant, columns=self.columns.get(name))
        return self.last[1].get_buffer(tensor.name.rpartition(".")[2])


def _write_tensor(
    file: BinaryIO, tensor: PlannedTensor, folder: Folder, to: Layout, rounding: Rounding, bar: Bar
) -> None:
    rows = max(1, PIECE // math.prod(tensor.shape[1:]))
    for piece in (piece for stretch in _stretches(tensor, folder, to) for piece in stretch.split(rows)):
        rounding.look(tensor, piece)
        written = piece.to(tensor.dtype).contiguous()
        if written.dtype != piece.dtype:
            rounding.compare(tensor, piece, written)
        if not rounding.infinite:  # else only counting goes on
            file.write(written.view(torch.uint8).numpy().data)
        bar.update(written.nbytes)


def _stretches(tensor: PlannedTensor, folder: Folder, to: Layout) -> Iterator[Tensor]:
    """A weight in the order of its layout, in stretches of rows; whole where the layout may move rows."""
    name = tensor.source.name
    if tensor.source.heads is None:
        yield from folder.weights.stretches(name)
    else:
        yield to.unfix(name, folder.args, folder.weights.get(name, exact=True))


class Rounding:
    """What a narrower dtype makes of the values: how many become infinite, how many zero; how many were no numbers."""

    def __init__(self) -> None:
        self.infinite = self.zero = self.values = self.broken = 0
        self.first = self.first_broken = ""
        self.dtype: torch.dtype | None = None

    def look(self, tensor: PlannedTensor, piece: Tensor) -> None:
        """Count the values that are no numbers, which are copied as they are."""
        if not all(math.isfinite(end) for end in piece.aminmax()):  # in which a NaN shows; takes no memory
            self.first_broken = self.first_broken or tensor.source.name
            self.broken += int((~piece.isfinite()).sum())

    def compare(self, tensor: PlannedTensor, before: Tensor, after: Tensor) -> None:
        self.dtype = after.dtype
        self.values += before.numel()
        if torch.promote_types(before.dtype, after.dtype) == after.dtype:
            return  # wider: exact
        infinite = int((after.isinf() & before.isfinite()).sum())
        if infinite and not self.infinite:
            self.first = tensor.source.name
        self.infinite += infinite
        self.zero += int(((after == 0) & (before != 0)).sum())

    def verdict(self) -> list[str]:
        """Notes, a sentence each.

        Raises:
            ConvertError: values became infinite.
        """
        notes = []
        if self.broken:
            are = "value is" if self.broken == 1 else "values are"
            notes.append(
                f"{self.broken:,} {are} NaN or infinite (the first in {self.first_broken}), and copied so: the weights "
                "are broken"
            )
        if self.dtype is None:
            return notes
        of = f"of {self.values:,} values"
        if self.infinite:
            largest = torch.finfo(self.dtype).max
            raise ConvertError(
                f"{self.infinite:,} {of} are beyond {dtype_name(self.dtype)}, which ends at {largest:g} "
                f"(the first in {self.first}): choose another --dtype"
            )
        if self.zero:
            are = "is so small that it is" if self.zero == 1 else "are so small that they are"
            notes.append(f"{self.zero:,} {of} {are} 0 in {dtype_name(self.dtype)}")
        return notes


def as_json(value: dict[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the line ends of Unix, on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")
