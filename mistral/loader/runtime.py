"""Where and in which dtypes a model runs: options in, one frozen Runtime out, once, at load.

Layers never see options; they see tensors that are already in place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from mistral import backends
from mistral.attention import Attend
from mistral.loader.executions import EXECUTIONS, Execution
from mistral.loader.options import CACHE_NAMES, LoadOptions, OptionError
from mistral.util import memory
from mistral.util.dtypes import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in DTYPE_NAMES.items()}
# Widened weights cost memory and, one row at a time, speed: only where there is plenty.
WIDEN_SHARE = 0.6


@dataclass(frozen=True)
class Runtime:
    """How a model runs.

    Args:
        device: of weights, activations and cache.
        weights, compute, cache: dtypes of the stored weights, of the activations, of keys and values.
        attention: name of the backend in use.
        attend: the backend.
        execution: how steps are computed, a name in `executions.EXECUTIONS`.
        quant: "int8", "int4", or None for weights as they are stored.
        notes: what could not be had, a sentence each.
        adapter: which LoRA adapter is in use and how, for people; "" for none.
        blocks: GGML types of the weights that stay as they are in their file, most of them first; see `loader.blocks`.
        mixed: dtypes of the stored weights where they are of several, that of most numbers first; beside blocks, those
            of matrices that are none.
        rounds_prompts: whether inputs of products with bf16 weights are rounded to bf16 in prompts; see `fast.prompt`.
    """

    device: torch.device
    weights: torch.dtype
    compute: torch.dtype
    cache: torch.dtype
    attention: str
    attend: Attend
    execution: str = "eager"
    quant: str | None = None
    notes: tuple[str, ...] = ()
    adapter: str = ""
    blocks: tuple[str, ...] = ()
    rounds_prompts: bool = False
    mixed: tuple[str, ...] = ()

    @property
    def how(self) -> Execution:
        """The row of the execution."""
        return EXECUTIONS[self.execution]

    def describe(self) -> str:
        """Every choice that was made, human-readable."""
        weights = self.quant or "+".join((*self.blocks, *self.mixed)) or _name(self.weights)
        execution = f"; {self.how.what}" if self.how.what else ""
        attention = "kernels" if self.execution == "bitwise" else self.attention
        prompts = "; products of prompts round inputs to bfloat16" if self.rounds_prompts else ""
        return (
            f"device {self.device}; weights/compute/cache {weights}/{_name(self.compute)}/{_name(self.cache)}; "
            f"attention {attention}{execution}{prompts}{f'; {self.adapter}' if self.adapter else ''}"
        )

    def standing_aside(self, unknown: str) -> Runtime:
        """This runtime where the fast path does not know a part of the model, with a note.

        Args:
            unknown: what it is: a module's name and class, or adapters.

        Raises:
            OptionError: the execution cannot be had without it.
        """
        if self.how.otherwise is None:
            raise OptionError(f"execution {self.execution} is not possible: it does not know {unknown}")
        if self.rounds_prompts:
            raise OptionError(f"prompt_dtype bfloat16 is not possible: the kernels do not know {unknown}")
        note = f"the fast path {self.execution} does not know {unknown}: steps are computed without it"
        return replace(self, execution=self.how.otherwise, notes=(*self.notes, note))


def resolve(options: LoadOptions, *, stored: torch.dtype, called: str, parameters: int, head_dim: int) -> Runtime:
    """Decide what the options left open.

    Args:
        options: as requested.
        stored: dtype of the weights as they are read.
        called: what they are in their file, such as "Q8_0".
        parameters: how many there are.
        head_dim: D, which some attention kernels limit.

    Raises:
        OptionError: the device is not there, or cannot do what was requested.
    """
    place = pick_device(options.device)
    compute = pick_dtype(options.dtype, place, stored)
    if options.quant is not None and (place.type, compute) != ("cpu", torch.float32) and place.type != "cuda":
        raise OptionError(
            f"quantized weights are for a CPU in float32, or for CUDA, not for {place.type} in {_name(compute)}"
        )
    if options.execution == "bitwise":
        _check_bitwise(place, compute, options.attention)
    name, attend = backends.resolve(options.attention, place, compute, head_dim)
    named = options.attention not in (None, "auto") and name == options.attention
    execution, notes = _execution(options.execution, place, compute, named)
    cache = pick_cache(options, place, compute)
    if cache == torch.int8 and execution == "cuda_graph":
        raise OptionError(
            "execution cuda_graph does not read keys and values in int8: omit --cache_dtype, or --execution"
        )
    weights = compute
    if EXECUTIONS[execution].products and compute.itemsize > stored.itemsize:
        weights = stored  # the kernels read narrow weights as fast as memory gives them
    elif compute.itemsize > stored.itemsize:
        left = memory.available(place)
        if left is not None and parameters * compute.itemsize > WIDEN_SHARE * left:
            weights = stored
    rounds = options.prompt_dtype in ("bfloat16", "bf16")
    if rounds:
        notes = (*notes, *_check_prompts(execution, compute, weights, called, options.quant))
    return Runtime(
        device=place,
        weights=weights,
        compute=compute,
        cache=cache,
        attention=name,
        attend=attend,
        execution=execution,
        quant=options.quant,
        notes=notes,
        rounds_prompts=rounds,
    )


def _check_prompts(
    execution: str, compute: torch.dtype, weights: torch.dtype, called: str, quant: str | None
) -> tuple[str, ...]:
    """Refuse to round prompts where nothing would; a note where that saves no time."""
    why = None
    if compute != torch.float32:
        why = f"dtype is {_name(compute)}"
    elif execution == "products":
        why = "an attention backend is asked for by name"
    elif execution != "kernels":
        why = f"execution is {execution}"
    elif quant is not None:
        why = f"the weights are in {quant}, and their inputs are rounded to 16 bits as it is"
    elif weights != torch.bfloat16:
        why = f"the weights are in {called}"
    if why is not None:
        raise OptionError(
            f"prompt_dtype bfloat16 is for bfloat16 weights and the kernels, on a CPU in float32, but {why}: omit it"
        )
    from mistral.fast.kernels import library

    slow = "this processor has no bf16 arithmetic: prompt_dtype bfloat16 rounds, and is no faster"
    return () if library().has_bf16() else (slow,)


def _check_bitwise(place: torch.device, compute: torch.dtype, attention: str | None) -> None:
    """Reject options that are not batch-invariant."""
    if place.type != "cpu" or compute != torch.float32:
        raise OptionError(
            f"execution bitwise is for a CPU in float32, not for {place.type} in {_name(compute)}: "
            "use --device cpu --dtype float32"
        )
    if attention not in (None, "auto"):
        raise OptionError(f"execution bitwise has its own attention: omit --attention {attention}")


def _execution(asked: str, place: torch.device, compute: torch.dtype, named: bool) -> tuple[str, tuple[str, ...]]:
    """The execution to use, and notes on what could not be had.

    Args:
        asked: a name, or "auto".
        named: whether an attention backend was asked for by name and runs: it is then the one that is used.
    """
    if asked == "eager":
        return "eager", ()
    if asked == "cuda_graph":  # by name only: not yet the default on a GPU
        if place.type != "cuda":
            raise OptionError(f"execution cuda_graph is for CUDA, not for {place.type}: omit --execution")
        return "cuda_graph", ()
    fits = place.type == "cpu" and compute in (torch.float32, torch.bfloat16)
    if not fits:
        if asked == "auto":
            return "eager", ()
        raise OptionError(
            f"execution {asked} is for a CPU in float32 or bfloat16, not for {place.type} in {_name(compute)}: "
            "omit --execution"
        )
    from mistral.fast.kernels import KernelsUnavailable, library

    try:
        library()
    except KernelsUnavailable as error:
        if asked != "auto":
            raise OptionError(f"execution {asked} computes with the C kernels, and there are none: {error}") from None
        return "eager", (f"no C kernels, which are several times faster: {error}",)
    if asked == "bitwise":
        return "bitwise", ()
    return ("kernels" if compute == torch.float32 and not named else "products"), ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, if it is there, or the best one that is."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise OptionError(f"no device is called {device!r}: cpu, cuda, cuda:1 or mps") from None
    if place.type not in ("cpu", "cuda", "mps"):
        raise OptionError(f"device {device!r} is not supported: cpu, cuda, cuda:1 or mps")
    if place.type != "cuda" and place.index:  # PyTorch itself takes any number, and knows one such device
        raise OptionError(f"device {str(device)!r} asked for, but there is one {place.type} device: {place.type}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        reason = f"sees {torch.cuda.device_count()} of them" if torch.version.cuda else "was built without CUDA"
        raise OptionError(f"device {device!r} asked for, but PyTorch {torch.__version__} {reason}")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"device {device!r} asked for, but PyTorch {torch.__version__} sees no Apple GPU")
    return torch.device("cpu") if place.type == "cpu" else place  # cpu:0 is the same


def own_gpu(rank: int = 0) -> torch.device:
    """The GPU of this process, one of several: that of its number on this machine, as torchrun and `parallel.launch`
    give it, else that of its rank."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))


