"""What a command line specifies: a model, prompts, a text. Each is read, or refused with one line.

Knows nothing about commands.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.cli import terminal, waiting
from mistral.cli.interrupts import keeping_interrupts
from mistral.cli.parallel import division
from mistral.cli.starting import starting
from mistral.util.errors import MistralError, UsageError, short_repr
from mistral.util.files import decode_text, plain_ends, reason_of
from mistral.util.parsed import KeyTwice, parse_json

if TYPE_CHECKING:
    from mistral.chat.templates import Template
    from mistral.cli.chat_options import ChatOptions
    from mistral.formats.folder import Folder
    from mistral.formats.release import Release
    from mistral.loader.load import Loaded
    from mistral.loader.options import LoadOptions
    from mistral.stored_ids import StoredIds
    from mistral.tokenizer import Tokenizer


def default_folder(folder: str | None) -> str | None:
    """The folder, or the one that MISTRAL_MODEL names, or None for the bundled model.

    Raises:
        UsageError: the variable names nothing that is there, and no hub id.
    """
    named = os.environ.get("MISTRAL_MODEL")
    if folder is not None or not named:
        return folder
    from mistral.formats.folder import nothing_at
    from mistral.formats.hub import is_hub_id

    if not os.path.lexists(named) and not is_hub_id(named):
        raise UsageError(f"{nothing_at(named)}, which the variable MISTRAL_MODEL names: mend it, or unset it")
    return named


def open_model(folder: str | None, options: LoadOptions) -> Loaded:
    """Load a model, and report on stderr what was loaded, and every note."""
    chosen = default_folder(folder)
    with keeping_interrupts(), starting("loading PyTorch and the model"):
        from mistral.loader.load import load

        loaded = load(chosen, division=division(), options=options)
    what = "the bundled model, " if chosen is None else "" if folder is not None else "MISTRAL_MODEL, "
    terminal.echo_err(f"loaded {what}{loaded.describe()}")
    for note in loaded.notes:
        terminal.echo_err(f"note: {note}")
    return loaded


def key_of(variable: str) -> str | None:
    """A server's key, which a variable holds; None where it is not set.

    Raises:
        UsageError: it cannot be sent.
    """
    key = os.environ.get(variable) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(f"the key in {variable} must be letters, digits and signs, without spaces")
    return key


@dataclass(frozen=True)
class PromptLine:
    """A prompt, text or ids.

    Args:
        suffix: the text that follows it, for fill-in-the-middle.
        max_tokens, adapter: its own, where it has any.
        where: the file and the line that it is from, for messages; "" where there is no file.
    """

    prompt: Any
    suffix: str | None = None
    max_tokens: int | None = None
    adapter: str | None = None
    where: str = ""


def read_prompts(prompt: str | None, suffix: str | None, file: str | None) -> list[PromptLine]:
    """What to continue: the word, the lines of the file, or stdin."""
    if file is not None:
        if prompt is not None:
            raise UsageError("a prompt and --file: give one of them")
        if suffix is not None:
            raise UsageError("--suffix and --file: give each line of the file its own suffix")
        return read_file(file)
    if prompt is None:
        prompt = without_last_end(_decoded(None))
        _note_returns(prompt, "stdin")
        if not prompt:
            raise UsageError("no prompt: give one in quotes, --file, or text on stdin")
    elif os.path.exists(prompt):
        terminal.echo_err(f"note: {prompt} is the prompt, though there is such a file: < {prompt} continues its text")
    return [PromptLine(prompt, suffix)]


def without_last_end(text: str) -> str:
    """Text without the line end that files and `echo` put last."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def read_ids(file: str | None) -> StoredIds | None:
    """The ids of a file whose name ends in .npy, which stay in it; None for other files.

    Raises:
        FormatError: it cannot be read, or holds something else.
    """
    if file is None or not file.lower().endswith(".npy"):
        return None
    from mistral.stored_ids import StoredIds

    return StoredIds(file)


def read_file(file: str) -> list[PromptLine]:
    """The prompts of a file: a JSON value a line, or, where its name ends in .txt, a prompt a line; or one of ids."""
    stored = read_ids(file)
    if stored is not None:
        return [PromptLine(stored)]
    lines = enumerate(plain_ends(_decoded(file)).split("\n"), 1)
    plain, name = file.lower().endswith(".txt"), "stdin" if file == "-" else file
    found = [
        PromptLine(line, where=f"{name} line {number}") if plain else _one_prompt(line, f"{name} line {number}")
        for number, line in lines
        if line.strip()
    ]
    if not found:
        raise UsageError(f"no prompts in {name}: it has no line that is not empty")
    return found


