"""What is written beside the weights: the shape, what transformers needs to give our ids, ends of sequence, templates.

Nothing that a folder says is lost without a note, and nothing is said that it does not say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from mistral.formats.folder import Folder
from mistral.formats.hf_template import to_chat_template
from mistral.formats.hf_tokenizer import as_found, to_tokenizer_config, to_tokenizer_json
from mistral.formats.instruct import why_instruct
from mistral.formats.layout import Layout, ParamsError, read_object
from mistral.formats.layouts import NATIVE
from mistral.formats.releases import identify
from mistral.formats.tokenizers import JSON, TEMPLATE, chat_templates, eos_ids, listed_ids, own_ends
from mistral.formats.unpack import GENERATION
from mistral.formats.weights import dtype_name
from mistral.formats.words import words_of
from mistral.formats.writer import PlannedTensor, as_json
from mistral.special_tokens import CONFIG, read_json
from mistral.tokenizer import Tokenizer, TokenizerError
from mistral.util.english import some_names


def tokenizer_of(folder: Folder) -> tuple[Tokenizer | None, list[str]]:
    """The source's tokenizer, None where there is none that can be used, and what should be known about it."""
    try:
        return words_of(folder.words, folder.args, folder.path)
    except TokenizerError as error:
        return None, [f"the tokenizer cannot be used: {error}"]


def describe(
    folder: Folder,
    layout: Layout,
    tensors: list[PlannedTensor],
    quant: str | None,
    tokenizer: Tokenizer | None,
    notes: list[str],
) -> dict[str, str]:
    """The file that gives the shape, and one that says what ends sequences where it is wanted: names and texts."""
    dtype = holds_all(tensors)
    described, assumed = layout.describe(
        folder.args, folder.raw, dtype=dtype, quant=quant, tokens=partial(_special_tokens, tokenizer, notes)
    )
    notes += assumed
    if described.get("dtype") and any(tensor.dtype != dtype for tensor in tensors):
        notes.append(
            f"weights are of several dtypes: {layout.config} has {dtype_name(dtype)}, which holds them all, and in "
            "which transformers loads them: --dtype writes one"
        )
    if lost := [key for key in folder.layout.unused(folder.raw) if key not in described]:
        notes.append(f"{layout.config} has no place for {', '.join(lost)} of {folder.source}, which change no number")
    return {layout.config: as_json(described)} | _ends(folder, described, tokenizer, notes)


def holds_all(tensors: list[PlannedTensor]) -> torch.dtype:
    """The dtype that keeps every number of weights: their own, or of several the one that others are widened to.

    transformers takes all weights to the dtype that config.json gives.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
    return reduce(torch.promote_types, dtypes)


def _ends(
    folder: Folder, described: Mapping[str, Any], tokenizer: Tokenizer | None, notes: list[str]
) -> dict[str, str]:
    """A generation_config.json with the ids that end sequences, where no other file of the destination has all.

    Args:
        described: the file that gives the shape there.
    """
    if folder.path.is_file() and folder.own_words is None:
        return {}  # `unpacked` writes them
    path, generation = folder.path / GENERATION, dict[str, Any]()
    with suppress(ParamsError):  # `require_whole` has named a broken one
        generation = read_object(path) if path.is_file() else {}
    there = {*_ids(generation), *_ids(described)}
    if tokenizer is not None and folder.own_words is None:  # with an adapter's, transformers goes by this file alone
        there |= own_ends(tokenizer)
    ends = eos_ids(folder.path, None, folder.args.vocab_size)[0] if tokenizer is None else tokenizer.eos_ids
    missing = ends - there
    if not missing:
        return {}
    others = (*_ids(folder.raw), *_ids(described))
    named = [i for i in others if i in ends]  # transformers goes by this file alone
    ids = list(dict.fromkeys([*_ids(generation), *named, *sorted(missing)]))
    where = "config.json" if folder.own_words is None else "the base or the adapter"
    notes.append(f"{GENERATION} has the ids that end a sequence in {where}: {', '.join(map(str, ids))}")
    return {GENERATION: as_json({**generation, "eos_token_id": ids[0] if len(ids) == 1 else ids})}


def for_transformers(folder: Folder, tokenizer: Tokenizer | None, notes: list[str], instruct: bool) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json with which AutoTokenizer gives our ids, where the source has none."""
    if tokenizer is None or (folder.words / JSON).is_file():
        return {}
    made = to_tokenizer_json(tokenizer)
    if made is None:
        notes.append(
            f"no {JSON} gives the ids of {tokenizer.path.name}, so none was written: "
            "transformers may split texts differently"
        )
        return {}
    texts = {JSON: made}
    if not (folder.words / CONFIG).is_file():
        texts[CONFIG] = as_json(to_tokenizer_config(tokenizer))
    were = "was" if len(texts) == 1 else "were"
    notes.append(
        f"{' and '.join(texts)} {were} made from {tokenizer.path.name}, so that transformers gives the same ids"
    )
    if CONFIG not in texts and (changed := as_found(read_json(folder.words / CONFIG), tokenizer)):
        texts[CONFIG] = as_json(changed)
        notes.append(f"added tokens in {CONFIG} are no longer normalized, which did nothing without {JSON}")
    return texts | _chat_template(folder, tokenizer, notes, instruct)


