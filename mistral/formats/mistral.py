"""Mistral's layout: params.json, what the keys of every release mean, as data, and where the weights are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.args import ArgsError, ModelArgs
from mistral.fast.layout import SYMMETRIC
from mistral.formats.config_parts import parts_of_params
from mistral.formats.experts import first_release
from mistral.formats.fp8 import mistrals_fp8
from mistral.formats.layout import Layout, ParamsError, Serving, read_object, trained_length
from mistral.formats.pth import open_archives
from mistral.formats.quantized import Method, check_plain, dequantized
from mistral.formats.weights import WeightFiles, WeightsError, numbered_parts, open_safetensors, parts_among, unwrapped
from mistral.util.errors import short_repr

if TYPE_CHECKING:
    import torch

__all__ = ["MistralLayout", "ParamsError", "find_weights", "params_json", "read_object", "to_args"]

REQUIRED = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
OPTIONAL = ("sliding_window", "rope_theta", "tied_embeddings")
PARTS = ("yarn", "llama_4_scaling", "moe")  # objects of their own
# Ours, with a word of STORED: the matrices are stored quantized as `fast.layout` has it. The second key is what this
# library wrote before 0.1. Mistral's own releases have an object there: see `_method`.
QUANTIZATION = ("quantization", "few_bits")
# What stands there, and what it is called elsewhere. A format that changes gets a new word; old ones stay.
STORED = {"int8": "int8", "int4-affine": "int4", "int4": SYMMETRIC}
FP8 = "fp8_e4m3"
ARCHIVE = re.compile(r"consolidated\.\d\d\.pth?")

# Seen in releases; they change no number of a dense text model.
HARMLESS = {
    "max_seq_len": "how long the training sequences were",
    "max_position_embeddings": "how long the training sequences were",
    "max_batch_size": "a setting of the machine it was exported on",
    "dtype": "the weights have their own",
    "model_type": "a label, unless it is that of a Mamba model",
    "lora": "how it was fine-tuned: mistral-finetune writes it beside merged weights too",
}
LABELS = ("max_seq_len", "max_position_embeddings", "max_batch_size", "dtype", "model_type")  # written anew, or empty
# Describe the part that reads images. Its weights are left aside, see `VISION`; text is computed without it.
SEEING = ("vision_encoder", "multimodal")
VISION = re.compile(r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..*")
# Would make the numbers wrong if they were ignored, unless they are null; where to go instead. What says most about
# the model comes first: a later release has several of them.
REFUSED = {
    "audio_encoder": "an audio model (Voxtral): use transformers or vLLM",
    "kv_lora_rank": "latent attention (Mistral Large 3): use vLLM",
    "qk_nope_head_dim": "latent attention (Mistral Large 3): use vLLM",
    "qk_rope_head_dim": "latent attention (Mistral Large 3): use vLLM",
    "q_lora_rank": "latent attention (Mistral Large 3): use vLLM",
    "v_head_dim": "latent attention (Mistral Large 3): use vLLM",
    "rope_scaling": "scaled rotary positions: use transformers or vLLM",
    "quantization_config": "a quantized checkpoint: use vLLM",
    "ssm_config": "a Mamba model (Codestral Mamba): use transformers or mamba-ssm",
}
# Harmless only with the one value that means "not used".
REFUSED_UNLESS = {
    "causal": (True, None),
    "use_biases": (False, None),
    "attn_bias": (False, None),
    "qk_norm": (False, None),
    "activation": ("silu", None),
}


def to_args(raw: dict[str, Any], max_batch_size: int = 0) -> ModelArgs:
    """ModelArgs from the object in a params.json.

    Raises:
        ParamsError: a key is missing, refused or unknown, or a value cannot be.
    """
    raw = dict(raw)
    if "_sliding_window" in raw:  # Ministral 8B's spelling
        if raw.get("sliding_window", raw["_sliding_window"]) != raw["_sliding_window"]:
            raise ParamsError("params.json gives both sliding_window and _sliding_window, and they differ")
        raw["sliding_window"] = raw.pop("_sliding_window")
    _check_multimodal(raw.get("multimodal"))
    # A dense model of a family that has others: null and -1 mean that it has no such part.
    raw = {key: value for key, value in raw.items() if not (key in REFUSED and value == -1)}
    for key, reason in REFUSED.items():
        if raw.get(key) is not None:
            raise ParamsError(f"params.json has {key!r}: {reason}")
    _quantization(raw)
    _method(raw)
    if raw.get("model_type") == "mamba":
        raise ParamsError(f"params.json describes {REFUSED['ssm_config']}")
    for key, value in raw.items():
        if any(key in table for table in (REQUIRED, OPTIONAL, PARTS, HARMLESS, REFUSED, QUANTIZATION, SEEING)):
            continue
        if key in REFUSED_UNLESS:
            if value in REFUSED_UNLESS[key]:
                continue
            raise ParamsError(
                f"params.json has {key} = {short_repr(value)}, which this model does not have: use transformers or vLLM"
            )
        raise ParamsError(
            f"params.json has {short_repr(key)}, which no supported release has: remove it if it changes nothing"
        )
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise ParamsError(f"params.json lacks {', '.join(missing)}")
    values = {key: raw[key] for key in (*REQUIRED, *OPTIONAL) if key in raw}
    if raw.get("tied_embeddings") is None:
        values.pop("tied_embeddings", None)
    window = values.get("sliding_window")
    if isinstance(window, str):
        values["sliding_window"] = _window_from_text(window)
    rule = "given in params.json" if raw.get("rope_theta") is not None else ""
    try:
        args = ModelArgs(**values, **parts_of_params(raw), theta_rule=rule)
    except ArgsError as error:
        raise ParamsError(f"params.json: {error}") from None
    return replace(args, max_batch_size=max_batch_size)  # the caller's; its errors are not the file's


def _check_multimodal(given: object) -> None:
    """Refuse other inputs than text and images."""
    if isinstance(given, dict) and not given.keys() - {"vision_encoder_args"} and given:
        return
    if given is not None:
        raise ParamsError(
            "params.json has 'multimodal': a model with other inputs than text (Voxtral): use transformers or vLLM"
        )


def _window_from_text(window: str) -> int | None:
    word = window.strip().lower()
    if word.isdecimal() and len(word) < 20:
        return int(word)
    if word in ("", "none", "null"):
        return None
    raise ParamsError(f"params.json: sliding_window is {short_repr(window)}, neither a number nor null")


def has_mistral_weights(folder: Path) -> bool:
    """Whether any file is named as weights in Mistral's layout are."""
    names = (path.name for path in folder.glob("consolidated.*.pt*"))
    return any(folder.glob("consolidated*.safetensors")) or any(map(ARCHIVE.fullmatch, names))


