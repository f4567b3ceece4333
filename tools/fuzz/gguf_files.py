"""GGUF files: a good one, and broken copies whose counts, sizes, types and offsets lie."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from mistral.formats.gguf import name_of
from tools.fuzz.mutate import mutate_bytes

COUNTS = (0, 1, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)


def write_gguf(path: Path, shape: Mapping[str, Any], weights: Mapping[str, Tensor], words: list[str]) -> None:
    """A model with a tokenizer of a few bytes; matrices in Q8_0 where rows allow it.

    Args:
        shape: as in params.json.
        words: of the vocabulary, after <unk>, <s> and </s>.
    """
    writer = GGUFWriter(path, "llama")
    numbers = {
        "block_count": "n_layers",
        "embedding_length": "dim",
        "feed_forward_length": "hidden_dim",
        "attention.head_count": "n_heads",
        "attention.head_count_kv": "n_kv_heads",
        "attention.key_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "vocab_size": "vocab_size",
    }
    for key, name in numbers.items():
        writer.add_uint32(f"llama.{key}", shape[name])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", shape["norm_eps"])
    writer.add_float32("llama.rope.freq_base", shape["rope_theta"])
    tokens = ["<unk>", "<s>", "</s>", *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *(6 if word.startswith("<0x") else 1 for word in words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in weights.items():
        kind = (
            GGMLQuantizationType.Q8_0 if weight.dim() > 1 and weight.shape[-1] % 32 == 0 else GGMLQuantizationType.F32
        )
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(name_of(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutate_gguf(rng: random.Random, data: bytes) -> bytes:
    """A copy that lies about one of its counts or sizes, or has broken bytes in one of its three parts."""
    keys, infos = data.index(b"general.architecture"), data.index(b"token_embd.weight")
    end = infos + 60 * data.count(b".weight", infos)
    kind = rng.randrange(6)
    changed = bytearray(data)
    if kind == 0:
        changed[8:24] = struct.pack("<QQ", *(rng.choice((n, *COUNTS)) for n in struct.unpack("<QQ", data[8:24])))
    elif kind == 1:  # the length of a name, a text or an array, wherever eight bytes are a small number
        places = [at for at in range(24, end) if data[at + 1 : at + 8] == bytes(7) and data[at]]
        at = rng.choice(places)
        changed[at : at + 8] = rng.choice(COUNTS).to_bytes(8, "little")
    elif kind == 2:
        changed[infos:end] = mutate_bytes(rng, bytes(changed[infos:end]))
    elif kind == 3:
        changed[keys : keys + 600] = mutate_bytes(rng, bytes(changed[keys : keys + 600]))
    elif kind == 4:
        del changed[rng.randrange(len(changed)) :]
    else:
        return mutate_bytes(rng, data)
    return bytes(changed)
