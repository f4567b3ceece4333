"""What comes out: an adapter in PEFT's form and in mistral-finetune's, or a model in its folder's own layout.

Files appear whole, and last the one without which the folder is taken for nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats import adapter
from mistral.formats.convert import write_folder
from mistral.formats.folder import Folder
from mistral.formats.huggingface import rows_to_hf, to_hf
from mistral.formats.mapped_tensors import Progress
from mistral.formats.weights import Reader, WeightFiles
from mistral.parameters import parameters
from mistral.train.options import TARGETS, TrainOptions
from mistral.train.state import save_tensors
from mistral.util.files import write_atomic

NATIVE, MERGED = "mistral-finetune", "merged"  # folders inside that of the results


def write_adapter(
    out: Path, weights: Mapping[str, Tensor], args: ModelArgs, options: TrainOptions, scale: float, base: str
) -> list[Path]:
    """An adapter in both forms, fp32: PEFT's in `out` itself, mistral-finetune's in a folder inside.

    Args:
        weights: A and B as `lora.put_lora` names them.
        scale: what B @ A is multiplied by.
        base: the model that it belongs to, as PEFT finds it.

    Raises:
        FormatError: a file cannot be written.
    """
    native = out / NATIVE
    native.mkdir(exist_ok=True)
    rank = next(w for name, w in weights.items() if name.endswith("lora_A.weight")).shape[0]
    save_tensors(native / adapter.NATIVE_WEIGHTS, weights)
    lora = {"enable": True, "rank": rank, "dropout": options.lora_dropout, "scaling": scale}
    _write(native / adapter.PARAMS, {**args.to_params(), "lora": lora})
    save_tensors(out / adapter.WEIGHTS, dict(_for_peft(weights, args)))
    _write(out / adapter.CONFIG, peft_config(weights, rank, scale, options.lora_dropout, base))
    return [out / adapter.CONFIG, out / adapter.WEIGHTS, native / adapter.NATIVE_WEIGHTS, native / adapter.PARAMS]


def _for_peft(weights: Mapping[str, Tensor], args: ModelArgs) -> list[tuple[str, Tensor]]:
    """The same under PEFT's names; rows of B of q and k in the order of Hugging Face's layout."""
    found = []
    known = parameters(args)
    for name, tensor in weights.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        heads = known[f"{path}.weight"].heads
        turned = heads is not None and part == "lora_B"
        module = to_hf(f"{path}.weight").removesuffix(".weight")
        value = rows_to_hf(tensor.detach().cpu(), heads) if turned and heads is not None else tensor
        found.append((f"base_model.model.{module}.{part}.weight", value))
    return found


def peft_config(weights: Mapping[str, Tensor], rank: int, scale: float, dropout: float, base: str) -> dict[str, Any]:
    """What an adapter_config.json holds. vLLM accepts it too: no bias, no modules to save, one rank."""
    changed = {name.split(".")[-3] for name in weights}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": [peft for peft, native in TARGETS.items() if native in changed],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def write_merged(out: Path, folder: Folder, rounded: str) -> list[str]:
    """The model with the adapter of `out` in it, in a folder inside; notes on what was assumed."""
    place = out / MERGED
    if place.is_dir():
        shutil.rmtree(place)
    return list(write_folder(folder, place, folder.layout.to or "mistral", dtype=rounded, adapter=out).notes)


def write_model(out: Path, folder: Folder, weights: Mapping[str, Tensor], rounded: str) -> list[str]:
    """All weights of a model into `out`, in the layout of the folder that they came from; notes on what was assumed.

    Args:
        folder: the base, with the args that are written.
        weights: fp32, by Mistral's names.
        rounded: the dtype that is written.
    """
    names = [name for name in folder.weights.tensors if name in weights]
    stored = {name: replace(folder.weights.tensors[name], dtype="float32", widened=False) for name in names}
    readers: dict[str, Reader] = {name: partial(_on_cpu, weights[name].detach()) for name in names}
    trained = replace(folder, weights=WeightFiles(folder.weights.files, stored, readers), notes=())
    work = out / ".model.partial"
    if work.is_dir():
        shutil.rmtree(work)
    written = write_folder(trained, work, folder.layout.to or "mistral", dtype=rounded)
    last = written.layout.config
    for path in sorted(work.rglob("*"), key=lambda path: path.name == last):
        if path.is_file():
            (out / path.relative_to(work)).parent.mkdir(exist_ok=True)
            os.replace(path, out / path.relative_to(work))
    shutil.rmtree(work)
    return list(written.notes)


def _on_cpu(tensor: Tensor, progress: Progress = None) -> Tensor:
    if progress is not None:
        progress(tensor.nbytes)
    return tensor.cpu()


def _write(path: Path, value: dict[str, Any]) -> None:
    with write_atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
