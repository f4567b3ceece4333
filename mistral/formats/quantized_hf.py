"""The methods of quantized checkpoints in Hugging Face's layout, by `quantization_config`.

AWQ (gemm), GPTQ, compressed-tensors (packed, int8, fp8), fp8 (Hugging Face's and vLLM's) and bitsandbytes (nf4, int8).
A weight becomes (q - zero) * scale in fp32; what is computed with is another matter.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.formats.fp8 import block_of, fp8
from mistral.formats.layout import ParamsError, read_object
from mistral.formats.quantized import Get, Method, Parts
from mistral.formats.quantized import require as _require
from mistral.formats.weights import FLOATS, Stored, WeightsError
from mistral.util.errors import printable, short_repr
from mistral.util.parsed import parse_json

if TYPE_CHECKING:
    from torch import Tensor

NESTED = ("weight.nested_absmax", "weight.nested_quant_map")  # scales of scales
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
# Where a folder has no `quantization_config`: files of older programs that say the same.
BESIDE = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
# A column of eight is in this nibble of its word in AWQ's files.
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


class _NotReadError(Exception):
    """What a checkpoint is that is not read here."""


def method_of(config: Any, where: str = "config.json has 'quantization_config'") -> Method:
    """How the weights of a folder are stored, from `quantization_config`.

    Args:
        where: the place of it, for messages.

    Raises:
        ParamsError: in a way that is not read here.
    """
    kind = config.get("quant_method") if isinstance(config, dict) else None
    known = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "bitsandbytes": _bitsandbytes, "fp8": _fp8}
    try:
        if not isinstance(kind, str) or kind not in known:
            what = f"a checkpoint quantized by {printable(kind)}" if isinstance(kind, str) else "a quantized checkpoint"
            raise _NotReadError(what)
        return known[kind](config)
    except _NotReadError as error:
        raise ParamsError(f"{where}: {error}, which is not read here: give the one it was made from") from None


def config_beside(folder: Path) -> dict[str, Any] | None:
    """What the first versions of AutoGPTQ and AutoAWQ wrote into a file of its own, as a `quantization_config`.

    Raises:
        ParamsError: it cannot be read, or is of a way that is not read here.
    """
    for kind, name in BESIDE.items():
        if (folder / name).is_file():
            found = {"quant_method": kind, **read_object(folder / name)}
            method_of(found, f"{name} is there")
            return found
    return None


def _unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers of a few bits in int32 words, lowest first, along a dimension; int32, 0 to 2**bits - 1."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    if dim == 0:
        return ((words[:, None] >> shifts[:, None]) & (2**bits - 1)).reshape(-1, words.shape[1])
    return ((words[..., None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)


# --- AWQ


def _awq(config: dict[str, Any]) -> Method:
    version, bits = str(_format(config, "version") or "gemm").lower(), config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise _NotReadError(f"a checkpoint quantized by awq, version {short_repr(version)}, {short_repr(bits)} bits")

    def header(parts: Parts, get: Get) -> Stored:
        inner, words = parts["qweight"].shape
        groups, out = parts["scales"].shape
        _require(parts["qweight"].dtype == parts["qzeros"].dtype == "int32")
        _require(out == words * 8 and parts["qzeros"].shape == (groups, words) and groups > 0 and inner % groups == 0)
        return replace(parts["scales"], shape=(out, inner))

    def columns(words: Tensor) -> Tensor:
        import torch

        nibbles = _unpacked(words, 4, 1).view(len(words), -1, 8)
        return nibbles[:, :, torch.tensor(AWQ_NIBBLES)].flatten(1)

    def read(parts: dict[str, Tensor]) -> Tensor:
        scales = parts["scales"].float()
        q, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
        each = len(q) // len(scales)
        return ((q.view(len(scales), each, -1) - zeros[:, None]) * scales[:, None]).flatten(0, 1).T.contiguous()

    return Method("AWQ", ("qweight",), ("qzeros", "scales"), (), header, read)


# --- GPTQ

# Keys of GPTQModel's for what is computed beside the weights, or between them.
BESIDE_GPTQ = {"rotation": "activations that are rotated", "adapter": "an adapter beside the weights"}


def _gptq(config: dict[str, Any]) -> Method:
    bits, form = config.get("bits"), _format(config) or "gptq"
    form = "marlin" if config.get("is_marlin_format") else form
    if bits not in (2, 4, 8) or form not in ("gptq", "gptq_v2"):
        raise _NotReadError(f"a checkpoint quantized by gptq, format {short_repr(form)}, {short_repr(bits)} bits")
    if _differs(config.get("dynamic")):
        raise _NotReadError("a checkpoint quantized by gptq, with bits that differ by layer (dynamic)")
    for key, what in BESIDE_GPTQ.items():
        if config.get(key):
            raise _NotReadError(f"a checkpoint quantized by gptq, with {what} ({key})")
    per, one = 32 // bits, 1 if form == "gptq" else 0
    # In the order of its inputs' activations, g_idx alone tells which group an input is in.
    ordered = bool(config.get("desc_act")) and config.get("group_size") != -1

    def header(parts: Parts, get: Get) -> Stored:
        _require(parts["qweight"].dtype == parts["qzeros"].dtype == "int32")
        words, out = parts["qweight"].shape
        groups = parts["scales"].shape[0]
        _require(parts["scales"].shape == (groups, out) and parts["qzeros"].shape == (groups, out // per))
        _require(out % per == 0 and groups > 0)
        inner = words * per
        _require(parts["g_idx"].shape == (inner,) if "g_idx" in parts else inner % groups == 0)
        return replace(parts["scales"], shape=(out, inner))

    def read(parts: dict[str, Tensor]) -> Tensor:
        import torch

        scales, zeros = parts["scales"].float(), _unpacked(parts["qzeros"], bits, 1) + one
        q = _unpacked(parts["qweight"], bits, 0)
        group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(q)) // (len(q) // len(scales))
        if "bias" in parts and parts["bias"].any():
            raise WeightsError("a layer has a bias that is not 0, which no layer of this model has")
        if group.min() < 0 or group.max() >= len(scales):
            raise WeightsError("g_idx names a group that has no scale: the weights are broken")
        return (scales[group] * (q - zeros[group])).T.contiguous()

    needed = ("qzeros", "scales", "g_idx") if ordered else ("qzeros", "scales")
    return Method("GPTQ", ("qweight",), needed, ("bias",) if ordered else ("g_idx", "bias"), header, read)


def _format(config: dict[str, Any], *older: str) -> Any:
    """How words are packed: what the file says, by whatever of the names that programs have for it; None for nothing.

    In another format zeros are other numbers, and nothing in the tensors tells.
    """
    given = {key: config[key] for key in (*older, "checkpoint_format", "format") if config.get(key) is not None}
    if len({str(value).lower() for value in given.values()}) > 1:
        told = " and ".join(f"{key} {short_repr(value)}" for key, value in given.items())
        raise _NotReadError(f"a checkpoint of two formats, {told}")
    return next(iter(given.values()), None)


def _differs(dynamic: Any) -> bool:
    """Whether layers are quantized in different ways: those that are not at all, after "-:", are seen in the files."""
    return bool(dynamic) and not (isinstance(dynamic, dict) and all(str(key).startswith("-:") for key in dynamic))


# --- compressed-tensors

# Where transforms of weights are: they are in the files. Others are of activations, keys or queries.
IN_WEIGHTS = ("weight_input", "weight_output")


def _compressed(config: dict[str, Any]) -> Method:
    form, weights = _kind_of_weights(config)
    bits, kind = weights.get("num_bits"), weights.get("type")
    if (transforms := config.get("transform_config")) and not _in_weights(transforms):
        raise _NotReadError("a checkpoint of compressed-tensors that transforms activations too (transform_config)")
    zeros = ("weight_zero_point",) if weights.get("symmetric") is False else ()
    if form == "pack-quantized" and kind == "int" and bits in (4, 8):
        ordered = weights.get("actorder") in ("group", "dynamic", True)
        return _packed(bits, (*zeros, *(("weight_g_idx",) if ordered else ())))
    if form == "naive-quantized":  # the name of both before they were told apart
        form = f"{kind}-quantized"
    if (form, kind, bits) == ("float-quantized", "float", 8):
        structure = weights.get("block_structure")
        try:
            return fp8("compressed-tensors in fp8", ("weight_scale",), block_of(structure))
        except ValueError:
            raise _NotReadError(f"compressed-tensors in fp8, in blocks of {short_repr(structure)}") from None
    if (form, kind, bits) == ("int-quantized", "int", 8):
        return _int8(zeros)
    raise _NotReadError(f"a checkpoint of compressed-tensors, format {short_repr(form)}, {short_repr(bits)} bits")


def _in_weights(transforms: Any) -> bool:
    """Whether all of them are in the files already: what they did to weights, and nothing else."""
    try:
        places = [at["location"] for group in transforms["config_groups"].values() for at in group["apply"]]
    except (AttributeError, KeyError, TypeError):
        return False
    return all(place in IN_WEIGHTS for place in places)


def _kind_of_weights(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Format, and how weights are rounded: what all groups of modules have in common."""
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    sparse = config.get("sparsity_config")
    if not groups and isinstance(sparse, dict):
        raise _NotReadError(f"a sparse checkpoint of compressed-tensors, format {short_repr(sparse.get('format'))}")
    if not groups or not all(isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups):
        raise _NotReadError("a checkpoint of compressed-tensors that does not tell how weights are rounded")
    same = ("num_bits", "type", "block_structure")
    kinds = [(g.get("format") or config.get("format"), *(g["weights"].get(key) for key in same)) for g in groups]
    if any(kind != kinds[0] for kind in kinds):
        told = " and ".join(dict.fromkeys(f"{short_repr(form)}, {short_repr(bits)} bits" for form, bits, *_ in kinds))
        raise _NotReadError(f"a checkpoint of compressed-tensors with several kinds of weights ({told})")
    first, *others = (g["weights"] for g in groups)
    return kinds[0][0], {key: value for key, value in first.items() if all(o.get(key) == value for o in others)}