def find_weights(folder: Path) -> WeightFiles:
    """The weights of a folder in Mistral's layout; safetensors are preferred where both are there.

    Raises:
        WeightsError: none, parts missing, or a file that cannot be read.
    """
    single = folder / "consolidated.safetensors"
    if single.is_file():
        return open_safetensors((single,))
    parts = numbered_parts(folder, "consolidated")
    if parts:
        return open_safetensors(parts)
    archives = _archives(path.name for path in folder.glob("consolidated.*.pt*"))
    if archives:
        return open_archives(tuple(folder / name for name in archives))
    raise WeightsError(
        f"no weights in {folder}: expected consolidated.safetensors, "
        "consolidated-00001-of-0000N.safetensors or consolidated.00.pth"
    )


def _archives(names: Iterable[str]) -> tuple[str, ...]:
    """The files that torch.save wrote, as the releases name them; () where the first is missing."""
    found = {name for name in names if ARCHIVE.fullmatch(name)}
    ends = [end for end in ("pth", "pt") if f"consolidated.00.{end}" in found]
    return tuple(sorted(name for name in found if name.endswith(f".{ends[0]}"))) if ends else ()


def _quantization(raw: dict[str, Any]) -> str | None:
    """How this library has quantized the matrices: "int8", "int4", `SYMMETRIC` or, where it has not, None.

    Raises:
        ParamsError: another word, or two that differ.
    """
    given = {key: raw[key] for key in QUANTIZATION if raw.get(key) is not None and not isinstance(raw[key], dict)}
    for key, value in given.items():
        if not isinstance(value, str) or value not in STORED:
            raise ParamsError(f"params.json has {key} = {short_repr(value)}; it must be one of {', '.join(STORED)}")
    if len(set(given.values())) > 1:
        raise ParamsError(f"params.json has both {' and '.join(f'{key} = {value!r}' for key, value in given.items())}")
    return next((STORED[value] for value in given.values()), None)


