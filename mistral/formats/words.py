"""A model's tokenizer, and what should be known about it: what its folder says twice, or where nobody reads it.

Runs without torch.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.formats.gguf_header import GgufError, read_gguf
from mistral.formats.gguf_tokenizer import BLANK, notes_on_ends
from mistral.formats.hf_tokenizer import begins_with_a_space
from mistral.formats.releases import identify
from mistral.formats.tokenizers import (
    ENDS,
    JSON,
    TEMPLATE,
    FolderTemplate,
    chat_templates,
    end_beside,
    eos_ids,
    has_tokenizer,
    is_gguf_file,
    listed_templates,
    load_tokenizer,
    missing_tokens,
    tokenizer_files,
    tokenizer_kind,
    tokenizer_notes,
)
from mistral.special_tokens import ADDED, CONFIG, read_added_tokens, read_json, read_special_tokens, token_text
from mistral.tekken import tekken_controls
from mistral.tokenizer import NO_TOKENIZER, Tokenizer, TokenizerError
from mistral.util.english import counted, some_names
from mistral.util.errors import short_repr
from mistral.util.files import read_limited

OF_PROCESSORS = "chat_template.json"  # what transformers reads for models that see images, and not for text


def words_of(folder: Path, args: ModelArgs, base: Path | None = None) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a model, None where there is none, and all that whoever uses it should know, a sentence each.

    Args:
        folder: where the tokenizer is; see `Folder.words`.
        base: the model itself; see `load_tokenizer`.

    Raises:
        TokenizerError: as `load_tokenizer`.
    """
    if not has_tokenizer(folder):
        return None, [NO_TOKENIZER]
    found = load_tokenizer(folder, args.vocab_size, base)
    notes = tokenizer_notes(folder, found, args.vocab_size) + text_notes(folder, found, args.vocab_size)
    return found, notes + unused_ids(args, found)


def unused_ids(args: ModelArgs, tokenizer: Tokenizer) -> list[str]:
    """A note where a model has ids without a token, as padding makes them."""
    release, _ = identify(args, tokenizer.kind, tokenizer.version)
    if not (spare := missing_tokens(args, tokenizer.n_ids, release)):
        return []
    return [f"the model has {counted(spare, 'id')} that the tokenizer has no token for, and so without text"]