def _packed(bits: int, promised: tuple[str, ...]) -> Method:
    """Words of a few bits; `promised` are the parts that the config says there are, without which others are meant."""
    per = 32 // bits

    def header(parts: Parts, get: Get) -> Stored:
        _require(parts["weight_packed"].dtype == "int32")
        out, words = parts["weight_packed"].shape
        rows, groups = parts["weight_scale"].shape
        _require(rows == out and groups > 0 and words * per % groups == 0)
        if "weight_zero_point" in parts:
            _require(out % per == 0 and parts["weight_zero_point"].shape == (out // per, groups))
        _require("weight_g_idx" not in parts or parts["weight_g_idx"].shape == (words * per,))
        return replace(parts["weight_scale"], shape=(out, words * per))

    def read(parts: dict[str, Tensor]) -> Tensor:
        import torch

        scale, q = parts["weight_scale"].float(), _unpacked(parts["weight_packed"], bits, 1)
        if parts["weight_shape"].tolist() != list(q.shape):
            raise WeightsError(f"weight_shape is {parts['weight_shape'].tolist()}, but the weights are {list(q.shape)}")
        group = torch.arange(q.shape[1]) // (q.shape[1] // scale.shape[1])
        if "weight_g_idx" in parts and parts["weight_g_idx"].max() >= 0:
            group = parts["weight_g_idx"].long()
            if group.min() < 0 or group.max() >= scale.shape[1]:
                raise WeightsError("weight_g_idx names a group that has no scale: the weights are broken")
        if "weight_zero_point" in parts:
            zeros = _unpacked(parts["weight_zero_point"], bits, 0)[:, group]
        else:
            zeros = torch.tensor(2 ** (bits - 1), dtype=torch.int32)
        return scale[:, group] * (q - zeros)

    optional = tuple(end for end in ("weight_zero_point", "weight_g_idx") if end not in promised)
    needed = ("weight_scale", "weight_shape", *promised)
    return Method("compressed-tensors", ("weight_packed",), needed, optional, header, read)


def _int8(zeros: tuple[str, ...]) -> Method:
    def header(parts: Parts, get: Get) -> Stored:
        out, inner = parts["weight"].shape
        _require(parts["weight"].dtype == "int8" and parts["weight_scale"].shape in ((), (1,), (1, 1), (out, 1)))
        zero = parts.get("weight_zero_point")
        _require(zero is None or zero.shape == parts["weight_scale"].shape)
        return replace(parts["weight_scale"], shape=(out, inner))

    def read(parts: dict[str, Tensor]) -> Tensor:
        q = parts["weight"].float()
        if "weight_zero_point" in parts:
            q -= parts["weight_zero_point"].float()
        return q * parts["weight_scale"].float()

    optional = () if zeros else ("weight_zero_point",)
    return Method("compressed-tensors in int8", ("weight_scale",), ("weight", *zeros), optional, header, read)


# --- fp8


def _fp8(config: dict[str, Any]) -> Method:
    block, form = config.get("weight_block_size"), config.get("fmt") or "e4m3"
    try:
        if form == "e4m3":
            return fp8("fp8", ("weight_scale_inv", "weight_scale"), block_of(block))
    except ValueError:
        raise _NotReadError(f"a checkpoint in fp8, in blocks of {short_repr(block)}") from None
    raise _NotReadError(f"a checkpoint in fp8, format {short_repr(form)}")


# --- bitsandbytes


def _bitsandbytes(config: dict[str, Any]) -> Method:
    if config.get("load_in_8bit"):
        return _rows_of_int8()
    if config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4":
        return _nf4()
    kind = config.get("bnb_4bit_quant_type")
    raise _NotReadError(f"a checkpoint quantized by bitsandbytes, type {short_repr(kind)}")


def _rows_of_int8() -> Method:
    def header(parts: Parts, get: Get) -> Stored:
        out, inner = parts["weight"].shape
        _require(parts["weight"].dtype == "int8" and parts["SCB"].shape == (out,) and parts["SCB"].dtype in FLOATS)
        return Stored((out, inner), "float16", "F16")  # what these weights were made from

    def read(parts: dict[str, Tensor]) -> Tensor:
        if "weight_format" in parts and parts["weight_format"].any():
            raise WeightsError("the int8 weights of bitsandbytes are in an order of one GPU: save them on another")
        return parts["weight"].float() * parts["SCB"].float()[:, None] / 127

    return Method("bitsandbytes in int8", ("SCB",), ("weight",), ("weight_format",), header, read)


def _nf4() -> Method:
    def header(parts: Parts, get: Get) -> Stored:
        state = _nf4_state(parts[NF4_STATE], get)
        out, inner = state["shape"]
        blocks = -(-out * inner // state["blocksize"])
        _require(type(out) is int and type(inner) is int and out > 0 and inner > 0)
        _require(math.prod(parts["weight"].shape) * 2 == out * inner and parts["weight"].dtype == "uint8")
        _require(parts["weight.absmax"].dtype in ("uint8", "float32"))
        _require(parts["weight.absmax"].shape == (blocks,) and parts["weight.quant_map"].shape == (16,))
        if parts["weight.absmax"].dtype == "uint8":
            nested = -(-blocks // state["nested_blocksize"])
            _require(parts["weight.nested_absmax"].shape == (nested,))
            _require(parts["weight.nested_quant_map"].shape == (256,))
            _require(math.isfinite(state["nested_offset"]))
        return Stored((out, inner), state["dtype"], state["dtype"])

    def read(parts: dict[str, Tensor]) -> Tensor:
        import torch

        state = _state_of(parts[NF4_STATE])
        both, absmax = parts["weight"].flatten(), parts["weight.absmax"]
        q = torch.stack([both >> 4, both & 15], dim=1).flatten().long()
        if absmax.dtype == torch.uint8:
            each = parts["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
            absmax = parts["weight.nested_quant_map"][absmax.long()] * each + state["nested_offset"]
        scale = absmax.float().repeat_interleave(state["blocksize"])[: len(q)]
        return (parts["weight.quant_map"].float()[q] * scale).view(state["shape"])

    needed = ("weight", "weight.quant_map", NF4_STATE)
    return Method("bitsandbytes in nf4", ("weight.absmax",), needed, NESTED, header, read)


def _nf4_state(stored: Stored, get: Get) -> dict[str, Any]:
    """Shape, dtype and sizes of blocks, from JSON in a tensor of bytes."""
    _require(stored.dtype == "uint8" and stored.parameters < 10_000)
    state = _state_of(get(NF4_STATE))
    sizes = [state["blocksize"], *([state["nested_blocksize"]] if "nested_blocksize" in state else [])]
    _require(all(type(size) is int and size > 0 for size in sizes))
    return state


def _state_of(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = parse_json(bytes(tensor.flatten().tolist()))
    return found
