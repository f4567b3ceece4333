"""The model that ships: its size, the loss its card claims, and that it writes English."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mistral.formats.folder import BUNDLED
from mistral.generate import generate
from mistral.loader.load import Loaded, load
from mistral.window import block_for

HELD_OUT = Path(__file__).parents[1] / "data" / "dwarf_long_nose.txt"


@pytest.fixture(scope="module")
def bundled() -> Loaded:
    return load()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((BUNDLED / "training.json").read_text())


def test_its_size_and_shape(bundled: Loaded) -> None:
    parameters = sum(p.numel() for p in bundled.model.parameters())
    assert parameters <= 7_000_000
    assert sum(f.stat().st_size for f in BUNDLED.iterdir()) < 14_000_000
    args = bundled.args
    assert args.n_kv_heads < args.n_heads
    assert args.sliding_window is not None
    assert (
        block_for(args.sliding_window) + args.sliding_window < 256
    )  # shorter than its training length: the buffer rolls
    assert (bundled.tokenizer.bos_id, bundled.tokenizer.eos_id) == (1, 2)
    assert bundled.tokenizer.n_words == args.vocab_size


def test_its_loss_on_the_held_out_story(bundled: Loaded, record: dict) -> None:
    text = HELD_OUT.read_text(encoding="utf-8").removesuffix("\n")
    assert len(text) == record["held_out_characters"]
    ids = [*bundled.tokenizer.encode(text), bundled.tokenizer.eos_id]
    _, (logprobs,) = generate([ids], bundled.model, bundled.tokenizer, max_tokens=0)
    assert len(logprobs) == record["held_out_tokens"]
    assert -sum(logprobs) / len(logprobs) == pytest.approx(record["held_out_nats_per_token"], abs=2e-3)


def test_its_greedy_text_is_english(bundled: Loaded) -> None:
    (text,), _ = generate(["Once upon a time"], bundled.model, bundled.tokenizer, max_tokens=100, temperature=0)
    words = re.findall(r"[a-z]+", text.lower())
    known = set(re.findall(r"[a-z]+", HELD_OUT.read_text(encoding="utf-8").lower()))
    assert len(words) > 50
    assert sum(word in known for word in words) > 0.85 * len(words), text
    assert len(set(words)) > 0.3 * len(words), text  # it does not go round in circles
