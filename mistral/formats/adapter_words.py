"""The words of an adapter: whether the tokenizer beside it is the model's with it, and what is said about that.

Runs without torch.
"""

from __future__ import annotations

from pathlib import Path

from mistral.args import ModelArgs
from mistral.formats.adapter import Adapter, AdapterError
from mistral.formats.tokenizers import FolderTemplate, chat_templates, has_tokenizer, read_tokenizer, suggested_sampling
from mistral.formats.widen import widened
from mistral.special_tokens import (
    ADDED,
    CONFIG,
    AddedToken,
    read_added_tokens,
    read_json,
    read_special_tokens,
    token_text,
)
from mistral.tokenizer import Tokenizer, TokenizerError
from mistral.util.english import counted, some_names


def own_words(adapter: Adapter, base: Path, args: ModelArgs) -> tuple[Path | None, list[str]]:
    """The folder of an adapter whose tokenizer is the model's with it, None for the base's own; and notes, a sentence
    each.

    It is where the adapter adds rows to the vocabulary, where its tokenizer has tokens that the base's lacks, with
    rows of the base's padding, or where a chat template is beside it that the base does not have: trainers save the
    tokenizer that they wrote conversations with. An adapter that is given as a file is used with the base's words.

    Args:
        base: the model, a folder or a GGUF file.
        args: of the model, without the adapter.

    Raises:
        AdapterError: its tokenizer has tokens for which neither has rows, or as `widened`.
        TokenizerError: its tokenizer is broken, and needed.
    """
    folder, vocab_size = adapter.path, widened(adapter, args).vocab_size
    wider = vocab_size > args.vocab_size
    if not folder.is_dir() or not has_tokenizer(folder):
        why = (
            "the adapter's folder has no tokenizer"
            if folder.is_dir()
            else "the adapter's file is used without a tokenizer"
        )
        notes = [f"{why}: the words that it adds have ids, and no text"] if wider else _unused_tokens(folder, base)
        alone = own_template(adapter, base)
        return None, notes + (
            [] if alone is None else [f"the chat template is that of {alone.file} beside the adapter"]
        )
    own, more = read_tokenizer(folder), more_words(folder, base)
    rowless = [word for word in more if own.added.get(word, 0) >= vocab_size]  # those of the base have a note already
    with_rows = [word for word in more if word not in rowless]
    if wrong := [word for word in rowless if word != own.named.get("pad_token")]:
        no_rows = "is no row" if len(wrong) == 1 else "are no rows"
        raise AdapterError(
            f"{folder} has a tokenizer with {counted(len(wrong), 'token')} ({some_names(wrong)}) for which there "
            f"{no_rows}: the tables have {vocab_size:,}, and the adapter has none with more. Save it again with them "
            f"(PEFT: save_embedding_layers=True), or give its file {adapter.weights.files[0].name} to use it with the "
            f"base's own words{left_over(folder, wrong)}"
        )
    if not wider and not with_rows and _new_template(folder, base) is None:
        return None, unused_of(folder, base)
    return folder, [_taken(own, more, folder, base)]


def own_template(adapter: Adapter, base: Path) -> FolderTemplate | None:
    """The chat template that is beside an adapter without a tokenizer, unless its base has the same: it is meant for
    the adapter, and used with the base's tokenizer.

    Raises:
        TokenizerError: a file that cannot be read.
    """
    folder = adapter.path
    return _new_template(folder, base) if folder.is_dir() and not has_tokenizer(folder) else None


def _unused_tokens(adapter: Path, base: Path) -> list[str]:
    """A note on tokens that an adapter's folder names without a tokenizer, and that its base does not have."""
    more = more_words(adapter, base) if adapter.is_dir() else []
    what = f"{counted(len(more), 'added token')} ({some_names(more)})"
    return [f"adapter {adapter} has {what} that {base.name} does not have: not used"] if more else []


def _taken(own: Tokenizer, more: list[str], folder: Path, base: Path) -> str:
    """What of an adapter's folder is used."""
    words = (
        f", which has {counted(len(more), 'token')} ({some_names(more)}) that {base.name} does not have" if more else ""
    )
    template = chat_templates(folder).get("default")
    if template is not None:
        chat = f"the chat template is that of {template.file} there"
    elif _has_template(base):
        chat = f"no chat template is there, and that of {base.name} is not used"
    else:
        chat = "no chat template is there"
    return f"the tokenizer is the adapter's {own.path.name}{words}; {chat}"


def _has_template(base: Path) -> bool:
    try:
        return bool(chat_templates(base))
    except TokenizerError:
        return False


def _new_template(adapter: Path, base: Path) -> FolderTemplate | None:
    """The chat template of an adapter's folder, unless its base has the same.

    Raises:
        TokenizerError: a file that cannot be read.
    """
    template, own = chat_templates(adapter).get("default"), chat_templates(base).get("default")
    return None if template is None or (own is not None and own.text.strip() == template.text.strip()) else template


def left_over(folder: Path, words: list[str]) -> str:
    """That nothing but added_tokens.json names some words, to go behind a message; "" where another file does.

    Raises:
        TokenizerError: a file that cannot be read.
    """
    decoder = read_json(folder / CONFIG).get("added_tokens_decoder")
    told = [*(decoder.values() if isinstance(decoder, dict) else ()), *read_added_tokens(folder).values()]
    named = {token.content if isinstance(token, AddedToken) else token_text(token) for token in told}
    if not read_json(folder / ADDED).keys() >= set(words) or named & set(words):
        return ""
    return f"; nothing but {ADDED} there names {some_names(words)}: if it is left over from before, remove it"


def more_words(adapter: Path, base: Path) -> list[str]:
    """The tokens that the files of an adapter's folder add and its base does not have, by id.

    Raises:
        TokenizerError: a file that cannot be read.
    """
    added = {**read_special_tokens(adapter).added, **read_added_tokens(adapter)}
    added = dict({token.content: (i, token) for i, token in added.items()}.values())  # one may be there with two ids
    known = set(read_tokenizer(base).added_tokens) if added and has_tokenizer(base) else set()
    known |= {token.content for token in read_special_tokens(base).added.values()} | {"<unk>"}
    return [token.content for _, token in sorted(added.items()) if token.content not in known]


def sampling_of(adapter: Path) -> list[str]:
    """A note where files of an adapter's folder say how to sample; see `suggested_sampling`."""
    return [f"adapter {adapter}: {note}" for note in (suggested_sampling(adapter) if adapter.is_dir() else ())]


def unused_of(adapter: Path, base: Path) -> list[str]:
    """A note where an adapter's folder brings a chat template or tokens that its base does not have and that are not
    used: fine-tunes with some of their own are saved so."""
    if not adapter.is_dir():
        return []
    try:
        template, more = _new_template(adapter, base), more_words(adapter, base)
    except TokenizerError:
        return []
    what = []
    if template is not None:
        what.append(f"a chat template ({template.file}; --template takes a file)")
    if more:
        what.append(f"{counted(len(more), 'added token')} ({some_names(more)})")
    if not what:
        return []
    return [f"adapter {adapter} has {' and '.join(what)} that {base.name} does not have: not used"]
