"""Draw the pictures of README and docs from the library's own functions: what is drawn is what runs.

    python -m tools.draw_ideas [OUT]        (OUT: docs/images)

Each cell is read off a mask, a slot or a plan, each angle off a rotation, each shape off the table of weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.cache import RollingBufferCache
from mistral.parameters import parameters
from mistral.rope import Rope, rotate
from mistral.window import visible
from tools.draw_svg import Picture

WINDOW = 4
CELL = 26
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "saw", "the", "dog"]
SEVEN_B = ModelArgs(4096, 32, 128, 14336, 32, 8, 1e-5, 32000, sliding_window=4096, rope_theta=1e4)
GROUPS = ("new", "old", "third", "fourth")

Grid = Sequence[Sequence[tuple[str, str]]]  # of each cell its kind and its label


def grid(picture: Picture, x: float, y: float, cells: Grid, columns: Sequence[str], rows: Sequence[str]) -> None:
    """A table of coloured cells at (x, y), row 0 on top, with the names of columns above and of rows to the left."""
    for i, row in enumerate(cells):
        picture.text(x - 6, y + (i + 0.5) * CELL, rows[i], size=11, anchor="end")
        for j, (kind, label) in enumerate(row):
            picture.rect(x + j * CELL + 1, y + i * CELL + 1, CELL - 2, CELL - 2, kind, label, size=10)
    for j, name in enumerate(columns):
        upright = name.isdigit()
        at = (x + (j + 0.5) * CELL, y - (9 if upright else 6))
        picture.text(*at, name, size=11, anchor="middle" if upright else "start", turn=0 if upright else -90)


def seen(mask: Tensor) -> Grid:
    """Cells of a mask."""
    return [[("new" if cell else "empty", "") for cell in row] for row in mask.tolist()]


def draw_masks() -> Picture:
    """Full and sliding-window attention: rows are queries, columns keys."""
    picture = Picture(720, 372, "Masks of full attention and of a sliding window of 4 tokens")
    positions = torch.arange(len(WORDS))
    for x, window in ((70, None), (430, WINDOW)):
        grid(picture, x, 70, seen(visible(positions, positions, window)), WORDS, WORDS)
        picture.text(x + 5 * CELL, 18, "key", "soft")
        picture.text(x - 52, 70 + 5 * CELL, "query", "soft", turn=-90)
        picture.text(
            x + 5 * CELL, 352, "full attention" if window is None else f"sliding window, W = {window}", size=13
        )
    return picture


def draw_reach() -> Picture:
    """What the last token can know of, layer by layer: W - 1 positions further each time."""
    positions = torch.arange(len(WORDS))
    mask = visible(positions, positions, WINDOW).float()
    known = torch.zeros(len(WORDS))
    known[-1] = 1
    rows = [known]
    for _ in range(3):
        rows.append((rows[-1] @ mask > 0).float())
    picture = Picture(440, 180, "What the last token can know of after each of three layers")
    names = ["the last token's input", "after 1 layer", "after 2 layers", "after 3 layers"]
    grid(picture, 155, 60, seen(torch.stack(rows) > 0), WORDS, names)
    return picture


def small_cache(rows: int) -> RollingBufferCache:
    args = ModelArgs(8, 1, 2, 8, 2, 1, 1e-5, 8, sliding_window=WINDOW)
    return RollingBufferCache(args, rows, positions=100)


def colour(key: int, start: int, query: int) -> str:
    """Of a key, for a step that began at `start` and a query: not seen, from before, or new."""
    if not visible(torch.tensor([query]), torch.tensor([key]), WINDOW).item():
        return "empty"
    return "old" if key < start else "new"


def draw_buffer() -> Picture:
    """Which position lies in which slot, as three sequences of different lengths grow."""
    cache = small_cache(rows=3)
    picture = Picture(800, 160, "The rolling buffer of three sequences in three steps")
    for number, seqlens in enumerate(((3, 6, 9), (1, 1, 1), (1, 1, 1))):
        plan = cache.plan(seqlens)
        store = cache.layer(0)
        cells: list[list[tuple[str, str]]] = []
        for run in plan.runs:
            for start in range(0, run.n, store.block):
                tile = store.tile(plan, run, start, min(start + store.block, run.n))
            for row, held in zip(range(run.rows.start, run.rows.stop), tile.k_pos.tolist(), strict=True):
                held += [-1] * (store.capacity - len(held))
                first, newest = plan.starts[row], plan.starts[row] + run.n - 1
                cells.append([(colour(p, first, newest), "" if p < 0 else str(p)) for p in held])
        cache.commit(plan)
        x = 90 + number * 235
        picture.text(x + store.capacity * CELL / 2, 16, "slot" if number else "after a first step; slot", "soft")
        slots = [str(s) for s in range(store.capacity)]
        grid(picture, x, 45, cells, slots, ["" if number else f"sequence {i}" for i in range(3)])
        words = f"lengths {', '.join(map(str, cache.lengths))}"
        picture.text(x + store.capacity * CELL / 2, 140, words, size=11)
    return picture


def draw_chunks() -> Picture:
    """Chunked prefill: keys a chunk's queries see in the cache (blue) and in the chunk itself (orange)."""
    cache = small_cache(rows=1)
    picture = Picture(780, 206, "A prompt of ten tokens in three chunks")
    x = 60
    for number, n in enumerate((4, 4, 2), 1):
        plan = cache.plan([n])
        start = plan.starts[0]
        cells = [[(colour(k, start, start + q), "") for k in range(start + n)] for q in range(n)]
        grid(picture, x, 56, cells, WORDS[: start + n], WORDS[start : start + n])
        picture.text(x + (start + n) * CELL / 2, 184, f"chunk {number}", size=12)
        cache.commit(plan)
        x += (start + n) * CELL + 60
    return picture


