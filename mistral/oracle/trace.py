"""Every activation of a model, by name, and what a step's plan says: `python -m main trace FOLDER "prompt" -o FILE`.

An activation has the name of the module whose output it is, which is the name in the checkpoint without `.weight`;
those that are no module's output are named for what they are. All are [T, width], rows in the order of the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.cache import RollingBufferCache
from mistral.model import Attention, FeedForward, Transformer
from mistral.oracle import arrays
from mistral.oracle.inputs import require_ids
from mistral.plan import LayerStore, Plan, Tile
from mistral.util import files
from mistral.window import visible

if TYPE_CHECKING:
    from mistral.loader.load import Loaded

FORMAT, VERSION = "mistral activations", 1

Note = Callable[[str, Tensor], None]


def names(args: ModelArgs) -> list[str]:
    """All activations of a model, in the order in which they are made."""
    layer = (
        "attention_norm",
        *(f"attention.{name}" for name in ("wq", "wk", "wv", "q", "k", "heads", "wo")),
        "ffn_norm",
        *(f"feed_forward.{name}" for name in (("w1", "w3", "gated", "w2") if args.moe is None else ("gate",))),
        *(() if args.moe is None else ("feed_forward",)),  # what experts make inside has no names
    )
    each = [name for i in range(args.n_layers) for name in (*(f"layers.{i}.{part}" for part in layer), f"layers.{i}")]
    return ["tok_embeddings", *each, "norm", "output"]


@contextmanager
def noted(model: Transformer, note: Note) -> Iterator[None]:
    """While open, `note` is told the activations of every forward of the model: [T, width], as they were computed.

    The model computes as it does otherwise, its plain path: what the kernels do in one call has no names.
    """
    undo: list[Callable[[], Any]] = []
    wanted = set(names(model.args))

    def told(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: note(name, output.detach().flatten(1))

    def watched(name: str, attention: Attention) -> None:
        attend = attention.attend

        def noting(q: Tensor, k: Tensor, v: Tensor, store: LayerStore, plan: Plan) -> Tensor:
            note(f"{name}.q", q.detach().flatten(1))
            note(f"{name}.k", k.detach().flatten(1))
            heads = attend(q, k, v, store, plan)
            note(f"{name}.heads", heads.detach().flatten(1))
            return heads

        attention.attend = noting
        undo.append(lambda: setattr(attention, "attend", attend))

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            watched(name, module)
        elif isinstance(module, FeedForward) and f"{name}.gated" in wanted:
            at = f"{name}.gated"
            undo.append(module.w2.register_forward_pre_hook(lambda _, x, at=at: note(at, x[0].detach())).remove)
        elif name in wanted:
            undo.append(module.register_forward_hook(told(name)).remove)
    try:
        yield
    finally:
        for forget in undo:
            forget()


@torch.no_grad()
def trace(model: Transformer, input_ids: Tensor, seqlens: Sequence[int]) -> dict[str, Tensor]:
    """Every activation of one forward without a cache, by name: [T, width] in the dtype it was computed in.

    Raises:
        ValueError: the lengths and ids do not fit together.
    """
    seen: dict[str, Tensor] = {}
    with noted(model, lambda name, value: seen.update({name: value.cpu().contiguous()})):
        model.forward(input_ids, seqlens)
    return {name: seen[name] for name in names(model.args)}


def write(loaded: Loaded, prompts: Sequence[Tensor], path: str | PathLike[str]) -> tuple[Path, int]:
    """Write the activations of prompts, with their ids and what made them; return the file and how many there are.

    Args:
        prompts: [n] int64 ids of each, at least 1; packed into one forward, prompt after prompt.

    Raises:
        FormatError: the file cannot be written.
        UsageError: an id that the model does not know.
    """
    require_ids(prompts, loaded.args)
    files.require_writable(path)
    ids, lens = torch.cat(list(prompts)), [len(p) for p in prompts]
    found = trace(loaded.model, ids.to(loaded.model.device), lens)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "args": dataclasses.asdict(loaded.args),
        "runtime": loaded.runtime.describe(),
        "cache": "none: one forward",
        "torch": torch.__version__,
    }
    tensors = {"prompt_ids": ids, "prompt_lens": torch.tensor(lens), **found}
    return arrays.write(path, tensors, facts), len(found)


def plans(lens: Sequence[int], chunk: int | None, window: int | None) -> list[dict[str, Any]]:
    """What each step of prompts of these lengths does in a layer of this window, for whoever writes another engine.

    Of each step: tokens and first position of each sequence, and for each tile of up to `block` tokens the positions of
    its queries, the slots their keys are written to, the position that each slot then holds (-1: empty), and the mask.

    Args:
        chunk: tokens of each sequence a step; None processes all at once.
        window: W; None for a layer without one.
    """
    args = ModelArgs(2, 1, 2, 1, 1, 1, 1e-5, 1, sliding_window=window)
    cache = RollingBufferCache(args, len(lens), positions=max(lens))
    store = cache.layer(0)
    steps = []
    done = [0] * len(lens)
    while done != list(lens):
        seqlens = [min(chunk or n, n - d) for n, d in zip(lens, done, strict=True)]
        plan = cache.plan(seqlens)
        tiles = [
            told
            for run in plan.runs
            for start in range(0, run.n, store.block)
            for told in _told(store.tile(plan, run, start, min(start + store.block, run.n)), window)
        ]
        steps.append({"seqlens": seqlens, "starts": list(plan.starts), "tiles": tiles})
        cache.commit(plan)
        done = [d + n for d, n in zip(done, seqlens, strict=True)]
    return steps


def _told(tile: Tile, window: int | None) -> Iterator[dict[str, Any]]:
    """A tile of each of its sequences."""
    mask = visible(tile.q_pos, tile.k_pos, window)
    for i, row in enumerate(range(tile.run.rows.start, tile.run.rows.stop)):
        yield {
            "sequence": row,
            "positions": tile.q_pos[i].tolist(),
            "written_to": tile.slots[i].tolist(),
            "held": tile.k_pos[i].tolist(),
            "mask": ["".join("1" if seen else "." for seen in line) for line in mask[i].tolist()],
        }
