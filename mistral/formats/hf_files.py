"""The files of weights of a folder in Hugging Face's layout: one, or several with an index."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mistral.formats.weights import WeightFiles, WeightsError, numbered_parts, open_safetensors, some_names
from mistral.util.errors import short_repr
from mistral.util.files import read_limited

INDEX = "model.safetensors.index.json"


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
    parts = numbered_parts(folder, "model")
    if parts:
        return open_safetensors(parts)
    raise WeightsError(f"no weights in {folder}: expected model.safetensors, or model-00001-of-0000N.safetensors")


def _indexed_parts(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of them in its own folder."""
    files = set(_weight_map(index).values())
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names {short_repr(name)}, which is no safetensors file beside it")
        if not os.path.isfile(index.parent / name):  # not Path.is_file, which raises where a name is too long
            raise WeightsError(f"{index} names {short_repr(name)}, which is missing")
    return tuple(index.parent / name for name in sorted(files))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(read_limited(index).decode("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{index} is not an index of weights: fetch it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index} does not say which file holds which tensor: fetch it again")
    return found


def _check_index(weights: WeightFiles, index: Path) -> WeightFiles:
    lacking = [name for name in _weight_map(index) if name not in weights.tensors]
    if lacking:
        raise WeightsError(f"{index} promises {some_names(lacking)}, which the files do not hold")
    return weights