def step(picture: Picture, x: float, y: float, w: float, words: str, shape: str = "", kind: str = "box") -> None:
    """A box of a flow chart, 34 high, and the shape of what leaves it."""
    picture.rect(x, y, w, 34, kind, words, size=12)
    if shape:
        picture.text(x + w / 2, y + 44, shape, "soft", 10)


def draw_layer() -> Picture:
    """One layer of 7B: what happens to one token, with the widths of the real weights."""
    weights = parameters(SEVEN_B)
    names = ("attention.wq", "attention.wk", "attention.wo", "feed_forward.w1", "feed_forward.w2")
    q, kv, dim, hidden, down = (f"{weights[f'layers.0.{name}.weight'].shape[0]:,}" for name in names)
    assert dim == down
    picture = Picture(960, 330, "One layer: attention and feed-forward, each added to the residual stream")
    stream, branch = 40, 150
    picture.line((20, stream), (945, stream), kind="ink", width=3, head=True)
    picture.text(20, stream - 18, f"residual stream x, {dim} numbers a token", anchor="start")
    for x in (535, 905):
        picture.circle(x, stream, 11, "box", filled=True)
        picture.circle(x, stream, 11, "ink")
        picture.text(x, stream, "+", size=15)

    picture.line((55, stream), (55, branch + 17), (75, branch + 17), head=True)
    step(picture, 75, branch, 74, "RMSNorm")
    for y, name, width, rotated in ((88, "wq", q, True), (branch, "wk", kv, True), (212, "wv", kv, False)):
        picture.line((149, branch + 17), (163, branch + 17), (163, y + 17), (180, y + 17), head=True)
        step(picture, 180, y, 44, name, width, "old")
        if rotated:
            picture.line((224, y + 17), (248, y + 17), head=True)
            step(picture, 248, y, 62, "rotate", kind="third")
        picture.line((310 if rotated else 224, y + 17), (345, y + 17), head=True)
    picture.rect(345, 88, 100, 158, "new")
    for i, line in enumerate(("attention", "over W keys,", "in the", "rolling buffer")):
        picture.text(395, 140 + 17 * i, line, "on", 12)
    picture.line((445, branch + 17), (468, branch + 17), head=True)
    step(picture, 468, branch, 44, "wo", dim, "old")
    picture.line((512, branch + 17), (535, branch + 17), (535, stream + 12), head=True)

    picture.line((572, stream), (572, branch + 17), (590, branch + 17), head=True)
    step(picture, 590, branch, 74, "RMSNorm")
    for y, name in ((119, "w1"), (181, "w3")):
        picture.line((664, branch + 17), (678, branch + 17), (678, y + 17), (695, y + 17), head=True)
        step(picture, 695, y, 44, name, hidden, "old")
    picture.line((739, 136), (753, 136), head=True)
    step(picture, 753, 119, 40, "silu", kind="third")
    picture.circle(818, branch + 17, 11, "box", filled=True)
    picture.circle(818, branch + 17, 11, "ink")
    picture.text(818, branch + 17, "×", size=15)
    picture.line((793, 136), (818, 136), (818, branch + 5), head=True)
    picture.line((739, 198), (818, 198), (818, branch + 29), head=True)
    picture.line((829, branch + 17), (845, branch + 17), head=True)
    step(picture, 845, branch, 44, "w2", dim, "old")
    picture.line((889, branch + 17), (905, branch + 17), (905, stream + 12), head=True)

    picture.frame(42, 70, 480, 206)
    picture.text(282, 292, "attention: the only place where tokens meet", "soft")
    picture.frame(560, 70, 336, 206)
    picture.text(728, 292, "feed-forward: each token alone", "soft")
    picture.text(480, 316, "blue: weights, with the width of what comes out, in 7B", "soft", 11)
    return picture


