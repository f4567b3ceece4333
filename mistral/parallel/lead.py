"""One rank leads and the others follow: they take each step of its model with it, and know nothing of what it is for.

For commands in which only the first rank sees what comes next, such as a server: requests, rows given away and tokens
chosen are its own. A follower is told the ids of a step and where each row of the cache begins, and goes back there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mistral.cache import NoCache, RollingBufferCache
from mistral.loader.load import Loaded
from mistral.model import Transformer
from mistral.plan import Plan
from mistral.util import memory
from mistral.util.errors import Fatal, MistralError

PATIENCE = timedelta(days=365)  # that followers wait for a step, where nobody asks for one
LAST = 10.0  # seconds that a step may take once the leader is to end
Load = Callable[[], Loaded]


def in_first(load: Load, command: Callable[[Load], None]) -> None:
    """Run a command on the first rank alone. The others load a model when it does, and then follow until it is through.

    Args:
        load: loads the model, on every rank.
        command: what the first rank does; it is given what loads, and may leave that.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if dist.get_rank():
        _follow(group, load)
        return
    leader = Leader(group)
    try:
        with _memory(_share):  # what fits is the first rank's to decide
            command(lambda: leader.load(load))
    finally:
        leader.end()


class Leader:
    """The first rank's end of it.

    Args:
        group: in which followers wait.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._agree = memory.agree  # how all ranks decide what fits
        self._one_at_a_time = threading.Lock()  # a command's threads: one takes steps, another ends it
        self._over: Fatal | None = None  # why there are no more steps

    def load(self, load: Load) -> Loaded:
        """Load a model, as every follower does, whose steps they take from then on.

        Raises:
            MistralError: it cannot be loaded, here or (Fatal) by another rank.
        """
        with self._telling("load"), _memory(self._agree):
            loaded = load()
        model = loaded.model
        step, logits = model.step, model.logits

        def led_step(input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
            with self._telling("step", input_ids.tolist(), plan.seqlens, plan.starts):
                return step(input_ids, plan, cache)

        def led_logits(h: Tensor) -> Tensor:
            with self._telling("logits", len(h)):
                dist.broadcast(h.contiguous(), src=0)
                return logits(h)

        model.step, model.logits = led_step, led_logits  # type: ignore[method-assign]
        return loaded

    def end(self) -> None:
        """Let the followers go. A step that another thread is in is waited for."""
        if not self._one_at_a_time.acquire(timeout=LAST):
            return  # it hangs; they end with this process
        try:
            if self._over is None:
                self._over = Fatal("the command is over")
                _tell(self._group, ("end",))
        except RuntimeError:
            pass  # they are gone already
        finally:
            self._one_at_a_time.release()

    @contextmanager
    def _telling(self, *what: Any) -> Iterator[None]:
        """While open, the followers do what they were told; after an error nobody knows how far each of them is.

        Raises:
            Fatal: an exchange with them failed, now or earlier.
        """
        with self._one_at_a_time:
            if self._over is not None:
                raise self._over
            try:
                _tell(self._group, what)
                yield
            except BaseException as error:  # also Ctrl-C, within a step
                self._over = Fatal(f"the ranks that divide the model are no longer in step: {error}")
                if what == ("load",) and isinstance(error, MistralError):  # it says more, and so do all ranks
                    raise
                if not isinstance(error, Exception):
                    raise
                raise self._over from error


def _tell(group: dist.ProcessGroup | None, what: tuple[Any, ...]) -> None:
    dist.broadcast_object_list([what], src=0, group=group, device=torch.device("cpu"))


def _follow(group: dist.ProcessGroup | None, load: Load) -> None:
    """Take the steps of the first rank's model, until it ends; what ends programs from outside is for that one."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    follower: Follower | None = None
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
        what, *rest = told[0]
        if what == "end":
            return
        if what == "load":
            follower = Follower(load().model)
            continue
        assert follower is not None
        follower.step(*rest) if what == "step" else follower.logits(*rest)


class Follower:
    """Another rank's end of it: its part of the model, and of the keys and values.

    Args:
        model: the part.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._cache: RollingBufferCache | None = None
        self._broken: set[int] = set()  # rows that NaN or infinite numbers have been in

    def step(self, ids: list[int], seqlens: tuple[int, ...], starts: tuple[int, ...]) -> None:
        """Compute a step with the others: `seqlens` tokens from the positions `starts` on."""
        model = self._model
        if self._cache is None:
            self._cache = model.make_cache(len(seqlens))
        for row, start in enumerate(starts):
            self._go_back(self._cache, row, start)
        with torch.inference_mode():
            plan = self._cache.plan(seqlens)
            h = model.step(torch.tensor(ids, device=model.device), plan, self._cache)
            self._cache.commit(plan)
            if not h.isfinite().all():  # the same on every rank, as sums over all of them
                self._broken |= {row for row, its in enumerate(h.split(seqlens)) if not its.isfinite().all()}

    def logits(self, rows: int) -> None:
        """Compute this rank's part of the logits of hidden states that the first one sends."""
        model = self._model
        with torch.inference_mode():
            h = torch.empty(rows, model.args.dim, dtype=model.dtype, device=model.device)
            dist.broadcast(h, src=0)
            model.logits(h)

    def _go_back(self, cache: RollingBufferCache, row: int, start: int) -> None:
        """Where the first rank's row is: what it has forgotten is forgotten here."""
        if cache.lengths[row] == start:
            return
        if start:
            left = cache.rewind(row, start)
            assert left == start, f"row {row} is at {left} here, and at {start} in the first rank"
        elif row in self._broken:  # its numbers must not meet the next sequence, even unseen: 0 x NaN
            cache.wipe(row)
            self._broken.remove(row)
        else:
            cache.reset(row)


def _share(left: int | None, device: torch.device) -> int | None:
    """Of a machine's memory a rank's part, as far as one of them can see."""
    return None if left is None else left // dist.get_world_size() if device.type == "cpu" else left


@contextmanager
def _memory(agree: Callable[[int | None, torch.device], int | None] | None) -> Iterator[None]:
    before, memory.agree = memory.agree, agree
    try:
        yield
    finally:
        memory.agree = before
