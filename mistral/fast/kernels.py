"""kernels.c, compiled once for this machine and kept; called through ctypes.

The compiler is the machine's own `cc` (or what CC names). Without one that knows OpenMP there are no kernels, which
costs speed and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mistral.util.errors import Unavailable

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = tuple(sorted(SOURCE.parent.glob("*.h")))  # which it includes
# The functions of torch's own OpenMP are used, so both share one set of threads. What is rounded is as it is written:
# a compiler left to merge products and sums does it in one loop and not in the next.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC", "-lm")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
RETURN_NOTHING = (
    *("product", "through_16_bits", "widen", "rows_of", "repack", "decode"),
    *("to_int8", "to_int4", "affine4_search", "to_affine4"),
)
PATIENCE = 300  # seconds; it takes about seven, and many times that on a busy machine


class KernelsUnavailable(Unavailable):
    """The kernels cannot be built here; says why."""


class Matrix(ctypes.Structure):
    """A weight matrix as kernels.c has it: [n, k], and how it is stored."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class Layer(ctypes.Structure):
    """A layer as kernels.c has it."""

    _fields_ = (
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "keys", "values")),
        ("capacity", ctypes.c_int64),
        ("window", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    """A model as kernels.c has it."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_layers", "dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim")),
        ("eps", ctypes.c_double),
    )


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers are."""
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; built at the first call on a machine.

    Raises:
        KernelsUnavailable: no compiler, or one that cannot build them.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8 or os.name != "posix":
        raise KernelsUnavailable("they want a 64-bit Unix")
    asked = os.environ.get("CC", "")
    try:
        compiler = shlex.split(asked) or ["cc"]
    except ValueError as error:
        raise KernelsUnavailable(f"CC is {asked!r}: {error}") from None
    if shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"there is no compiler ({compiler[0]})")
    library = _place(compiler)
    if not _intact(library):
        _compile(compiler, library)
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(f"{library} cannot be loaded: {error}") from None
    for name in ("scratch_floats", "inputs_bytes", "takes_many"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in RETURN_NOTHING:
        getattr(loaded, name).restype = None
    return loaded


def _place(compiler: list[str]) -> Path:
    """Where the library belongs: its name tells source, compiler, flags and processor."""
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *PARTS)]
    told = [*sources, *compiler, *FLAGS, _processor()]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and no entry for the user
        raise KernelsUnavailable("there is no home folder to keep them in: set XDG_CACHE_HOME") from None
    return base / "mistral-ref" / f"kernels-{name}.so"


def _processor() -> str:
    """What tells processors apart on which the same home may be used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _intact(library: Path) -> bool:
    """Whether a library is there, and ends with the digest of the rest of it: a broken one may end the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _reason(told: str) -> str:
    """The line of a compiler that says most about why it failed: a full disk, else its first error, not the last."""
    lines = [line.strip() for line in told.splitlines()]
    full = [line for line in lines if os.strerror(errno.ENOSPC) in line]
    errors = [line for line in lines if "error" in line or "failed" in line]
    return next((line for line in (*full, *errors, *lines) if not line.startswith("collect2")), "".join(lines[:1]))


def _compile(compiler: list[str], library: Path) -> None:
    """Build beside the library's place and move it there whole."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "kernels.so"
            done = subprocess.run(
                [*compiler, "-o", str(built), str(SOURCE), *FLAGS],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode:
                reason = _reason(done.stderr) or f"exit {done.returncode}"
                raise KernelsUnavailable(f"{compiler[0]} cannot build them: {reason}")
            if not built.exists():
                raise KernelsUnavailable(f"{compiler[0]} made no library")
            content = built.read_bytes()
            built.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(built, library)
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler[0]} did not end within {PATIENCE} s") from None
    except OSError as error:
        raise KernelsUnavailable(f"{library.parent} cannot be written: {error.strerror}") from None
