"""Weights on disk: which files, what is in them (headers only), and tensors one at a time.

safetensors files and those of torch.save (`.pth`, `.bin`) are mapped, not read, so a tensor is copied at most once,
to its device and dtype. Nothing in a file is executed. PyTorch is imported by what needs it: a file of torch.save, and
reading a tensor.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mistral.formats.elsewhere import wrapped
from mistral.formats.mapped_tensors import Part, Progress
from mistral.formats.safetensors_header import HeaderError, read_header
from mistral.util.english import some_names
from mistral.util.errors import FormatError, printable, short_repr
from mistral.util.files import regular, stamp_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Dtypes of weights, by PyTorch's names: bytes of a number, and safetensors' name. Whole numbers: quantized weights.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1, "uint8": 1}
ITEMSIZE |= {"int32": 4, "int64": 8, "float8_e4m3fn": 1}
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8"}
CODES |= {"int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3"}
FLOATS = ("float64", "float32", "float16", "bfloat16")
NAMES = {code: name for name, code in CODES.items()}
GONE = "a link to a file that is gone: fetch it again"
PART = 2**29  # bytes of a file that are mapped together, where a tensor is not larger


class WeightsError(FormatError):
    """Weights that are missing, broken, or not those of the model described."""


class TensorTwice(WeightsError):
    """A tensor that is in two files.

    Args:
        message: what is wrong, and what to do.
        name: of the tensor.
        last: the name of the second file.
    """

    def __init__(self, message: str, name: str = "", last: str = "") -> None:
        super().__init__(message)
        self.name, self.last = name, last


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Args:
        shape: its sizes.
        dtype: PyTorch's name of it, one of ITEMSIZE; "" if weights cannot have it.
        dtype_name: the file's name of it.
        widened: whether the file holds blocks of few bits, from which a reader computes numbers of `dtype`.
        computed: how the file holds it, human-readable, where a reader computes the numbers, in fp32, from other
            tensors; "": they are there as they are.
    """

    shape: tuple[int, ...]
    dtype: str
    dtype_name: str
    widened: bool = False
    computed: str = ""

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of a dtype that weights can have."""
        return self.parameters * ITEMSIZE[self.dtype]


class Reader(Protocol):
    """A tensor that can be had: on the CPU, in its file's dtype; in at least fp32 where it is computed."""

    def __call__(self, progress: Progress = None) -> Tensor: ...


@runtime_checkable
class RowReader(Protocol):
    """A reader that can also give its tensor in stretches of rows, so that the whole of it is never in memory."""

    def stretches(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class InFile:
    """Reads a tensor that is in a file as it is."""

    part: Part
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: str

    def __call__(self, progress: Progress = None) -> Tensor:
        return self.part.tensor(self.begin, self.end, self.shape, self.dtype, progress)

    def numbers(self) -> list[float]:
        """Those of a small one, without torch; none of a dtype that has no floats of 2 or 4 bytes.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.part.path, "rb", opener=regular) as file:
            file.seek(self.begin)
            raw = file.read(self.end - self.begin)
        if self.dtype == "bfloat16":  # the upper half of a float32
            raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        code = {"bfloat16": "f", "float32": "f", "float16": "e"}.get(self.dtype)
        return [] if code is None else [number for (number,) in struct.iter_unpack(f"<{code}", raw)]


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder.

    Args:
        files: in order.
        tensors: what they hold, by name.
        readers: how to get each tensor, in the files' order; nothing is read before they are called.
    """

    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    readers: dict[str, Reader] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.files)

    def get(self, name: str, progress: Progress = None, exact: bool = False) -> Tensor:
        """One tensor, on the CPU, backed by the file's pages; with `progress` all of it is in memory already.

        Args:
            exact: as the reader computes it. False: rounded to the dtype that its header gives, if it is computed.
                Whoever rounds a weight to something else wants the exact one, so that it is rounded once.

        Raises:
            WeightsError: the file cannot be read, or has changed since its header was.
        """
        import torch

        tensor = self.read(lambda: self.readers[name](progress), name)
        return tensor if exact else tensor.to(getattr(torch, self.tensors[name].dtype))

    def stretches(self, name: str) -> Iterator[Tensor]:
        """One tensor as its reader computes it, in stretches of rows where it can give those, else whole.

        Raises:
            WeightsError: as `get`.
        """
        reader = self.readers[name]
        if not isinstance(reader, RowReader):
            yield self.get(name, exact=True)
            return
        try:
            yield from reader.stretches()
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{name} cannot be read: {error}") from None

    def read(self, reader: Callable[[], Tensor], name: str) -> Tensor:
        """What a reader of the tensor gives.

        Raises:
            WeightsError: as `get`.
        """
        try:
            return reader()
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{name} cannot be read: {error}") from None


