"""Draw the README's pictures from the library's own `visible()` and `plan()`.

    python -m tools.draw_ideas [OUT]        (OUT: docs/images)

Needs matplotlib. What is drawn is what runs: each cell is read off a mask, a slot or a plan.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.cache import RollingBufferCache
from mistral.window import visible

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

WINDOW = 4
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "saw", "the", "dog"]
COLOURS = {"empty": "#f4f1ea", "seen": "#f2a541", "old": "#7fa7c9", "new": "#f2a541"}


def grid(ax: Axes, colours: list[list[str]], labels: list[list[str]] | None = None) -> None:
    """A table of coloured cells, row 0 on top."""
    for y, row in enumerate(colours):
        for x, colour in enumerate(row):
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=COLOURS[colour], edgecolor="white", linewidth=1.5))
            if labels and labels[y][x]:
                ax.text(x + 0.5, y + 0.5, labels[y][x], ha="center", va="center", fontsize=8, color="#333333")
    ax.set_xlim(0, len(colours[0]))
    ax.set_ylim(len(colours), 0)
    ax.set_aspect("equal")
    ax.tick_params(length=0, labelsize=8)
    for side in ax.spines.values():
        side.set_visible(False)


def ticks(ax: Axes, x: list[str], y: list[str], rotation: int = 90) -> None:
    ax.set_xticks([i + 0.5 for i in range(len(x))], x, rotation=rotation)
    ax.set_yticks([i + 0.5 for i in range(len(y))], y)
    ax.xaxis.tick_top()


def mask_colours(mask: Tensor) -> list[list[str]]:
    return [["seen" if cell else "empty" for cell in row] for row in mask.tolist()]


def draw_masks() -> plt.Figure:
    """Full and sliding-window attention: rows are queries, columns keys."""
    positions = torch.arange(len(WORDS))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for ax, window in zip(axes, (None, WINDOW), strict=True):
        grid(ax, mask_colours(visible(positions, positions, window)))
        ticks(ax, WORDS, WORDS)
        ax.set_xlabel("full attention" if window is None else f"sliding window, W = {window}", fontsize=10)
        ax.set_ylabel("query", fontsize=10)
        ax.set_title("key", fontsize=10)
    return figure


def draw_reach() -> plt.Figure:
    """What the last token can know of, layer by layer: W - 1 positions further each time."""
    positions = torch.arange(len(WORDS))
    mask = visible(positions, positions, WINDOW).float()
    known = torch.zeros(len(WORDS))
    known[-1] = 1
    rows = [known]
    for _ in range(3):
        rows.append((rows[-1] @ mask > 0).float())
    figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    grid(ax, mask_colours(torch.stack(rows) > 0))
    ticks(ax, WORDS, ["the last token's input", "after 1 layer", "after 2 layers", "after 3 layers"], rotation=0)
    return figure


def small_cache(rows: int) -> RollingBufferCache:
    args = ModelArgs(8, 1, 2, 8, 2, 1, 1e-5, 8, sliding_window=WINDOW)
    return RollingBufferCache(args, rows, positions=100)


def colour(key: int, start: int, query: int) -> str:
    """Of a key, for a step that began at `start` and a query: unseen, from before, or new."""
    if not visible(torch.tensor([query]), torch.tensor([key]), WINDOW).item():
        return "empty"
    return "old" if key < start else "new"


def draw_buffer() -> plt.Figure:
    """Which position lies in which slot, as three sequences of different lengths grow."""
    cache = small_cache(rows=3)
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.4), layout="constrained")
    for ax, seqlens in zip(axes, ((3, 6, 9), (1, 1, 1), (1, 1, 1)), strict=True):
        plan = cache.plan(seqlens)
        store = cache.layer(0)
        colours: list[list[str]] = []
        labels: list[list[str]] = []
        for run in plan.runs:
            for start in range(0, run.n, store.block):
                tile = store.tile(plan, run, start, min(start + store.block, run.n))
            for row, held in zip(range(run.rows.start, run.rows.stop), tile.k_pos.tolist(), strict=True):
                held += [-1] * (store.capacity - len(held))
                colours.append([colour(p, plan.starts[row], plan.starts[row] + run.n - 1) for p in held])
                labels.append(["" if p < 0 else str(p) for p in held])
        cache.commit(plan)
        grid(ax, colours, labels)
        ticks(ax, [str(s) for s in range(store.capacity)], [f"sequence {i}" for i in range(3)], rotation=0)
        ax.set_title("slot", fontsize=9)
        ax.set_xlabel(f"lengths {list(cache.lengths)}, W = {WINDOW}, C = {store.capacity}", fontsize=9)
    return figure


def draw_chunks() -> plt.Figure:
    """Chunked prefill: keys a chunk's queries see in the cache (blue) and in the chunk itself (orange)."""
    cache = small_cache(rows=1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained", width_ratios=(4, 8, 10))
    for number, (ax, n) in enumerate(zip(axes, (4, 4, 2), strict=True), 1):
        plan = cache.plan([n])
        start = plan.starts[0]
        grid(ax, [[colour(k, start, start + q) for k in range(start + n)] for q in range(n)])
        ticks(ax, WORDS[: start + n], WORDS[start : start + n])
        ax.set_xlabel(f"chunk {number}, W = {WINDOW}", fontsize=9)
        cache.commit(plan)
    return figure


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "mistral"
    for draw in (draw_masks, draw_reach, draw_buffer, draw_chunks):
        path = out / f"{draw.__name__.removeprefix('draw_')}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
