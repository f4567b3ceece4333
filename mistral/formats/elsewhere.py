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
    r".*\.onnx": "ONNX files: give the folder that they were made from",
}


def kind_of(names: Iterable[str]) -> str | None:
    """What a folder with files of these names holds; None if it is none of KINDS."""
    last = [name.rpartition("/")[2] for name in names]
    return next((what for pattern, what in KINDS.items() if any(re.fullmatch(pattern, n) for n in last)), None)
