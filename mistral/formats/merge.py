"""LoRA adapters on a model: checked against its shape, and merged into its weights while they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistral.args import ModelArgs
from mistral.formats.adapter import CONFIG, Adapter, AdapterError, Pair, join
from mistral.formats.huggingface import rows_to_mistral
from mistral.formats.layout import read_object
from mistral.formats.release import Release
from mistral.formats.releases import RELEASES, identify
from mistral.formats.weights import Reader, WeightFiles, some_names
from mistral.formats.words import unused_of
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter, parameters
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
    """

    a: Reader
    b: Reader
    magnitude: Reader | None
    rank: int
    scale: float

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
        rows = max(1, PIECE // weight.shape[1])
        for at in range(0, len(weight), rows):
            piece = b[at : at + rows] @ a
            piece *= self.scale
            piece += weight[at : at + rows].to(wide)
            if lengths is not None:
                piece *= (lengths[at : at + rows] / torch.linalg.vector_norm(piece, dim=1))[:, None]
            if not torch.isfinite(piece.to(weight.dtype)).all():
                raise AdapterError(f"{name} with its adapter is beyond {str(weight.dtype).removeprefix('torch.')}")
            yield piece


def updates(adapter: Adapter, args: ModelArgs) -> dict[str, Update]:
    """What an adapter adds to each weight of a model, once all of it is known to fit.

    Raises:
        AdapterError: it changes a weight that this model does not have, or one of another size.
    """
    known = parameters(args)
    if unknown := [name for name in adapter.pairs if name not in known]:
        tied = "; its output is tied to its embeddings" if unknown == ["output.weight"] else ""
        raise AdapterError(f"{adapter.path} changes {some_names(unknown)}, which the model does not have{tied}")
    return {name: _update(adapter, known[name], pair) for name, pair in adapter.pairs.items()}


def replaced(adapter: Adapter, args: ModelArgs) -> dict[str, Reader]:
    """Readers of the weights that an adapter has of its own in the place of a model's, rows in Mistral's order.

    Raises:
        AdapterError: the model has no such weight, or one of another size.
    """
    known, found = parameters(args), dict[str, Reader]()
    for name, stored in adapter.whole.items():
        if name not in known or (name == EMBEDDINGS and args.tied_embeddings):
            tied = ": its output is tied to its embeddings" if args.tied_embeddings else ""
            raise AdapterError(f"{adapter.path} has {name} of its own, which this model cannot have{tied}")
        if (shape := adapter.weights.tensors[stored].shape) != known[name].shape:
            words = (
                ", or words were added to its vocabulary: then merge it with PEFT, into its base with as many words, "
                "and give that model"
                if name in (EMBEDDINGS, OUTPUT)
                else ""
            )
            raise AdapterError(
                f"{printable(stored)} is {short_repr(list(shape))}, but the model makes it {list(known[name].shape)}: "
                f"the adapter is of another model{words}"
            )
        found[name] = _Rows(adapter.weights, stored, known[name].heads)
    return found


def _update(adapter: Adapter, parameter: Parameter, pair: Pair) -> Update:
    if parameter.role not in ("matrix", "router", "output"):
        raise AdapterError(f"{adapter.path} changes {parameter.name}, which is no matrix of a product")
    out, inner = parameter.shape
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
    return Update(_Rows(adapter.weights, pair.a, None), rows(pair.b), magnitude, pair.rank, pair.scale)


@dataclass(frozen=True)
class _Rows:
    """Reads a tensor of an adapter, its rows from the order of Hugging Face's layout where there are heads."""

    weights: WeightFiles
    name: str
    heads: int | None

    def __call__(self, progress: Progress = None) -> Tensor:
        tensor = self.weights.get(self.name, progress)
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
        raise AdapterError(
            f"the weights of {folder.path} are quantized to {folder.quant}, and merging would round them again: "
            "merge into what they were made from, or use --adapter_mode runtime"
        )
    found = updates(adapter, folder.args)
    old = {**folder.weights.readers, **replaced(adapter, folder.args)}
    readers = {name: _Merged(old[name], found[name], name) if name in found else old[name] for name in old}
    dtypes = [asked] if asked else sorted({folder.weights.tensors[name].dtype for name in (*found, *adapter.whole)})
    notes = (*folder.notes, *about(adapter, f"merged, rounded once to {join(dtypes)}", folder))
    return replace(folder, weights=replace(folder.weights, readers=readers), notes=notes)


def has_adapter(folder: Folder) -> bool:
    """Whether an adapter is merged into a folder's weights while they are read."""
    return any(isinstance(reader, _Merged) for reader in folder.weights.readers.values())


def about(adapter: Adapter, how: str, folder: Folder) -> tuple[str, ...]:
    """Notes on an adapter in use, a sentence each.

    Args:
        folder: the model that it is used with.
    """
    base = f"; trained on {printable(adapter.base)}" if adapter.base else ""
    notes = (f"adapter {adapter.path}: {adapter.describe()}; {how}{base}", *adapter.notes)
    return (*notes, *_doubts(adapter, folder), *unused_of(adapter.path, folder.path))


def _doubts(adapter: Adapter, folder: Folder) -> Iterator[str]:
    """What speaks against this model being the one that an adapter was trained on, though all sizes fit."""
    named, (here, _) = _release_named(adapter.base or ""), identify(folder.args)
    if named is not None and here is not None and named.shape != here.shape:
        yield (
            f"the adapter was trained on {printable(adapter.base or '')}, which is {named.name}, and this model is "
            f"{here.name}: it fits by its sizes, but the weights are others"
        )
    layers = {int(name.split(".")[1]) for name in adapter.pairs if name.startswith("layers.")}
    first = layers == set(range(len(layers)))  # of a base with more layers than it has, they are the first ones
    if 0 < len(layers) < folder.args.n_layers and first and not _chooses_layers(adapter):
        yield f"the adapter changes {len(layers)} of {folder.args.n_layers} layers: its base may have had no more"
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


def _release_named(base: str) -> Release | None:
    """The release that the name of a base means, such as mistralai/Mistral-7B-Instruct-v0.3."""
    words = set(re.split(r"[^a-z0-9.]+", base.lower()))
    if not any(word.endswith("stral") or word == "mixtral" for word in words):
        return None
    found = [release for release in RELEASES if words >= set(release.name.lower().split())]
    return max(found, key=lambda release: len(release.name.split()), default=None)
