"""How far back a changed token still moves a model's next prediction, by distance, window and layer.

Each layer carries information W - 1 positions further (docs/contract.md, rule 13). Beyond the sum over the layers
nothing arrives, and it shows as exactly nothing: with and without the change, the same steps run in the same places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.cache import RollingBufferCache
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.util.errors import UsageError
from mistral.window import Window

CHUNK = 128  # tokens of a step; steps begin at multiples of it, so that every run has the same ones
SMALLEST = 1e-18  # what a KL that rounds to 0 or below counts as, where any bit differs
SHARE = 0.01  # of a state's norm, behind a layer
NOTICEABLE = 1e-3  # nats of KL divergence; about a thousandth of a nat lost on the next token


@dataclass(frozen=True)
class Reach:
    """What changing one token does, as means over several texts.

    Args:
        window: of the layers, as text.
        edge: the furthest distance from which anything can arrive: the sum of W - 1 over the layers; None: any.
        layer_edges: the same for the first 1, 2, ... layers.
        distances: of the changed token from the last one, ascending.
        kl: mean KL divergence of the next token's distribution, in nats, with the change from without.
        largest: the largest of them.
        layers: for each layer, the mean change of the last token's state behind it, as a share of its norm.
        beyond: the largest KL of all distances past the edge; None where none was measured.
    """

    window: str
    edge: int | None
    layer_edges: list[int | None]
    distances: list[int]
    kl: list[float]
    largest: list[float]
    layers: list[list[float]]

    @property
    def beyond(self) -> float | None:
        if self.edge is None or self.distances[-1] <= self.edge:
            return None
        return max(kl for d, kl in zip(self.distances, self.largest, strict=True) if d > self.edge)

    @property
    def layers_noticeable(self) -> list[int | None]:
        """For each layer, the furthest distance at which a change moves the last state behind it by SHARE."""
        return [
            max((d for d, share in zip(self.distances, moved, strict=True) if share >= SHARE), default=None)
            for moved in self.layers
        ]

    @property
    def noticeable(self) -> int | None:
        """The furthest distance at which a change moves the prediction by NOTICEABLE nats in the mean."""
        return max((d for d, kl in zip(self.distances, self.kl, strict=True) if kl >= NOTICEABLE), default=None)


def edges(args: ModelArgs) -> list[int | None]:
    """How far back the state behind layers 1, 2, ... can see; None behind one without a window."""
    far = accumulate(float("inf") if w is None else w - 1 for w in args.windows)
    return [None if e == float("inf") else int(e) for e in far]


def distances_for(length: int, edge: int | None, count: int = 32) -> list[int]:
    """About `count` distances from 1 to length - 1, denser where they are short, and some around the edge."""
    most = length - 1
    found = {min(most, max(1, round(most ** (i / (count - 1))))) for i in range(count)}
    if edge is not None:
        found |= {edge - 1, edge, edge + 1, edge + (most - edge) // 2}
    return sorted(d for d in found if 1 <= d <= most)


@torch.inference_mode()
def reach(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    *,
    args: ModelArgs | None = None,
    distances: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reach:
    """Change one token of a text at each distance from its end, and see what that moves.

    Args:
        model: one that runs in PyTorch (execution eager): states behind layers are read from its modules.
        texts: ids, all of one length, at least 2.
        args: the model's with other windows; None: its own.
        distances: from the last token, ascending; None: `distances_for` the length.
        seed: the new token is drawn with it from the rest of the text.
        progress: told how many distances were measured, over all texts, and how many there are.

    Raises:
        UsageError: texts of no or different lengths, or a distance outside of them.
    """
    args = model.args if args is None else args
    lengths = {len(ids) for ids in texts}
    if len(lengths) != 1 or min(lengths) < 2:
        raise UsageError(f"texts of {sorted(lengths)} tokens: they must all have the same length, at least 2")
    (length,) = lengths
    behind = edges(args)
    chosen = distances_for(length, behind[-1]) if distances is None else list(distances)
    if not chosen or sorted(set(chosen)) != chosen or not 1 <= chosen[0] <= chosen[-1] < length:
        raise UsageError(f"distances must ascend from 1 at least to {length - 1} at most")
    kl, moved = [], []
    for number, ids in enumerate(texts):
        rng = random.Random(f"reach {seed} {number}")
        found = list(_one_text(model, args, list(ids), chosen[::-1], rng))
        kl.append([one for one, _ in found[::-1]])
        moved.append([layers for _, layers in found[::-1]])
        if progress is not None:
            progress((number + 1) * len(chosen), len(texts) * len(chosen))
    each = torch.tensor(kl, dtype=torch.float64)
    by_layer = torch.tensor(moved, dtype=torch.float64).mean(0).T  # [layers, distances]
    return Reach(
        args.window_text,
        behind[-1],
        behind,
        chosen,
        each.mean(0).tolist(),
        each.amax(0).tolist(),
        by_layer.tolist(),
    )


def _one_text(
    model: Transformer, args: ModelArgs, ids: list[int], distances: Sequence[int], rng: random.Random
) -> Iterator[tuple[float, list[float]]]:
    """The KL and the change behind each layer, for distances that descend.

    Row 1 of the cache does all the computing, so that every run has the same steps in the same places; row 0 keeps the
    text up to the step in which the change is.
    """
    cache = model.make_cache(2, len(ids), args)
    plain, states = _run(model, cache, ids, 0)
    kept = 0
    for distance in distances:
        at = len(ids) - 1 - distance
        if at // CHUNK * CHUNK > kept:
            cache.copy(0, 1)
            _run(model, cache, ids[: at // CHUNK * CHUNK], kept)
            kept = at // CHUNK * CHUNK
            cache.copy(1, 0)
        cache.copy(0, 1)
        others = sorted({*ids[1:]} - {ids[at]}) or [(ids[at] + 1) % args.vocab_size]
        changed, moved = _run(model, cache, [*ids[:at], rng.choice(others), *ids[at + 1 :]], kept)
        shares = [float((b - a).norm() / a.norm()) for a, b in zip(states, moved, strict=True)]
        yield _divergence(plain, changed), shares


def _divergence(plain: Tensor, changed: Tensor) -> float:
    """KL divergence in nats; exactly 0 where every bit is equal, and nowhere else."""
    if torch.equal(plain, changed):
        return 0.0
    return max(SMALLEST, float((plain.exp() * (plain - changed)).sum()))


def _run(model: Transformer, cache: RollingBufferCache, ids: list[int], first: int) -> tuple[Tensor, list[Tensor]]:
    """Process ids from `first` on in row 1; return the next token's log-probs and the last state behind each layer."""
    if not first:
        cache.reset(1)
    h = torch.empty(0)
    with _last_states(model) as states:
        for start in range(first, len(ids), CHUNK):
            piece = torch.tensor(ids[start : start + CHUNK], device=model.device)
            h = model.forward_partial(piece, [0, len(piece)], cache)
    return logprobs(model.logits(h[-1:]))[0], [states[i] for i in range(len(states))]


@contextmanager
def _last_states(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """The last token's state behind each layer of the newest step that runs inside, in float64."""
    states: dict[int, Tensor] = {}

    def keep(i: int, module: object, given: object, out: Tensor) -> None:
        states[i] = out[-1].double()

    hooks = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(model.layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def samples(ids: Sequence[int], count: int, length: int, seed: int, bos: Sequence[int]) -> list[list[int]]:
    """Pieces of a text, each begun by `bos` and of `length` tokens in all; where it is short, it begins again."""
    needed = length - len(bos)
    rng = random.Random(f"samples {seed}")
    starts = [rng.randrange(max(1, len(ids) - needed + 1)) for _ in range(count)]
    return [[*bos, *(ids[(start + i) % len(ids)] for i in range(needed))] for start in starts]


def window_args(args: ModelArgs, window: Window) -> ModelArgs:
    """The same model with another window in every layer; nothing else changes, rope_theta included."""
    return replace(args, sliding_window=window)
