"""The commands: check flags, load, run, print. Text goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 checks failed, 2 a mistake of the caller's (one line says which), 130 interrupted.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral import __version__
from mistral.cli import flags, oracle, terminal
from mistral.cli.prompts import Asked, ChecksFailed, load_model, read_prompts

if TYPE_CHECKING:
    from mistral.chat.templates import Template
    from mistral.generate import Completion
    from mistral.loader.load import Loaded

# What a user types: installed, there is a script and no main.py.
PROGRAM = "mistral-ref" if Path(sys.argv[0]).stem == "mistral-ref" else "python -m main"
SEPARATOR = "====================="
DEMO_PROMPTS = (
    "This is a test",
    "This is another test",
    "This is a third test, mistral AI is very good at testing. ",
)


def demo(
    folder: str | None = None,
    *,
    max_tokens: int = 35,
    temperature: float = 0.0,
    top_p: float = 0.8,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Continue three prompts in one ragged batch, and print each text.

    python -m main demo
    python -m main demo mistral-7B-v0.1 --max_tokens 35 --temperature 0
    python -m main demo mistral-7B-v0.1 --device cuda --dtype bfloat16

    Without FOLDER: the small model that ships, on prompts that suit it.
    """
    from mistral.formats.folder import BUNDLED
    from mistral.generate import generate

    loaded = load_model(folder, device, dtype, attention, kernels, quant, deterministic, threads, max_batch_size=3)
    prompts: Sequence[str] = DEMO_PROMPTS
    if folder is None:
        prompts = json.loads((BUNDLED / "prompts.json").read_text(encoding="utf-8"))
    texts, _ = generate(
        prompts,
        loaded.model,
        loaded.tokenizer,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk_size=chunk_size,
    )
    for text in texts:
        print(text)
        print(SEPARATOR)


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
        raise flags.UsageError("--system and --template belong to a conversation: add --instruct")
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
            _stream_one(loaded, prompt, echo=prompt, seed=seed, **options)
        except KeyboardInterrupt:
            if not terminal.typed():
                raise
        except ValueError as error:
            if not terminal.typed():
                raise
            terminal.say_error(error)  # one prompt's fault; the next may be better


