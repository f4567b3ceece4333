"""The kernels built for other processors: calls are recorded here, and replayed by a program that was built for them.

A recorded call is its function, its arguments and all memory that they lead to. tests/fast/replay.c reads calls from a
file; it runs here, or under qemu where the processor is another one.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.fast import kernels

REPLAY = Path(__file__).parents[1] / "fast" / "replay.c"
FLAGS = ("-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-static")


@dataclass(frozen=True)
class Build:
    """What the kernels are built with and for.

    Args:
        march: the instructions that the compiler may use.
        compiler, runner: programs and their arguments; runner is empty where the processor here has the instructions.
        fused: whether products and sums are rounded once.
    """

    march: str
    compiler: str
    runner: tuple[str, ...] = ()
    fused: bool = True

    def missing(self) -> str | None:
        """Why it cannot be built or run here; None if it can."""
        for program in (self.compiler, *self.runner[:1]):
            if shutil.which(program) is None:
                return f"there is no {program}"
        if not self.runner and (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return f"this is {platform.machine()} with {sys.platform}"
        if self.march == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return "this processor has no AVX2"
        return None

    def build(self, to: Path) -> Path:
        """The program that replays calls."""
        names = " ".join(f"X({name})" for name in kernels.RETURN_NOTHING)
        words = [self.compiler, "-Og", f"-march={self.march}", *FLAGS, f"-DFUNCTIONS={names}", "-o", str(to)]
        done = subprocess.run([*words, str(kernels.SOURCE), str(REPLAY), "-lm"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return to


@dataclass(frozen=True)
class Block:
    """Memory that a call uses: where it was, and what was in it before the call and after."""

    address: int
    before: bytes
    after: bytes


@dataclass(frozen=True)
class Call:
    """A call of the kernels: arguments are numbers, or (block, offset)."""

    name: str
    arguments: list[int | tuple[int, int]]
    blocks: list[Block]
    places: list[tuple[int, int, int, int]]  # pointers in memory: block, offset, and the block and offset they lead to

    def as_bytes(self) -> bytes:
        """As replay.c reads it."""
        numbers = [len(self.places), *(n for place in self.places for n in place), len(self.arguments)]
        for argument in self.arguments:
            numbers += argument if isinstance(argument, tuple) else (-1, argument)
        name = self.name.encode()
        parts = [_numbers(len(name), len(self.blocks)), _filled(name)]
        for block in self.blocks:
            parts += [_numbers(len(block.before)), _filled(block.before)]
        return b"".join([*parts, _numbers(*numbers)])


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _filled(content: bytes) -> bytes:
    return content + bytes(-len(content) % 8)


class Results:
    """What was left in the memory of each call."""

    def __init__(self, calls: list[Call], content: bytes) -> None:
        self._of: list[dict[int, bytes]] = []
        self._pointers = [{call.blocks[place[0]].address for place in call.places} for call in calls]
        for call in calls:
            self._of.append({})
            for block in call.blocks:
                self._of[-1][block.address] = content[: len(block.before)]
                content = content[len(block.before) :]
        assert not content

    def blocks(self, call: int) -> list[bytes]:
        """All of it, pointers aside."""
        return [content for address, content in self._of[call].items() if address not in self._pointers[call]]

    def of(self, call: int, tensor: Tensor) -> Tensor:
        """What a tensor would be after a call, by the memory that it had."""
        storage = tensor.untyped_storage()
        found = torch.frombuffer(bytearray(self._of[call][storage.data_ptr()]), dtype=torch.uint8)
        return found.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def replay(calls: list[Call], build: Build, folder: Path) -> Results:
    """Build a program in a folder and have it make the calls."""
    program = build.build(folder / "replay")
    (folder / "calls").write_bytes(b"".join([_numbers(len(calls)), *(call.as_bytes() for call in calls)]))
    words = [*build.runner, str(program), str(folder / "calls"), str(folder / "results")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return Results(calls, (folder / "results").read_bytes())


def here(calls: list[Call]) -> Results:
    """What the calls left when they were recorded."""
    return Results(calls, b"".join(block.after for call in calls for block in call.blocks))


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record what is called in a `with` block, by whoever it is."""
    library, calls = kernels.library(), []
    there = _tensors(gc.get_objects())
    gc.disable()  # so what is new stays in the youngest generation, and only that is looked through at each call

    def recorder(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> None:
            memory = _Memory(arguments, there + _tensors(gc.get_objects(0)))
            function(*arguments)
            calls.append(memory.call(name, arguments))

        return call

    plain = {name: getattr(library, name) for name in kernels.RETURN_NOTHING}
    try:
        for name, function in plain.items():
            setattr(library, name, recorder(name, function))
        yield calls
    finally:
        gc.enable()
        for name, function in plain.items():
            setattr(library, name, function)


class _Memory:
    """The memory that arguments lead to, before a call and after it."""

    def __init__(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> None:
        # By address: the storage of tensors, and structures.
        self._sizes = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, tensors) if s.nbytes()}
        self._structures = {ctypes.addressof(x): ctypes.sizeof(x) for a in arguments for x in _structures(a)}
        self._starts = sorted(self._sizes | self._structures)
        self._used: dict[int, int] = {}  # address: number of the block
        self._places: list[tuple[int, int, int, int]] = []
        self.arguments = [self._argument(a) for a in arguments]
        self.before = {address: self._content(address) for address in self._used}

    def _argument(self, argument: Any) -> int | tuple[int, int]:
        if isinstance(argument, ctypes.c_int64):
            return argument.value
        address = argument.value if isinstance(argument, ctypes.c_void_p) else ctypes.addressof(argument._obj)
        if not address:  # of a tensor without numbers
            return 0
        found = self._place(address)
        assert found is not None, "a pointer to nothing that is known"
        return found

    def _place(self, address: int) -> tuple[int, int] | None:
        """The block of an address and how far in it is; all that it leads to is taken in."""
        at = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[at] if at >= 0 else 0
        size = self._structures.get(start) or self._sizes.get(start, 0)
        if not start <= address < start + size:
            return None
        if start not in self._used:
            block = self._used[start] = len(self._used)
            if start in self._structures:
                words = struct.unpack(f"<{size // 8}q", ctypes.string_at(start, size))
                for i, word in enumerate(words):
                    if (place := self._place(word)) is not None:
                        self._places.append((block, 8 * i, *place))
        return self._used[start], address - start

    def _content(self, address: int) -> bytes:
        return ctypes.string_at(address, self._structures.get(address) or self._sizes[address])

    def call(self, name: str, arguments: tuple[Any, ...]) -> Call:
        blocks = [Block(address, content, self._content(address)) for address, content in self.before.items()]
        return Call(name, self.arguments, blocks, self._places)


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.layout == torch.strided  # what other tests left may be sparse


def _tensors(objects: list[Any]) -> list[Tensor]:
    return [x for x in objects if type(x) in (Tensor, torch.nn.Parameter) and _is_plain(x)]


def _structures(value: Any) -> Iterator[Any]:
    """The structures that an argument refers to, and those that their pointers keep alive."""
    value = getattr(value, "_obj", value)
    if isinstance(value, ctypes.Structure | ctypes.Array):
        yield value
    kept = value if isinstance(value, dict | tuple) else getattr(value, "_objects", None) or ()
    for part in kept.values() if isinstance(kept, dict) else kept:
        yield from _structures(part)
