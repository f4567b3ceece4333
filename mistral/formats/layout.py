"""What a layout is: a way in which a model lies on disk. Each is a class in a file of its own, and a row of `LAYOUTS`.

Knows names, shapes and the order of rows; reads no tensor itself. Runs without torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mistral.args import ModelArgs
from mistral.formats.weights import Reader, WeightFiles
from mistral.util.errors import FormatError
from mistral.util.files import read_limited
from mistral.util.parsed import not_json, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Keys that say how long the training sequences were; and one of a config.json that was converted: values that nothing
# had said and that had to be written, by key.
LENGTHS = ("max_position_embeddings", "max_seq_len", "llama.context_length", "mistral3.context_length")
ASSUMED = "assumed_values"


class ParamsError(FormatError):
    """A params.json or config.json that is missing, broken, or describes another kind of model."""


class Serving(NamedTuple):
    """How vLLM serves a folder: its flags; and why the folder must be converted first, if it must."""

    flags: str
    convert_first: str | None


class Layout(ABC):
    """A way in which a model lies on disk.

    A path is a folder, or a single file for a layout that has the whole model in one. Names of tensors and the order of
    their rows are Mistral's outside of a layout; a layout translates.

    Args:
        name: in reports and packs, and the key in LAYOUTS.
        title: human-readable; "layout" follows it in a sentence.
        to: what `convert --to` calls it; None: it is read and not written.
        config: the file that gives the shape.
        index: the file that says which file holds which tensor, where several are written; None: there is none.
        indexes: such files as they are read.
        shards: whether large models are written as several files.
        vision: names of tensors of the part that reads images; None: it has none.
        adapter: the form of adapters that goes with it, a key of `adapter.FORMS`; None: there is none.
    """

    name: str
    title: str
    to: str | None = None
    config: str
    index: str | None = None
    indexes: tuple[str, ...] = ()
    shards = False
    vision: re.Pattern[str] | None = None
    adapter: str | None = None

    # --- what is there

    def has_config(self, path: Path) -> bool:
        """Whether something gives the shape in this layout."""
        return (path / self.config).exists()

    @abstractmethod
    def has_weights(self, path: Path) -> bool:
        """Whether any file is named as weights in this layout are."""

    @abstractmethod
    def weight_sets(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """The sets of files that would be complete weights, best first, of a folder with these names."""

    # --- reading

    def place(self, path: Path) -> Path:
        """The folder or file that a model is: a file where a layout has all in one, whatever else is beside it."""
        return path

    def read_config(self, path: Path) -> dict[str, Any]:
        """What gives the shape, as it is.

        Raises:
            ParamsError: it cannot be read, or is no object of JSON.
        """
        return read_object(path / self.config)

    @abstractmethod
    def to_args(self, raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
        """The shape, and what was assumed, a sentence each.

        Raises:
            ParamsError: another kind of model, a key that is missing, refused or unknown, or a value that cannot be.
        """

    @abstractmethod
    def find_weights(self, path: Path) -> WeightFiles:
        """The weights under the layout's own names, rows in its own order.

        Raises:
            WeightsError: none, parts missing, or a file that cannot be read.
        """

    def name_of(self, name: str) -> str:
        """The layout's name of a tensor that Mistral calls `name`."""
        return name

    def ignores(self, stored: str) -> bool:
        """Whether a tensor of this name in its files is known, and of no use here."""
        return False

    def about_ignored(self, weights: WeightFiles, args: ModelArgs) -> list[str]:
        """Notes on tensors that it ignores and that contradict the shape, a sentence each."""
        return []

    def fix(self, name: str, args: ModelArgs, reader: Reader) -> Reader:
        """The reader of a tensor that Mistral calls `name`, with rows in Mistral's order."""
        return reader

    def quantization(self, raw: dict[str, Any]) -> str | None:
        """ "int8" or "int4" where the matrices are stored quantized as `fast.layout` has it."""
        return None

    def in_its_words(self, text: str) -> str:
        """A sentence about ModelArgs, with the layout's names of what it is about."""
        return text

    def plain(self, raw: dict[str, Any]) -> dict[str, Any]:
        """What gives the shape, as it goes into JSON."""
        return raw

    def unused(self, raw: dict[str, Any]) -> list[str]:
        """Keys of what gives the shape that change no number, and that another layout may have no place for."""
        return []

    # --- writing

    def file_name(self, number: int, total: int) -> str:
        """The name of a file of weights, `number` from 1 to `total`."""
        raise NotImplementedError

    def unfix(self, name: str, args: ModelArgs, weight: Tensor) -> Tensor:
        """A tensor with rows in Mistral's order, as this layout has it."""
        return weight

    def describe(
        self,
        args: ModelArgs,
        raw: dict[str, Any],
        *,
        dtype: torch.dtype,
        quant: str | None,
        tokens: Callable[[], dict[str, int]],
    ) -> tuple[dict[str, Any], list[str]]:
        """What `config` will hold, and what was assumed.

        Args:
            raw: what gave the shape of the source, in whatever layout: keys that are valid here too are kept.
            dtype: of most weights.
            quant: "int8" or "int4" where matrices are written quantized.
            tokens: gives bos_token_id and eos_token_id.
        """
        raise NotImplementedError

    # --- reporting

    def window_rule(self, raw: dict[str, Any]) -> str:
        """Where the windows are from."""
        for key in ("sliding_window", "_sliding_window"):
            if key in raw:
                return f"given {'' if key == 'sliding_window' else f'as {key} '}in {self.config}"
        return f"absent from {self.config}, which means none"

    def odd(self, raw: dict[str, Any]) -> list[str]:
        """What is odd about the file that gives the shape, a sentence each."""
        return []

    @abstractmethod
    def serving(self, path: Path, args: ModelArgs, files: tuple[Path, ...]) -> Serving:
        """How vLLM serves it."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ParamsError: the file cannot be read, or holds no JSON object.
    """
    try:
        text = read_limited(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise ParamsError(f"{path} {not_json(error)}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


def trained_length(raw: dict[str, Any]) -> int | None:
    """How long the training sequences were, by any layout's key; None where it is not given, or was assumed."""
    assumed = raw.get(ASSUMED)
    assumed = assumed if isinstance(assumed, dict) else {}
    # What somebody has changed since then is not assumed any more.
    given = (raw.get(key) for key in LENGTHS if key not in assumed or assumed[key] != raw.get(key))
    return next((n for n in given if type(n) is int and n > 0), None)


def beyond_training(trained: int | None, longest: int) -> str | None:
    """A sentence where sequences are longer than those that a model was trained on; None where they are not.

    Args:
        trained: tokens of the longest that it was trained on, by its files; None: they do not say.
        longest: tokens of the longest here.
    """
    if trained is None or longest <= trained:
        return None
    return (
        f"the model was trained on sequences of up to {trained:,} tokens, and the longest here has {longest:,}: "
        "beyond that it may fail for that reason alone"
    )
