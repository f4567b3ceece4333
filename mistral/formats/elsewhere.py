"""What else a folder may hold in the place of weights that are read here, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable

ADAPTER = "give its base model, and the adapter with --adapter"
# A pattern for names of files, and what they are. The first that matches says most about the folder.
KINDS = {
    r"adapter_(model|config)\..*": f"a PEFT adapter, not a model: {ADAPTER}",
    r"lora\.safetensors": f"a LoRA adapter of mistral-finetune, not a model: {ADAPTER}",
    r".*\.gguf": "GGUF files: give the path of one of them",
    r"consolidated\.01\.pth?": ".pth files in several parts: download the folder, and give its path",
    r"weights(\.\d+)?\.npz": "MLX's weights.npz: convert it to safetensors first",
    r"(?!consolidated|model)(.*)\.safetensors": "a safetensors file under another name: give it the release's name",
    r".*\.onnx": "ONNX files: give the folder that they were made from",
}
# A pattern for names of tensors, and what weights with such names are.
TENSORS = {
    r".*\.(base_layer|lora_[AB]\..*)\..*": "a model with its adapter: save it after merge_and_unload()",
    r"(layers\.\d+\.self_attn|embed_tokens)\..*": "a model without its output matrix (MistralModel): use transformers",
    r"(base_model\.)+model\..*": "a model inside of another (base_model.model): save the inner one",
    r"transformer\.h\..*": "a model of another kind, whatever its config.json says",
}


def kind_of(names: Iterable[str]) -> str | None:
    """What a folder with files of these names holds; None if it is none of KINDS."""
    last = [name.rpartition("/")[2] for name in names]
    return next((what for pattern, what in KINDS.items() if any(re.fullmatch(pattern, n) for n in last)), None)


def kind_of_tensors(names: Iterable[str]) -> str | None:
    """What weights with these names are; None if they are none of TENSORS."""
    given = list(names)
    return next((what for pattern, what in TENSORS.items() if any(re.fullmatch(pattern, n) for n in given)), None)
