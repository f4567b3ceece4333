"""Tiny Mistral folders: params.json, weights in each form, and the tokenizer of the bundled model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from tests.support.tiny import tiny_args, tiny_model

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "mistral" / "bundled"
# As tests/support/tiny.py has it, with the tokenizer's vocabulary.
PARAMS: dict[str, Any] = {
    "dim": 24,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 4096,
    "sliding_window": 5,
}


def random_state(seed: int = 0, dtype: torch.dtype = torch.float32, **params: Any) -> dict[str, Tensor]:
    """Random tensors, by name, of a model with these params, as far as they say how large it is."""
    sizes = {name: value for name, value in {**PARAMS, **params}.items() if type(value) is int}
    model = tiny_model(tiny_args(**sizes), seed)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def make_folder(
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    form: str = "single",
    tokenizer: bool = True,
    **params: Any,
) -> Path:
    """A folder to load.

    Args:
        state: the tensors; random ones if None.
        form: "single", "parts" (three safetensors files) or "pth".
        params: changes to PARAMS; they shape the random tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_params(folder, {**PARAMS, **params})
    write_weights(folder, random_state(**params) if state is None else state, form)
    if tokenizer:
        shutil.copy(BUNDLED / "tokenizer.model", folder)
    return folder


def write_params(folder: Path, params: Any) -> None:
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


def write_weights(folder: Path, state: Mapping[str, Tensor], form: str = "single") -> None:
    if form == "single":
        save_file(dict(state), folder / "consolidated.safetensors")
    elif form == "parts":
        names = list(state)
        for i in range(3):
            part = {name: state[name] for name in names[i::3]}
            save_file(part, folder / f"consolidated-{i + 1:05}-of-00003.safetensors")
    else:
        assert form == "pth"
        torch.save(dict(state), folder / "consolidated.00.pth")


def make_parrot(folder: Path, text: str) -> Path:
    """A folder whose greedy continuation of anything is `text` over and over, each byte a token of its own.

    Every byte of the text must occur once in it. Its layers add nothing: the last token alone picks the next.
    """
    tokenizer = SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    ids = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert tokenizer.unk_id() not in ids
    return make_reciter(folder, ids)


def make_reciter(folder: Path, ids: Sequence[int], *, tokenizer: bool = True, **params: int) -> Path:
    """A folder whose greedy continuation of anything is these ids, each of which must occur once, over and over."""
    assert len(set(ids)) == len(ids)
    params["dim"] = 2 * len(ids)
    state = random_state(**params)
    for name, tensor in state.items():
        if name.endswith(("wo.weight", "w2.weight")):
            tensor.fill_(1e-30)  # adds nothing; zeros are noted at load, as what a download left
        elif name.endswith("norm.weight"):
            tensor.fill_(1)
    meaning, output = state["tok_embeddings.weight"].zero_(), state["output.weight"].zero_()
    meaning[:, 0] = 1  # whatever else came last, the first of them is next
    for place, (last, _) in enumerate(pairwise(ids), 1):
        meaning[last] = 0
        meaning[last, place] = 1
    for place, token in enumerate(ids):
        output[token, place] = 10
    return make_folder(folder, state, tokenizer=tokenizer, **params)
