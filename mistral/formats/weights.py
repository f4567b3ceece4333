"""Weights on disk: which files, what is in them (headers only), and tensors one at a time.

safetensors and `.pth` files are mapped, not read, so a tensor is copied at most once, to its device
and dtype. Nothing in a file is executed. PyTorch is imported by what needs it: a `.pth` file, and reading a tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mistral.formats.mapped_tensors import Part, Progress, touch
from mistral.formats.pth import check_archive
from mistral.formats.safetensors_header import HeaderError, read_header
from mistral.util.errors import plain, quoted
from mistral.util.files import read_small

if TYPE_CHECKING:
    from torch import Tensor

# Dtypes of weights, by PyTorch's names: bytes of a number, and safetensors' name. Whole numbers: weights in few bits.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1, "uint8": 1}
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8"}
FLOATS = ("float64", "float32", "float16", "bfloat16")
NAMES = {code: name for name, code in CODES.items()}
PART = 2**29  # bytes of a file that are mapped together, where a tensor is not larger

INDEX = "model.safetensors.index.json"


class WeightsError(ValueError):
    """Weights that are missing, broken, or not those of the model described."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Args:
        shape: its sizes.
        dtype: PyTorch's name of it, one of ITEMSIZE; None if weights cannot have it.
        dtype_name: the file's name of it.
    """

    shape: tuple[int, ...]
    dtype: str | None
    dtype_name: str

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of a dtype that weights can have."""
        assert self.dtype is not None
        return self.parameters * ITEMSIZE[self.dtype]


class Reader(Protocol):
    """A tensor that can be had: on the CPU, in its file's dtype."""

    def __call__(self, progress: Progress = None) -> Tensor: ...


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

    def get(self, name: str, progress: Progress = None) -> Tensor:
        """One tensor, on the CPU, backed by the file's pages; with `progress` all of it is in memory already.

        Raises:
            WeightsError: the file cannot be read, or has changed since its header was.
        """
        try:
            return self.readers[name](progress)
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{name} cannot be read: {error}") from None


def file_names(files: tuple[Path, ...]) -> str:
    """Files for people: the first one's name, and how many more."""
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def has_mistral_weights(folder: Path) -> bool:
    """Whether any file is named as weights in Mistral's layout are."""
    return any(folder.glob("consolidated*.safetensors")) or any(folder.glob("consolidated.*.pth"))


def has_hf_weights(folder: Path) -> bool:
    """Whether any file is named as weights in Hugging Face's layout are."""
    return any(folder.glob("model*.safetensors")) or (folder / INDEX).is_file()