def pick_dtype(dtype: torch.dtype | str | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype asked for, or the one the device computes well: fp32 on a CPU, 16 bits on a GPU."""
    if dtype is not None and dtype != "auto":
        chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if chosen is None or chosen not in DTYPES.values():
            raise OptionError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if chosen == torch.float64 and device.type == "mps":
            raise OptionError("Apple's MPS has no float64; use --device cpu for it")
        return chosen
    if device.type == "cpu":
        return torch.float64 if stored == torch.float64 else torch.float32
    if stored == torch.float16:
        return torch.float16
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _bf16_on_mps()
    return torch.bfloat16 if has_bf16 else torch.float16


def pick_cache(options: LoadOptions, device: torch.device, compute: torch.dtype) -> torch.dtype:
    """Dtype of keys and values: the one asked for, or the arithmetic's.

    Raises:
        OptionError: float16 where a key that it cannot hold would become infinite.
    """
    if options.cache_dtype in (None, "auto"):
        return compute
    chosen: torch.dtype = getattr(torch, CACHE_NAMES[options.cache_dtype])
    if chosen == torch.float64 != compute:
        raise OptionError(f"cache_dtype float64 is for arithmetic in float64, and this is in {_name(compute)}: omit it")
    if chosen == torch.float16 and device.type != "cpu" and compute != torch.float16:
        raise OptionError(
            f"cache_dtype float16 holds no key beyond 65,504, which is not looked after on {device.type} in "
            f"{_name(compute)}: use --cache_dtype bfloat16"
        )
    return chosen


def _bf16_on_mps() -> bool:
    return bool(torch.backends.mps.is_macos_or_newer(14, 0))
