"""demo and complete: prompts continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mistral.cli import flags, terminal
from mistral.cli.chat_options import ChatOptions
from mistral.cli.parallel import divisible
from mistral.cli.prompts import (
    as_ids,
    default_folder,
    note_if_assumed,
    note_if_instruct,
    open_model,
    read_prompts,
    require_known_ids,
    require_there,
    template_of,
)
from mistral.loader.options import LoadOptions
from mistral.sampling_params import SamplingParams
from mistral.util.errors import UsageError, short_repr
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.chat.templates import Template
    from mistral.generate import Completion
    from mistral.loader.load import Loaded


SEPARATOR = "====================="
DEMO_PROMPTS = (
    "This is a test",
    "This is another test",
    "This is a third test, mistral AI is very good at testing. ",
)


@flat(
    params=SamplingParams(max_tokens=35, temperature=0.0),
    options=LoadOptions(max_batch_size=3),
    omit=("max_batch_size", "n", "stop", "top_logprobs"),
)
@divisible
def demo(
    folder: str | None = None, *, chunk_size: int | None = None, params: SamplingParams, options: LoadOptions
) -> None:
    """Continue three prompts in one ragged batch, and print each text.

    python -m main demo
    python -m main demo mistral-7B-v0.1 --max_tokens 35 --temperature 0
    python -m main demo mistral-7B-v0.1 --device cuda --dtype bfloat16

    Without FOLDER: the bundled model, with prompts that suit it.

    Args:
        chunk_size: the most prompt tokens of a sequence in one step; default: 2048 for all; changes rounding only
    """
    flags.require_at_least(1, chunk_size=chunk_size)
    prompts: Sequence[str] = DEMO_PROMPTS
    if default_folder(folder) is None:
        from mistral.formats.folder import BUNDLED

        prompts = json.loads((BUNDLED / "prompts.json").read_text(encoding="utf-8"))
    loaded = open_model(folder, options)
    from mistral.generate import complete

    results = complete(prompts, loaded.model, loaded.tokenizer, params=params, chunk_size=chunk_size)
    for result in results:
        terminal.write(f"{loaded.tokenizer.decode([*result.prompt_tokens, *result.tokens])}\n{SEPARATOR}\n")


@flat(chat=ChatOptions(), params=SamplingParams(), options=LoadOptions(max_batch_size=16), omit=("logits_processor",))
@divisible
def complete(
    folder: str | None = None,
    prompt: str | None = None,
    *,
    suffix: str | None = None,
    file: str | None = None,
    json: bool = False,
    json_schema: str | None = None,
    chunk_size: int | None = None,
    chat: ChatOptions,
    params: SamplingParams,
    options: LoadOptions,
) -> None:
    """Continue a prompt, or many; only the continuation goes to stdout, so it pipes.

    python -m main complete "Once upon a time" --max_tokens 40
    python -m main complete mistral-7B-v0.1 "The capital of France is" --temperature 0
    echo "Once upon a time" | python -m main complete mistral-7B-v0.1
    python -m main complete mistral-7B-Instruct-v0.3 "What is the capital of France?" --instruct
    python -m main complete mistral-7B-v0.1 --file prompts.jsonl --json > answers.jsonl
    python -m main complete codestral-22B-v0.1 "def fibonacci(n):" --suffix "    return a"

    One word that is a folder is FOLDER, and the prompt is read from stdin. Each line of FILE is a
    JSON string, or an object with "prompt" (text, or a list of ids) and optionally "max_tokens", "suffix" and "adapter"
    (the name of one); where its name ends in .txt, each line is a prompt. A FILE that ends in .npy holds the ids of one
    prompt, of any length; they are read piece by piece. With FILE, and with --n, each text is followed by a line of
    =====================. --json prints one object each: index, prompt_tokens, tokens, text, logprobs, finish_reason,
    sample if --n is given, and top_logprobs if requested; with --max_tokens 0 also prompt_logprobs, of the prompt's
    tokens from the second on. What a reasoning model thinks goes to stderr, or with --json
    into reasoning_content; the text is the answer alone.

    Args:
        suffix: the text that follows the gap, for fill-in-the-middle (Codestral)
        file: prompts, one JSON value a line; one a line if it ends in .txt; ids if it ends in .npy; - is stdin
        json: print JSON lines instead of text
        json_schema: a file with a JSON schema; each text is a value that fits it (needs llguidance)
        chunk_size: the most prompt tokens of a sequence in one step; default: 2048 for all; changes rounding only
        max_batch_size: the most prompts in one batch, the others wait; 0: all of them at once
    """
    flags.require_at_least(1, chunk_size=chunk_size)
    if params.top_logprobs and not json:
        raise UsageError("--top_logprobs are printed with --json only: give both")
    chat.require_instruct()
    if chat.instruct and suffix is not None:
        raise UsageError("--suffix and --instruct: give one of them")
    require_there(folder, prompt)
    schema = None if json_schema is None else _read_schema(json_schema)
    asked = read_prompts(prompt, suffix, file)
    loaded = open_model(folder, options)
    if schema is not None:
        params = _constrained(params, schema, loaded)
    template = template_of(loaded, chat.template) if chat.instruct else None
    note_if_instruct(loaded, chat)
    require_known_ids(asked, loaded)
    prompts = as_ids(asked, loaded, template, chat)
    if template is not None:
        note_if_assumed(template, loaded.tokenizer)
    ends, has_words = _ends(loaded, template)
    if not has_words and not json and not any(isinstance(prompt, str) for prompt in prompts):
        raise UsageError("the folder has no tokenizer, so answers are ids and have no text: add --json")
    thoughts = None if template is None else template.thought_ids
    each = [params if one.max_tokens is None else replace(params, max_tokens=one.max_tokens) for one in asked]
    if any(not one.max_tokens for one in each) and not json:
        terminal.echo_err("note: nothing is computed for --max_tokens 0; with --json prompts are scored")
    how: dict[str, Any] = {"chunk_size": chunk_size, "thoughts": thoughts, "eos_ids": ends}
    if file is None and not json and params.n == 1:
        terminal.stream_one(loaded, prompts[0], each[0], thinking=chat.shows_thoughts, **how)
        return
    _print_all(loaded, prompts, each, json, adapter=[one.adapter for one in asked], **how)


def _print_all(loaded: Loaded, prompts: Sequence[Any], params: list[SamplingParams], json: bool, **how: Any) -> None:
    """Continue prompts, and print what came of each, in their order.

    At Ctrl-C those that have ended are printed as JSON, which names their prompts, and a line says how many there are.

    Args:
        params: of each prompt; all have one n.
        json: as JSON lines, with scores of prompts of which nothing is generated.
        how: goes to `generate.completions`.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    from mistral.generate import completions, encode_prompts

    ids = encode_prompts(prompts, loaded.tokenizer)
    noted = terminal.note_length(loaded, max(map(len, ids)))
    bar = terminal.Bar("prompt", "token") if len(ids) == 1 else None
    ended = completions(ids, loaded.model, loaded.tokenizer, params=params, progress=bar, score=json, **how)
    longest = printed = 0
    early: dict[int, Completion] = {}
    try:
        for result, index in _in_order(ended, len(ids), params[0].n, early):
            longest = max(longest, len(result.prompt_tokens) + len(result.tokens))
            text = _as_json(index, result, params[index]) if json else f"{result.text}\n{SEPARATOR}"
            terminal.write(f"{text}\n")
            printed += 1
    except KeyboardInterrupt:
        for place in sorted(early) if json else ():
            index = place // params[0].n
            terminal.write(f"{_as_json(index, early.pop(place), params[index])}\n")
            printed += 1
        behind = f"; {len(early):,} more had ended, behind one that had not (--json prints those too)" if early else ""
        terminal.echo_err(f"interrupted: {printed:,} of {len(ids) * params[0].n:,} texts are printed{behind}")
        raise
    if not noted:
        terminal.note_length(loaded, longest)


