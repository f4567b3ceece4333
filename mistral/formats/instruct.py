"""Whether a model is for conversations, where no chat template in its folder says so. Runs without torch."""

from __future__ import annotations

import re
from pathlib import Path

from mistral.formats.gguf_header import GgufError, read_gguf
from mistral.formats.release import Release
from mistral.formats.tokenizers import is_gguf_file

# How models for conversations are called.
NAMES = re.compile(r"instruct|chat|assistant|reasoning|magistral|devstral|mistrallite", re.IGNORECASE)
LABELS = ("general.name", "general.finetune", "general.basename")  # of a GGUF file


def why_instruct(path: Path, release: Release | None) -> str | None:
    """What says that a model is for conversations, for a sentence; None where nothing does.

    Args:
        path: a folder, or a GGUF file.
        release: the one that the model is, if it is known.
    """
    for name in _names(path):
        if NAMES.search(name):
            return f"the name {name}"
    if release is not None and all(NAMES.search(variant) for variant in release.variants):
        return f"the release, {' or '.join(release.variants)}"
    return None


def _names(path: Path) -> list[str]:
    """What a model is called: its folder, its id in a hub's cache, its file and what that says."""
    whole = path.absolute()
    names = [whole.name, *(parent.name for parent in whole.parents if parent.name.startswith("models--"))]
    if is_gguf_file(path):
        try:
            metadata = read_gguf(path).metadata
        except GgufError:
            return names
        names += [value for label in LABELS if isinstance(value := metadata.get(label), str)]
    return names
