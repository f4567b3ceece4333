"""Hostile `.pth` files: broken zip files, pickles that would run code, tensors that cannot be, bombs of memory."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tools.fuzz.mutate import mutate_bytes

RAN = "ran"  # what appears in the current folder once code from a file has run
BOMB = 2 * 10**9  # bytes
Records = list[tuple[str, bytes]]


class _Call:
    """Unpickled, it is what a call returns."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


CODE: tuple[Callable[[], Any], ...] = (
    lambda: _Call(os.system, f"mkdir {RAN}"),
    lambda: _Call(os.mkdir, RAN),
    lambda: _Call(builtins.exec, f"import os; os.mkdir({RAN!r})"),
    lambda: _Call(builtins.eval, f"__import__('os').mkdir({RAN!r})"),
    lambda: _Call(builtins.getattr, _Call(__import__, "os"), "mkdir"),
    lambda: _Call(builtins.open, RAN, "w"),
    lambda: _Call(torch.load, RAN),
    lambda: _Call(torch.save, torch.ones(1), RAN),
    lambda: _Call(torch.hub.download_url_to_file, "file:///etc/passwd", RAN),
)
LARGE: tuple[Callable[[], Any], ...] = (
    lambda: _Call(bytearray, BOMB),
    lambda: _Call(torch.Tensor, 40_000, 50_000),
    lambda: _Call(torch.ones, BOMB),
    lambda: _Call(collections.Counter, "x" * 10**6),
    lambda: _Call(torch.empty, 10**15),
)


def _tensor(storage: torch.Tensor, offset: Any, size: Any, stride: Any) -> _Call:
    rebuild = getattr(torch._utils, "_rebuild_tensor_v2")  # noqa: B009  (it has no annotations)
    return _Call(rebuild, storage.storage(), offset, size, stride, False, collections.OrderedDict())


def _odd_tensors(rng: random.Random) -> Any:
    one = torch.ones(16)
    big = rng.choice((2**31, 2**62, 2**63, 10**30))
    odd: tuple[Callable[[], Any], ...] = (
        lambda: _tensor(one, big, (16,), (1,)),
        lambda: _tensor(one, -4, (16,), (1,)),
        lambda: _tensor(one, 0, (big,), (0,)),
        lambda: _tensor(one, 0, (16,), (big,)),
        lambda: _tensor(one, 0, (16,), (-1,)),
        lambda: _tensor(one, 0, (16,), (0,)),
        lambda: _tensor(one, 0, (-16,), (1,)),
        lambda: _tensor(one, 0, (1 << 40, 1 << 40), (0, 0)),
        lambda: _tensor(one, 0, (4, 4), (1,)),
        lambda: _tensor(one, 0, "16", None),
        lambda: _tensor(one, None, (16.0,), (True,)),
        lambda: one.to_sparse(),
        lambda: torch.ones(16, device="meta"),
        lambda: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([one, one[:3]]),
        lambda: torch.nn.Parameter(one),
        lambda: one.requires_grad_(),
        lambda: one[::2],
        lambda: one.to(torch.complex64).conj(),
        lambda: one.numpy(),
        lambda: collections.Counter("abc"),
        lambda: {"": {}},
        lambda: [one] * 1000,
        lambda: None,
        lambda: torch.float32,
        lambda: b"x" * 1000,
        lambda: "x" * 100_000,
    )
    return rng.choice(odd)()


def _records(data: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _zip(records: Records, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def _saved(state: Any, rng: random.Random) -> bytes:
    """As torch.save writes it, now or in former times, or as any pickle."""
    out = io.BytesIO()
    how = rng.randrange(10)
    if how == 0:
        try:
            return pickle.dumps(state, protocol=rng.randrange(6))
        except (RuntimeError, NotImplementedError, pickle.PicklingError):  # tensors that only torch.save can write
            pass
    torch.save(state, out, _use_new_zipfile_serialization=how != 1)
    return out.getvalue()


def mutate_pth(rng: random.Random, data: bytes) -> bytes:
    """A broken copy of a `.pth` file, or one that torch.save would have written of something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch and zipfile, about what is written
        return _mutated(rng, data)


def _mutated(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(10)
    if kind < 2:
        return mutate_bytes(rng, data)
    if kind < 7:
        return _zip_mutated(rng, _records(data))
    state = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(list(state))
    if kind == 7:
        state[rng.choice((name, "extra"))] = rng.choice(CODE)()
    elif kind == 8:
        state[rng.choice((name, name, "extra", 17, ""))] = _odd_tensors(rng)
    else:
        state[name] = rng.choice((rng.choice(LARGE)(), _odd_tensors(rng), list(state.values()), state[name].double()))
    return _saved(rng.choice((state, state, state, {"model": state}, state[name], [state])), rng)


def _zip_mutated(rng: random.Random, records: Records) -> bytes:
    at = rng.randrange(len(records))
    name, content = records[at]
    folder = records[0][0].partition("/")[0]
    pickled = next(i for i, (path, _) in enumerate(records) if path.endswith("/data.pkl"))
    kind = rng.randrange(8)
    if kind < 4:
        new = mutate_bytes(rng, records[pickled][1]) if rng.random() < 0.99 else b"\x80\x02" + b"]" * 25_000_000
        records[pickled] = (records[pickled][0], new)
    elif kind == 4:
        records[at] = (rng.choice((f"../../{name}", "/etc/x", name.upper(), f"{folder}/data/99", "x" * 300)), content)
    elif kind == 5:
        records[at] = (name, mutate_bytes(rng, content) if content else b"x")
    elif kind == 6:
        extra = rng.choice(("constants.pkl", "code/x.py", "byteorder", "version", "data.pkl", ".format_version"))
        records.append(
            (f"{folder}/{extra}", rng.choice((b"", b"big", b"\x80\x02N.", b"99999999999999999999", content)))
        )
    else:
        del records[at]
    # Compressed, a few bytes may stand for very many.
    packed = rng.random() < 0.1
    if packed and rng.random() < 0.2:
        records.insert(0, (f"{folder}/{rng.choice(('data.pkl', 'data/0', 'byteorder'))}", bytes(BOMB // 8)))
    return _zip(records, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
