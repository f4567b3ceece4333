"""Hugging Face's layout: names of tensors, and the order of q and k rows; its config.json is in hf_config.py.

Mistral's rows rotate adjacent pairs, Hugging Face's halves; nothing else in a tensor differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.args import ModelArgs
from mistral.formats.experts import fused
from mistral.formats.hf_config import (
    HARMLESS,
    HF_KEYS,
    LABELS,
    LENGTH,
    MODEL_TYPES,
    QUANTIZATION,
    SHAPE,
    config_json,
    config_to_args,
    default_window,
    in_their_words,
)
from mistral.formats.hf_files import FORMS, INDEX, SAFETENSORS, find_hf_weights, has_hf_weights
from mistral.formats.layout import Layout, Serving, trained_length
from mistral.formats.quantized import check_plain, dequantized
from mistral.formats.quantized_hf import config_beside, method_of
from mistral.formats.text_inside import VISION, text_config, text_names
from mistral.formats.weights import InFile, Reader, WeightFiles, unwrapped
from mistral.parameters import parameters
from mistral.util.errors import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mistral.formats.mapped_tensors import Progress

__all__ = [
    "HARMLESS",
    "INDEX",
    "LENGTH",
    "MODEL_TYPES",
    "SHAPE",
    "HuggingFaceLayout",
    "config_to_args",
    "find_hf_weights",
    "to_hf",
    "to_mistral",
]

# Hugging Face's name of each tensor, and Mistral's. N is a layer's number, E an expert's.
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.N.self_attn.q_proj.weight": "layers.N.attention.wq.weight",
    "model.layers.N.self_attn.k_proj.weight": "layers.N.attention.wk.weight",
    "model.layers.N.self_attn.v_proj.weight": "layers.N.attention.wv.weight",
    "model.layers.N.self_attn.o_proj.weight": "layers.N.attention.wo.weight",
    "model.layers.N.mlp.gate_proj.weight": "layers.N.feed_forward.w1.weight",
    "model.layers.N.mlp.down_proj.weight": "layers.N.feed_forward.w2.weight",
    "model.layers.N.mlp.up_proj.weight": "layers.N.feed_forward.w3.weight",
    "model.layers.N.block_sparse_moe.gate.weight": "layers.N.feed_forward.gate.weight",
    "model.layers.N.block_sparse_moe.experts.E.w1.weight": "layers.N.feed_forward.experts.E.w1.weight",
    "model.layers.N.block_sparse_moe.experts.E.w2.weight": "layers.N.feed_forward.experts.E.w2.weight",
    "model.layers.N.block_sparse_moe.experts.E.w3.weight": "layers.N.feed_forward.experts.E.w3.weight",
    "model.layers.N.input_layernorm.weight": "layers.N.attention_norm.weight",
    "model.layers.N.post_attention_layernorm.weight": "layers.N.ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
MISTRAL_NAMES = {mistral: hf for hf, mistral in NAMES.items()}
# Buffers that old exports carry; they are computed here.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def to_mistral(name: str) -> str | None:
    """Mistral's name of a tensor in Hugging Face's layout; None if it is known and ignored; unknown names stay."""
    if IGNORED.fullmatch(name):
        return None
    return _renamed(name, NAMES)


def to_hf(name: str) -> str:
    """Hugging Face's name of a tensor in Mistral's layout."""
    return _renamed(name, MISTRAL_NAMES)


def _renamed(name: str, table: dict[str, str]) -> str:
    numbers = re.findall(r"\.(\d+)(?=\.)", name)  # of the layer, and of the expert
    pattern = name
    for number, letter in zip(numbers, "NE", strict=False):
        pattern = pattern.replace(f".{number}.", f".{letter}.", 1)
    found = table.get(pattern)
    if found is None:
        return name
    for number, letter in zip(numbers, "NE", strict=False):
        found = found.replace(f".{letter}.", f".{number}.", 1)
    return found


def rows_to_mistral(w: Tensor, heads: int) -> Tensor:
    """Rows of a q or k weight [heads * D, dim], from halves to adjacent pairs."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def rows_to_hf(w: Tensor, heads: int) -> Tensor:
    """Rows of a q or k weight [heads * D, dim], from adjacent pairs to halves."""
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def heads_of(name: str, args: ModelArgs) -> int | None:
    """Heads of a tensor whose rows the layouts order differently; None for all others. Mistral's names."""
    parameter = parameters(args).get(name)
    return None if parameter is None else parameter.heads


