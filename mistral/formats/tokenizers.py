"""The tokenizer of a folder: which of its files is read, where its texts end, and the chat templates that it brings."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.formats import gguf_tokenizer
from mistral.formats.gguf_header import GgufError, is_gguf, read_gguf
from mistral.formats.releases import Release
from mistral.special_tokens import CONFIG, NAMES, read_added_tokens, read_json, read_special_tokens
from mistral.tokenizer import Tokenizer, TokenizerError
from mistral.util.english import counted, some_names
from mistral.util.errors import printable, short_repr
from mistral.util.files import read_limited

JSON = "tokenizer.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
ENDS = ("generation_config.json", "config.json")  # files that name the end of sequence, the tokenizer aside
USUAL_NAME = "its usual name"  # what names an end where no file does
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what the first may suggest besides
# And what it may ask for that changes texts: limits, words that must or must not come, stop strings.
MORE_SAMPLING = (
    *("max_new_tokens", "min_new_tokens", "min_length", "stop_strings", "bad_words_ids", "force_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("no_repeat_ngram_size", "encoder_repetition_penalty", "typical_p", "num_beams", "penalty_alpha"),
)
# Values of a config.json that stand there without being meant.
USUAL_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


def missing_tokens(args: ModelArgs, words: int, release: Release | None) -> int:
    """Ids of the model that its tokenizer should have a word for and has not."""
    return max(0, args.vocab_size - words - (release.added_words if release else 0))


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizers of a folder, the one that is read first: tekken.json, tokenizer.model.vN from the newest on,
    tokenizer.model, tokenizer.json.

    Nothing else counts, whatever it begins with: a backup or a checksum is no version. The order in which the system
    lists files does not matter.
    """
    versions: list[tuple[tuple[int, int], Path]] = []
    for path in folder.glob("tokenizer.model.v*"):
        if match := re.fullmatch(r"tokenizer\.model\.v([0-9]{1,4})(?:m([0-9]{1,4}))?", path.name):
            versions.append(((int(match[1]), int(match[2] or 0)), path))
    newest_first = [path for _, path in sorted(versions, reverse=True)]
    candidates = [folder / "tekken.json", *newest_first, folder / "tokenizer.model", folder / JSON]
    return [path for path in candidates if path.is_file()]


def other_tokenizers(folder: Path) -> list[Path]:
    """Those of the folder that differ from the one that is read. A tokenizer.json beside one of Mistral's own is the
    same in another form."""
    first, *others = tokenizer_files(folder) or [folder]
    return [p for p in others if p.name != JSON and not filecmp.cmp(first, p, shallow=False)]


def tokenizer_kind(path: Path) -> str:
    """ "sentencepiece", "tekken", or "tokenizers", which may be like either of them."""
    if path.suffix != ".json":
        return "sentencepiece"
    return "tokenizers" if path.name.endswith(JSON) else "tekken"


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model: the first of its `tokenizer_files`; of a GGUF file its own, else what is beside it.

    Raises:
        TokenizerError: none, or broken.
    """
    if not is_gguf_file(folder):
        path = next(iter(tokenizer_files(folder)), None)
        if path is None:
            raise TokenizerError(
                f"no tokenizer in {folder}: expected tokenizer.model, tokenizer.model.v3, tekken.json or tokenizer.json"
            )
        return Tokenizer(path)
    try:
        return gguf_tokenizer.tokenizer_of(folder, read_gguf(folder).metadata)
    except GgufError as error:
        beside = next(iter(tokenizer_files(folder.parent)), None)
        if beside is None:
            raise TokenizerError(f"{folder}: {error}") from None
        return Tokenizer(beside)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model has any tokenizer, readable or not."""
    return is_gguf_file(folder) or bool(tokenizer_files(folder))


def is_gguf_file(path: Path) -> bool:
    """Whether a model is one GGUF file, which has its tokenizer and its templates in its metadata."""
    return path.is_file() and is_gguf(path)


def tokenizer_content(folder: Path) -> bytes:
    """A model's tokenizer as the content of a file; empty without one.

    Raises:
        TokenizerError: it cannot be read.
    """
    path = next(iter(tokenizer_files(folder)), None)
    if is_gguf_file(folder):
        tokenizer = read_tokenizer(folder)
        if tokenizer.path == folder:
            return tokenizer.as_file()[1]
        path = tokenizer.path
    return b"" if path is None else path.read_bytes()


