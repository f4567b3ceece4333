"""How prompts become conversations, as typed: ChatOptions, of `complete` and `interactive`. Runs without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.formats.tokenizers import TEMPLATE  # it may be that of the model's folder
from mistral.util.errors import UsageError
from mistral.util.files import not_text, read_limited, reason_of

if TYPE_CHECKING:
    from mistral.chat.messages import Message

THINKING = ("show", "hide")
SYSTEM_FILE = "SYSTEM_PROMPT.txt"  # what Mistral's reasoning models are published with


@dataclass(frozen=True)
class ChatOptions:
    """How prompts become conversations.

    Args:
        instruct: each prompt is a question, in the template of the model
        system: with --instruct: the system prompt
        system_file: with --instruct: a file with it, in which [THINK]..[/THINK] is a thought (SYSTEM_PROMPT.txt)
        template: with --instruct: v1 to v15 (also as v3-tekken), mistrallite or a .jinja file; default: the model's own
        reasoning_effort: with --instruct: none or high, for models that take it; default: the model's own
        thinking: with --instruct: show or hide what a reasoning model thinks, on stderr; default: show

    Raises:
        UsageError: flags that only a conversation has, without `instruct`, or two that exclude each other.
    """

    instruct: bool = False
    system: str | None = None
    system_file: str | None = None
    template: str | None = None
    reasoning_effort: str | None = None
    thinking: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system_file: give one of them")
        if self.thinking not in (None, *THINKING):
            raise UsageError(f"thinking is {self.thinking!r}; it must be show or hide")

    def require_instruct(self) -> None:
        """Refuse flags that only a conversation has, and files that cannot be read, before a model is loaded.

        Raises:
            UsageError: there is one, without --instruct; or no such file.
        """
        fields = ("system", "system_file", "template", "reasoning_effort", "thinking")
        given = [name for name in fields if getattr(self, name) is not None]
        if given and not self.instruct:
            raise UsageError(f"--{given[0]} belongs to a conversation: add --instruct")
        if self.system_file is not None:
            self.system_message()
        name = self.template or ""
        if name.endswith(".jinja") and name != TEMPLATE and not os.path.isfile(os.path.expanduser(name)):
            what = "it is a folder, and a file is needed" if os.path.isdir(name) else "No such file or directory"
            raise UsageError(f"{name} cannot be read: {what}")

    @property
    def shows_thoughts(self) -> bool:
        return self.thinking != "hide"

    def system_message(self) -> Message | None:
        """The system prompt, which may be empty; None where none was given.

        Raises:
            UsageError, TemplateError: the file cannot be read, or a thought in it has no end.
        """
        from mistral.chat.messages import Message
        from mistral.chat.thinking import split_system

        if self.system_file is None:
            return None if self.system is None else Message("system", self.system)
        path = Path(os.path.expanduser(self.system_file))
        try:
            return split_system(read_limited(path, 1_000_000).decode("utf-8-sig").strip("\n"))
        except (OSError, UnicodeDecodeError) as error:
            reason = not_text(error) if isinstance(error, UnicodeDecodeError) else reason_of(error)
            raise UsageError(f"{self.system_file} cannot be read: {reason}") from None

    def note_of(self, folder: Path) -> str | None:
        """What to report where the folder brings a system prompt that nobody asked for."""
        file = folder / SYSTEM_FILE
        if self.system is None and self.system_file is None and file.is_file():
            return f"the model is published with a system prompt, which is not used: --system_file {file} uses it"
        return None
