"""The header of a safetensors file: what is in the file and where, without mapping it and without PyTorch.

A file is 8 bytes of length (little-endian), that many bytes of JSON, and the tensors' bytes. The JSON of a header
has one form, and only that form is read: memory stays that of the header, whatever a broken or hostile file holds.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mistral.util.errors import FormatError, short_repr
from mistral.util.files import LFS, POINTER, regular

LONGEST = 100_000_000  # bytes of JSON; the safetensors library has the same limit
# Bits of a number, by safetensors' names. Others may come; their tensors are known by where they begin and end.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class HeaderError(FormatError):
    """Not the header of a complete safetensors file; the message is the reason alone."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: safetensors' name of its dtype, its shape, and the bytes of the file that it takes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order in which they lie in it.

    Raises:
        HeaderError: the header is broken, or tensors and file do not cover each other byte for byte.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == POINTER[:8]:
            raise HeaderError(LFS)
        if len(start) < 8:
            raise HeaderError(f"it has {size} bytes, and the length of its header alone takes 8")
        if length > LONGEST and start.lstrip().startswith(b"<"):
            raise HeaderError("it is a web page, as of a download that failed: fetch it again")
        if length > LONGEST:
            raise HeaderError(f"its header would take {length:,} bytes, and at most {LONGEST:,} are allowed")
        raw = file.read(min(length, size))  # a length that is wrong costs no memory
    if len(raw) < length:
        raise HeaderError(f"its header takes {length:,} bytes, but it ends after {len(raw):,} of them")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(f"its header is not UTF-8 at byte {8 + error.start}") from None
    return _tiled(_entries(_Reader(text), 8 + length), 8 + length, size)


def _entries(reader: _Reader, data: int) -> dict[str, Entry]:
    """Every tensor, checked on its own; `data` is where the tensors' bytes begin."""
    entries = {}
    for name in reader.members("its header"):
        if name == "__metadata__":
            for _ in reader.members(name):
                reader.string(f"a value in {name}")
        else:
            entries[name] = _entry(reader, name, data)
    reader.end()
    return entries


def _entry(reader: _Reader, name: str, data: int) -> Entry:
    dtype, shape, offsets = None, None, None
    for key in reader.members(short_repr(name)):
        if key == "dtype":
            dtype = reader.string(f"the dtype of {short_repr(name)}")
        elif key == "shape":
            shape = reader.whole_numbers(f"the shape of {short_repr(name)}")
        elif key == "data_offsets":
            offsets = reader.whole_numbers(f"data_offsets of {short_repr(name)}")
        else:
            raise HeaderError(f"{short_repr(name)} has {short_repr(key)}, which no tensor has")
    if dtype is None or shape is None or offsets is None:
        raise HeaderError(f"{short_repr(name)} lacks its dtype, its shape or its data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"data_offsets of {short_repr(name)} are {short_repr(list(offsets))}, not a begin and an end")
    begin, end = offsets
    if math.prod(n for n in shape if n) >= 2**63:
        raise HeaderError(f"the shape of {short_repr(name)} is larger than any file")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise HeaderError(
            f"{short_repr(name)} has {end - begin:,} bytes, which does not fit {dtype} of shape "
            f"{short_repr(list(shape))}"
        )
    return Entry(dtype, shape, data + begin, data + end)


def _tiled(entries: dict[str, Entry], data: int, size: int) -> dict[str, Entry]:
    """The entries in the file's order, once it is sure that they cover it without a gap and without sharing a byte."""
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = data
    for name, entry in entries.items():
        if entry.begin < at:
            raise HeaderError(f"{short_repr(name)} begins inside the tensor before it")
        if entry.begin > at:
            raise HeaderError(f"the {entry.begin - at:,} bytes before {short_repr(name)} belong to no tensor")
        at = entry.end
    if at > size:
        raise HeaderError(f"its tensors end at byte {at:,}, but it has {size:,}: it was cut short, fetch it again")
    if at < size:
        raise HeaderError(f"its tensors end at byte {at:,}, but it has {size:,}: the rest belongs to no tensor")
    return entries


class _Reader:
    """The JSON of a header, from left to right: objects, strings and lists of whole numbers; nothing else.

    What is read is named by the caller, for the errors.
    """

    SPACE = re.compile(r"[ \t\n\r]*")
    LIST = re.compile(r"\[([0-9, \t\n\r]{0,400})\]")
    NUMBER = re.compile(r"[ \t\n\r]*(0|[1-9][0-9]{0,18})[ \t\n\r]*")
    DECODER = json.JSONDecoder()

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def members(self, what: str) -> Iterator[str]:
        """The names in an object, one after the other; the caller reads each value before it asks for the next."""
        if not self._takes("{"):
            raise self._error(f"{what} is no object")
        names: set[str] = set()
        more = not self._takes("}")
        while more:
            name = self.string(f"a name in {what}")
            if name in names:
                raise HeaderError(f"{what} has {short_repr(name)} twice")
            names.add(name)
            if not self._takes(":"):
                raise self._error(f"no value follows {short_repr(name)}")
            yield name
            more = self._takes(",")
            if not more and not self._takes("}"):
                raise self._error(f"{what} does not end")

    def string(self, what: str) -> str:
        if not self._next('"'):
            raise self._error(f"{what} is no text")
        try:
            value, self.at = self.DECODER.raw_decode(self.text, self.at)
            value.encode("utf-8")  # half of a pair of surrogates is no text
        except ValueError:
            raise self._error(f"{what} is no text") from None
        return value

    def whole_numbers(self, what: str) -> tuple[int, ...]:
        found = self.LIST.match(self.text, self.at) if self._next("[") else None
        if found is None:
            raise self._error(f"{what} is no list of whole numbers")
        self.at = found.end()
        words = found[1].split(",") if found[1].strip() else []
        numbers = [self.NUMBER.fullmatch(word) for word in words]
        if not all(numbers):
            raise self._error(f"{what} is no list of whole numbers")
        return tuple(int(number[1]) for number in numbers if number)

    def end(self) -> None:
        if not self._next("") or self.at < len(self.text):
            raise self._error("something follows the end of its header")

    def _takes(self, char: str) -> bool:
        found = self._next(char)
        self.at += found
        return found

    def _next(self, char: str) -> bool:
        space = self.SPACE.match(self.text, self.at)
        assert space is not None  # it matches nothing at all
        self.at = space.end()
        return self.text.startswith(char, self.at)

    def _error(self, reason: str) -> HeaderError:
        return HeaderError(f"{reason} (character {self.at} of the header)")
