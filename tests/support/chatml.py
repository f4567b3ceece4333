"""Adapters as the usual ChatML recipes save them: PEFT over transformers, words added, tables resized, a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.formats.convert import convert
from tests.support.folders import PARAMS, make_folder, random_state

WORDS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is the king's son?"}]
ROWS = PARAMS["vocab_size"]
# How the recipes keep the rows of the new words.
KINDS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "save_embedding_layers": {},
    "trainable_token_indices": {"trainable_token_indices": [ROWS, ROWS + 1]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [ROWS, 300], "lm_head": [ROWS + 1, 7]}},
}


def hf_base(folder: Path, tied: bool = False) -> Path:
    """A random base in Hugging Face's layout, with a tokenizer.json."""
    state = random_state()
    if tied:
        state.pop("output.weight")
    mistral = make_folder(folder.with_name(f"{folder.name}-mistral"), state, tied_embeddings=tied)
    convert(mistral, folder, "hf")
    return folder


def chatml(base: Path, folder: Path, *, more: int = 2, multiple: int | None = None, **lora: Any) -> tuple[Path, Tensor]:
    """Write an adapter with two words more and a tokenizer of its own.

    Args:
        more: rows that the tables get more.
        multiple: of which the rows are padded to one.
        lora: for `peft.LoraConfig`.

    Returns:
        its folder, and PEFT's logits of `ids_of(more)` with it.
    """
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if more:
        tokenizer.add_special_tokens({"additional_special_tokens": WORDS})
        tokenizer.eos_token, tokenizer.chat_template = WORDS[1], TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if more:
        model.resize_token_embeddings(ROWS + more, pad_to_multiple_of=multiple)
    config = peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": ["q_proj", "up_proj"], **lora})
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(torch.rand(weight.shape) / 2 - 0.25)
        logits = theirs(ids_of(more=more)[None]).logits[0]
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, logits


def ids_of(more: int = 2) -> Tensor:
    """Ids of a prompt that is longer than the window: among them the new words, or else words of the base."""
    ids = torch.arange(3, 3 + 11 * 307, 307)
    ids[4], ids[9] = (ROWS, ROWS + 1) if more else (5, 300)
    return ids
