"""The layouts that a model can have on disk, in the order in which they are preferred where a folder has several."""

from __future__ import annotations

from pathlib import Path

from mistral.formats.broken import broken_files
from mistral.formats.gguf_layout import GgufLayout
from mistral.formats.huggingface import HuggingFaceLayout
from mistral.formats.layout import Layout, ParamsError
from mistral.formats.mistral import MistralLayout
from mistral.util.english import some_names

# Mistral's own: the names of tensors and the order of rows that the model has.
NATIVE = MistralLayout()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (NATIVE, HuggingFaceLayout(), GgufLayout())}
# Those that `convert` writes, by what --to calls them.
WRITABLE: dict[str, Layout] = {layout.to: layout for layout in LAYOUTS.values() if layout.to is not None}


def find_layout(path: Path) -> tuple[Layout, list[str]]:
    """The layout of a folder or file, and what was ignored: one that is complete, else one that gives a shape.

    Raises:
        ParamsError: nothing gives a shape.
    """
    if path.is_file() and not any(layout.has_weights(path) for layout in LAYOUTS.values()):
        if not any((path.parent / layout.config).is_file() for layout in LAYOUTS.values()):
            raise ParamsError(f"{path} is no model: that is a folder with params.json or config.json, or a .gguf file")
        raise ParamsError(f"{path} is a file: give the folder that it is in")
    described = [layout for layout in LAYOUTS.values() if layout.has_config(path)]
    if not described:
        names = " and ".join(f"no {layout.config}" for layout in LAYOUTS.values())
        said = f"{names} in {path}: a model folder has one of them, weights and a tokenizer"
        broken = "".join(f"; {what}" for what in broken_files(path).values())
        raise ParamsError(f"{said}{broken}{_models_inside(path)}")
    complete = [layout for layout in described if layout.has_weights(path)]
    chosen = next(iter(complete), described[0])
    others = " and ".join(layout.title for layout in complete[1:])
    return chosen, [
        f"the folder holds several layouts: {chosen.title} was read, {others} was ignored"
    ] if others else []


def _models_inside(path: Path) -> str:
    """Which folders within one that is no model are models: checkpoints of a training, snapshots of the hub."""
    inside = sorted(config.parent for layout in LAYOUTS.values() for config in _within(path, layout.config))
    if not inside:
        return ""
    shown = some_names([folder.relative_to(path).as_posix() for folder in inside])
    return f"; within it there is {shown}: give {'that' if len(inside) == 1 else 'one of them'}"


def _within(path: Path, name: str) -> list[Path]:
    return [*path.glob(f"*/{name}"), *path.glob(f"snapshots/*/{name}")] if path.is_dir() else []
