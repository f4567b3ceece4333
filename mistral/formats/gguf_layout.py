"""GGUF as a layout: shape, weights, tokenizer and chat templates in one file, or in the parts that it was split into.

Read and not written. What its keys and tensors mean is in gguf.py; rows are in Mistral's order already.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.formats import gguf
from mistral.formats.gguf_header import GgufError, Metadata, StringArray, is_gguf, read_gguf
from mistral.formats.gguf_tokenizer import special_ids
from mistral.formats.layout import Layout, ParamsError, Serving
from mistral.formats.weights import WeightFiles, WeightsError

# What follows from the file besides, among the metadata, whose own keys all have a dot.
TIED, NOTES = "tied", "notes"


class GgufLayout(Layout):
    """The layout of llama.cpp: a .gguf file, or a folder with one."""

    name = "gguf"
    title = "GGUF"
    config = ".gguf file"

    def has_config(self, path: Path) -> bool:
        return self.has_weights(path)

    def has_weights(self, path: Path) -> bool:
        return is_gguf(path) or (path.suffix == ".gguf" and path.is_file())

    def weight_sets(self, names: Collection[str]) -> list[tuple[str, ...]]:
        return []  # a repository of the hub has a file for each type, and does not say which is wanted

    def place(self, path: Path) -> Path:
        return _read(path).files[0]

    def read_config(self, path: Path) -> dict[str, Any]:
        found = _read(path)
        words = found.metadata.get("tokenizer.ggml.tokens")
        key = f"{found.metadata.get('general.architecture')}.vocab_size"
        size = {key: words.count} if isinstance(words, StringArray) else {}
        more = {TIED: gguf.is_tied(found.tensors), NOTES: gguf.ignored(found)}
        return {**size, **found.metadata, **_ids(found.metadata), **more}

    def to_args(self, raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
        metadata = {key: value for key, value in raw.items() if "." in key}
        try:
            args, notes = gguf.args_of(metadata, max_batch_size=max_batch_size, tied=raw[TIED])
        except GgufError as error:
            raise ParamsError(str(error)) from None
        return args, [*notes, *raw.get(NOTES, ())]

    def find_weights(self, path: Path) -> WeightFiles:
        try:
            return gguf.open_gguf(read_gguf(path))
        except GgufError as error:
            raise WeightsError(str(error)) from None

    def name_of(self, name: str) -> str:
        return gguf.name_of(name)

    def ignores(self, stored: str) -> bool:
        return gguf.to_mistral(stored) is None

    def plain(self, raw: dict[str, Any]) -> dict[str, Any]:
        # An array of the shape repeats one value for every layer, or the shape would have been refused.
        own = tuple(f"{arch}." for arch in gguf.ARCHITECTURES)
        shape = {key: v[0] for key, v in raw.items() if key.startswith(own) and isinstance(v, array) and v}
        return {key: value for key, value in raw.items() if isinstance(value, str | int | float)} | shape

    def window_rule(self, raw: dict[str, Any]) -> str:
        notes: list[str]
        _, notes = self.to_args(raw)
        return notes[0].partition(": ")[2]

    def serving(self, path: Path, args: ModelArgs, files: tuple[Path, ...]) -> Serving:
        return Serving("", "vLLM reads safetensors")


def _ids(metadata: Metadata) -> dict[str, int | list[int]]:
    """The ids of bos and of the ends of a sequence, as a config.json has them; none without a tokenizer."""
    try:
        special = special_ids(metadata)
    except GgufError:
        return {}
    ids: dict[str, int | list[int]] = {"bos_token_id": special.bos} if special.bos >= 0 else {}
    ends = sorted(special.ends)
    return ids | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def _read(path: Path) -> gguf.Gguf:
    try:
        return read_gguf(path)
    except GgufError as error:
        raise ParamsError(str(error)) from None
