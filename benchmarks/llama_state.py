"""llama.cpp with many positions in its cache, without the minutes that a prompt of so many takes.

What a cache holds has the shape of key heads and layers alone, so a model with as many of both and next to no width fills
it; llama.cpp saves that, and a model of any width goes on from it. The numbers in it are of no model, and take as long.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs

CHUNK = 512
_kept: list[Any] = []  # functions that llama.cpp calls for as long as it runs


def narrow(args: ModelArgs) -> ModelArgs:
    """The shape with its layers and key heads, and next to no width."""
    return dataclasses.replace(args, dim=32, hidden_dim=32, n_heads=args.n_kv_heads)


def open_context(file: Path, positions: int, threads: int) -> tuple[Any, Any, Any]:
    """llama_cpp, a model and a context of it for so many positions."""
    L: Any = importlib.import_module("llama_cpp")
    silent = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(str(file).encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = positions, 1024, 1024
    params.n_threads = params.n_threads_batch = threads
    context = L.llama_init_from_model(model, params)
    _kept.append(silent)
    return L, model, context


def make_state(file: Path, path: Path, positions: int, threads: int) -> Path:
    """A saved cache of so many positions, by the narrow model in a file; made when missing."""
    if path.exists():
        return path
    L, _, context = open_context(file, positions + CHUNK, threads)
    for first in range(0, positions, CHUNK):
        n = min(CHUNK, positions - first)
        ids = (L.llama_token * n)(*[5 + i for i in range(n)])
        if L.llama_decode(context, L.llama_batch_get_one(ids, n)):
            raise RuntimeError("llama_decode failed")
    part = path.with_suffix(".part")
    none = (L.llama_token * 1)(1)
    if not L.llama_state_seq_save_file(context, str(part).encode(), 0, none, 1):
        raise RuntimeError(f"llama.cpp cannot save {part}")
    part.replace(path)
    return path


def load_state(L: Any, context: Any, path: Path) -> None:
    """Have a context hold what was saved."""
    room, count = (L.llama_token * 8)(), ctypes.c_size_t()
    if not L.llama_state_seq_load_file(context, str(path).encode(), 0, room, 8, ctypes.byref(count)):
        raise RuntimeError(f"llama.cpp cannot load {path}")
