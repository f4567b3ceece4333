"""Attention by name: a table, and the choice for a device and dtype, made once at load.

A library is imported when its name is asked for, and a kernel counts as present when it has run
here. Layers see only the `Attend` that comes out.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable

import torch

from mistral.attention import Attend, eager, sdpa, tiled
from mistral.backends.varlen import VarlenAttention

log = logging.getLogger("mistral")


def _flash() -> Attend:
    from mistral.backends import flash

    return flash.backend()


def _xformers() -> Attend:
    from mistral.backends import xformers

    return xformers.backend()


BACKENDS: dict[str, Callable[[], Attend]] = {
    "sdpa": lambda: tiled(sdpa),
    "eager": lambda: tiled(eager),
    "flash": _flash,
    "xformers": _xformers,
}


def _defaults(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What "auto" tries, best first; the last of them runs anywhere."""
    if dtype == torch.float64:
        return ("eager",)  # asked for to be exact, so the spelled-out arithmetic
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return "flash", "sdpa"
    return ("sdpa",)


def resolve(name: str | None, device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> tuple[str, Attend]:
    """The attention to use: its name in `BACKENDS`, and the function.

    Args:
        name: a name in `BACKENDS`; None or "auto" takes the best that runs.
        device, dtype: where and in what the model computes.
        head_dim: D, which some kernels limit.

    A backend that was named but does not run here is replaced by what "auto" takes, with one line
    of warning.

    Raises:
        ValueError: there is no backend of this name.
    """
    asked = "auto" if name is None else name
    if asked != "auto" and asked not in BACKENDS:
        raise ValueError(f"no attention backend is called {asked!r}; choose one of auto, {', '.join(BACKENDS)}")
    defaults = _defaults(device, dtype)
    failed = ""
    for used in defaults if asked == "auto" else dict.fromkeys((asked, *defaults)):
        try:
            attend = BACKENDS[used]()
            if isinstance(attend, VarlenAttention):
                attend.prove(device, dtype, head_dim)
        except Exception as error:  # a missing library, an old one, no kernel: all mean that it does not run here
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ..")
            failed = failed or f"attention {used!r} does not run on {device} in {str(dtype)[6:]} ({why})"
            continue
        if failed:
            # Nobody asked for what "auto" tried first.
            log.log(logging.INFO if asked == "auto" else logging.WARNING, "note: %s; using %r instead", failed, used)
        return used, attend
    raise AssertionError("the last default runs anywhere")
