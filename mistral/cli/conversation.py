"""A conversation on a terminal, or over a pipe, and its commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mistral.cli import settings
from mistral.cli.chat_options import THINKING
from mistral.cli.interrupts import Interrupt
from mistral.cli.terminal import (
    QUOTES,
    Bar,
    Thoughts,
    confirm,
    echo_err,
    echo_error,
    is_interactive,
    print_stream,
    read_lines,
)
from mistral.util.english import counted, did_you_mean
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.chat.conversation import Chat
    from mistral.engine import Progress
    from mistral.generate import Piece


class Conversation:
    """A chat on a terminal, or over a pipe: a line is a question, or a command.

    Args:
        chat: the conversation.
        fingerprint: returns the model's, with the adapter of the chat, for files.
        thinking: whether what the model thinks is shown.
        beyond: a note where so many tokens are more than the model was trained on, which is printed once.
    """

    def __init__(
        self,
        chat: Chat,
        fingerprint: Callable[[], str],
        *,
        thinking: bool = True,
        beyond: Callable[[int], str | None] = lambda longest: None,
    ) -> None:
        self._chat = chat
        self._beyond: Callable[[int], str | None] = beyond
        self._fingerprint = fingerprint
        self._thinking = thinking
        # By name: what comes after it, what it does, and the function.
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "print this list", self._help),
            "/retry": ("", "drop the last answer, and answer the question again", self._retry),
            "/continue": ("", "go on with the last answer, where it stopped", self._continue),
            "/undo": ("", "drop the last question and its answer", self._undo),
            "/reset": ("", "begin again, with the same system prompt", self._reset),
            "/system": ("TEXT", "set the system prompt; - removes it; without TEXT: print it", self._system),
            "/adapter": (
                "NAME",
                "answer with another adapter; - is none; without NAME: print them",
                self._adapter,
            ),
            "/set": ("NAME VALUE", "change a sampling parameter, thinking (show, hide) or reasoning_effort", self._set),
            "/show": ("", "print the parameters and the turns", self._show),
            "/save": ("FILE", "keep the conversation in a file", self._save),
            "/load": ("FILE", "go on with a conversation from a file", self._load),
            "/quit": ("", "leave, as Ctrl-D does", self._quit),
        }
        self._over = False

    def run(self) -> None:
        """Read lines until they end.

        Raises:
            ValueError, KeyboardInterrupt: where lines are piped; on a terminal only the answer ends.
        """
        if is_interactive():
            echo_err("A question a line; /help lists commands; Ctrl-C ends an answer, Ctrl-D the conversation.")
        for line in read_lines("> ", blocks=True):
            try:
                self._one(line)
            except KeyboardInterrupt:
                if not is_interactive():
                    raise
            except ValueError as error:
                if not is_interactive():
                    raise
                echo_error(error)  # one line's fault; the next may be better
            if self._over:
                return

    def _one(self, line: str) -> None:
        command = line.lstrip()
        if command.startswith("//"):
            self._ask(command[1:])
        elif command.startswith("/"):
            word, _, rest = command.partition(" ")
            if word not in self._commands:
                names = [name[1:] for name in self._commands]  # the slash would make all of them alike
                meant = did_you_mean(word[1:], names, "/") or ": /help lists them"
                raise UsageError(f"no command {word}{meant}; // begins a question with a slash")
            takes, _, run = self._commands[word]
            if rest.strip() and not takes:
                raise UsageError(f"{word} takes nothing after it")
            run(rest.strip())
        elif line.strip():
            self._ask(line)

    def _ask(self, question: str) -> None:
        self._print(lambda progress: self._chat.answer(question, progress))

    def _print(self, begin: Callable[[Progress], Iterator[Piece]]) -> int:
        """Print an answer as it comes; how many tokens it had."""
        bar = Bar("prompt", "token")
        with Interrupt() as interrupt:

            def between_steps(done: int, total: int) -> None:
                interrupt.check()
                bar(done, total)

            generated = print_stream(begin(between_steps), more=self._prefilled, thinking=self._thinking)
        if note := self._beyond(self._chat.prefilled_tokens + self._chat.cached_tokens + generated):
            echo_err(f"note: {note}")
            self._beyond = lambda longest: None  # once is enough
        return generated

    def _prefilled(self) -> str:
        cached = f", {self._chat.cached_tokens:,} cached" if self._chat.cached_tokens else ""
        return f"; {counted(self._chat.prefilled_tokens, 'prompt token')} prefilled{cached}"

    def _help(self, rest: str) -> None:
        for name, (takes, what, _) in self._commands.items():
            echo_err(f"{f'{name} {takes}'.strip():16} {what}", asked=True)
        echo_err(f"{'//...':16} ask a question that begins with a slash", asked=True)
        echo_err(f"{QUOTES:16} begin a question of several lines, which ends with the next {QUOTES}", asked=True)

    def _retry(self, rest: str) -> None:
        if not self._chat.messages:
            raise UsageError("there is no question to answer again")
        question = self._chat.undo().content
        echo_err(f"again: {question}")
        self._ask(question)

    def _continue(self, rest: str) -> None:
        if not self._print(self._chat.resume):
            echo_err("note: nothing was added: the model takes this answer for complete")

    def _undo(self, rest: str) -> None:
        echo_err(f"dropped: {self._chat.undo().content}")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        echo_err("a new conversation")

    def _system(self, rest: str) -> None:
        if rest:
            self._chat.set_system("" if rest == "-" else rest)
        echo_err(f"system prompt: {self._system_told()}", asked=not rest)

    def _system_told(self) -> str:
        there = self._chat.system_message is not None
        return self._chat.system or ("empty" if there else "none")

    def _adapter(self, rest: str) -> None:
        beside = self._chat.model.adapters
        if beside is None:
            raise UsageError("no adapters are beside the weights: --adapter and --adapter_mode runtime put them there")
        if rest:
            self._chat.set_adapter(beside.find("" if rest == "-" else rest))
        now = beside.find(self._chat.adapter)
        echo_err(f"adapter: {now or 'none'}, of {', '.join(beside.names)}", asked=not rest)

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        value = value.strip()
        if name == "thinking":
            if value not in THINKING:
                raise UsageError(f"/set thinking takes {' or '.join(THINKING)}")
            self._thinking = value == "show"
            if self._chat.template.thought_ids is None:
                echo_err("note: this template knows no thoughts, so there is nothing to show or hide")
        elif name == "reasoning_effort":
            self._chat.set_effort(None if value == "-" else value)
        else:
            settings.change(self._chat, name, value)
        echo_err(self._settings())

    def _settings(self) -> str:
        """Parameters, and what concerns thoughts where there are some."""
        chat = self._chat
        told = [settings.describe(chat)]
        if chat.template.thought_ids is not None:
            told.append(f"thinking {'show' if self._thinking else 'hide'}")
        if chat.template.efforts:
            told.append(f"reasoning_effort {chat.effort or 'as the model has it'}")
        return ", ".join(told)

    def _show(self, rest: str) -> None:
        echo_err(self._settings(), asked=True)
        echo_err(f"system prompt: {self._system_told()}", asked=True)
        for message in self._chat.messages:
            if self._thinking:
                thoughts = Thoughts(shown=True)
                for thought in message.thinking:
                    thoughts.push(thought.text)
                    thoughts.end()
            echo_err(f"> {message.content}" if message.role == "user" else message.content, asked=True)

    def _save(self, rest: str) -> None:
        from mistral.chat.session import save

        file = _file("/save", rest)
        there = os.path.exists(os.path.expanduser(file))
        if there and not confirm(f"{file} exists: replace it?"):
            echo_err("not saved")
            return
        save(self._chat, file, self._fingerprint())
        echo_err(f"saved {_turns(self._chat)} in {rest}{', in the place of what was there' if there else ''}")

    def _load(self, rest: str) -> None:
        from mistral.chat.session import load

        load(self._chat, _file("/load", rest), self._fingerprint())
        echo_err(f"loaded {_turns(self._chat)} from {rest}; {settings.describe(self._chat)}")

    def _quit(self, rest: str) -> None:
        self._over = True


def _file(command: str, name: str) -> str:
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    return name


def _turns(chat: Chat) -> str:
    return counted(sum(message.role == "user" for message in chat.messages), "turn")
