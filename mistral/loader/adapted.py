"""The adapters that are asked for: one merged into the weights as they are read, or several beside them at run time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mistral.formats.adapter import Adapter, join, read_adapter
from mistral.formats.adapter_words import own_template, own_words, unused_of
from mistral.formats.folder import Folder
from mistral.formats.merge import Update, about, merge_into, updates
from mistral.loader.options import LoadOptions, OptionError, adapter_names

if TYPE_CHECKING:
    import torch

    from mistral.model import Transformer


@dataclass(frozen=True)
class Adapted:
    """A folder with its adapters.

    Args:
        folder: where one is merged, its weights are read so.
        beside: for each adapter at run time, by name, what it adds to which weight.
        text: which are in use and how, human-readable; "" for none.
        notes: a sentence each.
    """

    folder: Folder
    beside: dict[str, dict[str, Update]] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()


def with_adapters(found: Folder, options: LoadOptions) -> Adapted:
    """A folder with the adapters of the options.

    Raises:
        OptionError: several, or one with DoRA, that cannot be had so.
        AdapterError: one is broken, or belongs to another model.
    """
    places = adapter_names(options.adapter)
    if not places:
        if options.adapter_mode is not None:
            raise OptionError("adapter_mode is given without an adapter: add --adapter FOLDER")
        return Adapted(found)
    if options.adapter_mode == "merge" and len(places) > 1:
        raise OptionError(f"merge takes one adapter, and {len(places)} are given: use --adapter_mode runtime")
    if (options.adapter_mode or ("merge" if len(places) == 1 else "runtime")) == "merge":
        (place,) = places.values()
        merged = merge_into(found, read_adapter(place), _asked(options))
        return Adapted(merged, text=f"adapter {place} merged", notes=merged.notes[len(found.notes) :])
    return _beside(found, {name: read_adapter(place) for name, place in places.items()})


def _asked(options: LoadOptions) -> str | None:
    """What weights are rounded to, where that is not the dtype of their file: wider arithmetic keeps that."""
    if options.quant not in (None, "none"):
        return options.quant
    return options.dtype if options.dtype in ("float16", "bfloat16") else None


def _beside(found: Folder, adapters: dict[str, Adapter]) -> Adapted:
    for adapter in adapters.values():
        if why := adapter.why_merged(found.args):
            if not adapter.dora:
                merge_into(found, adapter)  # one that cannot be merged either is refused for that
            raise OptionError(f"{adapter.path} has {why}: it can only be merged, alone (omit --adapter_mode)")
    beside = {name: updates(adapter, found.args) for name, adapter in adapters.items()}
    notes = [note for adapter in adapters.values() for note in about(adapter, "beside the weights at run time", found)]
    if len(adapters) == 1:
        (adapter,) = adapters.values()
        words, about_words = own_words(adapter, found.path, found.args)
        template = None if own_template(adapter, found.path) is None else adapter.path
        found = replace(found, own_words=words, own_template=template)
        return Adapted(found, beside, f"adapter {adapter.path} at run time", (*notes, *about_words))
    notes += [note for adapter in adapters.values() for note in unused_of(adapter.path, found.path)]
    if expert := next((n for added in beside.values() for n in added if _of_expert(n)), None):
        raise OptionError(f"an adapter changes {expert}, of an expert: such a one must be the only one")
    notes.append(f"{len(beside)} adapters: a prompt that names none of them is continued by the base alone")
    return Adapted(found, beside, f"adapters {join(beside)} at run time", tuple(notes))


def _of_expert(weight: str) -> bool:
    return ".experts." in weight


def put_adapters(
    model: Transformer, beside: dict[str, dict[str, Update]], device: torch.device, dtype: torch.dtype
) -> None:
    """Put adapters beside the weights of a model that is in memory."""
    from mistral.adapters import AdaptedLinear, Adapters, LoraPair

    names = list(dict.fromkeys(name for added in beside.values() for name in added))
    model.adapters = Adapters(list(beside), mixes=not any(map(_of_expert, names)))
    for name in names:
        path = name.removesuffix(".weight")
        pairs = {}
        for adapter, added in beside.items():
            if (update := added.get(name)) is not None:
                a, b = (reader().to(device, dtype, copy=True) for reader in (update.a, update.b))
                pairs[adapter] = LoraPair(a, b, update.scale)
        model.set_submodule(path, AdaptedLinear(model.get_submodule(path), model.adapters, pairs))
