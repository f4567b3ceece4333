"""The tokenizer files of a folder: which there are, which is read."""

from __future__ import annotations

import re
from pathlib import Path

from mistral.args import ModelArgs
from mistral.formats.releases import Release
from mistral.tokenizer import Tokenizer, TokenizerError


def missing_tokens(args: ModelArgs, words: int, release: Release | None) -> int:
    """Ids of the model that its tokenizer should have a word for and has not."""
    return max(0, args.vocab_size - words - (release.added_words if release else 0))


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizers of a folder, best first: tekken.json, tokenizer.model.vN from the newest on, tokenizer.model."""
    versions = {
        int(match[1]): path
        for path in folder.glob("tokenizer.model.v*")
        if (match := re.search(r"\.v(\d+)", path.name))
    }
    newest_first = [versions[n] for n in sorted(versions, reverse=True)]
    candidates = [folder / "tekken.json", *newest_first, folder / "tokenizer.model"]
    return [path for path in candidates if path.is_file()]


def tokenizer_kind(path: Path) -> str:
    """ "sentencepiece" or "tekken"."""
    return "tekken" if path.suffix == ".json" else "sentencepiece"


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder, the first of its `tokenizer_files`.

    Raises:
        TokenizerError: none, broken, or with more words than the model.
    """
    path = next(iter(tokenizer_files(folder)), None)
    if path is None:
        raise TokenizerError(f"no tokenizer in {folder}: expected tokenizer.model, tokenizer.model.v3 or tekken.json")
    tokenizer = Tokenizer(path)
    if tokenizer.n_words > vocab_size:
        raise TokenizerError(
            f"{path} has {tokenizer.n_words} words, but the model knows {vocab_size}: it is another model's"
        )
    return tokenizer