def file_names(files: tuple[Path, ...]) -> str:
    """Files human-readable: the first one's name, and how many more."""
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def numbered_parts(folder: Path, stem: str, end: str = ".safetensors") -> tuple[Path, ...]:
    """The files of weights in parts, such as model-00001-of-00002.safetensors, in order; none where there are none.

    Raises:
        WeightsError: some are missing, or are of another set.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob(f"{stem}-*-of-*{end}"):
        match = re.fullmatch(stem + r"-(\d+)-of-(\d+)" + re.escape(end), path.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        return ()
    if len(found) > 1:
        raise WeightsError(f"{folder} mixes parts of several sets: {', '.join(f'of {n}' for n in sorted(found))}")
    ((total, parts),) = found.items()
    if strange := [path.name for number, path in parts.items() if not 1 <= number <= total]:
        raise WeightsError(f"{folder} has {strange[0]}, a part that its own name rules out")
    if len(parts) < total:
        lacking = next(i for i in range(1, total + 1) if i not in parts)
        raise WeightsError(f"{folder} has {len(parts)} of {total} parts of its weights: part {lacking} is missing")
    return tuple(parts[i] for i in range(1, total + 1))


def parts_among(names: Collection[str], stem: str, end: str = ".safetensors") -> tuple[str, ...]:
    """The numbered parts of a set of which all are among these names."""
    for name in sorted(names):
        if match := re.fullmatch(stem + r"-0*1-of-(\d{1,5})" + re.escape(end), name):
            total, width = int(match[1]), len(match[1])
            parts = tuple(f"{stem}-{number:0{width}}-of-{match[1]}{end}" for number in range(1, total + 1))
            if set(parts) <= set(names):
                return parts
    return ()


def open_safetensors(files: tuple[Path, ...]) -> WeightFiles:
    """The tensors of safetensors files, by the names in their headers; no tensor is read.

    Raises:
        WeightsError: a file that cannot be read, is not complete, or holds what another one holds too.
    """
    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    for path in files:
        try:
            stamp = stamp_of(path)
            entries = read_header(path)
        except HeaderError as error:
            raise WeightsError(f"{path} is not a complete safetensors file: {error}") from None
        except OSError as error:
            gone = f"it is {GONE}" if path.is_symlink() and not path.exists() else error.strerror
            raise WeightsError(f"{path} cannot be read: {gone}") from None
        part = Part(path, 0, 0, stamp)
        for name, entry in entries.items():
            if name in tensors:
                twice = f"{printable(name)} is in {path.name} and in an earlier part"
                raise TensorTwice(f"{twice}: remove the file that is not meant", name, path.name)
            dtype = NAMES.get(entry.dtype, "")
            tensors[name] = Stored(entry.shape, dtype, entry.dtype)
            if not dtype:
                continue  # refused by name before anything is read
            if entry.end - part.begin > PART:
                part = Part(path, entry.begin, entry.end, stamp)
            part.end = entry.end
            readers[name] = InFile(part, entry.begin, entry.end, entry.shape, dtype)
    return WeightFiles(files, tensors, readers)


def renamed(weights: WeightFiles, new: Callable[[str], str]) -> WeightFiles:
    """The same weights under other names; where two get the same one, the last is left."""
    tensors = {new(name): stored for name, stored in weights.tensors.items()}
    return WeightFiles(weights.files, tensors, {new(name): reader for name, reader in weights.readers.items()})


# What a model is inside of while it is trained on several devices, or compiled: transformers saves it without that.
WRAPPER = re.compile(r"(module\.|_orig_mod\.)+")


def unwrapped(weights: WeightFiles) -> WeightFiles:
    """Weights that were saved from within a wrapper, under the names that they have without it."""
    if not all(WRAPPER.match(name) for name in weights.tensors):
        return weights
    return renamed(weights, lambda name: WRAPPER.sub("", name, count=1))


def check_tensors(
    found: dict[str, Stored],
    expected: dict[str, tuple[int, ...]],
    where: str,
    source: str,
    dtypes: dict[str, str] | None = None,
) -> None:
    """Compare what files hold with what the model needs, all of it, before anything is read.

    Args:
        where: the files, human-readable.
        source: the file that says what the model needs.
        dtypes: of tensors that are not floating-point numbers of any size.

    Raises:
        WeightsError: names, shapes or dtypes differ; the message names them.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        parts = [
            f"{what} {some_names(names)}" for what, names in (("lack", missing), ("hold unknown", unknown)) if names
        ]
        raise WeightsError(f"the weights in {where} {' and '.join(parts)}{wrapped(unknown, missing)}")
    for name, shape in expected.items():
        if found[name].shape != shape and 0 in found[name].shape:
            raise WeightsError(
                f"{name} in {where} has the shape {short_repr(list(found[name].shape))}: DeepSpeed saves such in "
                "ZeRO-3 without its weights: run the zero_to_fp32.py of its checkpoint"
            )
        if found[name].shape != shape:
            raise WeightsError(
                f"{source} makes {name} {list(shape)}, but in {where} it is {short_repr(list(found[name].shape))}: "
                "one of the two is from another model, and tensors are rarely wrong"
            )
        fitting = (dtypes[name],) if dtypes and name in dtypes else FLOATS
        if found[name].dtype not in fitting:
            raise WeightsError(
                f"{name} in {where} is {printable(found[name].dtype_name)}; "
                + (f"it must be {CODES[fitting[0]]}" if len(fitting) == 1 else f"weights are {_either(FLOATS)}")
            )


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def dtype_name(dtype: torch.dtype | None) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
