"""Commands whose model may be divided among processes: each rank runs the command, and the first one prints."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mistral.loader.options import LoadOptions

if TYPE_CHECKING:
    from mistral.loader.division import Division
    from mistral.loader.load import Loaded


def divisible(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command start the ranks that `--parallel` asks for."""

    @functools.wraps(command)
    def call(*given: Any, options: LoadOptions, **named: Any) -> None:
        if options.parallel == 1 or _in_a_group():
            command(*given, options=options, **named)
            return
        from mistral.parallel import launch

        launch.run(options.parallel, _again, command.__module__, command.__name__, given, {**named, "options": options})

    return call


def _again(module: str, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """The command, in whichever process this is; only the first one's words are seen."""
    from mistral.parallel.shard import shard_of_this_process

    command = getattr(importlib.import_module(module), name)
    shard = shard_of_this_process()
    if shard is None or shard.rank == 0:
        command(*given, **named)
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        command(*given, **named)


def in_first(load: Callable[[], Loaded], command: Callable[[Callable[[], Loaded]], None]) -> None:
    """Run a command that is given what loads its model: on the first rank alone, where there are several.

    The others load when it does, and take each step of its model with it; see `parallel.lead`.
    """
    if not _in_a_group():
        command(load)
        return
    from mistral.parallel import lead

    lead.in_first(load, command)


def _in_a_group() -> bool:
    if "torch.distributed" not in sys.modules:  # nobody has joined one
        return False
    from mistral.parallel.shard import shard_of_this_process

    return shard_of_this_process() is not None


def division() -> Division | None:
    """This process's part of the model, if it is one of several."""
    if not _in_a_group():
        return None
    from mistral.parallel.shard import shard_of_this_process

    return shard_of_this_process()


def from_first(read: Callable[[], bytes]) -> bytes:
    """What the first rank reads, which alone has a stdin."""
    if not _in_a_group():
        return read()
    from mistral.parallel import launch
    from mistral.parallel.shard import shard_of_this_process

    shard = shard_of_this_process()
    return launch.from_first(read() if shard is None or shard.rank == 0 else b"")