def complete(
    folder: str | None = None,
    prompt: str | None = None,
    *,
    suffix: str | None = None,
    file: str | None = None,
    json: bool = False,
    top_logprobs: int = 0,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.8,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    max_batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Continue a prompt, or many; only the continuation goes to stdout, so it pipes.

    python -m main complete "Once upon a time" --max_tokens 40
    python -m main complete mistral-7B-v0.1 "The capital of France is" --temperature 0
    echo "Once upon a time" | python -m main complete mistral-7B-v0.1
    python -m main complete mistral-7B-v0.1 --file prompts.jsonl --json > answers.jsonl
    python -m main complete codestral-22B-v0.1 "def fibonacci(n):" --suffix "    return a"

    One word that is a folder is FOLDER, and the prompt is read from stdin. Each line of FILE is a
    JSON string, or an object with "prompt" (text, or a list of ids) and perhaps "max_tokens" and "suffix".
    The texts of FILE's prompts are each followed by a line of =====================. --json prints one
    object a prompt: index, prompt_tokens, tokens, text, logprobs, finish_reason, and top_logprobs if
    asked for.
    """
    if top_logprobs and not json:
        raise flags.UsageError("--top_logprobs are printed with --json only: give both")
    from mistral.formats.hub import is_hub_id

    if folder is not None and not os.path.exists(folder) and not is_hub_id(folder):  # before stdin is waited for
        raise flags.UsageError(f"no such folder: {folder}")
    asked = read_prompts(prompt, suffix, file, max_tokens)
    loaded = load_model(
        folder, device, dtype, attention, kernels, quant, deterministic, threads, max_batch_size=max_batch_size
    )
    prompts, limits = _with_gaps(asked, loaded), [one.max_tokens for one in asked]
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
        "chunk_size": chunk_size,
        "top_logprobs": top_logprobs,
    }
    if file is None and not json:
        _stream_one(loaded, prompts[0], max_tokens=limits[0], **options)
        return
    from tqdm import tqdm

    from mistral.generate import completions

    ended = completions(prompts, loaded.model, loaded.tokenizer, max_tokens=limits, **options)
    bar = tqdm(ended, total=len(prompts), desc="prompts", unit="prompt", delay=2, disable=None, leave=False)
    early: dict[int, Completion] = {}  # ended before one that comes before it
    turn = 0
    for index, result in bar:
        early[index] = result
        while turn in early:
            shown = early.pop(turn)
            with bar.external_write_mode():
                terminal.write(
                    _as_json(turn, shown, bool(top_logprobs)) + "\n" if json else f"{shown.text}\n{SEPARATOR}\n"
                )
            turn += 1


def convert(src: str, dst: str, *, to: str, dtype: str | None = None, quant: str | None = None) -> None:
    """Write a model folder anew: in the other layout, as safetensors, or in another dtype.

    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-hf --to hf
    python -m main convert mistral-7B-v0.1-hf mistral-7B-v0.1-again --to mistral
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-fp16 --to mistral --dtype float16
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-int4 --to mistral --quant int4

    SRC is a folder in either layout, a hub id, or a pack with weights, and DST a folder that is not there yet.
    Weights stay the same bit for bit unless --dtype or --quant is given, and are never all in memory. DST appears when
    it is complete, not before. What --quant wrote loads at once, and nothing but this library reads it.
    """
    from mistral.formats.convert import convert as convert_folder
    from mistral.formats.convert import write_folder

    if src.endswith(".safetensors"):
        with oracle.model_of(src) as found:
            written = write_folder(found, dst, to, dtype=dtype, quant=quant)
    else:
        written = convert_folder(src, dst, to, dtype=dtype, quant=quant)
    terminal.say(f"wrote {written.describe()}")
    for note in written.notes:
        terminal.say(f"note: {note}")


def inspect_folder(folder: str | None = None, *, json: bool = False) -> None:
    """Say what a folder is, what it needs, and what looks wrong; no tensor is read.

    python -m main inspect
    python -m main inspect mistral-7B-v0.1
    python -m main inspect mistral-7B-v0.1 --json

    Release, layout, files, dtypes, window and theta with the rule used, tokenizer, memory for weights
    and for the cache of one sequence, anything suspicious, and the vLLM command that serves the folder.
    Without FOLDER: the small model that ships. --json prints one object. Only a .pth file takes PyTorch, and seconds.
    """
    from mistral.formats.inspect import as_json, as_text
    from mistral.formats.inspect import inspect_folder as report_on

    report = report_on(folder)
    print(as_json(report) if json else as_text(report))


def bench(
    folder: str | None = None,
    *,
    shape: str | None = None,
    contexts: str = "32,4096",
    batches: str = "1,8",
    prompts: str = "512",
    repeats: int = 5,
    json: bool = False,
    plot: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    threads: int | None = None,
) -> None:
    """Measure prefill and decoding, beside what memory and arithmetic would allow at best.

    python -m main bench
    python -m main bench mistral-7B-v0.1 --quant int4
    python -m main bench --shape 7b --contexts 32,4096 --batches 1,8 --prompts 512,8192
    python -m main bench --shape 1b --json > bench.json

    Medians over the repeats, and the slowest and fastest of them. The limit of decoding is the rate at which memory
    is read, measured between the repeats; that of prefill is the rate of one large product. --shape takes random
    weights of that shape. Close other programs: on a busy machine every figure is too low.
    """
    asked = {
        "contexts": flags.numbers("contexts", contexts),
        "batches": flags.numbers("batches", batches),
        "prompts": flags.numbers("prompts", prompts),
    }
    if folder is not None and shape is not None:
        raise flags.UsageError("FOLDER and --shape: give one of them")
    from mistral.eval import bench as measuring

    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention, "kernels": kernels}
    options |= {"quant": quant, "deterministic": deterministic}
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if plot is not None:
        measuring.require_plotting(plot)
    report = measuring.report(folder, shape, options, repeats=repeats, **asked)
    print(measuring.as_json(report) if json else measuring.as_text(report))
    if plot is not None:
        measuring.plot(report, plot)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "interactive": interactive,
    "complete": complete,
    "inspect": inspect_folder,
    "convert": convert,
    "bench": bench,
    "perplexity": oracle.perplexity,
    "verify": oracle.verify,
    "pack": oracle.pack,
    "compare": oracle.compare,
    "trace": oracle.trace,
    "plants": oracle.plants,
}
# Which parameter a single word is, where it could be several.
LONE: dict[Callable[..., None], Callable[[str], str]] = {
    complete: lambda word: _folder_or_prompt(word),
    oracle.perplexity: lambda word: "folder" if os.path.isdir(word) else "file",
    oracle.trace: lambda word: _folder_or_prompt(word),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _speak_utf8()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        _run(words)
        sys.stdout.flush()
        return 0
    except ChecksFailed:
        sys.stdout.flush()
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as `head` does; nothing more is wanted
        _drop_output()
        return 0
    except ValueError as error:
        terminal.say_error(error)
        return 2
    except OSError as error:  # no permission, a full disk
        _drop_output()
        terminal.say_error(error)
        return 2


def _run(words: list[str]) -> None:
    if not words:
        raise flags.UsageError(f"no command: {', '.join(COMMANDS)}; see --help")
    name, rest = words[0], words[1:]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        raise flags.UsageError(f"no command {name!r}: {', '.join(COMMANDS)}; see --help")
    command = COMMANDS[name]
    options = rest[: rest.index("--")] if "--" in rest else rest
    if "--help" in options or "-h" in options:
        print(_help(name, command))
        return
    checked = flags.canonical(command, rest, RANGES, lone=LONE.get(command))
    import fire

    fire.Fire(flags.readable_by_fire(command), command=checked, name=name)


def _speak_utf8() -> None:
    """Read and write UTF-8 whatever the locale: model text has any character, and pipes the same everywhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller; print would write to the other one
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for as long as we run)
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            try:
                stream.reconfigure(encoding="utf-8", errors=errors)
            except io.UnsupportedOperation:  # a caller in Python has already read from it
                pass


