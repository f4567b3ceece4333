"""params.json: what the keys of every release mean, as data, and the way from there to ModelArgs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral.args import ArgsError, ModelArgs
from mistral.fast.layout import QUANTS
from mistral.formats.pth import open_pth
from mistral.formats.weights import WeightFiles, WeightsError, numbered_parts, open_safetensors
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited

REQUIRED = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
OPTIONAL = ("sliding_window", "rope_theta", "tied_embeddings")
FEW_BITS = "few_bits"  # ours alone: the weights of products are stored as `packing` has it

# Seen in releases; they change no number of a dense text model.
HARMLESS = {
    "max_seq_len": "how long the training sequences were",
    "max_position_embeddings": "how long the training sequences were",
    "max_batch_size": "a setting of the machine it was exported on",
    "dtype": "the weights have their own",
    "model_type": "a label, unless it is that of a Mamba model",
}
# Would make the numbers wrong if they were ignored, unless they are null; where to go instead. What says most about
# the model comes first: a later release has several of them.
REFUSED = {
    "vision_encoder": "a vision model (Pixtral, Mistral Small 3.1 and later, Ministral 3): use transformers or vLLM",
    "audio_encoder": "an audio model (Voxtral): use transformers or vLLM",
    "multimodal": "a model with other inputs than text (Voxtral): use transformers or vLLM",
    "kv_lora_rank": "latent attention (Mistral Large 3): use vLLM",
    "qk_nope_head_dim": "latent attention (Mistral Large 3): use vLLM",
    "moe": "a mixture of experts (Mixtral): use transformers or vLLM",
    "yarn": "YaRN positions: use vLLM",
    "rope_scaling": "scaled rotary positions: use transformers or vLLM",
    "llama_4_scaling": "scaled attention: use vLLM",
    "quantization": "a quantized checkpoint: use vLLM",
    "quantization_config": "a quantized checkpoint: use vLLM",
    "ssm_config": "a Mamba model (Codestral Mamba): use transformers or mamba-ssm",
    "lora": "a LoRA adapter, not a model: merge it into its base first",
}
# Harmless only with the one value that means "not used".
REFUSED_UNLESS = {
    "causal": (True, None),
    "use_biases": (False, None),
    "attn_bias": (False, None),
    "qk_norm": (False, None),
    "activation": ("silu", None),
}


class ParamsError(FormatError):
    """A params.json that is missing, broken, or describes another kind of model."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ParamsError: the file cannot be read, or holds no JSON object.
    """
    try:
        text = read_limited(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} cannot be read: {error}") from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ParamsError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


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
    for key, reason in REFUSED.items():
        if raw.get(key) is not None:
            raise ParamsError(f"params.json has {key!r}: {reason}")
    if raw.get("model_type") == "mamba":
        raise ParamsError(f"params.json describes {REFUSED['ssm_config']}")
    for key, value in raw.items():
        if key in REQUIRED or key in OPTIONAL or key in HARMLESS or key in REFUSED:
            continue
        if key == FEW_BITS:
            if value not in QUANTS:
                raise ParamsError(f"params.json has {FEW_BITS} = {short_repr(value)}: {' or '.join(QUANTS)}")
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
        args = ModelArgs(**values, theta_rule=rule)
    except ArgsError as error:
        raise ParamsError(f"params.json: {error}") from None
    return replace(args, max_batch_size=max_batch_size)  # the caller's; its errors are not the file's


def _window_from_text(window: str) -> int | None:
    word = window.strip().lower()
    if word.isdecimal() and len(word) < 20:
        return int(word)
    if word in ("", "none", "null"):
        return None
    raise ParamsError(f"params.json: sliding_window is {short_repr(window)}, neither a number nor null")


def has_mistral_weights(folder: Path) -> bool:
    """Whether any file is named as weights in Mistral's layout are."""
    return any(folder.glob("consolidated*.safetensors")) or any(folder.glob("consolidated.*.pth"))


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
    pth = folder / "consolidated.00.pth"
    if pth.is_file():
        if (folder / "consolidated.01.pth").exists():
            raise WeightsError(f"{folder} holds a model split over several .pth files, which is not supported")
        return open_pth(pth)
    raise WeightsError(
        f"no weights in {folder}: expected consolidated.safetensors, "
        "consolidated-00001-of-0000N.safetensors or consolidated.00.pth"
    )


def params_json(args: ModelArgs, length: int | None) -> dict[str, Any]:
    return args.to_params() | ({} if length is None else {"max_seq_len": length})
