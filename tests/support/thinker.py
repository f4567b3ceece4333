"""A tiny reasoning model: a folder with a tokenizer of v13 whose greedy answer to anything is a thought and a word."""

from __future__ import annotations

import json
from pathlib import Path

from mistral.tokenizer import Tokenizer
from tests.chat.test_templates import NAMED
from tests.support.folders import make_reciter
from tests.support.tokenizer_json import small_tekken

THOUGHT, ANSWER = "é, so", "Yes 漢."
SYSTEM_PROMPT = "Think first.\n[THINK]Your thoughts.[/THINK]Then answer."


def v13_tokenizer(folder: Path, version: str = "v13") -> Tokenizer:
    """A tekken.json of 4000 words, with the control tokens of v13 (of v15 too)."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(small_tekken(folder / "tekken.json", 3000).read_text())
    early = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    fill = [NAMED.get(i, f"<SPECIAL_{i}>") for i in range(len(early), 1000)]
    named = [{"rank": len(early) + i, "token_str": word, "is_control": True} for i, word in enumerate(fill)]
    raw["special_tokens"], raw["config"]["version"] = [*early, *named], version
    if version == "v15":
        effort = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        raw["model_settings_builder"] = {"reasoning_effort": effort}
    (folder / "tekken.json").write_text(json.dumps(raw))
    return Tokenizer(folder / "tekken.json")


def make_thinker(folder: Path, version: str = "v13") -> Path:
    """The folder. Its layers add nothing: the last token alone picks the next, and all tokens of the answer differ."""
    words = v13_tokenizer(folder, version)
    control = words.control_tokens
    ids = [control["[THINK]"], *words.encode(THOUGHT, bos=False), control["[/THINK]"]]
    ids += [*words.encode(ANSWER, bos=False), words.eos_id]
    return make_reciter(folder, ids, tokenizer=False, vocab_size=4000)