def text_notes(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> list[str]:
    """What a folder says about texts and conversations twice, or where it is not read, a sentence each."""
    if is_gguf_file(folder):
        return _about_a_file(folder, tokenizer)
    return [
        *_about_words(folder, tokenizer),
        *_beside_tekken(folder),
        *_about_ends(folder, tokenizer, vocab_size),
        *_named_in_vain(folder, tokenizer),
        *_about_templates(folder),
    ]


def _about_a_file(path: Path, tokenizer: Tokenizer | None) -> list[str]:
    """What a GGUF file says about ends, if its own tokenizer is read, and its chat templates."""
    notes = []
    with suppress(GgufError):
        if tokenizer is not None and tokenizer.path == path:
            notes += notes_on_ends(read_gguf(path).metadata)
    return notes + _about_templates(path)


def _about_words(folder: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Where tokenizer.json has other words than the tokenizer.model that is read."""
    if tokenizer is None or tokenizer.kind != "sentencepiece" or not (folder / JSON).is_file():
        return []
    try:
        whole, added = read_json(folder / JSON), read_added_tokens(folder)
    except TokenizerError:
        return []  # `broken` names the file
    notes = _other_words(whole, tokenizer)
    unread = [t.content for i, t in added.items() if i >= tokenizer.n_words and t.content not in tokenizer.added]
    if unread:
        notes.append(
            f"{JSON} adds {counted(len(unread), 'token')} ({some_names(unread)}) that {CONFIG} and {ADDED} do not: "
            "not used"
        )
    return notes


def _other_words(whole: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Where a tokenizer.json has other words, or begins texts otherwise, than the tokenizer.model beside it."""
    name, model = tokenizer.path.name, whole.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    instead = f"remove {name} to have {JSON} read"
    if not isinstance(words, dict | list):
        return []
    if len(words) != tokenizer.n_words:
        return [
            f"{JSON} has {counted(len(words), 'word')} and {name}, which is read, {tokenizer.n_words:,}: one is "
            f"another model's; {instead}"
        ]
    pieces, scores = tokenizer.pieces()
    ids = words if isinstance(words, dict) else {str(word[0]): i for i, word in enumerate(words) if word}
    other = [p for i, p in enumerate(pieces) if scores[i] is not None and ids.get(p) != i]
    if other:
        return [
            f"{JSON} has other ids than {name}, which is read, for {counted(len(other), 'word')} "
            f"({some_names([p.replace(BLANK, ' ') for p in other])}): one is another model's; {instead}"
        ]
    begins = begins_with_a_space(tokenizer)
    if begins != _json_begins_with_a_space(whole):
        return [
            f"{JSON} begins texts {'without' if begins else 'with'} a space, and {name}, which is read, "
            f"{'with' if begins else 'without'} one: prompts have other ids in transformers; {instead}"
        ]
    return []


def _json_begins_with_a_space(whole: dict[str, Any]) -> bool:
    """Whether a tokenizer.json of SentencePiece's words puts a space in front of a text, as SentencePiece does."""
    parts: list[Any] = [whole.get("normalizer"), whole.get("pre_tokenizer")]
    for part in parts:
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        parts += [*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())]
        older = "always" if part.get("add_prefix_space", True) else "never"
        if kind == "Prepend" or (kind == "Metaspace" and part.get("prepend_scheme", older) != "never"):
            return True
    return False


def _about_ends(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> list[str]:
    """Where tokenizer_config.json has texts begin or end otherwise than they do here."""
    try:
        told = read_json(folder / CONFIG)
    except TokenizerError:
        return []
    notes = []
    if told.get("add_bos_token") is False and tokenizer is not None and tokenizer.adds_bos:
        notes.append(
            f"{CONFIG} has add_bos_token false, and texts begin with bos here, as {tokenizer.path.name} has it"
        )
    if told.get("add_eos_token") is True:
        notes.append(f"{CONFIG} has add_eos_token true, which is for training: prompts end without eos here")
    eos = None if tokenizer is None else token_text(told.get("eos_token"))
    if tokenizer is not None and eos and not _is_token(tokenizer, eos) and not end_beside(folder, vocab_size):
        notes.append(
            f"{CONFIG} has eos_token {short_repr(eos)}, for which the tokenizer has no token: it ends no sequence"
        )
    return notes + ([] if tokenizer is None else _about_ids(folder, tokenizer, vocab_size))


def _beside_tekken(folder: Path) -> list[str]:
    """Where a fine-tune has tokens of its own, and the tekken.json of its base, which is read, is in the folder too."""
    path = next(iter(tokenizer_files(folder)), folder)
    if path == folder or tokenizer_kind(path) != "tekken":
        return []
    try:
        told, inside = read_special_tokens(folder).added, read_added_tokens(folder)
        there = {**inside, **told}
        known = set(tekken_controls(path).values()) if there else set()
        own = chat_templates(folder)
    except TokenizerError:
        return []
    added = [t.content for t in there.values() if t.content not in known]
    if not added:
        return []
    is_whole = (folder / JSON).is_file()
    used = "conversations have them, other texts do not" if is_whole and own else "not used"
    instead = f"remove {path.name} to have {JSON} read" if is_whole else f"add its {JSON}"
    return [
        f"{JSON if inside else CONFIG} has {counted(len(added), 'token')} ({some_names(added)}) that {path.name}, "
        f"which is read, has not: {used}; {instead}"
    ]


def _named_in_vain(folder: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Where files beside a tokenizer name special tokens that it lacks, those aside of which there is another note."""
    if tokenizer is None or tokenizer.kind == "tekken":
        return []
    try:
        told = read_special_tokens(folder)
    except TokenizerError:
        return []
    aside = {told.names.get(key) for key in ("eos_token", "pad_token", "unk_token")} | {"<unk>"}
    aside |= {token.content for token in told.added.values()}
    lacking = [text for text in sorted(told.special) if text not in aside and not _is_token(tokenizer, text)]
    if not lacking:
        return []
    return [
        f"the files beside {tokenizer.path.name} name {counted(len(lacking), 'special token')} "
        f"({some_names(lacking)}) for which it has no token: text here, new ids in transformers"
    ]


def _is_token(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is one token: a control token, one that was added, or a word."""
    return text in tokenizer.added_tokens or tokenizer.has_control(text) or len(tokenizer.encode(text, bos=False)) == 1


def _about_ids(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Where the model's files begin or end sequences with other ids than such a tokenizer has for that."""
    notes = []
    control, where = set(tokenizer.added_tokens.values()), " or ".join(ENDS)
    for i in sorted(eos_ids(folder, tokenizer, vocab_size)[0] - control - {tokenizer.eos_id}):
        if i < tokenizer.n_words:
            word = short_repr(tokenizer.decode([i]))
            notes.append(f"sequences end with id {i}, which is the ordinary word {word}: see {where}")
        elif i >= tokenizer.n_ids:
            notes.append(f"sequences end with id {i}, for which the tokenizer has no token: see {where}")
    for name in ENDS:
        with suppress(TokenizerError):
            begins = read_json(folder / name).get("bos_token_id")
            if type(begins) is int and begins >= 0 and tokenizer.adds_bos and begins != tokenizer.bos_id:
                notes.append(f"{name} has bos_token_id {begins}, and texts begin with {tokenizer.bos_id} here")
    return notes


def _about_templates(folder: Path) -> list[str]:
    """Chat templates of which there are several, or that count as none."""
    try:
        own = chat_templates(folder)
        told = None if is_gguf_file(folder) else read_json(folder / CONFIG).get("chat_template")
    except TokenizerError:
        return []  # whoever writes conversations refuses it
    notes: list[str] = []
    default, listed = own.get("default"), _default(told)
    if default is not None and default.file != CONFIG and listed and listed.strip() != default.text.strip():
        notes.append(f"two chat templates that differ: that of {default.file} is used, that of {CONFIG} ignored")
    if default is not None and _differs(folder / TEMPLATE, default):
        notes.append(f"two chat templates that differ: that of {default.file} is used, that of {TEMPLATE} ignored")
    if isinstance(listed, str) and not listed.strip() and default is None:
        notes.append(f"the chat template in {CONFIG} is empty: it counts as none")
    if others := [name for name in own if name != "default"] if default is not None else []:
        notes.append(f"more chat templates: {some_names(others)}; --template takes one of them")
    if (folder / OF_PROCESSORS).is_file():
        instead = "" if own else f"; a template for text is in {TEMPLATE} or {CONFIG}"
        notes.append(f"{OF_PROCESSORS} is not read: it is for models that see images{instead}")
    return notes


def _differs(path: Path, default: FolderTemplate) -> bool:
    """Whether chat_template.jinja is there and another template than the default one: additional_chat_templates may
    have one of that name."""
    if default.file in (TEMPLATE, CONFIG) or not path.is_file():
        return False
    return read_limited(path, 1_000_000).decode("utf-8-sig", "replace").strip() != default.text.strip()


def _default(told: Any) -> str | None:
    """The template that tokenizer_config.json has for all conversations."""
    named = {one.get("name"): one.get("template") for one in listed_templates(told) if isinstance(one, dict)}
    text = named.get("default")
    return text if isinstance(text, str) else None