def _chat_template(folder: Folder, tokenizer: Tokenizer, notes: list[str], instruct: bool) -> dict[str, str]:
    """chat_template.jinja for an instruct model without a template, as its tokenizer has conversations written.

    A base model gets none: a template is what others take for the sign of an instruct model.
    """
    release, _ = identify(folder.args, tokenizer.kind, tokenizer.version)
    of_its_own = release is not None and release.template == "mistrallite"
    if chat_templates(folder.templates) or of_its_own or (made := to_chat_template(tokenizer)) is None:
        return {}
    why = "as asked" if instruct else why_instruct(folder.path, release)
    if why is None:
        notes.append(
            f"no {TEMPLATE} was written: nothing says that this model is for conversations; if it is, --instruct "
            f"writes one for {tokenizer.version}, the version of {tokenizer.path.name}"
        )
        return {}
    if not instruct:
        why = f"that the model is for conversations is assumed from {why}"
    notes.append(
        f"{TEMPLATE} was made by mistral-common for {tokenizer.version}, the version of {tokenizer.path.name}: {why}"
    )
    return {TEMPLATE: made}


def about_names(folder: Folder, dst: Path, layout: Layout) -> list[str]:
    """A note where nothing but the source's name says that a model is for conversations, and the new one does not."""
    try:
        why = None if chat_templates(folder.templates) or layout is not NATIVE else why_instruct(folder.path, None)
    except TokenizerError:
        return []
    if why is None or why_instruct(dst, None) is not None:
        return []
    return [f"that the model is for conversations is known from {why} alone, and {dst.name} does not say so"]


def _ids(told: Mapping[str, Any]) -> list[int]:
    return [i for i in listed_ids(told) if type(i) is int]


def not_carried(folder: Folder, carried: Iterable[str], written: set[str]) -> list[str]:
    """A note on the files of the source that have no copy and no counterpart in the destination.

    Args:
        carried: what is copied, by its names in the destination.
    """
    used = {folder.source, *folder.layout.indexes, *written, *(path.name for path in folder.weights.files)}
    used |= {Path(name).parts[0] for name in carried}
    there = folder.path.iterdir() if folder.path.is_dir() else ()
    rest = sorted(entry.name for entry in there if entry.name not in used)
    return [f"not carried along: {some_names(rest, most=8)}"] if rest else []


def _special_tokens(tokenizer: Tokenizer | None, notes: list[str]) -> dict[str, int]:
    if tokenizer is not None:
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    notes.append("config.json has bos_token_id 1 and eos_token_id 2, as all releases do: no tokenizer says otherwise")
    return {"bos_token_id": 1, "eos_token_id": 2}
