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
BELOW = ".base_layer.weight"  # ends PEFT's name of a weight as it was, below a LoRA of it
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
        if more := max(self.ids) + 1 - len(whole):  # words that were added, all of them among the rows
            whole = torch.cat([whole, whole.new_empty(max(0, more), whole.shape[1])])
        whole[torch.tensor(self.ids)] = rows.to(whole.dtype)
        return whole


@dataclass(frozen=True)
class Transposed:
    """Reads a matrix of an adapter as its transpose."""

    of: Reader

    def __call__(self, progress: Progress = None) -> Tensor:
        return self.of(progress).T.contiguous()


def widened(adapter: Adapter, args: ModelArgs) -> ModelArgs:
    """The shape of a model with as many words as the adapter's own tables have rows, single ones with them.

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
    single = {name: adapter.rows[name].ids for name in TABLES if name in adapter.rows}
    parts = [f"{rows:,} rows for {_called(name)}" for name, rows in sizes.items()]
    parts += [f"single rows up to id {max(ids):,} for {_called(name)}" for name, ids in single.items()]
    there = " and ".join(parts)
    if any(rows < args.vocab_size for rows in sizes.values()):
        raise AdapterError(
            f"{adapter.path} has {there}, fewer than the {args.vocab_size:,} of the model: the adapter is of another "
            "model, or its base was cut to fewer words: then merge it with PEFT into that, and give the result"
        )
    most = max([args.vocab_size, *sizes.values(), *(max(ids) + 1 for ids in single.values())])
    if most == args.vocab_size:
        return args

    def lacks(name: str) -> bool:
        rows = sizes.get(name, args.vocab_size)
        return rows + sum(i >= rows for i in single.get(name, ())) < most  # no id is there twice

    needed = (EMBEDDINGS,) if args.tied_embeddings and OUTPUT not in sizes else TABLES
    if lacking := [_called(name) for name in needed if lacks(name)]:
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
    if not tables:
        return True
    if len(tables) == 2:
        import torch

        one, other = (reader() for reader in tables.values())
        return one.dtype == other.dtype and torch.equal(one, other)
    return EMBEDDINGS in tables and (EMBEDDINGS not in adapter.whole or args.vocab_size > rows)


def one_table(adapter: Adapter, args: ModelArgs) -> Adapter:
    """An adapter of a model whose output is tied, with its own table for both where it has what is below a LoRA of
    the output: that is the one table as it was before training."""
    stored = adapter.whole.get(OUTPUT, "")
    if not args.tied_embeddings or EMBEDDINGS in adapter.whole or not stored.endswith(BELOW):
        return adapter
    return replace(adapter, whole={**adapter.whole, EMBEDDINGS: stored})


def same_lora(adapter: Adapter) -> bool:
    """Whether an adapter adds the same to the embeddings and to the output: PEFT trains one LoRA for both on request,
    and writes it twice, once transposed."""
    import torch

    pairs = [adapter.pairs.get(name) for name in TABLES]
    below, output = pairs
    if below is None or output is None:
        return below is output
    if below.scale != output.scale or below.magnitude or output.magnitude:
        return False
    get = adapter.weights.get
    return torch.equal(get(below.a).T, get(output.b)) and torch.equal(get(below.b).T, get(output.a))


def _called(name: str) -> str:
    return to_hf(name).removesuffix(".weight")
