"""/set and /show of a conversation: its sampling parameters, by name."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from mistral.cli import flags
from mistral.sampling_params import SamplingParams
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.chat.conversation import Chat

# What a conversation has no use for.
OMITTED = ("n", "top_logprobs")


def describe(chat: Chat) -> str:
    """The parameters and the seed, on one line."""
    params = chat.params
    shown = [f.name for f in fields(params) if f.name in _kinds() and f.name != "seed"]
    return ", ".join([*(f"{name} {_text(getattr(params, name))}" for name in shown), f"seed {chat.seed}"])


def change(chat: Chat, name: str, text: str) -> None:
    """Give a parameter another value, from the next answer on.

    Raises:
        UsageError: an unknown name, or a value that cannot be.
    """
    kinds = _kinds()
    if name not in kinds or not text:
        raise UsageError(f"/set needs a name and a value: {', '.join(kinds)}")
    value: Any = flags.convert(name, text, kinds[name])
    if kinds[name] is list:
        value = () if text == "-" else (text,)
    params = replace(chat.params, **{name: value})
    if name == "seed":
        chat.seed = value
        chat.answers = 0
        return
    chat.params = params


def _kinds() -> dict[str, Any]:
    """What can be changed, and the type of each."""
    parameters = inspect.signature(SamplingParams).parameters.values()
    return {p.name: flags.kind_of(p) for p in parameters if flags.kind_of(p) and p.name not in OMITTED}


def _text(value: object) -> str:
    return " and ".join(map(repr, value)) or "none" if isinstance(value, tuple) else str(value)
