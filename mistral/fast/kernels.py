"""csrc/kernels.c, compiled once for this machine and kept; called through ctypes.

The compiler is the machine's own `cc` (or what CC names): GCC or Clang, on x86-64 or 64-bit Arm. Without one that knows
OpenMP there are no kernels, which costs speed and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mistral.util.errors import Unavailable

log = logging.getLogger("mistral")
SOURCE = Path(__file__).with_name("csrc") / "kernels.c"
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))  # which it includes
TORCH = Path(torch.__file__).with_name("lib")


def _native(machine: str) -> str:
    """The flag for all instructions of this processor: on Arm, Apple's compiler and older ones know another."""
    return "-mcpu=native" if machine in ("arm64", "aarch64") else "-march=native"


def _openmp(system: str) -> tuple[str, ...]:
    """Flags for the functions of torch's own OpenMP, so that both share one set of threads.

    On macOS a second OpenMP in a process ends it, so torch's is linked by name.
    """
    if system == "darwin":
        return "-Xpreprocessor", "-fopenmp", f"-L{TORCH}", f"-Wl,-rpath,{TORCH}", "-lomp"
    return ("-fopenmp",)


# What is rounded is what is written: a compiler left to merge products and sums does in one loop and not in the next.
ROUNDING = ("-fno-math-errno", "-ffp-contract=off")
FLAGS = ("-O3", _native(platform.machine()), *_openmp(sys.platform), *ROUNDING, "-shared", "-fPIC", "-lm")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
RETURN_NOTHING = (
    *("product", "through_16_bits", "widen", "rows_of", "repack", "decode"),
    *("to_int8", "affine4_search", "to_affine4"),
    *("product_many", "attend_many", "norm_rows", "rotate_rows", "gate_rows"),
)
ROOM = 2**20  # bytes that the library may need; it has half of that
PATIENCE = 300  # seconds; it takes about 16, and many times that on a busy machine


class KernelsUnavailable(Unavailable):
    """The kernels cannot be built here; says why."""


class Matrix(ctypes.Structure):
    """A weight matrix as lanes.h has it: [n, k], and how it is stored."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class Expert(ctypes.Structure):
    """An expert of a mixture as lanes.h has it."""

    _fields_ = tuple((name, Matrix) for name in ("w1", "w2", "w3"))


class Layer(ctypes.Structure):
    """A layer as lanes.h has it."""

    _fields_ = (
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "keys", "values")),
        ("capacity", ctypes.c_int64),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales")),
        *((name, ctypes.c_int64) for name in ("kept", "overflows")),
        ("gate", Matrix),
        ("experts", ctypes.POINTER(Expert)),
    )


class Model(ctypes.Structure):
    """A model as lanes.h has it."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_layers", "dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim")),
        ("eps", ctypes.c_double),
        ("chosen", ctypes.c_int64),
        ("overflows", ctypes.c_int64),
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
        raise KernelsUnavailable("they need a 64-bit Linux or macOS (on Windows: WSL)")
    asked = os.environ.get("CC", "")
    try:
        compiler = shlex.split(asked) or ["cc"]
    except ValueError as error:
        raise KernelsUnavailable(f"CC is {asked!r}: {error}") from None
    if shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"there is no compiler ({compiler[0]})")
    library = _place(compiler)
    if not _intact(library):
        log.warning("compiling the C kernels for this machine, which is done once and may take a minute")
        _compile(compiler, library)
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(f"{library} cannot be loaded: {error}") from None
    counts = ("scratch_floats", "inputs_bytes", "takes_many", "keep", "takes_many_floats", "has_bf16", "tiles_bytes")
    for name in counts:
        getattr(loaded, name).restype = ctypes.c_int64
    for name in RETURN_NOTHING:
        getattr(loaded, name).restype = None
    return loaded


def _place(compiler: list[str]) -> Path:
    """Where the library belongs: its name tells source, compiler, flags and processor."""
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *HEADERS)]
    told = [*sources, *compiler, *FLAGS, _processor()]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and no entry for the user
        raise KernelsUnavailable("there is no home folder to keep them in: set XDG_CACHE_HOME") from None
    return base / "mistral-ref" / f"kernels-{name}.so"


def _processor() -> str:
    """What tells processors apart on which the same home may be used."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _digest(library: Path) -> Path:
    """Where a library's digest is: not in it, since macOS signs libraries as they are built."""
    return library.with_suffix(".sha256")


def _intact(library: Path) -> bool:
    """Whether a library is there, and has the digest that it was built with: a broken one may end the process."""
    try:
        return _digest(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


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
            built.write_bytes(bytes(ROOM))  # a disk that is full says so now, not after each run's compiling
            built.unlink()
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
            digest = _digest(built)
            digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
            os.replace(built, library)
            os.replace(digest, _digest(library))
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler[0]} did not end within {PATIENCE} s") from None
    except OSError as error:
        raise KernelsUnavailable(f"{library.parent} cannot be written: {error.strerror}") from None
