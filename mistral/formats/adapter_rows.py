"""Single rows of tables that an adapter has of its own: PEFT's trainable_token_indices, which trains some words alone.

The file holds the rows as they are after training (PEFT calls them a delta), the config says whose they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mistral.formats.weights import Stored
from mistral.util.errors import FormatError, printable, short_repr

KEY = "trainable_token_indices"
ROWS = re.compile(r"(?:base_model\.model\.)?(.+)\.token_adapter\.trainable_tokens_delta")
EMBED = "embed_tokens"


class AdapterError(FormatError):
    """An adapter that is broken, cannot be merged exactly, or belongs to another model."""


@dataclass(frozen=True)
class Rows:
    """Rows that stand in the place of some of a table.

    Args:
        name: of their tensor [rows, dim] in the adapter's file.
        ids: which row of the table each is.
    """

    name: str
    ids: tuple[int, ...]


def rows_by_module(tensors: dict[str, Stored], indices: Any, config: str) -> dict[str, Rows]:
    """The rows of an adapter, by the module that has the table.

    Args:
        tensors: of the adapter's file.
        indices: what the config has under KEY: a list for the embeddings, or an object with lists by module.
        config: the name of that file.

    Raises:
        AdapterError: the config and the file do not go together.
    """
    found = {match[1]: name for name in tensors if (match := ROWS.fullmatch(name))}
    if not indices:
        if found:
            raise AdapterError(f"the adapter holds {printable(next(iter(found.values())))}, but {config} has no {KEY}")
        return {}
    listed = indices if isinstance(indices, dict) else {EMBED: indices}
    for word, ids in listed.items():
        if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
            raise AdapterError(f"{config} has {KEY} {short_repr(ids)} for {short_repr(word)}; it must be a list of ids")
        if len(set(ids)) < len(ids):
            raise AdapterError(
                f"{config} has an id twice in {KEY} of {short_repr(word)}: which row counts is not known"
            )
    # An output that is tied to the embeddings has the same rows, which PEFT writes again and does not list.
    usual = next((ids for word, ids in listed.items() if _is_of(EMBED, word)), None)
    rows: dict[str, Rows] = {}
    for module, name in found.items():
        ids = next((ids for word, ids in listed.items() if _is_of(module, word)), usual)
        shape = tensors[name].shape
        if ids is None or len(shape) != 2 or shape[0] != len(ids):
            raise AdapterError(
                f"{printable(name)} is {short_repr(list(shape))}, but {config} has {KEY} of "
                f"{0 if ids is None else len(ids)} rows for it"
            )
        rows[module] = Rows(name, tuple(ids))
    for word, ids in listed.items():
        there = any(_is_of(module, word) for module in rows)
        if not there and (_is_of(EMBED, word) or ids != usual):  # PEFT leaves out those of an output that is tied
            raise AdapterError(f"{config} has {KEY} of {short_repr(word)}, which the adapter's file does not hold")
    return rows


def _is_of(module: str, word: str) -> bool:
    """Whether a word of the config means a module, as PEFT matches the ends of names."""
    return f".{module}".endswith(f".{word}")