class HuggingFaceLayout(Layout):
    """The layout of transformers: config.json and model*.safetensors, other names, another order of rows in q and k."""

    name, to, adapter = "huggingface", "hf", "peft"
    title = "Hugging Face's"
    config = "config.json"
    vision = VISION
    index = INDEX
    indexes = tuple(form.index for form in FORMS)
    shards = True

    def has_weights(self, path: Path) -> bool:
        return has_hf_weights(path)

    def weight_sets(self, names: Collection[str]) -> list[tuple[str, ...]]:
        return [files for form in FORMS for files in form.among(names)]

    def to_args(self, raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
        return config_to_args(raw, max_batch_size)

    def read_config(self, path: Path) -> dict[str, Any]:
        raw = text_config(super().read_config(path))
        if raw.get(QUANTIZATION) is None and (beside := config_beside(path)) is not None:
            raw = {**raw, QUANTIZATION: beside}
        return raw

    def find_weights(self, path: Path) -> WeightFiles:
        weights, raw = fused(text_names(unwrapped(find_hf_weights(path)))), self.read_config(path)
        if raw.get(QUANTIZATION) is None:
            check_plain(weights, self.config)
            return weights
        return dequantized(weights, method_of(raw[QUANTIZATION]), self.config)

    def name_of(self, name: str) -> str:
        return to_hf(name)

    def ignores(self, stored: str) -> bool:
        return to_mistral(stored) is None

    def about_ignored(self, weights: WeightFiles, args: ModelArgs) -> list[str]:
        name = next((name for name in weights.tensors if IGNORED.fullmatch(name)), None)
        size = args.head_dim // 2
        if name is None or args.yarn is not None or size < 2 or weights.tensors[name].shape != (size,):
            return []
        reader = weights.readers.get(name)
        numbers = reader.numbers() if isinstance(reader, InFile) else weights.get(name).tolist()
        # The last turns slowest: theta ** (2 / D - 1). In 16 bits theta is known to about 1%.
        theta = numbers[-1] ** (1 / (1 / size - 1)) if numbers and numbers[-1] > 0 else math.nan
        if abs(theta / args.rope_theta - 1) < 0.02:
            return []
        found = f"rope_theta {theta:.4g}" if theta > 1 and math.isfinite(theta) else "no rope_theta"
        return [
            f"{printable(name)} in the files is that of {found}, and {self.config} has {args.rope_theta:g}, which is "
            "used, as in transformers from 4.32 on: the model may have been trained with the other"
        ]

    def fix(self, name: str, args: ModelArgs, reader: Reader) -> Reader:
        heads = heads_of(name, args)
        return reader if heads is None else partial(reordered, reader, heads)

    def unused(self, raw: dict[str, Any]) -> list[str]:
        return [key for key in raw if key in HARMLESS and key not in LABELS and raw[key] is not None]

    def in_its_words(self, text: str) -> str:
        return in_their_words(text)

    def file_name(self, number: int, total: int) -> str:
        return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"

    def unfix(self, name: str, args: ModelArgs, weight: Tensor) -> Tensor:
        heads = heads_of(name, args)
        return weight if heads is None else rows_to_hf(weight.contiguous(), heads)

    def describe(
        self,
        args: ModelArgs,
        raw: dict[str, Any],
        *,
        dtype: torch.dtype,
        quant: str | None,
        tokens: Callable[[], dict[str, int]],
    ) -> tuple[dict[str, Any], list[str]]:
        notes = []
        length = trained_length(raw)
        if length is None:
            notes.append(f"the training length is not given: config.json has max_position_embeddings {LENGTH}")
        kept = {key: raw[key] for key in HF_KEYS if raw.get(key) is not None}
        if "bos_token_id" not in kept or "eos_token_id" not in kept:
            kept = {**tokens(), **kept}
        return config_json(args, length, dtype, kept), notes

    def window_rule(self, raw: dict[str, Any]) -> str:
        if raw.get("model_type") == "llama":
            return f"model_type is llama in {self.config}, which has none"
        if raw.get("layer_types") is not None:
            return f"given by layer_types in {self.config}"
        if "sliding_window" not in raw:
            return f"absent from {self.config}, which means {default_window(raw.get('model_type')) or 'none'}"
        return super().window_rule(raw)

    def serving(self, path: Path, args: ModelArgs, files: tuple[Path, ...]) -> Serving:
        safe = all(file.suffix == SAFETENSORS.end for file in files)
        flags = f"--config_format hf --load_format {'safetensors' if safe else 'auto'}"
        if not (path / "tokenizer.json").is_file():
            flags = f"--tokenizer_mode mistral {flags}"
        mixed = len(set(args.windows)) > 1
        return Serving(flags, "vLLM reads a window for each layer in Mistral's layout" if mixed else None)


def reordered(reader: Reader, heads: int, progress: Progress = None) -> Tensor:
    """Rows of q or k, of that many heads, in Mistral's order."""
    return rows_to_mistral(reader(progress), heads)
