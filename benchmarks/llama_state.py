"""llama.cpp with many positions in its cache, without the minutes that a prompt of so many takes.

Its cache is given a state as it saves them (llama-cpp-python 0.3.36), with numbers of no model in it: they take
as long.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from mistral.args import ModelArgs

MAGIC, F16 = 2937339096, 1
_kept: list[Any] = []  # functions that llama.cpp calls for as long as it runs


def open_context(file: Path, positions: int, threads: int) -> tuple[Any, Any, Any]:
    """llama_cpp, a model and a context of it for so many positions."""
    L: Any = importlib.import_module("llama_cpp")
    silent = L.llama_log_callback(lambda *_: None)
    _kept.append(silent)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(str(file).encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = positions, positions, 1024
    params.n_threads = params.n_threads_batch = threads
    return L, model, L.llama_init_from_model(model, params)


def fill(L: Any, context: Any, args: ModelArgs, positions: int) -> None:
    """Have a context of a model of this shape hold so many positions of one sequence, keys and values in fp16."""
    row = args.n_kv_heads * args.head_dim
    cells = np.zeros((positions, 3), np.uint32)  # position, sequences, which
    cells[:, 0], cells[:, 1] = range(positions), 1
    data = np.full(positions * row, 0.01, np.float16).tobytes()
    head = np.array([F16, 2 * row, 0], np.uint32).tobytes()
    layers = (head + data) * args.n_layers
    begin = np.array([MAGIC, 0, 1, positions], np.uint32).tobytes() + cells.tobytes()
    state = begin + np.array([0, args.n_layers], np.uint32).tobytes() + layers + layers
    array = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    if L.llama_state_seq_set_data(context, array, len(state), 0) != len(state):
        raise RuntimeError("this llama.cpp saves states in another way")