def _method(raw: dict[str, Any]) -> Method | None:
    """How Mistral's own quantized releases store the matrices; None where they are not quantized so.

    Raises:
        ParamsError: in another way than in fp8.
    """
    given = raw.get(QUANTIZATION[0])
    if not isinstance(given, dict):
        return None
    known = {"qformat_weight": (FP8,), "qscheme_act": ("TENSOR", "NO_SCALES", None)}
    for key, value in {"qformat_weight": None, **given}.items():
        if value not in known.get(key, ()):
            what = f"with {short_repr(key)} = {short_repr(value)}"
            raise ParamsError(f"params.json has 'quantization' {what}, not {FP8}: a quantized checkpoint: use vLLM")
    return mistrals_fp8()


def params_json(args: ModelArgs, length: int | None, quant: str | None = None) -> dict[str, Any]:
    """What a params.json holds; `length` is how long the training sequences were."""
    params = args.to_params() | ({} if length is None else {"max_seq_len": length})
    words = {meant: word for word, meant in STORED.items()}
    return params if quant is None else {**params, QUANTIZATION[0]: words[quant]}


class MistralLayout(Layout):
    """The layout of Mistral's own downloads: params.json and consolidated weights."""

    name, to, adapter = "mistral", "mistral", "finetune"
    title = "Mistral's"
    config = "params.json"
    vision = VISION

    def has_weights(self, path: Path) -> bool:
        return has_mistral_weights(path)

    def weight_sets(self, names: Collection[str]) -> list[tuple[str, ...]]:
        # Those of several such files have Hugging Face's beside them, in a safer form.
        pth = ("consolidated.00.pth",) if "consolidated.01.pth" not in names else ()
        return [("consolidated.safetensors",), parts_among(names, "consolidated"), pth]

    def to_args(self, raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
        method = _method(raw)
        return to_args(raw, max_batch_size), [] if method is None else [method.note]

    def find_weights(self, path: Path) -> WeightFiles:
        weights, method = first_release(unwrapped(find_weights(path))), _method(self.read_config(path))
        if method is None:
            check_plain(weights, self.config)
            return weights
        return dequantized(weights, method, self.config)

    def unused(self, raw: dict[str, Any]) -> list[str]:
        return [key for key in raw if key in HARMLESS and key not in LABELS]

    def quantization(self, raw: dict[str, Any]) -> str | None:
        return _quantization(raw)

    def file_name(self, number: int, total: int) -> str:
        return "consolidated.safetensors"

    def describe(
        self,
        args: ModelArgs,
        raw: dict[str, Any],
        *,
        dtype: torch.dtype,
        quant: str | None,
        tokens: Callable[[], dict[str, int]],
    ) -> tuple[dict[str, Any], list[str]]:
        return params_json(args, trained_length(raw), quant), []

    def odd(self, raw: dict[str, Any]) -> list[str]:
        if "_sliding_window" not in raw:
            return []
        return ["params.json spells it _sliding_window, which vLLM does not read: rename it, or vLLM has no window"]

    def serving(self, path: Path, args: ModelArgs, files: tuple[Path, ...]) -> Serving:
        pth = any(file.suffix in (".pth", ".pt") for file in files)
        flags = "--tokenizer_mode mistral --config_format mistral --load_format mistral"
        return Serving(flags, "vLLM does not read .pth files" if pth else None)
