"""perplexity and eval: how well a model predicts a text, and what it finds in a long one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.cli import flags, terminal
from mistral.cli.chat_options import ChatOptions
from mistral.cli.parallel import divisible
from mistral.cli.prompts import (
    note_if_assumed,
    note_if_instruct,
    one_line,
    open_model,
    read_ids,
    read_text,
    template_of,
)
from mistral.loader.options import LoadOptions, OptionError, window_of
from mistral.util.errors import UsageError
from mistral.util.files import require_writable
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.eval.evaluation import Asked
    from mistral.loader.load import Loaded

RETRIEVAL = ("passkey", "lines", "topics", "needle")
TASKS = (*RETRIEVAL, "reach", "position")


@flat(options=LoadOptions(max_batch_size=1), omit=("max_batch_size", "draft", "prompt_dtype"))
@divisible
def perplexity(
    folder: str | None = None,
    file: str | None = None,
    *,
    json: bool = False,
    chunk_size: int | None = None,
    options: LoadOptions,
) -> None:
    """Measure how well a model predicts a text, of any length.

    python -m main perplexity story.txt
    python -m main perplexity mistral-7B-v0.1 story.txt
    python -m main perplexity mistral-7B-v0.1 story.txt --quant int4 --json
    cat story.txt | python -m main perplexity mistral-7B-v0.1

    The text is one sequence with bos in front, each token predicted from all before it that the windows show (without
    bos, where the tokenizer puts none, the first token is not predicted, and its characters do not count);
    memory does not grow with it, except for layers without a window. Perplexity is exp of the mean nats a token. --json
    prints one object: tokens, nats (their sum), perplexity, characters. A FILE whose name ends in .npy holds ids, one
    dimension of whole numbers, taken as they are and read piece by piece.

    Args:
        json: print one JSON object instead of text
        chunk_size: tokens of a step; default: 2048; changes rounding only
    """
    flags.require_at_least(1, chunk_size=chunk_size)
    if folder is not None and file is not None and os.path.isfile(folder) and os.path.isdir(file):
        raise UsageError(f"{folder} is a file, and {file} a folder: FOLDER comes before FILE")
    stored = read_ids(file)
    text = "" if stored is not None else read_text(file)
    if stored is None and not text:
        empty = "stdin is empty" if file == "-" else f"{file} is empty"
        raise UsageError(f"no text: {'give a file, or text on stdin' if file is None else empty}")
    loaded = open_model(folder, options)
    from mistral.engine import STEP_TOKENS
    from mistral.eval.perplexity import perplexity as score_text
    from mistral.tokenizer import encode, outside

    ids = encode(loaded.tokenizer, text) if stored is None else stored
    if stored is None and (what := outside(ids, loaded.tokenizer, loaded.args.vocab_size)) is not None:
        raise UsageError(f"{file or 'stdin'} has {what}")
    terminal.note_length(loaded, len(ids))
    score = score_text(
        loaded.model, ids, chunk_size=chunk_size or STEP_TOKENS, progress=terminal.Bar("prompt", "token")
    )
    facts = {"tokens": score.tokens, "nats": score.nats, "perplexity": score.perplexity}
    each = score.nats / score.tokens
    over = f"{score.tokens} token{'s' * (score.tokens != 1)}"
    line = f"perplexity {score.perplexity:.4f}: {each:.4f} nats a token over {over}"
    if stored is None:  # ids have no characters
        begun = 0 if ids[0] == loaded.tokenizer.bos_id else len(loaded.tokenizer.decode(ids[:1]))  # by no prediction
        facts["characters"] = len(text) - begun
        line += f", {score.nats / math.log(2) / max(1, len(text) - begun):.4f} bits a character"
    print(one_line(facts) if json else line)


@flat(options=LoadOptions(max_batch_size=8), omit=("draft", "parallel", "prompt_dtype"))
def evaluate(
    folder: str | None = None,
    *,
    task: str,
    lengths: str | None = None,
    n: int | None = None,
    seed: int = 0,
    filler: str | None = None,
    questions: list[str] | None = None,
    windows: str | None = None,
    instruct: bool = False,
    template: str | None = None,
    output: str | None = None,
    json: bool = False,
    plot: str | None = None,
    options: LoadOptions,
) -> None:
    """Measure what a model does with a long context.

    python -m main eval --task reach --windows 16,64,none --plot reach.svg
    python -m main eval --task position --filler story.txt --plot loss.svg
    python -m main eval mistral-7B-v0.1 --task passkey --lengths 4k,8k,16k --plot passkey.svg
    python -m main eval MistralLite --task lines --lengths 4k,8k --instruct --output lines.jsonl
    python -m main eval MistralLite --task topics --questions 5_topics.jsonl --questions 10_topics.jsonl --instruct

    Retrieval: passkey (a number in a text that repeats itself), lines (one of many labelled numbers), topics (the first
    topic of a conversation), needle (a sentence at evenly spread depths). Prompts are made with the seed and have at
    most LENGTH tokens of the model's own tokenizer. reach: how far back one changed token moves the next prediction,
    exactly 0 beyond layers x (window - 1). position: the loss on the same tokens with more and more context.

    Args:
        task: passkey, lines, topics, needle, reach or position
        lengths: tokens, with commas between; 4k is 4096; for reach one length, for position the contexts
        n: cases a length (50; needle 11); for reach texts (8), for position places (64)
        seed: of everything random
        filler: a file with the text to hide things in, in any language; for reach and position the text to measure
        questions: for lines and topics: a file of LongChat's instead of prompts made here; may be repeated
        windows: for reach and position: windows to measure with, such as 64,256,none; default: the model's own
        instruct: each prompt is a question; it is asked with the template of the model
        template: with --instruct: see complete
        output: a file for single results, JSON lines; if it is there, what it lacks is added
        json: print one JSON object instead of a table
        plot: a file for a picture (.svg, .png; needs matplotlib)
        max_batch_size: the most prompts in one batch; 0: as many as memory takes
    """
    chat = ChatOptions(instruct=instruct, template=template)
    chat.require_instruct()
    asked = _asked(task, lengths, n, seed, questions, windows, output, filler)
    if task not in RETRIEVAL and instruct:
        raise UsageError(f"--instruct is for questions; {task} measures plain text")
    if plot is not None:
        from mistral.eval.bench_text import require_plotting

        require_plotting(plot)
    if output is not None and not os.path.exists(output):
        require_writable(output)
    if filler is not None:
        asked = replace(asked, text=(_filler_text(filler), filler))
    if task == "reach":  # the plain path: every layer is looked at
        plain = options.execution if options.execution != "auto" else "eager"
        options = replace(options, execution=plain, dtype=options.dtype or "float32")
    loaded = open_model(folder, options)
    if task in RETRIEVAL and not instruct:
        note_if_instruct(loaded, chat)
    _report(loaded, replace(asked, rows=options.max_batch_size or 2**31), instruct, template, json, plot)


def _asked(
    task: str,
    lengths: str | None,
    n: int | None,
    seed: int,
    questions: list[str] | None,
    windows: str | None,
    output: str | None,
    filler: str | None,
) -> Asked:
    """What flags specify, refused where they do not belong together."""
    if task not in TASKS:
        raise UsageError(f"--task is {task!r}; it must be one of {', '.join(TASKS)}")
    flags.require_at_least(1, n=n)
    flags.require_at_least(0, seed=seed)
    retrieval = task in RETRIEVAL
    if questions is not None and (lengths, n, filler) != (None, None, None):
        raise UsageError("--questions have their own lengths and number: omit --lengths, --n and --filler")
    if windows is not None and retrieval:
        raise UsageError(f"--windows is for reach and position; for {task} give one --sliding_window")
    if task == "lines" and filler is not None:
        raise UsageError("--filler is not for lines: the record is all there is")
    if questions is not None and task not in ("lines", "topics"):
        raise UsageError(f"--questions are for lines and topics, not for {task}")
    if output is not None and not retrieval:
        raise UsageError(f"--output is for the single results of retrieval; {task} has none: redirect --json")
    chosen = None if windows is None else tuple(_window(word) for word in windows.split(","))
    if chosen is not None and len(set(chosen)) < len(chosen):
        raise UsageError(f"--windows {windows} has a window twice")
    sizes = None if lengths is None else _lengths(lengths)
    from mistral.eval.evaluation import Asked

    return Asked(task, sizes, n, seed, None, tuple(questions or ()), chosen, output)


def _lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens, with commas between; k is 1024."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}k?(,[1-9][0-9]{0,8}k?)*", text.lower()):
        what = "whole numbers from 1 on, of at most nine digits, with commas between, such as 512,4k,16k"
        raise UsageError(f"--lengths is {text!r}; it must be {what}")
    words = text.lower().split(",")
    found = tuple(int(word.removesuffix("k")) * (1024 if word.endswith("k") else 1) for word in words)
    if len(set(found)) < len(found):
        raise UsageError(f"--lengths {text} has a length twice")
    return found


def _window(word: str) -> int | None:
    try:
        window = window_of(word)
    except OptionError:
        window = "auto"
    if isinstance(window, str):
        raise UsageError(f"--windows has {word!r}; each must be a number of tokens above 0, or none")
    return window


def _filler_text(path: str) -> str:
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"--filler {path} has no text")
    return text


def _report(loaded: Loaded, asked: Asked, instruct: bool, template: str | None, json: bool, plot: str | None) -> None:
    """Run the evaluation, print what it found, and draw it."""
    from mistral.chat.messages import Message
    from mistral.eval.evaluation import evaluate as run
    from mistral.tokenizer import encode

    found = template_of(loaded, template) if instruct else None
    note_if_assumed(found, loaded.tokenizer)

    def prompt(text: str) -> list[int]:
        return encode(loaded.tokenizer, text) if found is None else found.encode_chat([Message("user", text)])

    def bar(what: str, unit: str) -> Callable[[int, int], None]:
        return terminal.Bar(what, unit)

    try:
        done = run(
            loaded,
            asked,
            prompt=prompt,
            template=found,
            bar=bar,
            say=lambda note: terminal.echo_err(f"note: {note}"),
        )
    except KeyboardInterrupt:
        if asked.output is not None:
            terminal.echo_err(f"note: what was measured is in {asked.output}; the same command goes on from there")
        raise
    if resumed := done.report.get("resumed"):
        terminal.echo_err(f"note: {resumed} results were in {asked.output} already")
    if (total := done.report.get("prompt_tokens")) and done.report["processed_tokens"] < total:
        processed = done.report["processed_tokens"]
        terminal.echo_err(f"note: {processed:,} of {total:,} tokens of prompts were processed; the others begin alike")
    if done.report.get("shared_beginnings") is False:
        terminal.echo_err(
            "note: memory is short of the rows for it, so common beginnings were processed again each time"
        )
    print(one_line(done.report) if json else done.text)
    if plot is not None:
        done.draw(plot)