def _one_prompt(line: str, where: str) -> PromptLine:
    try:
        entry = parse_json(line)
    except ValueError as error:
        if isinstance(error, KeyTwice):
            raise UsageError(f"{where} {error}") from None
        plain = "; plain text, a prompt a line, must be in a file whose name ends in .txt"
        if where.startswith("stdin "):
            plain += "; without --file, all of stdin is one prompt"
        raise UsageError(f"{where} is not JSON: {error}{plain}") from None
    if not isinstance(entry, dict):
        entry = {"prompt": entry}
    unknown = set(entry) - {"prompt", "suffix", "max_tokens", "adapter"}
    if unknown:
        raise UsageError(f"{where} has {', '.join(sorted(unknown))}; known are prompt, suffix, max_tokens and adapter")
    prompt, suffix, limit, adapter = (entry.get(name) for name in ("prompt", "suffix", "max_tokens", "adapter"))
    ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not (isinstance(prompt, str) or ids):
        raise UsageError(f"{where}: the prompt is {short_repr(prompt)}; it must be text or a list of ids")
    if prompt == []:
        raise UsageError(f"{where}: the prompt is an empty list; bos alone would be one")
    if suffix is not None and not (isinstance(suffix, str) and isinstance(prompt, str)):
        raise UsageError(f"{where}: a suffix must be text, and so must its prompt")
    if "max_tokens" in entry and (type(limit) is not int or limit < 0):
        raise UsageError(f"{where}: max_tokens must be a whole number, at least 0, not {limit!r}")
    if not isinstance(adapter, str | None):
        raise UsageError(f"{where}: adapter must be the name of one")
    return PromptLine(prompt, suffix, limit, adapter, where)


def read_text(file: str | None) -> str:
    """The text of a file, or of stdin for None and "-": all of it, also its line ends."""
    text = _decoded(file)
    _note_returns(text, file or "stdin")
    return text


def _note_returns(text: str, where: str) -> None:
    """Print a note if what is used of a text has line ends of Windows."""
    if "\r" in text:
        terminal.echo_err(f"note: {where} has carriage returns, as on Windows: they are part of the text")


def _decoded(file: str | None) -> str:
    if file == "":
        raise UsageError("'' cannot be read: the name is empty")
    if file is None or file == "-":
        return decode_text(terminal.read_stdin(), "stdin")
    try:
        with open(file, "rb") as opened:
            return decode_text(opened.read(), file)
    except (OSError, ValueError) as error:
        if isinstance(error, MistralError):
            raise
        raise UsageError(f"{file} cannot be read: {reason_of(error)}") from None


def require_there(folder: str | None, prompt: str | None) -> None:
    """Refuse a folder that cannot be found anywhere, before stdin is waited for.

    Raises:
        UsageError: there is none, and it is no id of the hub; it may be part of a prompt that was not quoted.
    """
    from mistral.formats.folder import nothing_at
    from mistral.formats.hub import is_hub_id

    if folder is None or os.path.isdir(folder) or is_gguf_name(folder) or is_hub_id(folder):
        return
    if os.path.isfile(folder) and prompt is not None and os.path.isdir(prompt):
        raise UsageError(f"{folder} is a file, and {prompt} a folder: FOLDER comes before what is to be continued")
    if os.path.exists(folder):
        return  # loading says what it is
    unquoted = prompt is not None and "/" not in folder and not is_gguf_name(folder)
    two = f" (of two words the first is the folder, and the second, {short_repr(prompt)}, the prompt)"
    raise UsageError(nothing_at(folder) + two * unquoted)


def require_known_ids(asked: list[PromptLine], of: Loaded | Folder) -> None:
    """Refuse the ids of a file that a model does not have.

    Raises:
        UsageError: it names the line.
    """
    for one in asked:
        if isinstance(one.prompt, list) and one.where:
            size = of.args.vocab_size
            wrong = next((i for i in one.prompt if not 0 <= i < size), None)
            if wrong is not None:
                raise UsageError(f"{one.where} has the id {wrong}, outside the vocabulary of {size}")


def template_of(loaded: Loaded, name: str | None) -> Template:
    from mistral.chat.templates import find_template

    release = None if loaded.release is None else loaded.release.template
    return find_template(loaded.tokenizer, name=name, release=release, folder=loaded.templates)


