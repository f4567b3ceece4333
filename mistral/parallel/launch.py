"""Several processes that run the same function, each with its part of a model: ranks, started here or by torchrun.

All ranks take the same steps: they see the same memory, draw the same seeds, and get equal bits from every exchange,
so each makes the same choice of tokens. The first one is the process that asked; the others print nothing.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mistral.util import memory
from mistral.util.errors import MistralError, Unavailable, UsageError

R = TypeVar("R")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
TIMEOUT = timedelta(minutes=2)  # for all ranks to have started
PATIENCE = 10.0  # seconds that a rank has to say why it failed, or to end once it is through


class RankFailed(MistralError):
    """Another rank stopped; its own message follows."""

    exit_code = 2


def run(ranks: int, target: Callable[..., R], *args: Any) -> R:
    """Run a function on all ranks, and return what the first one's gave.

    Under torchrun this process is one of them already; otherwise the others are started, on this machine.

    Args:
        ranks: how many there are.
        target: found again by its name in every process, as are its arguments by pickle.

    Raises:
        MistralError: what a rank raised; RankFailed where it was another than this one.
        UsageError: torchrun has started another number of processes.
    """
    if not dist.is_available():
        raise Unavailable("this PyTorch was built without torch.distributed, which parallel needs")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
        if started != ranks:
            raise UsageError(f"parallel is {ranks}, but torchrun has started {started} processes: give the same number")
        with _member(int(os.environ["RANK"]), ranks, None):
            return target(*args)
    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    others = _start(ranks, store.port, target, args)
    try:
        _require_started(others)
        with _member(0, ranks, store):
            result = target(*args)
        for process, _ in others:
            process.join(PATIENCE)
        return result
    except RuntimeError as error:
        if not _of_exchange(error):
            raise
        raise _reason(others) or error from None
    finally:
        for process, _ in others:
            process.join(1)  # its next exchange fails, and it tidies up
            process.kill()


def from_first(value: R) -> R:
    """What the first rank gives, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


@contextmanager
def _member(rank: int, ranks: int, store: dist.Store | None) -> Iterator[None]:
    """Be one of the ranks: None as the store is torchrun's own."""
    if store is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    threads, agree = torch.get_num_threads(), memory.agree
    here = ranks if store is not None else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", str(rank))  # on this machine, as torchrun calls it: the number of its GPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    try:
        torch.set_num_threads(max(1, threads // here))

        def least(left: int | None, device: torch.device) -> int | None:
            """The same on every rank; of a machine's memory, which the ranks share, each takes its part."""
            share = here if device.type == "cpu" else 1
            mine = torch.tensor(-1 if left is None else left // share, dtype=torch.int64)
            dist.all_reduce(mine, dist.ReduceOp.MIN)
            return None if mine.item() < 0 else int(mine)

        memory.agree = least
        torch.manual_seed(from_first(int(torch.randint(2**62, ()))))
        yield
    finally:
        memory.agree = agree
        torch.set_num_threads(threads)
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _start(ranks: int, port: int, target: Callable[..., Any], args: Any) -> list[tuple[BaseProcess, Connection]]:
    """The other ranks, started, each with the pipe on which it says why it failed."""
    context = multiprocessing.get_context("spawn")
    others: list[tuple[BaseProcess, Connection]] = []
    in_main_thread = threading.current_thread() is threading.main_thread()  # which alone may do this
    # Ctrl-C reaches every process of a terminal; it is the first rank's to act on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        for rank in range(1, ranks):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_other, args=(rank, ranks, port, sending, target, args), daemon=True)
            process.start()
            sending.close()
            others.append((process, receiving))
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    return others


def _other(
    rank: int, ranks: int, port: int, failure: Connection, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """What another rank than the first does: the same, and nothing is printed.

    What ends a whole group of processes is for the first rank to act on, which may save first; this one ends with it.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as we run)
    try:
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False, timeout=TIMEOUT)
        failure.send("")
        with _member(rank, ranks, store):
            target(*args)
    except Exception as error:
        if not _of_exchange(error):  # or else another rank has gone, and says why
            own = isinstance(error, MistralError | OSError)
            failure.send(str(error) if own else f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _end_with_the_first() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _require_started(others: list[tuple[BaseProcess, Connection]]) -> None:
    """Wait until every other rank has said that it is there: who meets nobody in the first exchange waits for long.

    Raises:
        RankFailed: one has ended.
    """
    for rank, (process, failure) in enumerate(others, 1):
        multiprocessing.connection.wait([process.sentinel, failure])
        try:
            said = failure.recv()
        except EOFError:
            raise _reason(others) or RankFailed(f"rank {rank} did not start") from None
        if said:
            raise RankFailed(f"rank {rank}: {said}")


def _of_exchange(error: Exception) -> bool:
    """Whether an exchange raised it, as it does when another rank has gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _reason(others: list[tuple[BaseProcess, Connection]]) -> RankFailed | None:
    """Why another rank is gone, if one is."""
    ended = multiprocessing.connection.wait([process.sentinel for process, _ in others], PATIENCE)
    for rank, (process, failure) in enumerate(others, 1):
        if process.sentinel not in ended:
            continue
        process.join()
        with suppress(EOFError):
            if failure.poll():
                return RankFailed(f"rank {rank}: {failure.recv()}")
        code = process.exitcode or 0
        if code < 0:
            return RankFailed(f"rank {rank} was ended by {signal.Signals(-code).name}; is there enough memory?")
        return RankFailed(f"rank {rank} ended with exit code {code}")
    return None