def _drop_output() -> None:
    """Have what is still buffered for stdout go nowhere, or Python complains once more at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:  # not a file, in a test or a notebook
        pass


def _overview() -> str:
    lines = [f"Mistral 7B and its family, version {__version__}.", "", "Commands (COMMAND --help tells more):"]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:12} {(inspect.getdoc(command) or '').splitlines()[0]}")
    lines += ["", "FOLDER is a folder, or a model of the Hugging Face hub: owner/name, or owner/name@revision."]
    return "\n".join(lines)


def _help(name: str, command: Callable[..., None]) -> str:
    parameters = inspect.signature(command).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    places = [
        p.name.upper() if p in required else f"[{p.name.upper()}]"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    places += [f"--{p.name} {p.name.upper()}" for p in required if p.kind is p.KEYWORD_ONLY]
    lines = [f"usage: {PROGRAM} {name} {' '.join(places)} [flags]", ""]
    lines += [(inspect.getdoc(command) or "").replace("python -m main", PROGRAM), "", "flags:"]
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY:
            kind = str(p.annotation).removesuffix(" | None").replace("list[str]", "str, may be repeated")
            default = "" if p.default is None or p.default is False else f", default {p.default}"
            default = ", required" if p in required else default
            text = FLAG_HELP.get(f"{name} --{p.name}", FLAG_HELP[p.name])
            lines.append(f"  --{p.name:15} {text} ({kind}{default})")
    return "\n".join(lines)


FLAG_HELP = {
    "max_tokens": "most tokens to make",
    "temperature": "0 takes the likeliest token; higher is more random",
    "top_p": "draw from the likeliest tokens that sum to this probability; 1 is all",
    "top_k": "draw from this many of the likeliest tokens; 0 is all",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "seed": "makes sampling repeatable: the same seed, the same text for the same prompt; left out: random",
    "stop": "text that ends a continuation; not printed",
    "instruct": "have a conversation, with the template of the model",
    "system": "the system prompt",
    "template": "v1, v2, v3, v7 or mistrallite; left out: the one that goes with the tokenizer",
    "suffix": "text that follows: fill the gap between it and the prompt (Codestral)",
    "device": "cpu, cuda, cuda:1 or mps; left out: the best one here",
    "dtype": "of the arithmetic: float32, bfloat16, float16 or float64; left out: what the device does well",
    "attention": "sdpa, plain, flash or xformers; left out: the device's default",
    "kernels": "compiled decode steps on a CPU (by default where they build), captured ones on CUDA (on request)",
    "quant": "round the weights while they are loaded: int8 or int4 (less memory, faster; other numbers)",
    "threads": "CPU threads; left out: as many as PyTorch takes",
    "chunk_size": "most prompt tokens a sequence takes in at a step; left out: 2048 shared by all; changes no number",
    "file": "prompts, one JSON value a line",
    "json": "print JSON lines instead of text",
    "top_logprobs": "with --json: how many of the likeliest tokens to report for each token",
    "max_batch_size": "most prompts run at once; the others wait",
    "to": "the layout to write: mistral or hf",
    "shape": "random weights in the shape of a model: 7b or 1b",
    "contexts": "positions in the cache when decoding, with commas between; the first one also for the batches",
    "batches": "sequences decoded together",
    "prompts": "lengths of prompts to take in",
    "repeats": "how often everything is measured",
    "plot": "a file for a picture of the rates against the positions (.svg, .png; needs matplotlib)",
    # Where a flag means something else in one command.
    "bench --json": "print one JSON object instead of a table",
    "perplexity --json": "print one JSON object instead of text",
    "perplexity --chunk_size": "tokens taken in at a step; left out: 2048; changes no number",
    "full": "take prompts longer than the model's window, however wide it is",
    "output": "the file to write; also -o",
    "top": "likeliest tokens to keep of each position",
    "weights": "put the weights in too",
    "model": "the server's name for the model; left out: the first that it lists",
    "mistake": "write only this one; may be given several times; left out: all that matter here",
    "plants --seed": "of the random prompts",
    "plants --output": "the folder to write to; also -o",
    "plan": "lengths of prompts, with commas between",
    "window": "of the layer; left out: none",
    "deterministic": "the same bits in any batch, chunking and number of threads (CPU, float32; slower)",
    "pack --seed": "of the random prompts",
    "compare --seed": "of the random prompts",
    "compare --json": "print one JSON object instead of text",
    "compare --dtype": "of the arithmetic of the side that is not the truth",
    "trace --chunk_size": "with --plan: tokens of each prompt a step; left out: all at once",
    "trace --dtype": "of the arithmetic: float32, bfloat16, float16 or float64; left out: float32",
    "trace --attention": "sdpa or plain; left out: sdpa, in float64 plain",
    "verify --json": "print one JSON object instead of a table",
    "verify --seed": "of the random prompts",
    "inspect --json": "print one JSON object instead of text",
    "convert --dtype": "of the weights written: float32, bfloat16 or float16; left out: as they are",
}


# Checked before anything is loaded. What only the model can tell (ids, memory) is checked after.
RANGES = {
    "max_tokens": (0, 2**63 - 1),
    "temperature": (0, sys.float_info.max),
    "top_p": (0, 1),
    "top_k": (0, 2**63 - 1),
    "min_p": (0, 1),
    "top_logprobs": (0, 2**63 - 1),
    "max_batch_size": (0, 2**31 - 1),
    "chunk_size": (1, 2**63 - 1),
    "repeats": (1, 1000),
    "top": (1, 2**31 - 1),
    "window": (1, 2**31 - 1),
    "threads": (1, 1024),  # what PyTorch can start depends on the machine; far more ends the process
}


def _stream_one(loaded: Loaded, prompt: Any, echo: str = "", **options: Any) -> None:
    """Continue one prompt on stdout as it is made, `echo` first; then say how fast on stderr, also after Ctrl-C."""
    from mistral.generate import stream

    pieces = stream([prompt], loaded.model, loaded.tokenizer, progress=terminal.Bar("prompt", "token"), **options)
    terminal.show(pieces, echo)


def _converse(loaded: Loaded, template: str | None, **options: Any) -> None:
    from mistral.chat.conversation import Chat
    from mistral.formats.fingerprint import fingerprint

    found = _template(loaded, template)
    terminal.say(f"template {found.name}, by {'--template' if template else loaded.tokenizer.path.name}")
    chat = Chat(loaded.model, loaded.tokenizer, found, **options)
    terminal.Conversation(chat, lambda: fingerprint(loaded.folder)).run()


def _template(loaded: Loaded, name: str | None) -> Template:
    from mistral.chat.templates import find_template

    release = None if loaded.release is None else loaded.release.template
    return find_template(loaded.tokenizer, name=name, release=release)


def _folder_or_prompt(word: str) -> str:
    """Which of the two a single word after `complete` is: a path that is there, or looks like one or a hub id."""
    one_word = not re.search(r"\s", word)
    path = os.path.isdir(word) or (one_word and re.match(r"/|\.\.?/|~|.*/$|[\w.-]+(/[\w.-]+)+(@\S+)?$", word))
    if one_word and not path and terminal.text_waits():
        raise flags.UsageError(f"no such folder: {word} (or, as the prompt: nothing on stdin beside it)")
    if one_word and not path:
        terminal.say(f"note: there is no folder {word!r} here, so it is the prompt")
    return "folder" if path else "prompt"


def _with_gaps(asked: list[Asked], loaded: Loaded) -> list[Any]:
    """The prompts, those with a suffix as the ids after which its model fills the gap."""
    if all(one.suffix is None for one in asked):
        return [one.prompt for one in asked]
    template = _template(loaded, None)
    return [one.prompt if one.suffix is None else template.infill(one.prompt, one.suffix) for one in asked]


def _as_json(index: int, result: Completion, with_top: bool) -> str:
    entry: dict[str, Any] = {
        "index": index,
        "prompt_tokens": result.prompt_tokens,
        "tokens": result.tokens,
        "text": result.text,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
    }
    if with_top:
        entry["top_logprobs"] = [[[token, lp] for token, lp in top.items()] for top in result.top_logprobs]
    return json.dumps(entry, ensure_ascii=False)
