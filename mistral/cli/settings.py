"""/set and /show of a conversation: its sampling parameters, by name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mistral.cli import flags
from mistral.sampling_params import SamplingParams
from mistral.util.english import did_you_mean
from mistral.util.errors import UsageError, short_repr

if TYPE_CHECKING:
    from mistral.chat.conversation import Chat

# What a conversation has no use for.
OMITTED = ("n", "top_logprobs")
OF_THOUGHTS = ("thinking", "reasoning_effort")  # the conversation's own, of models that think before they answer
USUAL = ("max_tokens", "temperature", "top_p", "seed")


def describe(chat: Chat) -> str:
    """The parameters that are not the defaults, and those that everybody asks for, on one line; and the seed."""
    defaults = SamplingParams()
    shown = [n for n in _kinds() if n in USUAL or getattr(chat.params, n) != getattr(defaults, n)]
    values = (f"{name} {_text(getattr(chat.params, name))}" for name in shown if name != "seed")
    return ", ".join([*values, f"seed {chat.seed}"])


def change(chat: Chat, name: str, text: str) -> None:
    """Give a parameter another value, from the next answer on.

    Raises:
        UsageError: an unknown name, or a value that cannot be.
    """
    kinds = _kinds()
    names = (*kinds, *OF_THOUGHTS)
    known = ", ".join(names)
    if name and name not in kinds:
        raise UsageError(f"/set knows no {short_repr(name)}{did_you_mean(name, names) or f': {known}'}")
    if not text:
        raise UsageError(f"/set needs a value for {name}" if name else f"/set needs a name and a value: {known}")
    value: Any = () if kinds[name] in flags.REPEATED and text == "-" else flags.convert(name, text, kinds[name])
    if kinds[name] in flags.REPEATED and value:
        value = (value,)
    chat.params = replace(chat.params, **{name: value})
    if name == "seed":
        chat.seed, chat.answers = value, 0


def _kinds() -> dict[str, Any]:
    """What can be changed, and the type of each."""
    parameters = inspect.signature(SamplingParams).parameters.values()
    return {p.name: flags.kind_of(p) for p in parameters if flags.kind_of(p) and p.name not in OMITTED}


def _text(value: object) -> str:
    return " and ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
