"""A file of torch.save before PyTorch opens it: an archive as that writes them, of pickles that ask for tensors only.

PyTorch runs no code of such a file either, but unpacks whatever it holds, and makes whatever it asks for: a few bytes
may then take any amount of memory.
"""

from __future__ import annotations

import os
import pickletools
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.formats.mapped_tensors import Progress, touch
from mistral.formats.weights import ITEMSIZE, Reader, Stored, WeightFiles, WeightsError
from mistral.util.errors import FormatError, printable
from mistral.util.files import LFS, POINTER, regular

if TYPE_CHECKING:
    from torch import Tensor


# What pickles of plain tensors ask for. That of other tensors is in it, so that those can be named for what they are.
TENSORS = re.compile(
    r"collections OrderedDict"
    r"|torch (\w+Storage|[a-z]+\d+\w*|bool|device|Size)"
    r"|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(?!device)\w+"
    r"|torch\.serialization _get_layout"
)

OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # how files of torch.save began: a pickle of one large number
LARGEST_PICKLE = 10_000_000  # bytes; a byte may become an object


class ArchiveError(FormatError):
    """Not an archive of plain tensors; the message is the reason alone."""


def check_archive(path: Path) -> None:
    """See that loading a file takes no more memory than the file.

    Raises:
        ArchiveError: it is no archive as torch.save writes them, or asks for something else than tensors.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
                if packed or sum(record.file_size for record in records) > size:
                    raise ArchiveError("it is compressed, which torch.save does not do")
                for record in records:
                    # In any case, and all of them: PyTorch and zipfile differ in which one they take.
                    if record.filename.lower().endswith(".pkl"):
                        if record.file_size > LARGEST_PICKLE:
                            raise ArchiveError(
                                f"its pickle has {record.file_size:,} bytes, as none of plain tensors has"
                            )
                        _check_pickle(archive.read(record))
        except (ArchiveError, OSError):
            raise
        except Exception as error:  # zipfile and pickletools raise what broken bytes happen to make of them
            raise ArchiveError(f"it is broken ({type(error).__name__}): fetch it again") from None


def _check_pickle(pickled: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not TENSORS.fullmatch(str(argument)):
            raise ArchiveError(
                f"it asks for {printable(str(argument).replace(' ', '.'))}, which is code and was not run"
            )


def open_archives(paths: tuple[Path, ...]) -> WeightFiles:
    """The tensors of one file, or of several that hold different ones (Mixtral's first release; numbered parts).

    Raises:
        WeightsError: a file cannot be read, holds something else than tensors, or part of a tensor.
    """
    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    place: dict[str, Path] = {}
    for path in paths:
        part = open_pth(path)
        if twice := [name for name in part.tensors if name in tensors]:
            raise WeightsError(
                f"{path.parent} holds tensors that are split over several {path.suffix} files, which is not supported: "
                f"{printable(twice[0])} is in {place[twice[0]].name} and in {path.name}"
            )
        tensors |= part.tensors
        readers |= part.readers
        place |= dict.fromkeys(part.tensors, path)
    return WeightFiles(paths, tensors, readers)


def open_pth(path: Path) -> WeightFiles:
    """The tensors of a file of torch.save's, by name, each mapped until it is read. Nothing in the file is executed.

    Raises:
        WeightsError: it cannot be read, is not complete, or holds more than tensors.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            complete = zipfile.is_zipfile(file)  # the directory of a zip file is its end
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not complete:
        with open(path, "rb", opener=regular) as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise WeightsError(f"{path} cannot be read: {LFS}")
        if start.startswith(OLD):
            raise WeightsError(f"{path} has torch.save's form from before PyTorch 1.6: load it there and save it again")
        raise WeightsError(f"{path} is cut short, or was not written by torch.save (1.6 or newer): fetch it again")
    import torch

    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is an error
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises what its unpickler and zip reader happen to raise
        raise WeightsError(f"{path} cannot be loaded as plain tensors: {_reason(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise WeightsError(f"{path} does not hold tensors by name, and nothing else")
    tensors = {}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = Stored(tuple(tensor.shape), dtype if dtype in ITEMSIZE else "", str(tensor.dtype))
    return WeightFiles((path,), tensors, {name: partial(_in_memory, tensor) for name, tensor in state.items()})


def _in_memory(tensor: Tensor, progress: Progress = None) -> Tensor:
    """The tensor as others are: row after row, without gaps. A view with other strides becomes a copy."""
    plain = tensor.contiguous()
    if progress is not None:
        touch(plain)
        progress(plain.nbytes)
    return plain


def _is_plain(value: object) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _reason(error: Exception) -> str:
    """What torch.load objects to, in one line, and without its advice to trust the file."""
    text = str(error)
    if code := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {printable(code[1])}, which is code and was not run"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return printable(lines[0].strip(), 300) if lines else type(error).__name__
