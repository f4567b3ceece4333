"""The tables of a model with an adapter's own in their place: more rows, for words that were added; a tie that ends.

Decides shapes from headers. Whether two tables are one is seen in their numbers, where an adapter has both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.args import ModelArgs
from mistral.formats.adapter import Adapter, AdapterError
from mistral.formats.huggingface import to_hf
from mistral.formats.weights import Reader
from mistral.parameters import EMBEDDINGS, OUTPUT
from mistral.util.english import counted

if TYPE_CHECKING:
    from torch import Tensor

    from mistral.formats.mapped_tensors import Progress

TABLES = (EMBEDDINGS, OUTPUT)
SAVE = 'save it again with both (PEFT: modules_to_save=["embed_tokens", "lm_head"])'


@dataclass(frozen=True)
class WithRows:
    """Reads a table with some of its rows replaced.

    Args:
        table: its reader.
        rows: reader of those in their place [rows, dim].
        ids: where they are.
    """

    table: Reader
    rows: Reader
    ids: tuple[int, ...]

    def __call__(self, progress: Progress = None) -> Tensor:
        import torch

        table, rows = self.table(progress), self.rows()
        whole = table.to(torch.promote_types(table.dtype, rows.dtype), copy=True)
        whole[torch.tensor(self.ids)] = rows.to(whole.dtype)
        return whole


def widened(adapter: Adapter, args: ModelArgs) -> ModelArgs:
    """The shape of a model with as many words as the adapter's own tables have rows.

    Raises:
        AdapterError: they have fewer than the model's, or only one of the two has more.
    """
    sizes = {}
    for name in TABLES:
        if name in adapter.whole:
            shape = adapter.weights.tensors[adapter.whole[name]].shape
            if len(shape) != 2 or shape[1] != args.dim:
                return args  # of another model, which whoever takes the table says
            sizes[name] = shape[0]
    there = " and ".join(f"{rows:,} rows for {_called(name)}" for name, rows in sizes.items())
    if any(rows < args.vocab_size for rows in sizes.values()):
        raise AdapterError(
            f"{adapter.path} has {there}, fewer than the {args.vocab_size:,} of the model: the adapter is of another "
            "model, or its base was cut to fewer words: then merge it with PEFT into that, and give the result"
        )
    most = max(sizes.values(), default=args.vocab_size)
    if most == args.vocab_size:
        return args
    needed = (EMBEDDINGS,) if args.tied_embeddings else TABLES
    if len(set(sizes.values())) > 1 or any(name not in sizes for name in needed):
        lacking = [_called(name) for name in needed if sizes.get(name) != most]
        more = most - args.vocab_size
        raise AdapterError(
            f"{adapter.path} has {there}, and the rows of {counted(more, 'word')} that {'was' if more == 1 else 'were'}"
            f" added are not saved for {' and '.join(lacking)}: {SAVE}"
        )
    return replace(args, vocab_size=most)


def still_tied(adapter: Adapter, args: ModelArgs, tables: dict[str, Reader], rows: int) -> bool:
    """Whether the output of a model is the embeddings, with an adapter that may have either of its own.

    With embeddings of its own in the place of tied ones PEFT leaves the output what it was, so the two are no longer
    one; unless rows were added, which the output then has nowhere else.

    Args:
        args: with the adapter's number of words.
        tables: readers of the tables that the adapter has of its own, with its single rows.
        rows: of the model's own table.

    Raises:
        AdapterError: what the adapter changes in the output alone goes with no output that is tied.
    """
    if not args.tied_embeddings:
        return False
    if OUTPUT in adapter.rows and OUTPUT not in adapter.whole:
        raise AdapterError(
            f"{adapter.path} has rows of its own for lm_head, and the output of this model is tied to its embeddings: "
            "what PEFT merges of that is not what was trained"
        )
    if OUTPUT in adapter.pairs or not tables:
        return True
    if len(tables) == 2:
        import torch

        one, other = (reader() for reader in tables.values())
        return one.dtype == other.dtype and torch.equal(one, other)
    return EMBEDDINGS in tables and (EMBEDDINGS not in adapter.whole or args.vocab_size > rows)


def _called(name: str) -> str:
    return to_hf(name).removesuffix(".weight")