def as_ids(asked: list[PromptLine], loaded: Loaded, template: Template | None, chat: ChatOptions) -> list[Any]:
    """The prompts; as ids where a template writes them: questions, and fill-in-the-middle.

    Args:
        template: of questions; None without --instruct.

    Raises:
        UsageError: --instruct with ids or a suffix.
    """
    if template is None and all(one.suffix is None for one in asked):
        return [one.prompt for one in asked]
    if template is None:
        of_suffix = template_of(loaded, None)
        return [one.prompt if one.suffix is None else of_suffix.encode_fim(one.prompt, one.suffix) for one in asked]
    if any(one.suffix is not None or not isinstance(one.prompt, str) for one in asked):
        raise UsageError("--instruct takes questions: each prompt must be text, without a suffix")
    from mistral.chat.messages import Message, behind

    system, effort = chat.system_message(), chat.reasoning_effort
    return [template.encode_chat(behind(system, [Message("user", one.prompt)]), effort=effort) for one in asked]


def note_if_instruct(loaded: Loaded, chat: ChatOptions | None = None) -> None:
    """Print a note if raw text goes to a model that was tuned on conversations, or its system prompt goes unused."""
    if chat is not None and chat.instruct:
        if told := chat.note_of(loaded.folder):
            terminal.echo_err(f"note: {told}")
    elif is_instruct(loaded.folder, loaded.release) or is_instruct(loaded.templates):
        terminal.echo_err("note: this is an instruct model, and the prompt is continued as raw text: see --instruct")


def note_if_assumed(template: Template | None, tokenizer: Tokenizer) -> None:
    """Print a note if conversations are written in a template that nothing named."""
    from mistral.chat.templates import assumed

    if template is not None and (note := assumed(template, tokenizer)):
        terminal.echo_err(f"note: {note}")


def is_gguf_name(word: str) -> bool:
    """Whether a word names a GGUF file, there or not."""
    return word.lower().endswith(".gguf") and not re.search(r"[\n\t]", word)


def is_instruct(folder: Path, release: Release | None = None) -> bool:
    """Whether a folder holds a model for conversations: a name or its release says so, or it brings a chat template."""
    from mistral.formats.instruct import why_instruct
    from mistral.formats.tokenizers import chat_templates

    if why_instruct(folder, release) is not None:
        return True

    try:
        return bool(chat_templates(folder))
    except MistralError:  # broken: loading reports on it
        return False


def folder_or_prompt(word: str) -> str:
    """Which of the two a single word is, where a prompt on stdin may go with it.

    A folder that exists, or a path that can be nothing else, also one whose first folder is here; owner/name only
    where stdin may bring the prompt.
    """
    if os.path.isdir(word) or is_gguf_name(word):
        return "folder"
    if re.search(r"\s", word):
        return "prompt"
    if os.path.isfile(word) and "." in word:
        raise UsageError(
            f"{word} is a file, and neither a folder nor a prompt: < {word} continues its text, --file {word} each of "
            "the prompts in it"
        )
    if re.match(r"/.|\.\.?/|~|.*/$", word) or ("/" in word and os.path.isdir(word.partition("/")[0])):
        return "folder"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)+(@\S+)?", word) and waiting.stdin_may_have_data():
        return "folder"
    if waiting.stdin_has_data():
        raise UsageError(
            f"no such folder: {word}, in which to continue the text on stdin; if {word} is the prompt, add < /dev/null"
        )
    terminal.echo_err(f"note: there is no folder {word!r} here, so it is the prompt")
    return "prompt"


def folder_or_text(word: str) -> str:
    """Whether a single word of `perplexity` is the folder, or the file with the text."""
    if os.path.isdir(word) or is_gguf_name(word):
        return "folder"
    from mistral.formats.hub import is_hub_id

    an_id = is_hub_id(word) and not os.path.exists(word)
    return "folder" if an_id and waiting.stdin_may_have_data() else "file"


@contextlib.contextmanager
def model_of(folder: str | None, options: LoadOptions | None = None) -> Iterator[Folder]:
    """A folder, a hub id, a pack with weights; else the folder of MISTRAL_MODEL, or the bundled model.

    Args:
        options: the window and the adapter that are asked for; see `load.as_read`.
    """
    from mistral.formats.folder import BUNDLED, read_folder
    from mistral.formats.hub import locate
    from mistral.loader.load import as_read
    from mistral.oracle.pack import folder_of, is_pack

    def asked(found: Folder) -> Folder:
        return found if options is None else as_read(found, options)

    folder = default_folder(folder)
    if folder is not None and (is_pack(folder) or (folder.endswith(".safetensors") and Path(folder).exists())):
        with tempfile.TemporaryDirectory() as nothing:
            yield asked(folder_of(folder, Path(nothing)))
        return
    if folder is not None and Path(folder).is_file() and not is_gguf_name(folder):
        raise UsageError(f"{folder} is neither a folder nor a .gguf file nor a pack")
    yield asked(read_folder(BUNDLED if folder is None else locate(folder)))


def one_line(facts: dict[str, Any]) -> str:
    from mistral.oracle.arrays import as_json

    return as_json(facts)
