"""The commands of a conversation, and `interactive`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mistral.cli import terminal
from mistral.cli.prompts import load_model, template_of
from mistral.cli.terminal import Bar, Interrupt, lines, say, say_error, show, stream_one, typed
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.chat.conversation import Chat
    from mistral.loader.load import Loaded


class Conversation:
    """A chat on a terminal, or over a pipe: a line is a question, or a command.

    Args:
        chat: the conversation.
        fingerprint: gives the model's, for files.
    """

    def __init__(self, chat: Chat, fingerprint: Callable[[], str]) -> None:
        self._chat = chat
        self._fingerprint = fingerprint
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/reset": ("begin anew, with the same system prompt", self._reset),
            "/undo": ("drop the last question and its answer", self._undo),
            "/system": ("TEXT sets the system prompt, - removes it, nothing shows it", self._system),
            "/save": ("FILE keeps the conversation in a file", self._save),
            "/load": ("FILE goes on with a conversation from a file", self._load),
            "/quit": ("leave, as Ctrl-D does", self._quit),
        }
        self._over = False

    def run(self) -> None:
        """Read lines until they end.

        Raises:
            ValueError, KeyboardInterrupt: where lines are piped; on a terminal only the answer ends.
        """
        if typed():
            say("A question a line; /help lists commands; Ctrl-C ends an answer, Ctrl-D the conversation.")
        for line in lines("> "):
            try:
                self._one(line)
            except KeyboardInterrupt:
                if not typed():
                    raise
            except ValueError as error:
                if not typed():
                    raise
                say_error(error)  # one line's fault; the next may be better
            if self._over:
                return

    def _one(self, line: str) -> None:
        command = line.lstrip()
        if command.startswith("//"):
            self._ask(command[1:])
        elif command.startswith("/"):
            word, _, rest = command.partition(" ")
            if word not in self._commands:
                raise UsageError(f"no command {word}: /help lists them; // begins a question with a slash")
            if rest.strip() and word not in ("/system", "/save", "/load"):
                raise UsageError(f"{word} takes nothing after it")
            self._commands[word][1](rest.strip())
        elif line.strip():
            self._ask(line)

    def _ask(self, question: str) -> None:
        bar = Bar("prompt", "token")
        with Interrupt() as interrupt:

            def between_steps(taken: int, total: int) -> None:
                interrupt.check()
                bar(taken, total)

            show(self._chat.answer(question, between_steps), more=self._read)

    def _read(self) -> str:
        kept = f", {self._chat.kept} kept" if self._chat.kept else ""
        return f"; {self._chat.prefilled} prompt tokens read{kept}"

    def _help(self, rest: str) -> None:
        for name, (what, _) in self._commands.items():
            say(f"{name:9}{what}")
        say("//...    asks a question that begins with a slash")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        say("a new conversation")

    def _undo(self, rest: str) -> None:
        say(f"dropped: {self._chat.undo().content}")

    def _system(self, rest: str) -> None:
        if rest:
            self._chat.set_system("" if rest == "-" else rest)
        say(f"system prompt: {self._chat.system or 'none'}")

    def _save(self, rest: str) -> None:
        from mistral.chat.session import save

        save(self._chat, _file("/save", rest), self._fingerprint())
        say(f"saved {_turns(self._chat)} in {rest}")

    def _load(self, rest: str) -> None:
        from mistral.chat.session import OPTIONS, load

        load(self._chat, _file("/load", rest), self._fingerprint())
        options = ", ".join(f"{name} {self._chat.options[name]}" for name in OPTIONS if name in self._chat.options)
        say(f"loaded {_turns(self._chat)} from {rest}; {options}, seed {self._chat.seed}")

    def _quit(self, rest: str) -> None:
        self._over = True


def _file(command: str, name: str) -> str:
    if not name:
        raise UsageError(f"{command} wants the name of a file")
    return name


def _turns(chat: Chat) -> str:
    n = sum(message.role == "user" for message in chat.messages)
    return f"{n} turn" if n == 1 else f"{n} turns"


def interactive(
    folder: str | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.8,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    instruct: bool = False,
    system: str | None = None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Read prompts, a line each, and continue them; with --instruct, have a conversation.

    python -m main interactive
    python -m main interactive mistral-7B-v0.1 --max_tokens 256 --temperature 1.0 --top_p 0.9 --seed 1
    printf 'Once upon a time\\nThe wolf said\\n' | python -m main interactive --max_tokens 20
    python -m main interactive mistral-7B-Instruct-v0.3 --instruct --system "Answer in one sentence."

    Text appears as it is made. Ctrl-C stops the answer and asks for the next prompt; Ctrl-D leaves. A
    conversation keeps its turns and takes in only what is new of them; /help lists its commands: /undo,
    /reset, /system, /save and /load. Its template is the one that goes with the tokenizer, or that of --template.
    """
    if not instruct and (system is not None or template is not None):
        raise UsageError("--system and --template belong to a conversation: add --instruct")
    loaded = load_model(folder, device, dtype, attention, kernels, quant, deterministic, threads, max_batch_size=1)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "stop": stop or [],
        "chunk_size": chunk_size,
    }
    if instruct:
        _converse(loaded, template, system=system or "", seed=seed, **options)
        return
    for prompt in terminal.lines("Prompt: "):
        if not prompt.strip():
            continue
        try:
            stream_one(loaded, prompt, echo=prompt, seed=seed, **options)
        except KeyboardInterrupt:
            if not terminal.typed():
                raise
        except ValueError as error:
            if not terminal.typed():
                raise
            terminal.say_error(error)  # one prompt's fault; the next may be better


def _converse(loaded: Loaded, template: str | None, **options: Any) -> None:
    from mistral.chat.conversation import Chat
    from mistral.formats.fingerprint import fingerprint

    found = template_of(loaded, template)
    terminal.say(f"template {found.name}, by {'--template' if template else loaded.tokenizer.path.name}")
    chat = Chat(loaded.model, loaded.tokenizer, found, **options)
    Conversation(chat, lambda: fingerprint(loaded.folder)).run()
