"""The three texts that Mistral's own README shows for 7B v0.1, on real weights where there are any."""

from __future__ import annotations

import os

import pytest

from mistral.cli.generate import DEMO_PROMPTS
from mistral.generate import generate
from mistral.loader.load import load

FOLDER = os.environ.get("MISTRAL_7B_V01")
TEXTS = [
    "This is a test of the emergency broadcast system. This is only a test.\n\n"
    "If this were a real emergency, you would be told what to do.\n\nThis is a test",
    "This is another test of the new blogging software. I’m not sure if I’m going to keep it or not. "
    "I’m not sure if I’m going to keep",
    "This is a third test, mistral AI is very good at testing. 🙂\n\n"
    "This is a third test, mistral AI is very good at testing. 🙂\n\nThis",
]


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="MISTRAL_7B_V01 does not name a folder with the weights of 7B v0.1")
def test_the_original_readmes_texts() -> None:
    loaded = load(FOLDER, max_batch_size=3)
    texts, _ = generate(DEMO_PROMPTS, loaded.model, loaded.tokenizer, max_tokens=35, temperature=0)
    assert texts == TEXTS
