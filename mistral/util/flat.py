"""Options as parcels, shown flat: a function that takes a dataclass is called by its fields. Runs without torch."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields, replace
from typing import Any, TypeVar

from mistral.util.arguments import require_kind

R = TypeVar("R")


def flat(*, omit: Collection[str] = (), **parcels: Any) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a function that takes dataclasses as keyword arguments a signature of their fields.

        @flat(params=SamplingParams(max_tokens=35), options=LoadOptions())
        def demo(folder: str | None = None, *, params: SamplingParams, options: LoadOptions) -> None: ...

    `demo(max_tokens=5, device="cpu")` then passes `SamplingParams(max_tokens=5)` and `LoadOptions(device="cpu")`. The
    instances given here hold the defaults. A parcel may also be given whole, and fields beside it change it.

    Args:
        omit: fields that the function has no use for: they are not shown, and not accepted.
        parcels: by the name of the argument, the dataclass with the defaults.
    """
    shown_fields = {
        name: [field for field in fields(default) if field.name not in omit] for name, default in parcels.items()
    }

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> R:
            for name, default in parcels.items():
                whole = named.pop(name, None)
                changes = {f.name: named.pop(f.name) for f in shown_fields[name] if f.name in named}
                base = default if whole is None else whole
                require_kind(name, base, type(default))
                named[name] = replace(base, **changes) if changes else base
            return function(*given, **named)

        own = inspect.signature(function).parameters.values()
        shown = [p for p in own if p.name not in parcels]
        shown += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(default, f.name), annotation=f.type
            )
            for name, default in parcels.items()
            for f in shown_fields[name]
        ]
        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        call.__parcels__ = [  # type: ignore[attr-defined]
            (default, shown_fields[name]) for name, default in parcels.items()
        ]
        return call

    return decorate


def parcels_of(function: Callable[..., Any]) -> list[tuple[Any, list[Field[Any]]]]:
    """The dataclasses that a `flat` function takes, with their defaults, and the fields of each that it shows."""
    return getattr(function, "__parcels__", [])


def field_help(kind: Any) -> Mapping[str, str]:
    """The text for each name under `Args:` in the docstring of a dataclass or function, on one line."""
    text = (inspect.getdoc(kind) or "").partition("Args:\n")[2]
    text = re.split(r"\n\n|\n\S", text)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", said) for name, said in found}
