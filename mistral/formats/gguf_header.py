"""The header of a GGUF file: its metadata and where its tensors lie, without PyTorch.

A file is "GGUF", a version, two counts, key-value pairs, descriptions of tensors, and the tensors' bytes. Nothing in it
is trusted: whatever a broken or hostile file holds, memory stays below its size, and what is wrong is one GgufError.
Source: docs/gguf.md of ggml (versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from mistral.fast.ggml_types import REMOVED, TYPES, GgmlType
from mistral.util.english import some_names
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import regular

MAGIC = b"GGUF"
POINTER = b"vers"  # how the text begins that Git LFS leaves in a file's place
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors, where the file gives none
LONGEST = 200_000_000  # bytes of a header; those of the largest vocabularies have 20 million
MOST_KEYS, MOST_TENSORS = 2**14, 2**16
LONGEST_NAME = 2**16 - 1  # bytes
MOST_DIMENSIONS = 4

STRING, ARRAY, BOOL, FLOAT32 = 8, 9, 7, 6
# Numbers by GGUF's type: codes that `struct` and `array` share.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT32: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
U32, U64, FLOAT = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<f")


class GgufError(FormatError):
    """Not a complete GGUF file, or not one of a model of this family."""


@dataclass(frozen=True)
class StringArray:
    """An array of texts as it lies in the file: `count` times a length (8 bytes) and so many bytes of UTF-8."""

    key: str
    count: int
    raw: bytes

    def decode(self) -> list[str]:
        """The texts.

        Raises:
            GgufError: one of them is not UTF-8.
        """
        texts, at, raw = [], 0, self.raw
        try:
            for _ in range(self.count):
                (length,) = U64.unpack_from(raw, at)
                at += 8 + length
                texts.append(raw[at - length : at].decode("utf-8"))
        except UnicodeDecodeError:
            raise GgufError(f"text {len(texts)} of {short_repr(self.key)} is not UTF-8") from None
        return texts


Value = int | float | bool | str | StringArray | array  # type: ignore[type-arg]  # of numbers
Metadata = dict[str, Value]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file: its type, its shape (rows first), and the bytes of the file that it takes."""

    kind: GgmlType
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file holds, or several that belong together.

    Args:
        files: in order.
        metadata: of the first file.
        tensors: of all files by name, in the order in which they lie in them.
    """

    files: tuple[Path, ...]
    metadata: Metadata
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, or a folder holds a file that is named like one."""
    if path.is_dir():
        return any(path.glob("*.gguf"))
    try:
        with open(path, "rb", opener=regular) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> Gguf:
    """The headers of a model: of one file, of all that belong to a part of one, or of those in a folder.

    Raises:
        GgufError: no such file, several models in a folder, a part is missing, or a header is broken.
    """
    files = _parts(_only(path) if path.is_dir() else path)
    read = []
    for file in files:
        try:
            read.append(_read_one(file))
        except _Broken as error:
            raise GgufError(f"{file} is not a complete GGUF file: {error}") from None
        except OSError as error:
            raise GgufError(f"{file} cannot be read: {error.strerror}") from None
    metadata = read[0][0]
    tensors: dict[str, GgufTensor] = {}
    for number, (file, (meta, some)) in enumerate(zip(files, read, strict=True)):
        if meta.get("split.count", 1) not in (len(files), 0) or meta.get("split.no", number) != number:
            here = f"part {short_repr(meta.get('split.no'))} of {short_repr(meta.get('split.count'))}"
            raise GgufError(f"{file} is {here} by its contents: give parts the names that they were written with")
        for name, tensor in some.items():
            if name in tensors:
                raise GgufError(f"{short_repr(name)} is in {file.name} and in an earlier part")
            tensors[name] = tensor
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(files) > 1 and expected != len(tensors):
        raise GgufError(
            f"{files[0]} and its parts hold {len(tensors)} tensors, but {short_repr(expected)} were written"
        )
    return Gguf(files, metadata, tensors)


PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")