def _ends(loaded: Loaded, template: Template | None) -> tuple[frozenset[int], bool]:
    """The ids that end a sequence, and whether there is a tokenizer: without one they are those of the folder."""
    from mistral.chat.templates import ends_of
    from mistral.formats.tokenizers import eos_ids, has_tokenizer

    if has_tokenizer(loaded.words):
        return ends_of(loaded.tokenizer, template), True
    return eos_ids(loaded.folder, None, loaded.args.vocab_size)[0], False


def _read_schema(file: str) -> dict[str, Any]:
    """The JSON schema in a file.

    Raises:
        UsageError: it cannot be read, or holds no object.
    """
    from pathlib import Path

    from mistral.util.files import decode_text, read_limited, reason_of
    from mistral.util.parsed import not_json, parse_json

    try:
        text = decode_text(read_limited(Path(os.path.expanduser(file)), 1_000_000), file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {reason_of(error)}") from None
    try:
        schema = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{file} {not_json(error)}") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{file} holds {short_repr(schema)}; a JSON schema is an object")
    return schema


def _constrained(params: SamplingParams, schema: dict[str, Any], loaded: Loaded) -> SamplingParams:
    """Params of texts that fit a schema."""
    from mistral.generate import eos_of
    from mistral.grammar import Grammars

    grammar = Grammars(loaded.tokenizer, eos_of(loaded.tokenizer)).json(schema)
    return replace(params, logits_processor=grammar.constraint())


def _in_order(
    ended: Iterable[tuple[int, Completion]], prompts: int, n: int, early: dict[int, Completion]
) -> Iterator[tuple[Completion, int]]:
    """Each completion, and the index of its prompt, as soon as those before it have ended too.

    Args:
        early: where those are meanwhile that have ended before one in front of them, by their place.
    """
    turn = 0
    with terminal.Bar("completing", "text", prompts * n) as bar:
        for index, result in ended:
            bar.update(1)
            early[index * n + result.sample] = result
            while turn in early:
                with bar.aside():
                    yield early.pop(turn), turn // n
                turn += 1


def _as_json(index: int, result: Completion, params: SamplingParams) -> str:
    from mistral.stored_ids import StoredIds

    prompt: Any = result.prompt_tokens
    if isinstance(prompt, StoredIds):  # it stayed in its file
        prompt = {"file": str(prompt.path), "length": len(prompt)}
    entry: dict[str, Any] = {
        "index": index,
        "prompt_tokens": prompt,
        "tokens": result.tokens,
        "text": result.text,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
    }
    if not result.tokens and result.finish_reason == "length":  # max_tokens is 0
        entry["prompt_logprobs"] = list(result.prompt_logprobs)
    if result.prompt_top_logprobs:
        entry["prompt_top_logprobs"] = [list(map(list, top.items())) for top in result.prompt_top_logprobs]
    if result.thinking:
        entry["reasoning_content"] = result.thinking
    if params.n > 1:
        entry["sample"] = result.sample
    if params.top_logprobs:
        entry["top_logprobs"] = [[[token, lp] for token, lp in top.items()] for top in result.top_logprobs]
    return json.dumps(entry, ensure_ascii=False)
