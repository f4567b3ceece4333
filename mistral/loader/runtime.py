"""Where and in which dtypes a model runs: options in, one frozen Runtime out, once, at load.

Layers never see options; they see tensors that are already in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mistral import backends
from mistral.attention import Attend
from mistral.fast.layout import QUANTS
from mistral.loader.options import OptionError
from mistral.util import memory

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Widened weights cost memory and, one row at a time, speed: only where there is plenty.
WIDEN_SHARE = 0.6


@dataclass(frozen=True)
class Runtime:
    """How a model runs.

    Args:
        device: of weights, activations and cache.
        weights, compute, cache: dtypes of what is stored, of the activations, of keys and values.
        attention: name of the backend in use.
        attend: the backend.
        kernels: whether products of few rows are those of `fast`.
        decode: whether whole decode steps are, attention included.
        captured: whether decode steps on a GPU are captured and replayed.
        quant: "int8", "int4", or None for weights as they are stored.
        deterministic: whether a sequence has the same bits in any batch, in any chunks, on any number of threads.
        notes: what could not be had, a sentence each.
    """

    device: torch.device
    weights: torch.dtype
    compute: torch.dtype
    cache: torch.dtype
    attention: str
    attend: Attend
    kernels: bool = False
    decode: bool = False
    captured: bool = False
    quant: str | None = None
    deterministic: bool = False
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Every choice that was made, for people."""
        weights = self.quant or _name(self.weights)
        kernels = ("; kernels for decode steps" if self.decode else "; kernels for products") if self.kernels else ""
        if self.captured:
            kernels = "; captured decode steps"
        if self.deterministic:
            kernels = "; kernels for all steps; bitwise"
        return (
            f"device {self.device}; weights/compute/cache {weights}/{_name(self.compute)}/{_name(self.cache)}; "
            f"attention {self.attention}{kernels}"
        )


def resolve(
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    attention: str | None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    *,
    stored: torch.dtype,
    parameters: int,
    head_dim: int,
) -> Runtime:
    """Decide what the caller left open.

    Args:
        device: None takes CUDA, else Apple's MPS, else the CPU.
        dtype: of the arithmetic; None takes what the device computes well.
        attention: name of a backend; None takes the default of the device.
        kernels: whether to use the kernels of `fast`; None does where they can be built.
        quant: "int8" or "int4" for weights in few bits; None leaves them as they are stored.
        deterministic: the same bits for a sequence in any company, at the price of speed; see `oracle.bitwise`.
        stored: dtype of the weights in their file.
        parameters: how many there are.
        head_dim: D, which some attention kernels limit.

    Raises:
        OptionError: a name is unknown, or the device is not there.
    """
    place = pick_device(device)
    compute = pick_dtype(dtype, place, stored)
    on_cpu_in_fp32 = place.type == "cpu" and compute == torch.float32
    if quant is not None and quant not in QUANTS:
        raise OptionError(f"quant {quant!r} is not one of {', '.join(QUANTS)}")
    if quant is not None and not on_cpu_in_fp32 and place.type != "cuda":
        raise OptionError(
            f"quantized weights are for a CPU in float32, or for CUDA, not for {place.type} in {_name(compute)}"
        )
    if deterministic:
        _check_deterministic(place, compute, attention, kernels)
    # Opt-in: not yet run on a real GPU.
    captured = place.type == "cuda" and kernels is True
    fits = place.type == "cpu" and compute in (torch.float32, torch.bfloat16)
    fast, notes = (False, ()) if captured else _kernels(kernels, fits)
    weights = compute
    if fast and compute.itemsize > stored.itemsize:
        weights = stored  # the kernels read narrow weights as fast as memory gives them
    elif compute.itemsize > stored.itemsize:
        left = memory.available(place)
        if left is not None and parameters * compute.itemsize > WIDEN_SHARE * left:
            weights = stored
    name, attend = backends.resolve(attention, place, compute, head_dim)
    named = attention not in (None, "auto") and name == attention
    decode = fast and on_cpu_in_fp32 and not named  # a backend that was asked for is the one that is used
    if deterministic:
        name = "kernels"
    return Runtime(place, weights, compute, compute, name, attend, fast, decode, captured, quant, deterministic, notes)


def _check_deterministic(
    place: torch.device, compute: torch.dtype, attention: str | None, kernels: bool | None
) -> None:
    """Refuse what has other bits in other company."""
    if place.type != "cpu" or compute != torch.float32:
        raise OptionError(
            f"deterministic is for a CPU in float32, not for {place.type} in {_name(compute)}: "
            "use --device cpu --dtype float32"
        )
    if attention not in (None, "auto"):
        raise OptionError(f"deterministic has an attention of its own: leave --attention {attention} out")
    if kernels is False:
        raise OptionError("deterministic computes with the kernels: leave --kernels=false out")
    try:
        _kernels(True, True)
    except OptionError as error:
        raise OptionError(f"deterministic computes with the kernels: {error}") from None


def _kernels(wanted: bool | None, fits: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether the kernels are used, and what to say if they cannot be."""
    if wanted is False or (wanted is None and not fits):
        return False, ()
    if not fits:
        raise OptionError("the kernels are for a CPU in float32 or bfloat16, or for CUDA: leave --kernels out")
    from mistral.fast.kernels import KernelsUnavailable, library

    try:
        library()
    except KernelsUnavailable as error:
        if wanted:
            raise OptionError(f"no kernels: {error}") from None
        return False, (f"no kernels, which are several times faster: {error}",)
    return True, ()


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
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        reason = f"sees {torch.cuda.device_count()} of them" if torch.version.cuda else "was built without CUDA"
        raise OptionError(f"device {device!r} asked for, but PyTorch {torch.__version__} {reason}")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"device {device!r} asked for, but PyTorch {torch.__version__} sees no Apple GPU")
    return place


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


def _bf16_on_mps() -> bool:
    return bool(torch.backends.mps.is_macos_or_newer(14, 0))
