"""An adapter in the other form: PEFT's and mistral-finetune's name the same matrices, in another order of rows.

Every number keeps its bits, there and back. What the other form cannot say is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.args import ModelArgs
from mistral.formats.adapter import (
    CONFIG,
    FORMS,
    NATIVE_WEIGHTS,
    PARAMS,
    WEIGHTS,
    Adapter,
    AdapterError,
    join,
    read_adapter,
)
from mistral.formats.convert import copy_files, destination, files_of_words
from mistral.formats.folder import read_folder
from mistral.formats.hub import locate
from mistral.formats.huggingface import rows_to_hf, rows_to_mistral, to_hf
from mistral.formats.layout import ParamsError, read_object
from mistral.formats.layouts import WRITABLE
from mistral.formats.merge import updates
from mistral.formats.mistral import to_args
from mistral.formats.tokenizers import JSON
from mistral.formats.writer import as_json, save_tensors, write_text
from mistral.parameters import parameters
from mistral.special_tokens import CONFIG as OF_TOKENIZER
from mistral.util.english import counted, some_names
from mistral.util.errors import ConvertError, MistralError
from mistral.util.files import folder_atomic

if TYPE_CHECKING:
    from torch import Tensor

# Forms by what --to calls the layout that they go with.
TO = {to: layout.adapter for to, layout in WRITABLE.items() if layout.adapter is not None}


@dataclass(frozen=True)
class ConvertedAdapter:
    """An adapter that was written.

    Args:
        path: its folder.
        form: a key of FORMS.
        matrices: how many it changes.
        notes: what was assumed, a sentence each.
    """

    path: Path
    form: str
    matrices: int
    notes: tuple[str, ...]

    def describe(self) -> str:
        """One line: what was written, and where."""
        what = counted(self.matrices, "matrix", "matrices")
        return f"{self.path}: an adapter of {what} in the form of {FORMS[self.form]}"


def convert_adapter(
    src: str | PathLike[str], dst: str | PathLike[str], to: str, base: str | PathLike[str] | None = None
) -> ConvertedAdapter:
    """Write an adapter in the form that goes with the other layout; the adapter's tensors are all in memory meanwhile.

    Args:
        src: a folder of PEFT's or of mistral-finetune's.
        dst: a folder that is not there yet, or is empty.
        to: "hf" for PEFT's form, "mistral" for mistral-finetune's.
        base: its base model, of which only the shape is read, which tells the rows of each head; None takes the one
            that the adapter names, if it is a folder here, or the shape in its params.json.

    Raises:
        ConvertError: the form or the destination does not allow it, or no base is known.
        AdapterError: it does not fit the base, or the other form cannot say what it is.
    """
    if to not in TO:
        raise ConvertError(f"no layout is called {to!r}: {' or '.join(TO)}")
    adapter, form = read_adapter(src), TO[to]
    if adapter.form == form:
        raise ConvertError(f"{src} is in the form of {FORMS[form]} already")
    args, named = _base(adapter, base)
    updates(adapter, args)  # whether it fits
    notes = list(adapter.notes)
    described = _as_peft(adapter, args, named, notes) if form == "peft" else _as_finetune(adapter, args)
    place = destination(adapter.path, Path(dst))
    words = files_of_words(adapter.path)  # it may have more than its base: see `own_words`
    if not words.keys() & {JSON, OF_TOKENIZER}:
        words = {}  # of mistral-finetune, which adds none: the base's again
    config, weights, named_as = (CONFIG, WEIGHTS, _peft_name) if form == "peft" else (PARAMS, NATIVE_WEIGHTS, _own_name)
    tensors = _tensors(adapter, args, rows_to_hf if form == "peft" else rows_to_mistral, named_as)
    try:
        with folder_atomic(place) as work:
            save_tensors(work / weights, tensors, {"format": "pt"})
            write_text(work / config, as_json(described))
            copy_files(words, work)
            read_adapter(work)
    except OSError as error:
        raise ConvertError(f"{place} was not written: {error.strerror or error}") from error
    return ConvertedAdapter(Path(dst), form, len(adapter.pairs), tuple(notes))


def _base(adapter: Adapter, base: str | PathLike[str] | None) -> tuple[ModelArgs, str | None]:
    """The shape of the base, and its name if it has one."""
    if base is not None:
        return read_folder(locate(base)).args, str(base)
    if adapter.base is not None and os.path.isdir(adapter.base):
        return read_folder(adapter.base).args, adapter.base
    try:
        if adapter.form == "finetune":
            folder = adapter.path.parent if adapter.path.is_file() else adapter.path
            return to_args(read_object(folder / PARAMS)), None
        why = f"{CONFIG} names no folder here" if adapter.base is None else f"{adapter.base} is no folder here"
    except (ParamsError, MistralError) as error:
        why = str(error)
    raise ConvertError(f"the rows of each head follow from the base's shape, and {why}: give it with --base FOLDER")


def _tensors(
    adapter: Adapter, args: ModelArgs, reorder: Callable[[Tensor, int], Tensor], named: Callable[[str], str]
) -> dict[str, Tensor]:
    """The adapter's own numbers under the other form's names; of q and k, rows of B in the other order."""
    known, found = parameters(args), {}
    for name, pair in adapter.pairs.items():
        b, heads = adapter.weights.get(pair.b), known[name].heads
        at = named(name.removesuffix(".weight"))
        found[f"{at}.lora_A.weight"] = adapter.weights.get(pair.a).contiguous()
        found[f"{at}.lora_B.weight"] = (b if heads is None else reorder(b, heads)).contiguous()
    return found


def _own_name(module: str) -> str:
    return module


def _hf_module(name: str) -> str:
    """What Hugging Face's layout calls the module of a weight of ours."""
    return to_hf(f"{name}.weight").removesuffix(".weight")


