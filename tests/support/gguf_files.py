"""Small GGUF files, written by the `gguf` package: of a random model, with any type that it can quantize to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats.gguf import name_of
from tests.support.tiny import tiny_args, tiny_model

# Rows of 64 and 96 weights: blocks of 32 fit, and H * D != dim.
SHAPE: dict[str, Any] = {"dim": 64, "hidden_dim": 96, "head_dim": 24, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61}


# Types that the package reads and does not write: the bytes of a block where its fp16 scales are.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "IQ1_M": (),  # in four high halves of bytes
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def gguf_args(**changes: Any) -> ModelArgs:
    """The shape of the small model."""
    return tiny_args(**{**SHAPE, "sliding_window": None, **changes})


def shape_keys(args: ModelArgs, arch: str = "llama") -> dict[str, Any]:
    """The metadata that gives a shape, as llama.cpp's converter writes it."""
    found = {
        "llama.block_count": args.n_layers,
        "llama.context_length": 512,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "llama.rope.freq_base": float(args.rope_theta),
        "llama.rope.dimension_count": args.head_dim,
        "llama.vocab_size": args.vocab_size,
    }
    if args.moe is not None:
        found |= {
            "llama.expert_count": args.moe.num_experts,
            "llama.expert_used_count": args.moe.num_experts_per_tok,
        }
    if args.yarn is not None:
        found |= {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": float(args.yarn.factor),
            "llama.rope.scaling.yarn_beta_fast": float(args.yarn.beta_fast),
            "llama.rope.scaling.yarn_beta_slow": float(args.yarn.beta_slow),
            "llama.rope.scaling.original_context_length": args.yarn.original_length,
        }
        if args.yarn.attention_factor == 1:
            found["llama.rope.scaling.yarn_log_multiplier"] = 1.0
    if args.llama_4_scaling is not None:
        found["llama.attention.temperature_scale"] = float(args.llama_4_scaling.beta)
    return {key.replace("llama.", f"{arch}.", 1): value for key, value in found.items()}


def write_gguf(
    path: Path,
    kind: str = "F32",
    args: ModelArgs | None = None,
    state: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
    arch: str = "llama",
    split: int = 0,
    without: tuple[str, ...] = (),
    stacked: bool = True,
) -> dict[str, np.ndarray]:
    """Write a model; matrices in `kind`, norms in F32.

    Args:
        args, state: the model; a random one of two layers if None.
        extra: metadata besides; None as a value leaves the key out.
        split: most tensors in a file; the files are then named as parts.
        without: Mistral's names of tensors to leave out.
        stacked: whether the experts of a layer lie in one tensor.

    Returns:
        the fp32 weights that the file holds, by Mistral's names, as the package reads its own blocks.
    """
    args = args or gguf_args()
    state = tiny_model(args).state_dict() if state is None else state
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in {**shape_keys(args, arch), **(extra or {})}.items():
        add(writer, key, value)
    held, stacks = {}, dict[str, list[np.ndarray]]()
    for name, tensor in state.items():
        if name in without:
            continue
        array = tensor.float().numpy()
        quantized = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        written = quantized.name not in SCALES
        data = gguf.quants.quantize(array, quantized) if written else random_blocks(quantized, array.shape)
        held[name] = np.array(gguf.quants.dequantize(data, quantized)).reshape(array.shape)
        if stacked and (expert := re.fullmatch(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight", name_of(name))):
            stack = stacks.setdefault(f"{expert[1]}_exps.weight", [])
            assert len(stack) == int(expert[2])
            stack.append(data)
            continue
        writer.add_tensor(name_of(name), data, raw_dtype=None if kind in ("F32", "F16") else quantized)
    for name, parts in stacks.items():
        raw = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
        writer.add_tensor(name, np.stack(parts), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks with random bits and small scales, of a tensor whose rows are whole blocks."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (int(np.prod(shape)) // elements, size), dtype=np.uint8)
    scale = np.float16(2e-5 if kind.name == "Q6_K" else 1e-4)  # signed factors of 8 bits: weights of ordinary size
    for at in SCALES[kind.name]:
        raw[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind.name == "IQ1_M":
        for i in range(4):
            raw[:, 49 + 2 * i] = raw[:, 49 + 2 * i] & 15 | (int(scale.view(np.uint16)) >> 4 * i & 15) << 4
    return raw.reshape(*shape[:-1], -1)


def tokenizer_keys(path: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.model."""
    sp = SentencePieceProcessor(model_file=str(path))
    ids = range(sp.vocab_size())

    def kind(i: int) -> int:
        checks: list[tuple[Callable[[int], bool], int]]
        checks = [(sp.IsUnknown, 2), (sp.IsControl, 3), (sp.IsUnused, 5), (sp.IsByte, 6)]
        return next((number for check, number in checks if check(i)), 1)

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [sp.IdToPiece(i) for i in ids],
        "scores": [sp.GetScore(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
        "unknown_token_id": sp.unk_id(),
        "add_bos_token": True,
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """One key; ints as u32, floats as f32, lists as arrays."""
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
        writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.STRING))
