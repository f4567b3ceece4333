"""Where and how a model runs, as requested: LoadOptions, checked on construction. Runs without torch.

Flags, help texts and defaults derive from this class. What is left open is decided at load, see `loader.runtime`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from mistral.fast.layout import QUANTS
from mistral.util.arguments import require_integer
from mistral.util.dtypes import DTYPE_NAMES
from mistral.util.errors import UsageError, short_repr

EXECUTION_NAMES = ("auto", "eager", "kernels", "cuda_graph", "bitwise")
ADAPTER_MODES = ("merge", "runtime")
ATTENTIONS = ("auto", "sdpa", "eager", "flash", "xformers")
# Of keys and values; float64 is for arithmetic in float64.
CACHE_NAMES = {**DTYPE_NAMES, "int8": "int8"}

PROMPT_DTYPES = ("auto", "float32", "bfloat16", "fp32", "bf16")


CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", *DTYPE_NAMES),
    "cache_dtype": ("auto", *CACHE_NAMES),
    "prompt_dtype": PROMPT_DTYPES,
    "attention": ATTENTIONS,
    "execution": EXECUTION_NAMES,
    "quant": (*QUANTS, "none"),
    "adapter_mode": ADAPTER_MODES,
}


class OptionError(UsageError):
    """An option that does not exist, or that this machine cannot honour."""


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model runs.

    Args:
        device: cpu, cuda, cuda:1 or mps; default: the best one available
        dtype: of the arithmetic: float32, bfloat16, float16 or float64; default: what the device computes well
        cache_dtype: of keys and values: float32, bfloat16, float16 or int8; default: that of the arithmetic
        prompt_dtype: of the inputs of products of prompts: bfloat16 rounds them (bf16 weights, CPU); default: dtype
        attention: eager, sdpa, flash or xformers; default: what suits the device
        execution: how steps are computed: eager, kernels (C, on a CPU), cuda_graph (on a GPU), bitwise or auto
        quant: int8 or int4: round the weights at load (changes numbers); none: dequantize a GGUF file's blocks
        threads: the most CPU threads, fewer beside busy programs; default: as many as PyTorch takes
        max_batch_size: the most sequences in one step; 0 sets no limit
        adapter: a LoRA adapter: a folder of PEFT's or of mistral-finetune's, or NAME=FOLDER; may be repeated
        adapter_mode: merge (one, into the weights) or runtime (beside them); default: merge, for several runtime
        sliding_window: a number, or none; default: what the files say; for GGUF, that of the release
        draft: guess tokens ahead: ngram (from the text so far), or a smaller model's folder; changes no token
        parallel: processes that divide the model: 2, 4 ...; for complete, interactive, perplexity, serve, batch

    Raises:
        OptionError: a value that cannot be, whatever the machine.
    """

    device: str | None = None
    dtype: str | None = None
    cache_dtype: str | None = None
    prompt_dtype: str | None = None
    attention: str | None = None
    execution: str = "auto"
    quant: str | None = None
    threads: int | None = None
    max_batch_size: int = 0
    adapter: tuple[str, ...] = ()
    adapter_mode: str | None = None
    sliding_window: str | int | None = "auto"
    draft: str | None = None
    parallel: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", _words(self.adapter))
        adapter_names(self.adapter)
        if self.draft is not None:  # a Path is accepted too
            object.__setattr__(self, "draft", str(self.draft))
        for name in ("device", "dtype", "cache_dtype", "prompt_dtype"):  # torch's own objects are accepted too
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(value).removeprefix("torch."))
        _check_device(self.device)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in (*known, None) or (value is None and name == "execution"):
                raise OptionError(f"{name} {short_repr(value)} is not one of {', '.join(known)}{_of_others(value)}")
        for name, least, most in (("threads", 1, 1024), ("max_batch_size", 0, 2**31 - 1), ("parallel", 1, 1024)):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            object.__setattr__(self, name, require_integer(name, value, least, most, OptionError))
        object.__setattr__(self, "sliding_window", window_of(self.sliding_window))


def _of_others(value: object) -> str:
    """Which other options have a value, for the end of a sentence: the line of what was loaded names several."""
    others = [f"--{name}" for name, known in CHOICES.items() if value in known]
    return f"; it is a value of {' and '.join(others)}" if others else ""


def _words(given: object) -> tuple[str, ...]:
    """Adapters as they are typed: one path or several, or paths by name, are accepted too; so is None."""
    if isinstance(given, str | PathLike):
        return (str(given),)
    if isinstance(given, Mapping):
        return tuple(f"{name}={place}" for name, place in given.items())
    if not isinstance(given, Iterable | None):
        raise OptionError(f"adapter is {short_repr(given)}; it must be a folder, or several")
    return tuple(str(one) for one in given or ())


def adapter_names(words: Sequence[str]) -> dict[str, str]:
    """The place of each adapter by its name: of NAME=FOLDER, or else the folder's own.

    Raises:
        OptionError: two have the same name, or one has none.
    """
    places: dict[str, str] = {}
    for word in words:
        named = None if os.path.exists(word) else re.fullmatch(r"([^/=]*)=(.*)", word)
        place = named[2] if named else word
        folder = os.path.dirname(place) if place.endswith(".safetensors") else place
        name = named[1] if named else os.path.basename(os.path.abspath(os.path.expanduser(folder)))
        if not name or not place:
            raise OptionError(f"adapter {short_repr(word)} has no {'name' if place else 'folder'}: give NAME=FOLDER")
        if name in places:
            raise OptionError(f"two adapters are called {short_repr(name)}: give them names, as NAME=FOLDER")
        places[name] = place
    return places


def window_of(value: object) -> str | int | None:
    """A window that was asked for, as a number, None for none, or "auto".

    Raises:
        OptionError: something else.
    """
    if isinstance(value, str):
        word = value.strip().lower()
        value = int(word) if word.isascii() and word.isdecimal() and len(word) < 20 else word
    if value in ("auto", "none", None):
        return "auto" if value == "auto" else None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise OptionError(f"sliding_window is {short_repr(value)}; it must be a number of tokens above 0, or none")
    return value


def _check_device(device: str | None) -> None:
    if device is None or device == "auto" or re.fullmatch(r"(cpu|cuda|mps)(:\d{1,3})?", device):
        return
    raise OptionError(f"device {short_repr(device)} is not one of cpu, cuda, cuda:1 (and other numbers) or mps")