def _peft_name(module: str) -> str:
    return f"base_model.model.{_hf_module(module)}"


def _as_finetune(adapter: Adapter, args: ModelArgs) -> dict[str, Any]:
    """params.json: the shape, and one rank and one scaling for all."""
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    scales = sorted({pair.scale for pair in adapter.pairs.values()})
    names = [name for name in adapter.pairs if not name.startswith("layers.") or ".experts." in name]
    for wrong, what in (
        (adapter.dora, "DoRA"),
        (bool(adapter.replaces), f"weights of its own in the place of {adapter.replaces}"),
        (len(ranks) > 1, f"ranks of {join(map(str, ranks))}, where it has one for all"),
        (len(scales) > 1, f"scales of {join(f'{scale:g}' for scale in scales)}, where it has one for all"),
        (bool(names), f"a LoRA of {some_names(names)}"),
    ):
        if wrong:
            raise AdapterError(f"the form of mistral-finetune has no place for {what}")
    lora = {"enable": True, "rank": ranks[0], "dropout": 0.0, "scaling": scales[0]}
    return {"moe": None, **args.to_params(), "lora": lora}


def _as_peft(adapter: Adapter, args: ModelArgs, base: str | None, notes: list[str]) -> dict[str, Any]:
    """adapter_config.json, whose alpha / r is the scale."""
    modules = {_hf_module(name.removesuffix(".weight")) for name in adapter.pairs}
    words = {module.rpartition(".")[2] for module in modules}
    everywhere = {_hf_module(name.removesuffix(".weight")) for name in parameters(args)}
    whole = {module for module in everywhere if module.rpartition(".")[2] in words} == modules
    by_rank: dict[int, list[str]] = {}
    for name, pair in adapter.pairs.items():
        by_rank.setdefault(pair.rank, []).append(_hf_module(name.removesuffix(".weight")))
    (rank, _), *others = sorted(by_rank.items(), key=lambda item: -len(item[1]))
    scale = next(iter(adapter.pairs.values())).scale  # one for all
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha_of(scale, rank, notes),
        "lora_dropout": 0.0,
        "target_modules": sorted(words if whole else modules),
        "bias": "none",
    }
    if others:
        config["rank_pattern"] = {module: n for n, names in others for module in names}
        alphas = {n: alpha_of(scale, n, notes) for n, _ in others}
        config["alpha_pattern"] = {module: alphas[n] for n, names in others for module in names}
    return config


def alpha_of(scale: float, rank: int, notes: list[str]) -> float:
    """The number that divided by the rank is the scale, or comes closest, of which there is then a note."""
    near = scale * rank
    alpha = min(
        (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)), key=lambda x: abs(x / rank - scale)
    )
    if alpha / rank != scale:
        notes.append(f"the scale {scale!r} becomes {alpha / rank!r}: no lora_alpha gives it with a rank of {rank}")
    return int(alpha) if alpha == int(alpha) else alpha
