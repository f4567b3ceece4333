"""Hugging Face's config.json: what its keys mean for ModelArgs, and what is written into one. Knows no tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mistral.args import ArgsError, ModelArgs
from mistral.formats.config_parts import moe_of_config, positions_of_config, rope_parameters
from mistral.formats.layout import ASSUMED, LENGTHS, ParamsError
from mistral.formats.quantized_hf import method_of
from mistral.formats.text_inside import text_config
from mistral.formats.tokenizers import MORE_SAMPLING, SAMPLING
from mistral.formats.weights import dtype_name
from mistral.util.errors import ConvertError, short_repr

if TYPE_CHECKING:
    import torch

# transformers takes this where config.json leaves the key out.
DEFAULT_WINDOW = 4096

# config.json keys that shape the model, and ModelArgs' names for them.
SHAPE = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
# Llama is this model without a window; many exports of the family say so.
MODEL_TYPES = ("mistral", "ministral", "ministral3", "mixtral", "llama")
# Keys that mixtral alone has: how many experts, and what only training uses.
MIXTRAL = (
    "num_local_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
# What transformers 4 wrote into each config.json, or into those that it wrote whole: options of its own, other kinds of
# models' keys, and sampling, which is for whoever asks (`tokenizers.suggested_sampling` has a note on it).
GENERIC = (
    *("_attn_implementation_autoset", "_commit_hash", "finetuning_task", "is_decoder", "prefix", "sep_token_id"),
    *("decoder_start_token_id", "task_specific_params", "tf_legacy_loss", "torchscript", "use_bfloat16"),
    *("do_sample", "early_stopping", "exponential_decay_length_penalty", "length_penalty", "max_length"),
    *("diversity_penalty", "num_beam_groups", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("return_dict_in_generate", "encoder_no_repeat_ngram_size", *SAMPLING, *MORE_SAMPLING),
)
# Known keys that change no number of a forward.
HARMLESS = {
    "_attn_implementation": "an option of transformers",
    "_attn_implementation_autoset": "an option of transformers",
    "_attn_implementation_internal": "an option of transformers",
    "_experts_implementation": "an option of transformers",
    "_flash_attn_2_enabled": "an option of transformers",
    "_name_or_path": "where it was exported",
    "architectures": "a label; model_type decides",
    ASSUMED: "what was not known when it was converted",
    "attention_dropout": "training",
    "auto_map": "code, which is never run; a note says so",
    "bos_token_id": "the tokenizer's",
    "chunk_size_feed_forward": "an option of transformers",
    "dtype": "the weights have their own",
    "eos_token_id": "the tokenizer's",
    "id2label": "a classifier's",
    "initializer_range": "training",
    "is_llama_config": "where it was exported",
    "label2id": "a classifier's",
    "max_position_embeddings": "how long the training sequences were",
    "max_sequence_length": "how long the training sequences were",
    "model_type": "checked on its own",
    "output_attentions": "an option of transformers",
    "output_hidden_states": "an option of transformers",
    "pad_token_id": "the tokenizer's",
    "problem_type": "a classifier's",
    "return_dict": "an option of transformers",
    "tokenizer": "the tokenizer's",
    "tokenizer_class": "the tokenizer's",
    "torch_dtype": "the weights have their own",
    "transformers_version": "where it was exported",
    "trust_remote_code": "code, which is never run",
    "unk_token_id": "the tokenizer's",
    "unsloth_fixed": "where it was exported",
    "unsloth_version": "where it was exported",
    "use_cache": "an option of transformers",
    **dict.fromkeys(GENERIC, "written by older transformers for every kind of model"),
}
# Those that are written anew, or say nothing about a model.
LABELS = {
    *("_attn_implementation", "_name_or_path", "architectures", "dtype", "eos_token_id", "bos_token_id", "model_type"),
    *(ASSUMED, "max_position_embeddings", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version"),
    *GENERIC,
}
# Keys with a meaning that is worked out below.
HANDLED = {
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
}
# Keys that are harmless with one of these values only.
ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pretraining_tp": (1,),
    "pruned_heads": ({}, None),
    "cross_attention_hidden_size": (None,),
    "rope_interleaved": (False, None),
    "use_sliding_window": (True, None),
}
# Keys of quantized checkpoints: the one that is read, and those that are not.
QUANTIZATION = "quantization_config"
QUANTIZED = {
    "quantization": "a checkpoint quantized by MLX",
    "quip_params": "a checkpoint quantized by QuIP#",
}
# Other kinds of model of the family, by model_type; transformers and vLLM have them.
ELSEWHERE = {
    "mistral4": "a mixture of experts (Mistral Small 4)",
    "mistral_large4": "a mixture of experts with a vision encoder (Mistral Large 4)",
    "pixtral": "a vision model (Pixtral)",
    "llava": "a vision model (LLaVA, as Pixtral is exported)",
    "llava_next": "a vision model (LLaVA-NeXT)",
    "voxtral": "an audio model (Voxtral)",
    "voxtral_realtime": "an audio model (Voxtral Realtime)",
    "mamba2": "a Mamba model (Codestral Mamba)",
    "mamba": "a Mamba model",
}


def config_to_args(raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
    """ModelArgs from the object in a config.json, and what was assumed, a sentence each.

    Raises:
        ParamsError: another kind of model, a key missing or unknown, or a value that cannot be.
    """
    raw = text_config(raw)
    kind = raw.get("model_type")
    grouped = raw.get("num_key_value_heads", None if kind == "llama" else ...)
    if grouped is None and "num_attention_heads" in raw:  # before grouped heads there was no key for them, or null
        raw = {**raw, "num_key_value_heads": raw["num_attention_heads"]}
    if kind not in MODEL_TYPES:
        what = ELSEWHERE.get(kind, f"a model of type {short_repr(kind)}") if isinstance(kind, str) else "no model_type"
        raise ParamsError(f"config.json describes {what}: use transformers or vLLM")
    notes = _check_keys(raw, kind)
    missing = [key for key in SHAPE if key not in raw]
    if missing:
        raise ParamsError(f"config.json lacks {', '.join(missing)}")
    values = {ours: raw[theirs] for theirs, ours in SHAPE.items()}
    values["head_dim"] = _head_dim(raw, values["dim"], values["n_heads"])
    if raw.get(QUANTIZATION) is not None:
        notes.append(method_of(raw[QUANTIZATION]).note)
    if isinstance(raw.get("auto_map"), dict) and any(name.startswith("AutoModel") for name in raw["auto_map"]):
        notes.append(f"config.json has auto_map: code of its own, which is never run: this is computed as {kind} is")
    values["sliding_window"] = _window(raw, kind, notes)
    if raw.get("tie_word_embeddings") is not None:
        values["tied_embeddings"] = raw["tie_word_embeddings"]
    if kind == "mixtral":
        values["moe"] = moe_of_config(raw)
    positions = positions_of_config(raw)
    try:
        args = ModelArgs(**values, **positions)
    except ArgsError as error:
        raise ParamsError(f"config.json: {in_their_words(str(error))}") from None
    return replace(args, max_batch_size=max_batch_size), notes  # the caller's; its errors are not the file's


def _check_keys(raw: dict[str, Any], kind: str) -> list[str]:
    """Refuse keys that mean something which this model does not have, and those that nobody knows.

    Returns a note on unknown ones that are null: what is absent changes no number.
    """
    absent: list[str] = []
    for key, value in raw.items():
        if key in ONLY:
            if value not in ONLY[key]:
                raise ParamsError(
                    f"config.json has {key} = {short_repr(value)}, which this model does not have: use transformers "
                    "or vLLM"
                )
        elif key == QUANTIZATION:
            if value is not None:
                method_of(value)  # or it is refused
        elif key in QUANTIZED:
            if value is not None:
                what = QUANTIZED[key]
                raise ParamsError(
                    f"config.json has {key!r}: {what}, which is not read here: give the one it was made from"
                )
        elif key in (*HARMLESS, *HANDLED, *SHAPE, *(MIXTRAL if kind == "mixtral" else ())):
            continue
        elif value is None:
            absent.append(short_repr(key))
        else:
            raise ParamsError(
                f"config.json has {short_repr(key)}, which no supported release has: remove it if it changes nothing"
            )
    return [f"config.json has {', '.join(absent)}, unknown here and null: ignored"] if absent else []


def _head_dim(raw: dict[str, Any], dim: Any, heads: Any) -> Any:
    """What the file says, or else the width that each head has its share of."""
    if raw.get("head_dim") is not None:
        return raw["head_dim"]
    if not (type(dim) is int and type(heads) is int and heads > 0 and dim % heads == 0):
        raise ParamsError("config.json has no head_dim, and hidden_size is no multiple of num_attention_heads")
    return dim // heads


def in_their_words(text: str) -> str:
    """A sentence about ModelArgs, with config.json's names of what it is about."""
    ours = {ours: theirs for theirs, ours in SHAPE.items()} | {"tied_embeddings": "tie_word_embeddings"}
    # Not what is in quotes: that is a value, and stands in the file as it is.
    return re.sub(rf"(?<!['\"])\b({'|'.join(ours)})\b", lambda found: ours[found[1]], text)


