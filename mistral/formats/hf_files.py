"""The files of weights of a folder in Hugging Face's layout: one, or several with an index; safetensors or older."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mistral.formats.pth import open_archives
from mistral.formats.weights import (
    TensorTwice,
    WeightFiles,
    WeightsError,
    numbered_parts,
    open_safetensors,
    parts_among,
)
from mistral.util.english import some_names
from mistral.util.errors import printable, short_repr
from mistral.util.files import read_limited
from mistral.util.parsed import KeyTwice, parse_json


@dataclass(frozen=True)
class Form:
    """A form of weights: one file, `stem + end`, or numbered parts, with an index or without."""

    stem: str
    end: str
    open: Callable[[tuple[Path, ...]], WeightFiles]

    @property
    def single(self) -> str:
        """The name of a file that holds all."""
        return self.stem + self.end

    @property
    def index(self) -> str:
        """The name of the file that says which part holds which tensor."""
        return f"{self.single}.index.json"

    def among(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """The sets of files that would be complete weights, best first, of a folder with these names."""
        single, parts = (self.single,), parts_among(names, self.stem, self.end)
        return [(self.index, *parts) if parts else (), single] if self.index in names else [single, parts]

    def there(self, folder: Path) -> bool:
        """Whether any file is named as one of these."""
        parts = any(folder.glob(f"{self.stem}-*{self.end}"))
        return parts or (folder / self.single).is_file() or (folder / self.index).is_file()


SAFETENSORS = Form("model", ".safetensors", open_safetensors)
FORMS = (SAFETENSORS, Form("pytorch_model", ".bin", open_archives))  # what torch.save wrote, before 2023
INDEX = SAFETENSORS.index


def has_hf_weights(folder: Path) -> bool:
    """Whether any file is named as weights in Hugging Face's layout are."""
    return any(form.there(folder) for form in FORMS)


def find_hf_weights(folder: Path) -> WeightFiles:
    """The weights of a folder in Hugging Face's layout, under Hugging Face's names; safetensors where both are there.

    Raises:
        WeightsError: none, parts missing, an index that does not fit them, or a file that cannot be read.
    """
    form = next((form for form in FORMS if form.there(folder)), SAFETENSORS)
    index, single = folder / form.index, folder / form.single
    if index.is_file():
        parts = _indexed_parts(index, form)
        if single.is_file() and single not in parts:  # transformers reads the one, vLLM the others
            raise WeightsError(
                f"{folder} holds {single.name} and an index of other files: remove those of another model"
            )
        try:
            return _check_index(form.open(parts), index)
        except TensorTwice as error:
            raise WeightsError(f"{str(error).rpartition(': ')[0]}: {_of_overlay(error, index)}") from None
    if single.is_file():
        return form.open((single,))
    parts = numbered_parts(folder, form.stem, form.end)
    if parts:
        return form.open(parts)
    names = " or ".join(f"{form.single}, or {form.stem}-00001-of-0000N{form.end}," for form in FORMS).rstrip(",")
    inside = _weights_inside(folder)
    there = f"; there are some in {some_names(inside)} there: give that folder" if inside else ""
    raise WeightsError(f"no weights in {folder}: expected {names}{there}")


def _weights_inside(folder: Path) -> list[str]:
    """The folders within one that have weights, as a training leaves checkpoints beside a config.json."""
    try:
        return sorted(place.name for place in folder.iterdir() if place.is_dir() and has_hf_weights(place))
    except OSError:
        return []


def _indexed_parts(index: Path, form: Form) -> tuple[Path, ...]:
    """The files that an index names, all of them in its own folder."""
    files = set(_weight_map(index).values())
    for name in files:
        if Path(name).name != name or not name.endswith(form.end):
            raise WeightsError(f"{index} names {short_repr(name)}, which is no {form.end[1:]} file beside it")
        if not os.path.isfile(index.parent / name):  # not Path.is_file, which raises where a name is too long
            raise WeightsError(f"{index} names {short_repr(name)}, which is missing")
    return tuple(index.parent / name for name in sorted(files))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = parse_json(read_limited(index).decode("utf-8"))["weight_map"]
    except KeyTwice as error:
        raise WeightsError(f"{index} {error}: mend it") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{index} is not an index of weights: fetch it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index} does not say which file holds which tensor: fetch it again")
    return found


def _of_overlay(error: TensorTwice, index: Path) -> str:
    """What to do where an index names files that hold a tensor twice, as those that lay a few tensors over others."""
    listed = _weight_map(index).get(error.name)
    if listed != error.last:
        said = "does not list it" if listed is None else f"gives {printable(listed)} for it"
        return f"{index.name} {said}, and transformers reads the last file: remove the one that is not meant"
    return (
        f"{index.name} gives the last file for it, which transformers reads: have it write one set of files "
        f"(AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(OTHER)), and give that"
    )


def _check_index(weights: WeightFiles, index: Path) -> WeightFiles:
    lacking = [name for name in _weight_map(index) if name not in weights.tensors]
    if lacking:
        raise WeightsError(f"{index} promises {some_names(lacking)}, which the files do not hold")
    return weights
