"""A `.pth` file before PyTorch opens it: an archive as torch.save writes them, of pickles that ask for tensors only.

PyTorch runs no code of such a file either, but unpacks whatever it holds, and makes whatever it asks for: a few bytes
may then take any amount of memory.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from pathlib import Path

from mistral.util.errors import plain

# What pickles of plain tensors ask for. That of other tensors is in it, so that those can be named for what they are.
TENSORS = re.compile(
    r"collections OrderedDict"
    r"|torch (\w+Storage|[a-z]+\d+\w*|bool|device|Size)"
    r"|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_(?!device)\w+"
    r"|torch\.serialization _get_layout"
)

LARGEST_PICKLE = 10_000_000  # bytes; a byte may become an object


class ArchiveError(ValueError):
    """Not an archive of plain tensors; the message is the reason alone."""


def check_archive(path: Path) -> None:
    """See that loading a file takes no more memory than the file.

    Raises:
        ArchiveError: it is no archive as torch.save writes them, or asks for something else than tensors.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
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
            raise ArchiveError(f"it asks for {plain(str(argument).replace(' ', '.'))}, which is code and was not run")