def load_tokenizer(folder: Path, vocab_size: int, base: Path | None = None) -> Tokenizer:
    """The tokenizer of a model, see `read_tokenizer`, with the `eos_ids` of the folder.

    Tokens that were added may lie outside the model's vocabulary, as padding often does: see `tokenizer_notes`.

    Args:
        base: the model itself, where the tokenizer is that of an adapter: what ends its sequences ends these too.

    Raises:
        TokenizerError: none, broken, or with more words than the model.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer.n_words > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.n_words} words, but the model knows {vocab_size}: it is another model's"
        )
    told, _ = _ends_of_files(folder, vocab_size)
    ends = {} if base is None or base == folder else _ends_of(base, vocab_size)
    tokenizer.settle_eos([*told, *(i for i, names in ends.items() if names != [USUAL_NAME])])
    tokenizer.eos_ids = frozenset(_with_own(told, folder, tokenizer, vocab_size)) | ends.keys()
    return tokenizer


def _ends_of(base: Path, vocab_size: int) -> dict[int, list[str]]:
    """The ids that end sequences by all files of a model, as far as they can be read, with what names each of them."""
    try:
        return ends_of(base, load_tokenizer(base, vocab_size), vocab_size)[0]
    except TokenizerError:
        return ends_of(base, None, vocab_size)[0]


def tokenizer_notes(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """What is odd about the tokenizers of a folder, or was ignored, a sentence each."""
    notes = list(tokenizer.notes)
    if is_gguf_file(folder):
        if tokenizer.path != folder:
            notes.append(f"{tokenizer.path.name} beside {folder.name} is read, whose own tokenizer is not")
    elif others := other_tokenizers(folder):
        names = ", ".join(path.name for path in others)
        notes.append(f"several tokenizers: {tokenizer.path.name} is read, {names} ignored; remove what is wrong")
    if beyond := [text for text, i in tokenizer.added.items() if i >= vocab_size]:
        notes.append(
            f"the model has no weights for {counted(len(beyond), 'added token')} of its tokenizer "
            f"({some_names(beyond)}): what has one is refused"
        )
    return [*notes, *eos_ids(folder, tokenizer, vocab_size)[1]]


def suggested_sampling(folder: Path) -> list[str]:
    """A note where generation_config.json, or config.json as older ones do, says how to sample, which is for whoever
    asks to say."""
    notes = []
    for file in ENDS:
        try:
            told = {} if folder.is_file() else read_json(folder / file)
        except TokenizerError:
            continue  # `broken` names it
        if file != ENDS[0]:  # where older transformers wrote all values, whether they ask for anything or not
            told = {name: value for name, value in told.items() if value != USUAL_SAMPLING.get(name)}
        values = [f"{name} {told[name]}" for name in SAMPLING if type(told.get(name)) in (int, float)]
        values += [
            printable(name) for name in told if name in MORE_SAMPLING and told[name] not in (None, [], 0, 1.0, False)
        ]
        if values:
            notes.append(f"{file} suggests {', '.join(values)}, which is not used: give what you want of it")
    return notes


def eos_ids(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[frozenset[int], list[str]]:
    """The ids that end a sequence, and notes on what was ignored; see `ends_of`."""
    ends, notes = ends_of(folder, tokenizer, vocab_size)
    return frozenset(ends), notes


def ends_of(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[dict[int, list[str]], list[str]]:
    """The ids that end a sequence, with what names each of them; and notes on what was ignored.

    They are all that generation_config.json, config.json and the tokenizer name: one of them in the place of another
    is how models come to write without end. A file that names none that can be is ignored, with a note: where it gives
    the shape too, reading the folder refuses it.
    """
    told, notes = _ends_of_files(folder, vocab_size)
    return _with_own(told, folder, tokenizer, vocab_size), notes


def _with_own(
    told: dict[int, list[str]], folder: Path, tokenizer: Tokenizer | None, vocab_size: int
) -> dict[int, list[str]]:
    """What the files beside a tokenizer name, and the tokenizer's own ends; of a GGUF file those that it has."""
    if is_gguf_file(folder):
        return {i: [what] for i, what in _ends_of_gguf(folder, tokenizer).items() if i < vocab_size}
    ends = {} if tokenizer is None else {i: [what] for i, what in _named_ends(tokenizer).items()}
    for i, names in told.items():
        ends[i] = [*(what for what in ends.get(i, ()) if what != USUAL_NAME), *names]
    return ends


def _ends_of_files(folder: Path, vocab_size: int) -> tuple[dict[int, list[str]], list[str]]:
    """The ids that the files beside the tokenizer name, by whom, and notes on what was ignored; none of a GGUF file."""
    found: dict[int, list[str]] = {}
    notes: list[str] = []
    for name in ENDS if folder.is_dir() else ():
        try:
            whole = read_json(folder / name)
        except TokenizerError:
            continue  # `formats.broken` names the file
        inside = whole.get("text_config")  # of a model that reads images: the text model's own
        ids = [*listed_ids(whole), *(listed_ids(inside) if isinstance(inside, dict) else [])]
        for i in ids:
            if type(i) is not int or i >= vocab_size:
                notes.append(f"{name} ends sequences with {short_repr(i)}, which is no id of the model: ignored")
            elif i >= 0 and name not in found.setdefault(i, []):  # -1 is how some write none
                found[i].append(name)
    return found, notes


