"""How a mistake is made: functions of the library replaced from outside, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.backends.varlen import VarlenAttention
from mistral.fast.bitwise import BitwiseTransformer
from mistral.fast.cuda_graph import CudaGraphTransformer
from mistral.fast.decode import FastTransformer
from mistral.model import Transformer
from mistral.quant.linear import QuantizedLinear
from mistral.rope import Rope

# Functions are replaced for all threads, so only one of them may do it at a time; it may do it again inside.
_one_thread = RLock()
# (module or class, name of its function, what is called instead: with the right function, then its arguments)
Change = tuple[Any, str, Callable[..., Any]]
Matters = Callable[[ModelArgs, Sequence[int]], bool]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A mistake.

    Args:
        name: in snake_case.
        what: it is, in a line.
        changes: functions to replace.
        matters: whether a model of this shape, asked for prompts of these lengths, can give other numbers by it.
        bos: how many more ids of BOS (less, if negative) a prompt begins with.
        loads: whether it is made while a model with an adapter is loaded, and stays in that model.
    """

    name: str
    what: str
    changes: tuple[Change, ...]
    matters: Matters
    bos: int = 0
    loads: bool = False

    @contextmanager
    def patch(self) -> Iterator[None]:
        """While open, the library makes the mistake. May be nested: then it makes several. Other threads wait."""
        with _one_thread, ExitStack() as undo:
            for owner, name, wrong in (*PLAIN, *self.changes):
                right = vars(owner)[name]
                undo.callback(setattr, owner, name, right)
                setattr(owner, name, wraps(right)(instead(wrong, right)))
            yield

    def prompt_ids(self, ids: Tensor) -> Tensor:
        """What is fed for a prompt [n] that begins with BOS: [n + bos] ids."""
        return torch.cat([ids[:1].repeat(max(0, self.bos)), ids[max(0, -self.bos) :]])

    def align(self, rows: Tensor, n: int) -> Tensor:
        """Rows [n + bos, V] for what was fed, by the prompt's own positions: [n, V], nan where there is none."""
        missing = rows.new_full((max(0, -self.bos), *rows.shape[1:]), torch.nan)
        return torch.cat([missing, rows[max(0, self.bos) :]])[:n]


def instead(wrong: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """`partial(wrong, right)`, but a function: a class binds it to its objects."""
    return lambda *given, **named: wrong(right, *given, **named)


class As:
    """A module or cache with some parts replaced, for one call of a function of its class; it stays what it is."""

    def __init__(self, thing: Any, **parts: Any) -> None:
        self._thing = thing
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


# What goes round the functions that are replaced below goes by them again.
PLAIN: tuple[Change, ...] = (
    (FastTransformer, "step", lambda right, *given: Transformer.step(*given)),
    (CudaGraphTransformer, "step", lambda right, *given: Transformer.step(*given)),
    (BitwiseTransformer, "step", lambda right, *given: Transformer.step(*given)),
    (FastTransformer, "logits", lambda right, *given: Transformer.logits(*given)),
    (BitwiseTransformer, "logits", lambda right, *given: Transformer.logits(*given)),
    (VarlenAttention, "_parts", lambda right, *given: None),
)


def weight_of(linear: Any) -> Tensor:
    """The weights of a product [out, in], quantized ones as they are meant."""
    weight: Tensor = linear.rows(0, linear.out_features) if isinstance(linear, QuantizedLinear) else linear.weight
    return weight


# When a mistake can matter.


def several_ids(args: ModelArgs, lens: Sequence[int]) -> bool:
    return max(lens, default=0) > 1


def looks_back(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Some token sees another one."""
    return several_ids(args, lens) and set(args.windows) != {1}


def turns_unevenly(args: ModelArgs, lens: Sequence[int]) -> bool:
    """Several pairs turn, each by its own angle; the first one's is the position, whatever theta."""
    return args.head_dim > 2 and looks_back(args, lens)


def angles(wrong: Callable[..., tuple[Tensor, ...]]) -> tuple[Change, ...]:
    """A mistake in cosines and sines. Frequencies lie in the models, so it is made where they are used."""
    return ((Rope, "cos_sin", wrong),)