def _only(folder: Path) -> Path:
    """The model among the .gguf files of a folder: the first part, where it has several parts."""
    found = sorted(p for p in folder.glob("*.gguf") if not p.name.startswith("mmproj"))
    models = {match["stem"] if (match := PART.fullmatch(p.name)) else p.name: p for p in reversed(found)}
    if len(models) != 1:
        names = some_names([p.name for p in found])
        what = f"several models ({names}): give one file" if found else "no .gguf file"
        raise GgufError(f"{folder} holds {what}")
    return next(iter(models.values()))


def _parts(path: Path) -> tuple[Path, ...]:
    """The file, or all the parts of a model whose name is that of a part."""
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    total = int(match["total"])
    if not 1 <= int(match["number"]) <= total <= MOST_TENSORS:
        raise GgufError(f"{path.name} is a part that its own name rules out")
    parts = [path.with_name(f"{match['stem']}-{i:05}-of-{match['total']}.gguf") for i in range(1, total + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise GgufError(f"{len(missing)} of {total} parts are missing beside {path}: {missing[0]}")
    return tuple(parts)


# --- one file


class _Broken(Exception):
    """The reason alone."""


def _read_one(path: Path) -> tuple[Metadata, dict[str, GgufTensor]]:
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(24)
        if start[:4] == POINTER:
            raise _Broken("it is the pointer that Git LFS leaves in its place: run git lfs pull")
        if not start:
            raise _Broken("it is empty")
        if start[:4] != MAGIC:
            raise _Broken("it does not begin with GGUF")
        if len(start) < 24:
            raise _Broken(f"it has {size} bytes, and its counts alone take 24")
        version, tensors, keys = struct.unpack("<IQQ", start[4:])
        if version & 0xFFFF == 0:
            raise _Broken("its numbers are big-endian: convert it on the machine that wrote it")
        if version not in VERSIONS:
            raise _Broken(f"it has version {version}, and 2 and 3 are read: convert the model again")
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise _Broken(
                f"it declares {keys:,} keys and {tensors:,} tensors; "
                f"at most {MOST_KEYS:,} and {MOST_TENSORS:,} are read"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data, 24, min(size, len(data)))
            metadata = reader.metadata(keys)
            described = [reader.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {short_repr(alignment)}, which is no power of 2")
    base = -(-reader.at // alignment) * alignment
    return metadata, _placed(described, path, base, alignment, size)


_Described = tuple[str, GgmlType, tuple[int, ...], int]  # name, type, shape, bytes after the header


def _placed(described: list[_Described], path: Path, base: int, alignment: int, size: int) -> dict[str, GgufTensor]:
    """The tensors in the file's order, once it is sure that each lies in it and no two share a byte."""
    tensors: dict[str, GgufTensor] = {}
    at = base
    for name, kind, shape, offset in sorted(described, key=lambda one: one[3]):
        if name in tensors:
            raise _Broken(f"it has {short_repr(name)} twice")
        if offset % alignment:
            raise _Broken(f"{short_repr(name)} begins at byte {offset:,}, which is no multiple of {alignment}")
        begin = base + offset
        end = begin + math.prod(shape) // kind.elements * kind.nbytes
        if begin < at:
            raise _Broken(f"{short_repr(name)} begins inside the tensor before it")
        if end > size:
            raise _Broken(f"{short_repr(name)} ends at byte {end:,}, but it has {size:,}: fetch it again")
        tensors[name] = GgufTensor(kind, shape, path, begin, end)
        at = end
    return tensors


class _Reader:
    """A header from left to right, never past its end. What is read is named by the caller, for the errors."""

    def __init__(self, data: mmap.mmap, at: int, size: int) -> None:
        self.data, self.at, self.size = data, at, min(size, LONGEST)

    def metadata(self, count: int) -> Metadata:
        found: Metadata = {}
        for i in range(count):
            key = self.text(f"key {i}", LONGEST_NAME)
            if not key or key in found:
                raise _Broken(f"key {i} is {short_repr(key)}{' again' if key else ', empty'}")
            found[key] = self.value(key)
        return found

    def tensor(self) -> _Described:
        name = self.text("a tensor's name", LONGEST_NAME)
        what = f"tensor {short_repr(name)}"
        dimensions = self.u32(what)
        if dimensions > MOST_DIMENSIONS:
            raise _Broken(f"{what} has {dimensions} dimensions; at most {MOST_DIMENSIONS} are possible")
        shape = tuple(reversed([self.u64(what) for _ in range(dimensions)]))
        number, offset = self.u32(what), self.u64(what)
        if number not in TYPES:
            gone = f"{REMOVED[number]}, which no program reads any more" if number in REMOVED else "which is none"
            raise _Broken(f"{what} has type {number}, {gone}: convert the model again")
        kind = TYPES[number]
        if 0 in shape or math.prod(shape) >= 2**63:
            raise _Broken(f"the shape of {what} is {short_repr(list(shape))}, which no tensor has")
        row = shape[-1] if shape else 1
        if row % kind.elements:
            raise _Broken(f"{what} has rows of {row} weights, and {kind.name} comes in blocks of {kind.elements}")
        return name, kind, shape, offset

    def value(self, key: str) -> Value:
        what = f"the value of {short_repr(key)}"
        kind = self.u32(what)
        if kind == STRING:
            return self.text(what, self.size)
        if kind == ARRAY:
            inner, count = self.u32(what), self.u64(what)
            return self.strings(key, count) if inner == STRING else self.numbers(what, inner, count)
        if kind not in NUMBERS:
            raise _Broken(f"{what} has type {kind}, which is none")
        (number,) = self.numbers(what, kind, 1)
        if kind == BOOL:
            return bool(number)
        return _shortest(number) if kind == FLOAT32 else number

    def text(self, what: str, longest: int) -> str:
        raw = self.take(what, min(self.u64(what), 2**62))
        if len(raw) > longest:
            raise _Broken(f"{what} has {len(raw):,} bytes; at most {longest:,} are allowed")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Broken(f"{what} is not UTF-8 (byte {self.at - len(raw)})") from None

    def strings(self, key: str, count: int) -> StringArray:
        what, begin, at, data = f"the value of {short_repr(key)}", self.at, self.at, self.data
        if count > (self.size - at) // 8:  # each takes 8 bytes at least
            raise self.cut(what, count * 8)
        for _ in range(count):
            if at + 8 > self.size:
                raise self.cut(what, at + 8 - begin)
            at += 8 + U64.unpack_from(data, at)[0]
        return StringArray(key, count, self.take(what, at - begin))

    def numbers(self, what: str, kind: int, count: int) -> array:  # type: ignore[type-arg]
        if kind not in NUMBERS:
            raise _Broken(f"{what} is an array of type {kind}, which is not read")
        found = array(NUMBERS[kind])
        assert found.itemsize == struct.calcsize(f"<{found.typecode}")
        found.frombytes(self.take(what, count * found.itemsize))
        if sys.byteorder == "big":
            found.byteswap()
        if kind == BOOL and any(number > 1 for number in found):
            raise _Broken(f"{what} is neither true nor false")
        return found

    def u32(self, what: str) -> int:
        return U32.unpack(self.take(what, 4))[0]

    def u64(self, what: str) -> int:
        return U64.unpack(self.take(what, 8))[0]

    def take(self, what: str, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.cut(what, count)
        self.at += count
        return self.data[self.at - count : self.at]

    def cut(self, what: str, count: int) -> _Broken:
        where = f"byte {self.at:,} of {self.size:,} that {'are read' if self.size == LONGEST else 'there are'}"
        return _Broken(f"{what} would take {count:,} bytes from {where}")


def _shortest(number: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5, where a double would read 9.99999974737875e-06.

    So a shape equals one that was written in JSON, and nothing changes: arithmetic with it is in fp32.
    """
    raw = FLOAT.pack(number)
    for digits in range(1, 10):
        short = float(f"{number:.{digits}g}")
        try:
            if FLOAT.pack(short) == raw:
                return short
        except OverflowError:  # rounded up past the largest
            pass
    return number