def draw_heads() -> Picture:
    """Which key/value head each of 8 query heads reads: 8, 2 and 1 key/value heads."""
    picture = Picture(900, 190, "Query heads and the key/value heads that they read")
    heads = 8
    for x0, kv, name in ((50, 8, "multi-head: K = 8"), (345, 2, "grouped: K = 2"), (640, 1, "multi-query: K = 1")):
        for h in range(heads):
            group = h // (heads // kv)  # the contract's rule 6
            kind = GROUPS[group % len(GROUPS)]
            x, wide = x0 + h * CELL, heads // kv * CELL
            centre = x0 + (group + 0.5) * wide
            picture.line((x + CELL / 2, 70), (centre, 110), width=1.2)
            picture.rect(x + 1, 44, CELL - 2, CELL, kind, str(h), size=10)
            if h % (heads // kv) == 0:
                picture.rect(centre - CELL / 2 + 1, 110, CELL - 2, CELL, kind, str(group), size=10)
        picture.text(x0 + heads * CELL / 2, 24, name, size=13)
    picture.text(42, 57, "q", anchor="end")
    picture.text(42, 123, "k, v", anchor="end")
    saved = SEVEN_B.n_heads // SEVEN_B.n_kv_heads
    words = f"7B: {SEVEN_B.n_heads} query heads, {SEVEN_B.n_kv_heads} key/value heads: a cache {saved} times smaller"
    picture.text(450, 166, words, "soft")
    return picture


def hand(picture: Picture, x: float, y: float, r: float, pair: Tensor, kind: str) -> None:
    """A pair of numbers as the hand of a dial at (x, y): the first to the right, the second up."""
    a, b = pair.tolist()
    picture.line((x, y), (x + r * a, y - r * b), kind=kind, width=2.2, head=True)


def turned(position: int, rope: Rope) -> Tensor:
    """The pairs (1, 0) of a head at a position, rotated: [D/2, 2]."""
    unit = torch.tensor([1.0, 0.0]).repeat(len(rope.frequencies)).view(1, 1, -1)
    return rotate(unit, *rope.cos_sin(torch.tensor([position]))).view(-1, 2)


def draw_rotation() -> Picture:
    """RoPE: how far the pairs of a head turn, and that a query and a key differ by their distance alone."""
    picture = Picture(900, 250, "Rotary positions: pairs turn like hands of a clock")
    rope = Rope(ModelArgs(8, 1, 8, 8, 1, 1, 1e-5, 8, rope_theta=1e4))
    for i in range(4):
        x, y, r = 85 + i * 120, 118, 46
        picture.circle(x, y, r, "soft")
        for position, kind in ((0, "soft"), (1, "old"), (2, "new"), (8, "ink")):
            hand(picture, x, y, r, turned(position, rope)[i], kind)
        picture.text(x, 190, f"pair ({2 * i}, {2 * i + 1})", size=11)
        picture.text(x, 207, f"{rope.frequencies[i]:.3g} a position", "soft", 11)
    picture.text(265, 24, "one head of 8 numbers, theta 10,000: pair i turns by theta^(-2i/8)", size=13)
    for x, position, kind in ((110, 0, "soft"), (200, 1, "old"), (300, 2, "new"), (400, 8, "ink")):
        picture.rect(x, 226, 10, 10, kind)
        picture.text(x + 15, 231, f"position {position}", size=11, anchor="start")
    for x, q, k in ((620, 2, 1), (780, 8, 7)):
        y, r = 118, 60
        picture.circle(x, y, r, "soft")
        hand(picture, x, y, r, turned(k, rope)[0], "old")
        hand(picture, x, y, r, turned(q, rope)[0], "new")
        score = float((turned(q, rope)[0] * turned(k, rope)[0]).sum())
        assert math.isclose(score, math.cos((q - k) * float(rope.frequencies[0])), abs_tol=1e-6)
        picture.text(x, 198, f"query at {q}, key at {k}", size=11)
        picture.text(x, 215, f"product {score:.2f}", "soft", 11)
    picture.text(700, 24, "the product depends on the distance alone", size=13)
    for x, words, kind in ((610, "key", "old"), (700, "query", "new")):
        picture.rect(x, 226, 10, 10, kind)
        picture.text(x + 15, 231, words, size=11, anchor="start")
    return picture


def draw_packed() -> Picture:
    """A ragged batch in one step: what each sequence holds and contributes, how it is packed, and its runs."""
    cache = small_cache(rows=5)
    cache.commit(cache.plan([2, 6, 3, 5, 0]))
    plan = cache.plan([4, 1, 1, 0, 3])
    picture = Picture(690, 330, "Five sequences packed into one step")
    x0, y0 = 130, 46
    names = ["chunk of a prompt", "decodes", "decodes", "waits", "new prompt"]
    for row, (start, n) in enumerate(zip(plan.starts, plan.seqlens, strict=True)):
        y = y0 + row * CELL
        picture.text(x0 - 8, y + CELL / 2, f"{'abcde'[row]}: {names[row]}", size=11, anchor="end")
        for p in range(start + n):
            kind = "new" if p >= start else "old"
            picture.rect(x0 + p * CELL + 1, y + 1, CELL - 2, CELL - 2, kind, str(p), size=10)
    picture.text(x0 + 3.5 * CELL, 26, "position", "soft")
    picture.text(480, 58, "in the cache", size=11, anchor="start")
    picture.rect(456, 50, 16, 16, "old")
    picture.text(480, 84, "contributed to this step", size=11, anchor="start")
    picture.rect(456, 76, 16, 16, "new")
    picture.text(456, 116, f"seqlens = {list(plan.seqlens)}", size=11, anchor="start")
    picture.text(456, 136, f"starts = {list(plan.starts)}", size=11, anchor="start")
    y = 226
    picture.text(x0 - 8, y + CELL / 2, "packed", size=11, anchor="end")
    owners = [row for row, n in enumerate(plan.seqlens) for _ in range(n)]
    for token, (row, position) in enumerate(zip(owners, plan.positions.tolist(), strict=True)):
        picture.rect(x0 + token * CELL * 1.5 + 1, y, CELL * 1.5 - 2, CELL, "new", f"{'abcde'[row]} {position}", size=11)
    for run in plan.runs:
        left, right = (x0 + at * CELL * 1.5 for at in (run.tokens.start, run.tokens.stop))
        picture.line((left + 3, y + 36), (left + 3, y + 42), (right - 3, y + 42), (right - 3, y + 36))
        rows = run.rows.stop - run.rows.start
        picture.text((left + right) / 2, y + 56, f"run [{rows}, {run.n}]", "soft", 11)
    packed = f"T = {len(plan.positions)} tokens, no padding"
    words = f"{packed}; a run is a rectangle: adjacent sequences that contribute equally many"
    picture.text(345, y + 84, words, "soft", 12)
    return picture


DRAWINGS = (draw_masks, draw_reach, draw_buffer, draw_chunks, draw_layer, draw_heads, draw_rotation, draw_packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/images"), metavar="FOLDER")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for draw in DRAWINGS:
        path = out / f"{draw.__name__.removeprefix('draw_')}.svg"
        draw().save(path)
        print(path)


if __name__ == "__main__":
    main()