def default_window(kind: object) -> int | None:
    """The window of a config.json that names none, by its model_type."""
    return None if kind in ("llama", "ministral3", "mixtral") else DEFAULT_WINDOW


def _window(raw: dict[str, Any], kind: str, notes: list[str]) -> Any:
    if kind == "llama":
        ignored = "; transformers ignores its sliding_window" if raw.get("sliding_window") is not None else ""
        notes.append(f"model_type is llama: this model without a sliding window{ignored}")
        return None
    default = default_window(kind)
    if "sliding_window" not in raw and default is not None:
        notes.append(f"config.json has no sliding_window, which means {DEFAULT_WINDOW} to transformers")
    window = raw.get("sliding_window", default)
    types = raw.get("layer_types")
    if types is None:
        return window
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or not all(isinstance(t, str) and t in known for t in types):
        raise ParamsError(f"config.json: layer_types must list {' or '.join(known)} for each layer")
    if len(types) != raw["num_hidden_layers"]:
        raise ParamsError(f"config.json: {len(types)} layer_types for {raw['num_hidden_layers']} layers")
    if window is None and "sliding_attention" in types:
        raise ParamsError("config.json: layer_types has sliding_attention, but sliding_window is null")
    return [known[t] for t in types]


# Keys of a config.json that say nothing about shape and stay true of the converted model.
HF_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range", "use_cache")
# How long the training sequences were, where the source does not say: others need a number. That of 7B v0.1 to v0.3.
LENGTH = 32768


