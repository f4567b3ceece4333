"""`interactive`: prompts continued as they are typed, or a conversation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

from mistral.cli import flags, terminal
from mistral.cli.chat_options import ChatOptions
from mistral.cli.conversation import Conversation
from mistral.cli.parallel import divisible, in_first
from mistral.cli.prompts import note_if_assumed, note_if_instruct, open_model, template_of
from mistral.cli.terminal import echo_err, echo_error, is_interactive, read_lines
from mistral.loader.options import LoadOptions, adapter_names
from mistral.sampling_params import SamplingParams
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.loader.load import Loaded

RAW_HELP = "A prompt a line, which the model continues; Ctrl-C ends an answer; /quit or Ctrl-D leaves."


UNUSED = ("max_batch_size", "top_logprobs", "n", "logits_processor")


@flat(chat=ChatOptions(), params=SamplingParams(), options=LoadOptions(max_batch_size=1), omit=UNUSED)
@divisible
def interactive(
    folder: str | None = None,
    *,
    chunk_size: int | None = None,
    chat: ChatOptions,
    params: SamplingParams,
    options: LoadOptions,
) -> None:
    """Read prompts, a line each, and continue them; with --instruct, have a conversation.

    python -m main interactive
    python -m main interactive mistral-7B-v0.1 --max_tokens 256 --temperature 1.0 --top_p 0.9 --seed 1
    printf 'Once upon a time\\nThe wolf said\\n' | python -m main interactive --max_tokens 20
    python -m main interactive mistral-7B-Instruct-v0.3 --instruct --system "Answer in one sentence."

    Text appears as it is generated. Ctrl-C stops the answer and asks for the next prompt; Ctrl-D or /quit leaves. A
    conversation keeps its turns, and prefills only what is new; /help lists its commands: /retry, /continue, /undo,
    /reset, /system, /adapter, /set, /show, /save and /load. What a reasoning model thinks goes to stderr, and stays in
    the conversation; /set thinking hide hides it.

    Args:
        chunk_size: the most prompt tokens in one step; default: 2048; changes rounding only
    """
    flags.require_at_least(1, chunk_size=chunk_size)
    chat.require_instruct()

    def at_terminal(load: Callable[[], Loaded]) -> None:
        loaded = load()
        note_if_instruct(loaded, chat)
        if chat.instruct:
            _converse(loaded, adapter_names(options.adapter), chat, params, chunk_size)
        else:
            _continue_lines(loaded, params, chunk_size)

    in_first(partial(open_model, folder, options), at_terminal)


def _continue_lines(loaded: Loaded, params: SamplingParams, chunk_size: int | None) -> None:
    from mistral.request import check_params

    check_params(params, loaded.args.vocab_size)
    if is_interactive():
        echo_err(RAW_HELP)
    for prompt in read_lines("Prompt: "):
        if not prompt.strip():
            continue
        if prompt.strip() == "/quit":
            return
        if prompt.strip() == "/help":
            echo_err(RAW_HELP, asked=True)
            continue
        try:
            terminal.stream_one(loaded, prompt, params, echo=prompt, chunk_size=chunk_size)
        except KeyboardInterrupt:
            if not is_interactive():
                raise
        except ValueError as error:
            if not is_interactive():
                raise
            echo_error(error)  # one prompt's fault; the next may be better


def _converse(
    loaded: Loaded, adapters: dict[str, str], options: ChatOptions, params: SamplingParams, chunk_size: int | None
) -> None:
    from mistral.chat.conversation import Chat
    from mistral.formats.fingerprint import fingerprint

    template = template_of(loaded, options.template)
    echo_err(f"template {template.name}" + ("" if template.source == template.name else f", by {template.source}"))
    if template.source == template.name:
        whose = "folder's" if loaded.templates == loaded.folder else "adapter's"
        echo_err(f"note: this chat template is the {whose} own; --template takes one of Mistral's instead")
    note_if_assumed(template, loaded.tokenizer)
    more = {"params": params, "chunk_size": chunk_size, "effort": options.reasoning_effort}
    chat = Chat(loaded.model, loaded.tokenizer, template, system=options.system_message() or "", **more)
    only = next(iter(adapters.values())) if len(adapters) == 1 else None

    @cache
    def of(adapter: str | None) -> str:
        return fingerprint(loaded.folder, adapter)

    def of_model() -> str:
        return of(only if chat.adapter is None else adapters.get(chat.adapter))

    Conversation(chat, of_model, thinking=options.shows_thoughts, beyond=loaded.beyond_training).run()