def listed_ids(told: Mapping[str, Any]) -> list[Any]:
    """What an object gives for eos_token_id, which may be one id or several."""
    ids = told.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def own_ends(tokenizer: Tokenizer) -> set[int]:
    """The ids that a tokenizer ends sequences with: its own, and the eos_token that tokenizer_config.json beside it
    names, which may be another."""
    return set(_named_ends(tokenizer))


def _named_ends(tokenizer: Tokenizer) -> dict[int, str]:
    """The same, and what names each."""
    named = tokenizer.added_tokens.get(tokenizer.named.get("eos_token", ""), -1)
    beside = _file_of_eos(tokenizer.path.parent)
    if tokenizer.is_tekken:  # which knows nothing of what is beside it
        return {tokenizer.eos_id: tokenizer.path.name} | end_beside(tokenizer.path.parent, tokenizer.n_words)
    if tokenizer.is_json:  # which names none itself; without a file beside it, eos_id may be from the model's files
        what = USUAL_NAME if tokenizer.guesses_eos else beside
        ends = {} if what is None else {tokenizer.eos_id: what}
    else:
        ends = ({} if beside is None else {named: beside}) | {tokenizer.eos_id: tokenizer.path.name}
    return {i: what for i, what in ends.items() if i >= 0}


def end_beside(folder: Path, words: int) -> dict[int, str]:
    """The eos_token that the files beside a tekken.json name, and which it may have under another name, by its id in
    tokenizer_config.json or tokenizer.json; with the file that names it."""
    try:
        told = read_special_tokens(folder)
        added = told.added or read_added_tokens(folder)
    except TokenizerError:
        return {}  # `broken` names the file
    file, name = _file_of_eos(folder), told.names.get("eos_token")
    return {i: file for i, token in added.items() if token.content == name and 2 != i < words and file is not None}


def _file_of_eos(folder: Path) -> str | None:
    """The file beside a tokenizer that names its eos_token."""
    for name in (CONFIG, NAMES):
        with suppress(TokenizerError):
            if read_json(folder / name).get("eos_token"):
                return name
    return None


def _ends_of_gguf(file: Path, tokenizer: Tokenizer | None) -> dict[int, str]:
    """The same of a GGUF file, or of the tokenizer beside it that is read in the place of its own."""
    if tokenizer is None:
        return {}
    if tokenizer.path != file:
        return _named_ends(tokenizer)
    metadata = read_gguf(file).metadata
    told = {metadata.get(f"tokenizer.ggml.{name}_token_id"): f"{name}_token_id" for name in ("eom", "eot", "eos")}
    return {i: told.get(i, USUAL_NAME) for i in sorted({*own_ends(tokenizer), *tokenizer.eos_ids})}


@dataclass(frozen=True)
class FolderTemplate:
    """A chat template that a folder brings.

    Args:
        name: "default", or what the folder calls it.
        file: where it stands.
        text: in Jinja.
    """

    name: str
    file: str
    text: str


def listed_templates(told: Any) -> list[Any]:
    """What tokenizer_config.json has for chat_template, as a list of names and templates: it may be one text, an object
    of names or such a list."""
    if isinstance(told, list):
        return told
    named = told if isinstance(told, dict) else {} if told is None else {"default": told}
    return [{"name": name, "template": text} for name, text in named.items()]


def chat_templates(folder: Path) -> dict[str, FolderTemplate]:
    """The chat templates of a folder by name, as transformers finds them.

    chat_template.jinja and the files in additional_chat_templates/ come before those in tokenizer_config.json, which
    may be one or a list with names.

    Raises:
        TokenizerError: a file that cannot be read, or has something else in the place of a template.
    """
    if is_gguf_file(folder):
        own = gguf_tokenizer.chat_templates(read_gguf(folder).metadata)
        return {name: FolderTemplate(name, folder.name, text) for name, text in own.items()}
    found: dict[str, FolderTemplate] = {}
    for entry in listed_templates(read_json(folder / CONFIG).get("chat_template")):
        name, text = (entry.get(key) for key in ("name", "template")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(text, str)):
            raise TokenizerError(f"{folder / CONFIG} has the chat_template {short_repr(entry)}: fetch it again")
        if text.strip():  # an empty one is none, as `words.text_notes` says
            found[name] = FolderTemplate(name, CONFIG, text)
    files = {"default": folder / TEMPLATE}
    files |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                text = read_limited(path, 1_000_000).decode("utf-8-sig")
            except (OSError, ValueError) as error:
                raise TokenizerError(
                    f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
                ) from None
            if text.strip():
                found[name] = FolderTemplate(name, str(path.relative_to(folder)), text)
    return found


def why_version(file: str, kind: str, version: str) -> str:
    """Why conversations are written as those of a version, where no chat template says how; for a sentence.

    Args:
        file, kind, version: of the tokenizer. Some of Mistral's files state the version, others show it.
    """
    if kind == "tekken" or re.search(r"\.v[0-9]+\w*$", file):
        return f"by {file}"
    if version == "v1":
        return f"assumed, as {file} has no control token [INST]"
    return f"assumed from the control tokens of {file}"
