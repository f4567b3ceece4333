"""LoRA adapters beside the weights while a model runs, several at once: which rows of a product have which of them.

Whoever runs a step declares the adapter of each of its rows (`Adapters.of`), and each matrix that adapters change
(`AdaptedLinear`) looks there. So nothing between the two passes names on. Knows nothing about files or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.util.errors import UsageError, short_repr

BASE = ""  # the name of the model itself, without an adapter

# Adapters, and which rows have them: their numbers, or None for all rows. Rows that are in none are those of the base.
Spans = tuple[tuple[str, Tensor | None], ...]
# Of the step that this thread runs; None where nobody declared any.
_now: ContextVar[Spans | None] = ContextVar("adapters of rows", default=None)


class Adapters:
    """The adapters that a model has beside its weights.

    Args:
        names: what they are called, at least one.
        mixes: whether rows of one step may have different ones. Where experts are changed they may not: an expert is
            given some rows of a step, and cannot tell which.

    Attributes:
        default: what rows have of which nothing is declared: the only adapter, or the base if there are several.
    """

    def __init__(self, names: Sequence[str], mixes: bool = True) -> None:
        self.names, self.mixes = tuple(names), mixes
        self.default = self.names[0] if len(self.names) == 1 else BASE

    def find(self, name: str | None) -> str:
        """A name that was asked for, if it can be had; None is the default, BASE the model without an adapter.

        Raises:
            UsageError: there is none of that name, or it cannot be beside the default.
        """
        if name is None:
            return self.default
        if name != BASE and name not in self.names:
            raise UsageError(f"no adapter is called {short_repr(name)}; there are {', '.join(self.names)}")
        if not self.mixes and name != self.default:
            raise UsageError(f"the adapter {self.default} changes experts, so every request must have it")
        return name

    @contextmanager
    def of(self, names: Sequence[str], counts: Sequence[int], device: torch.device | str = "cpu") -> Iterator[None]:
        """While open, in this thread, products are of packed rows: the first counts[0] have names[0], and so on.

        Args:
            names: as `find` returns them.
            counts: how many rows each has; may be 0.
            device: of the rows.
        """
        token = _now.set(_spans(names, counts, device))
        try:
            yield
        finally:
            _now.reset(token)

    def now(self) -> Spans:
        """The adapters that rows have now."""
        declared = _now.get()
        if declared is not None:
            return declared
        return () if self.default == BASE else ((self.default, None),)


def _spans(names: Sequence[str], counts: Sequence[int], device: torch.device | str) -> Spans:
    rows: dict[str, list[Tensor]] = {}
    begin = 0
    for name, count in zip(names, counts, strict=True):
        if count:
            rows.setdefault(name, []).append(torch.arange(begin, begin + count, device=device))
            begin += count
    if len(rows) == 1:
        name = next(iter(rows))
        return () if name == BASE else ((name, None),)
    return tuple((name, torch.cat(parts)) for name, parts in rows.items() if name != BASE)


class LoraPair(nn.Module):
    """`B(A(x) * scale)`: [..., in] to [..., out], in x's dtype.

    Args:
        a, b: [rank, in] and [out, rank], in the dtype of activations.
        scale: what B @ A is multiplied by.
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


class AdaptedLinear(nn.Module):
    """A product, and beside it what the adapters of its rows add: [T, in] to [T, out], in x's dtype.

    The sum is of two products, each rounded. Rows of the base are those of `of`, bit for bit.

    Args:
        of: any kind of `Linear`; its weights stay as they are, quantized ones included.
        adapters: those of the model, also the ones that leave this matrix as it is.
        pairs: by their names, what the others add.
    """

    def __init__(self, of: nn.Module, adapters: Adapters, pairs: dict[str, LoraPair]) -> None:
        super().__init__()
        self.of, self.adapters = of, adapters
        self.pairs = nn.ModuleList(pairs.values())
        self._places = {name: i for i, name in enumerate(pairs)}  # a name may have dots, which modules' names may not

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of(x)
        for name, rows in self.adapters.now():
            if name not in self._places:
                continue
            pair = self.pairs[self._places[name]]
            y = y + pair(x) if rows is None else y.index_add(0, rows, pair(x[rows]))
        return y


def find_adapter(adapters: Adapters | None, name: str | None) -> str:
    """The adapter of that name, "" for none; None: the default. Of a model that may have none at all.

    Raises:
        UsageError: there is no such adapter.
    """
    if adapters is not None:
        return adapters.find(name)
    if name:
        raise UsageError(
            f"no adapter is called {short_repr(name)}: none is beside the weights (one alone is merged into them, and "
            "has no name then: --adapter_mode runtime leaves it beside them)"
        )
    return BASE