def find_hf_weights(folder: Path) -> WeightFiles:
    """The weights of a folder in Hugging Face's layout, under Hugging Face's names.

    Raises:
        WeightsError: none, parts missing, an index that does not fit them, or a file that cannot be read.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        parts = _indexed_parts(index)
        if single.is_file() and single not in parts:  # transformers reads the one, vLLM the others
            raise WeightsError(
                f"{folder} holds {single.name} and an index of other files: remove those of another model"
            )
        return _check_index(open_safetensors(parts), index)
    if single.is_file():
        return open_safetensors((single,))
    parts = _numbered_parts(folder, "model")
    if parts:
        return open_safetensors(parts)
    old = next(folder.glob("pytorch_model*.bin"), None)
    advice = f"; {old.name} must be saved as safetensors first" if old else ""
    raise WeightsError(
        f"no weights in {folder}: expected model.safetensors, or model-00001-of-0000N.safetensors{advice}"
    )


def _indexed_parts(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of them in its own folder."""
    files = set(_weight_map(index).values())
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names {quoted(name)}, which is no safetensors file beside it")
        if not os.path.isfile(index.parent / name):  # not Path.is_file, which raises where a name is too long
            raise WeightsError(f"{index} names {quoted(name)}, which is missing")
    return tuple(index.parent / name for name in sorted(files))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(read_small(index).decode("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{index} is not an index of weights: fetch it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index} does not say which file holds which tensor: fetch it again")
    return found


def _check_index(weights: WeightFiles, index: Path) -> WeightFiles:
    lacking = [name for name in _weight_map(index) if name not in weights.tensors]
    if lacking:
        raise WeightsError(f"{index} promises {_some(lacking)}, which the files do not hold")
    return weights


def find_weights(folder: Path) -> WeightFiles:
    """The weights of a folder in Mistral's layout; safetensors are preferred where both are there.

    Raises:
        WeightsError: none, parts missing, or a file that cannot be read.
    """
    single = folder / "consolidated.safetensors"
    if single.is_file():
        return open_safetensors((single,))
    parts = _numbered_parts(folder, "consolidated")
    if parts:
        return open_safetensors(parts)
    pth = folder / "consolidated.00.pth"
    if pth.is_file():
        if (folder / "consolidated.01.pth").exists():
            raise WeightsError(f"{folder} holds a model split over several .pth files, which is not supported")
        return _open_pth(pth)
    raise WeightsError(
        f"no weights in {folder}: expected consolidated.safetensors, "
        "consolidated-00001-of-0000N.safetensors or consolidated.00.pth"
    )


def _numbered_parts(folder: Path, stem: str) -> tuple[Path, ...]:
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob(f"{stem}-*-of-*.safetensors"):
        match = re.fullmatch(stem + r"-(\d+)-of-(\d+)\.safetensors", path.name)
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


def open_safetensors(files: tuple[Path, ...]) -> WeightFiles:
    tensors: dict[str, Stored] = {}
    readers: dict[str, Reader] = {}
    for path in files:
        try:
            entries = read_header(path)
        except HeaderError as error:
            raise WeightsError(f"{path} is not a complete safetensors file: {error}") from None
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
        part = Part(path, 0, 0)
        for name, entry in entries.items():
            if name in tensors:
                raise WeightsError(f"{plain(name)} is in {path.name} and in an earlier part")
            dtype = NAMES.get(entry.dtype)
            tensors[name] = Stored(entry.shape, dtype, entry.dtype)
            if dtype is None:
                continue  # refused by name before anything is read
            if entry.end - part.begin > PART:
                part = Part(path, entry.begin, entry.end)
            part.end = entry.end
            readers[name] = partial(part.tensor, entry.begin, entry.end, entry.shape, dtype)
    return WeightFiles(files, tensors, readers)


def _open_pth(path: Path) -> WeightFiles:
    try:
        with path.open("rb") as file:
            complete = zipfile.is_zipfile(file)  # the directory of a zip file is its end
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not complete:
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
        tensors[name] = Stored(tuple(tensor.shape), dtype if dtype in ITEMSIZE else None, str(tensor.dtype))
    return WeightFiles((path,), tensors, {name: partial(_in_memory, tensor) for name, tensor in state.items()})


def _in_memory(tensor: Tensor, progress: Progress = None) -> Tensor:
    if progress is not None:
        touch(tensor)
        progress(tensor.nbytes)
    return tensor


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
        return f"it asks for {plain(code[1])}, which is code and was not run"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return plain(lines[0].strip(), 300) if lines else type(error).__name__


def check_tensors(
    found: dict[str, Stored],
    expected: dict[str, tuple[int, ...]],
    where: str,
    source: str,
    dtypes: dict[str, str] | None = None,
) -> None:
    """Compare what files hold with what the model needs, all of it, before anything is read.

    Args:
        where: the files, for people.
        source: the file that says what the model needs.
        dtypes: of tensors that are not floating-point numbers of any size.

    Raises:
        WeightsError: names, shapes or dtypes differ; the message names them.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        parts = [f"{what} {_some(names)}" for what, names in (("lack", missing), ("hold unknown", unknown)) if names]
        raise WeightsError(f"the weights in {where} {' and '.join(parts)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise WeightsError(
                f"{source} makes {name} {list(shape)}, but in {where} it is {quoted(list(found[name].shape))}: "
                "one of the two is from another model, and tensors are rarely wrong"
            )
        fitting = (dtypes[name],) if dtypes and name in dtypes else FLOATS
        if found[name].dtype not in fitting:
            raise WeightsError(
                f"{name} in {where} is {plain(found[name].dtype_name)}; "
                + (f"it must be {CODES[fitting[0]]}" if len(fitting) == 1 else f"weights are {_either(FLOATS)}")
            )


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _some(names: list[str]) -> str:
    shown = ", ".join(map(plain, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
