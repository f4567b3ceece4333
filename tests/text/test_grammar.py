"""Texts by grammar: every value fits its schema, for each kind of tokenizer; requests do not mix; nothing raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral import complete
from mistral.formats.folder import BUNDLED
from mistral.generate import eos_of
from mistral.sampling_params import SamplingError
from mistral.tokenizer import Tokenizer
from tests.support.tiny import tiny_args, tiny_model
from tests.support.tokenizer_json import KINDS, small_tekken, write_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")

from mistral.grammar import Grammar, Grammars

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -5, "maximum": 50},
        "b": {"type": "string", "maxLength": 8},
        "c": {"enum": ["x", "é☃ <0x41> </s>"]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


def made(grammar: Grammar, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """A text of random allowed tokens."""
    constraint, ids = grammar.constraint(), []
    random = torch.Generator().manual_seed(seed)
    while len(ids) < most:
        token = int(constraint([], ids, torch.randn(tokenizer.n_ids + 3, generator=random)).argmax())
        if token in grammar.ends:
            return tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError(tokenizer.decode(ids))


@pytest.mark.parametrize("kind", [*KINDS, "model", "tekken.json"])
def test_values_fit_their_schema(tmp_path: Path, kind: str) -> None:
    if kind == "model":
        tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    elif kind == "tekken.json":
        tokenizer = Tokenizer(small_tekken(tmp_path / kind))
    else:
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "x", kind, tmp_path) / "tokenizer.json")
    grammar = Grammars(tokenizer, [tokenizer.eos_id]).json(SCHEMA)
    for seed in range(3):
        value = json.loads(made(grammar, tokenizer, seed))
        assert list(value) == ["a", "b", "c"]
        assert -5 <= value["a"] <= 50
        assert len(value["b"]) <= 8
        assert value["c"] in SCHEMA["properties"]["c"]["enum"]


def test_token_bytes_are_what_is_decoded(tmp_path: Path) -> None:
    for kind in KINDS:
        tokenizer = Tokenizer(write_tokenizer(tmp_path / kind, kind, tmp_path) / "tokenizer.json")
        words = tokenizer.token_bytes()
        assert len(words) == tokenizer.n_ids
        for text in ("The königin said: 永和 🙂\n\n  {}", "<0x41>x"):
            ids = tokenizer.encode(text, bos=False)
            assert b"".join(words[i] or b"" for i in ids).strip() == text.encode().strip()
        assert all(words[i] is None for i in tokenizer.control_tokens.values())


def test_requests_that_share_a_constraint_do_not_mix() -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    model = tiny_model(tiny_args(vocab_size=4096))
    grammar = Grammars(tokenizer, eos_of(tokenizer)).choice(["the wolf", "the king's daughter", "nobody"])
    options = {"max_tokens": 20, "temperature": 3.0, "top_p": 1.0, "n": 3, "seed": 1}
    shared = complete(["A", "B"], model, tokenizer, logits_processor=grammar.constraint(), **options)
    for prompt, results in (("A", shared[:3]), ("B", shared[3:])):
        alone = complete([prompt], model, tokenizer, logits_processor=grammar.constraint(), **options)
        assert [r.tokens for r in results] == [r.tokens for r in alone]
    assert {r.text.strip() for r in shared} <= {"the wolf", "the king's daughter", "nobody"}
    assert {r.finish_reason for r in shared} == {"stop"}


def test_a_grammar_may_begin_after_a_token() -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    grammar = Grammars(tokenizer, [2]).lark('start: "ab"', after=7)
    constraint, logits = grammar.constraint(), torch.zeros(4096)
    assert torch.equal(constraint([], [5, 6], logits), logits)
    allowed = constraint([], [5, 7], logits).isfinite().nonzero().flatten().tolist()
    assert 0 < len(allowed) < 5


def test_where_it_gives_up_the_text_ends() -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    constraint = Grammars(tokenizer, [2]).regex("(a{1,1000}){1,1000}" * 20).constraint()
    letter = tokenizer.token_bytes().index(b"a")
    ids: list[int] = []
    for _ in range(400):
        logits = constraint([], ids, torch.zeros(4096))
        if constraint.problem(ids):
            break
        ids.append(letter)
    assert "gave up" in str(constraint.problem(ids))
    assert logits.isfinite().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    "schema", [{"type": "foo"}, {"$ref": "http://127.0.0.1:9/x"}, {"properties": 1}, {"minProperties": "x"}]
)
def test_schemas_that_cannot_be_are_refused(schema: dict[str, Any]) -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    with pytest.raises(SamplingError, match="grammar cannot be used"):
        Grammars(tokenizer, [2]).json(schema)
    with pytest.raises(SamplingError, match=r"invalid regex .* error: unclosed group$"):
        Grammars(tokenizer, [2]).regex("(")
    with pytest.raises(SamplingError, match="not valid Unicode"):
        Grammars(tokenizer, [2]).choice(["\ud800"])
    with pytest.raises(SamplingError, match="not valid Unicode"):
        Grammars(tokenizer, [2]).regex("\ud800")
    with pytest.raises(SamplingError, match="no token ends"):
        Grammars(tokenizer, [])
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(SamplingError, match="too deep"):
        Grammars(tokenizer, [2]).json(deep)
