"""LoRA adapters on a model: checked against its shape, and merged into its weights while they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.args import ModelArgs
from mistral.formats.adapter import CONFIG, Adapter, AdapterError, Pair, join
from mistral.formats.adapter_words import own_template, own_words, sampling_of
from mistral.formats.huggingface import rows_to_mistral
from mistral.formats.layout import read_object
from mistral.formats.release import Release
from mistral.formats.releases import RELEASES, identify
from mistral.formats.weights import Reader, Stored, WeightFiles, file_names
from mistral.formats.widen import TABLES, Transposed, WithRows, one_table, same_lora, still_tied, widened
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter, parameters
from mistral.util.english import counted, some_names
from mistral.util.errors import printable, short_repr

if TYPE_CHECKING:
    from torch import Tensor

    from mistral.formats.folder import Folder
    from mistral.formats.mapped_tensors import Progress

PIECE = 2**18  # weights merged at a time


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one matrix, with rows in Mistral's order; nothing is read before it is asked for.

    Args:
        a, b: readers of A [rank, in] and B [out, rank].
        magnitude: reader of the lengths of rows [out] that DoRA learned, or None.
        scale: what B @ A is multiplied by.
        of_columns: whether the lengths are those of columns [in], as PEFT has them for embeddings.
    """

    a: Reader
    b: Reader
    magnitude: Reader | None
    rank: int
    scale: float
    of_columns: bool = False

    def merged(self, weight: Tensor, name: str) -> Tensor:
        """A weight [out, in] with the adapter in it, in fp32 (fp64 for fp64): whoever keeps it rounds it, once.

        Raises:
            AdapterError: as `stretches`.
        """
        import torch

        out = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        at = 0
        for piece in self.stretches(weight, name):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def stretches(self, weight: Tensor, name: str) -> Iterator[Tensor]:
        """The same in stretches of rows, each in memory of its own.

        Raises:
            AdapterError: a value is infinite or NaN in the weight's own dtype.
        """
        import torch

        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.a().to(wide), self.b().to(wide)
        lengths = None if self.magnitude is None else self.magnitude().to(wide).flatten()
        columns = None
        if lengths is not None and self.of_columns:
            norms = [torch.linalg.vector_norm(piece, dim=0) for _, piece in self._sums(weight, a, b)]
            columns = lengths / torch.linalg.vector_norm(torch.stack(norms), dim=0)
        for rows, piece in self._sums(weight, a, b):
            if columns is not None:
                piece *= columns
            elif lengths is not None:
                piece *= (lengths[rows] / torch.linalg.vector_norm(piece, dim=1))[:, None]
            if not torch.isfinite(piece.to(weight.dtype)).all():
                raise AdapterError(f"{name} with its adapter is beyond {str(weight.dtype).removeprefix('torch.')}")
            yield piece

    def _sums(self, weight: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """W + scale * B @ A in stretches of rows, and which rows each has."""
        step = max(1, PIECE // weight.shape[1])
        for at in range(0, len(weight), step):
            rows = slice(at, at + step)
            piece = b[rows] @ a
            piece *= self.scale
            piece += weight[rows].to(a.dtype)
            yield rows, piece


def updates(adapter: Adapter, args: ModelArgs) -> dict[str, Update]:
    """What an adapter adds to each weight of a model, once all of it is known to fit.

    Raises:
        AdapterError: it changes a weight that this model does not have, or one of another size.
    """
    known = parameters(args)
    if unknown := [name for name in adapter.pairs if name not in known]:
        tied = "; its output is tied to its embeddings" if unknown == ["output.weight"] else ""
        raise AdapterError(f"{adapter.path} changes {some_names(unknown)}, which the model does not have{tied}")
    there = 0 if args.moe is None else args.moe.num_experts
    if adapter.experts and adapter.experts != there:
        raise AdapterError(
            f"{adapter.path} changes {adapter.experts} experts of each layer, but the model has {there}: the adapter "
            "is of another model"
        )
    return {name: _update(adapter, known[name], pair) for name, pair in adapter.pairs.items()}


def replaced(adapter: Adapter, args: ModelArgs, old: Mapping[str, Reader]) -> dict[str, Reader]:
    """Readers of the weights that an adapter has of its own in the place of a model's, rows in Mistral's order.

    Args:
        args: of the model with the adapter; see `widened`.
        old: readers of the model's weights, of which an adapter may have some rows only.

    Raises:
        AdapterError: the model has no such weight, or one of another size.
    """
    known, found = parameters(replace(args, tied_embeddings=False)), dict[str, Reader]()
    for name, stored in adapter.whole.items():
        if name not in known:
            raise AdapterError(f"{adapter.path} has {name} of its own, which this model does not have")
        if (shape := adapter.weights.tensors[stored].shape) != known[name].shape:
            raise AdapterError(
                f"{printable(stored)} is {short_repr(list(shape))}, but the model makes it {list(known[name].shape)}: "
                "the adapter is of another model"
            )
        found[name] = _Rows(adapter.weights, stored, known[name].heads)
    if strange := [name for name in adapter.rows if name not in TABLES]:
        raise AdapterError(f"{adapter.path} has rows of its own in {some_names(strange)}, which has none for words")
    return found | {name: _with_rows(adapter, name, known[name], found.get(name), old) for name in adapter.rows}


def _with_rows(
    adapter: Adapter, name: str, parameter: Parameter, own: Reader | None, old: Mapping[str, Reader]
) -> Reader:
    """The reader of a table, the adapter's own or the model's, with the rows in it that the adapter has alone."""
    rows = adapter.rows[name]
    n, dim = parameter.shape
    if (width := adapter.weights.tensors[rows.name].shape[1]) != dim:
        raise AdapterError(
            f"{printable(rows.name)} has rows of {width} numbers, but {name} is {[n, dim]}: the adapter is of another "
            "model"
        )
    table = own or old.get(name, old[EMBEDDINGS])
    return WithRows(table, _Rows(adapter.weights, rows.name, None), rows.ids)


def _update(adapter: Adapter, parameter: Parameter, pair: Pair) -> Update:
    if parameter.role == "norm":
        raise AdapterError(f"{adapter.path} changes {parameter.name}, which is no matrix of a product")
    table = parameter.role == "embedding"  # of which PEFT has the transpose
    out, inner = reversed(parameter.shape) if table else parameter.shape
    expected: dict[str, tuple[int, ...]] = {pair.a: (pair.rank, inner), pair.b: (out, pair.rank)}
    expected |= {} if pair.magnitude is None else {pair.magnitude: (out,)}
    for name, shape in expected.items():
        if (found := adapter.weights.tensors[name].shape) != shape:
            raise AdapterError(
                f"{printable(name)} is {short_repr(list(found))}, but the model makes it {list(shape)}: "
                f"the adapter is of another model{f', {printable(adapter.base)}' if adapter.base else ''}"
            )
    heads = parameter.heads if adapter.form == "peft" else None

    def rows(name: str) -> Reader:
        return _Rows(adapter.weights, name, heads)

    magnitude = None if pair.magnitude is None else rows(pair.magnitude)
    a, b = _Rows(adapter.weights, pair.a, None), rows(pair.b)
    if table:
        return Update(Transposed(b), Transposed(a), magnitude, pair.rank, pair.scale, of_columns=True)
    return Update(a, b, magnitude, pair.rank, pair.scale)


@dataclass(frozen=True)
class _Rows:
    """Reads a tensor of an adapter, its rows from the order of Hugging Face's layout where there are heads.

    Raises:
        AdapterError: a value is NaN or infinite, which would be taken for the model's.
    """

    weights: WeightFiles
    name: str
    heads: int | None

    def __call__(self, progress: Progress = None) -> Tensor:
        tensor = self.weights.get(self.name, progress)
        if tensor.numel() and not all(math.isfinite(end) for end in tensor.aminmax()):
            name, file = printable(self.name), file_names(self.weights.files)
            raise AdapterError(f"the adapter has NaN or infinity in {name} of {file}: fetch it or train it again")
        if self.heads is None:
            return tensor
        return rows_to_mistral(tensor.reshape(len(tensor), -1), self.heads).view(tensor.shape)


@dataclass(frozen=True)
class _Merged:
    """Reads a weight with its adapter in it."""

    reader: Reader
    update: Update
    name: str

    def __call__(self, progress: Progress = None) -> Tensor:
        return self.update.merged(self.reader(progress), self.name)

    def stretches(self) -> Iterator[Tensor]:
        return self.update.stretches(self.reader(), self.name)


def merge_into(folder: Folder, adapter: Adapter, asked: str | None = None) -> Folder:
    """A folder whose weights are read with an adapter in them, tensor by tensor, each in the dtype that it has.

    Args:
        asked: the dtype, or int8 or int4, that the reader of the weights rounds to instead; for the note.

    Raises:
        AdapterError: the adapter is of another model, or the folder's weights are quantized already.
    """
    if folder.quant is not None:
        beside = "" if adapter.why_merged(folder.args) else ", or use --adapter_mode runtime"
        raise AdapterError(
            f"the weights of {folder.path} are quantized to {folder.quant}, and merging would round them again: "
            f"merge into what they were made from{beside}"
        )
    adapter = one_table(adapter, folder.args)
    weights, args, said = _with_tables(folder, adapter)
    once = {name: pair for name, pair in adapter.pairs.items() if not (args.tied_embeddings and name == OUTPUT)}
    found = updates(replace(adapter, pairs=once), args)
    old = weights.readers
    readers = {name: _Merged(old[name], found[name], name) if name in found else old[name] for name in old}
    changed = {*found, *adapter.whole, *adapter.rows} & old.keys()
    dtypes = [asked] if asked else sorted({weights.tensors[name].dtype for name in changed})
    words, about_words = own_words(adapter, folder.path, folder.args)
    said = [*about(adapter, f"merged, rounded once to {join(dtypes)}", folder), *said, *about_words]
    weights = replace(weights, readers=readers)
    template = None if own_template(adapter, folder.path) is None else adapter.path
    notes = (*folder.notes, *said)
    return replace(folder, args=args, weights=weights, notes=notes, own_words=words, own_template=template)


def _with_tables(folder: Folder, adapter: Adapter) -> tuple[WeightFiles, ModelArgs, list[str]]:
    """A folder's weights with those that an adapter has of its own in their place, their shape, and notes on it."""
    args = widened(adapter, folder.args)
    readers, tensors, notes = dict(folder.weights.readers), dict(folder.weights.tensors), list[str]()
    own = replaced(adapter, args, readers)
    tables = {name: own[name] for name in TABLES if name in own}
    if args.vocab_size > folder.args.vocab_size:
        more = args.vocab_size - folder.args.vocab_size
        notes.append(
            f"the adapter adds {counted(more, 'row')} to the vocabulary: {args.vocab_size:,}, by its own tables"
        )
    if args.tied_embeddings and still_tied(adapter, args, tables, folder.args.vocab_size):
        own.pop(OUTPUT, None)  # the same
        if EMBEDDINGS in adapter.whole and OUTPUT not in adapter.whole:
            notes.append(
                "the output stays tied to the embeddings, which are the adapter's: it has no rows for the output"
            )
    elif args.tied_embeddings:
        args = _untie(args, readers, tensors, notes)
    for name, reader in own.items():
        stored = tensors[name]
        readers[name] = reader
        tensors[name] = replace(
            stored, shape=parameters(args)[name].shape, dtype_name=stored.dtype, widened=False, computed=""
        )
    if args.tied_embeddings and not same_lora(adapter):  # beside the one table, as PEFT trains it
        args = _untie(args, readers, tensors, notes)
    return WeightFiles(folder.weights.files, tensors, readers), args, notes


def _untie(args: ModelArgs, readers: dict[str, Reader], tensors: dict[str, Stored], notes: list[str]) -> ModelArgs:
    """Make the output a table of its own, as the embeddings are now."""
    readers[OUTPUT], tensors[OUTPUT] = readers[EMBEDDINGS], tensors[EMBEDDINGS]
    notes.append("the output is no longer tied to the embeddings: with the adapter the two are different tables")
    return replace(args, tied_embeddings=False)


def has_adapter(folder: Folder) -> bool:
    """Whether an adapter is merged into a folder's weights while they are read."""
    return any(isinstance(reader, _Merged) for reader in folder.weights.readers.values())


def about(adapter: Adapter, how: str, folder: Folder) -> tuple[str, ...]:
    """Notes on an adapter in use, a sentence each; those on its words are by `own_words`.

    Args:
        folder: the model that it is used with.
    """
    base = f"; trained on {printable(adapter.base)}" if adapter.base else ""
    notes = (f"adapter {adapter.path}: {adapter.describe()}; {how}{base}", *adapter.notes)
    return (*notes, *sampling_of(adapter.path), *_doubts(adapter, folder))


def _doubts(adapter: Adapter, folder: Folder) -> Iterator[str]:
    """What speaks against this model being the one that an adapter was trained on, though all sizes fit."""
    named, (here, _) = release_named(adapter.base or ""), identify(folder.args)
    if named is not None and here is not None and named.shape != here.shape:
        yield (
            f"the adapter was trained on {printable(adapter.base or '')}, which is {named.name}, and this model is "
            f"{here.name}: it fits by its sizes, but the weights are others"
        )
    layers = {int(name.split(".")[1]) for name in adapter.pairs if name.startswith("layers.")}
    first = layers == set(range(len(layers)))  # of a base with more layers than it has, they are the first ones
    if 0 < len(layers) < folder.args.n_layers and first and not _chooses_layers(adapter):
        yield f"the adapter changes {len(layers)} of {folder.args.n_layers} layers: its base may have had no more"
    get = adapter.weights.get
    if not (adapter.dora or adapter.replaces) and not any(
        get(pair.b).any() and get(pair.a).any() for pair in adapter.pairs.values()
    ):
        yield "every lora_B of the adapter is zero, as before training: it changes nothing"
    if not adapter.base and adapter.form == "peft":
        yield "the adapter does not name its base: its sizes fit this model, and nothing else is known"


def _chooses_layers(adapter: Adapter) -> bool:
    """Whether an adapter's config has it change some layers and not others."""
    if adapter.form != "peft":
        return False
    place = adapter.path
    config = read_object((place.parent if place.is_file() else place) / CONFIG)
    # Which modules it changes, and which not, are patterns where they are a text; names may have a layer in them.
    patterns = (str(config.get(key) or "") for key in ("target_modules", "exclude_modules"))
    return config.get("layers_to_transform") is not None or any("layers" in pattern for pattern in patterns)


def release_named(base: str) -> Release | None:
    """The release that the name of a base means, such as mistralai/Mistral-7B-Instruct-v0.3."""
    words = set(re.split(r"[^a-z0-9.]+", base.lower()))
    if not any(word.endswith("stral") or word == "mixtral" for word in words):
        return None
    found = [release for release in RELEASES if words >= set(release.name.lower().split())]
    return max(found, key=lambda release: len(release.name.split()), default=None)