def config_json(args: ModelArgs, length: int | None, dtype: torch.dtype, kept: dict[str, Any]) -> dict[str, Any]:
    """What a config.json holds; `length` is how long the training sequences were, None where nothing says so."""
    distinct = set(args.windows) - {None}
    if len(distinct) > 1:
        raise ConvertError(
            f"layers have windows of {' and '.join(map(str, sorted(filter(None, distinct))))} tokens: "
            "a config.json has one for all layers, or for some of them"
        )
    window = next(iter(distinct), None)
    mixed = len(set(args.windows)) > 1
    grows = args.llama_4_scaling is not None
    if mixed and grows:
        raise ConvertError("layers have different windows, and queries grow: a config.json has no type for both")
    if args.moe is not None and (mixed or grows):
        raise ConvertError("a mixture of experts whose windows differ or whose queries grow has no config.json")
    kind = "Mixtral" if args.moe else "Ministral3" if grows else "Ministral" if mixed else "Mistral"
    config: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        **{theirs: getattr(args, ours) for theirs, ours in SHAPE.items()},
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        LENGTHS[0]: length or LENGTH,
        **({} if length else {ASSUMED: {LENGTHS[0]: LENGTH}}),
        "rope_theta": args.rope_theta,  # as transformers 4 spells it; 5 reads the next line
        "rope_parameters": rope_parameters(args),
        "sliding_window": window,  # null included: left out, it is 4096
        "tie_word_embeddings": args.tied_embeddings,
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),
        **kept,
    }
    if args.moe is not None:
        config |= {"num_local_experts": args.moe.num_experts, "num_experts_per_tok": args.moe.num_experts_per_tok}
    if mixed:
        config["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in args.windows]
    return config
