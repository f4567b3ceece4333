"""The commands: check flags, load, run, print. Text goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 checks failed, 2 a mistake of the caller's (one line says which), 130 interrupted.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mistral import __version__
from mistral.cli import evaluate, flags, oracle, terminal
from mistral.cli.bench import bench
from mistral.cli.chat import interactive
from mistral.cli.folders import convert, inspect_folder
from mistral.cli.generate import complete, demo
from mistral.cli.prompts import folder_or_prompt
from mistral.util.errors import ChecksFailed, UsageError

# What a user types: installed, there is a script and no main.py.
PROGRAM = "mistral-ref" if Path(sys.argv[0]).stem == "mistral-ref" else "python -m main"


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "interactive": interactive,
    "complete": complete,
    "inspect": inspect_folder,
    "convert": convert,
    "bench": bench,
    "perplexity": evaluate.perplexity,
    "verify": oracle.verify,
    "pack": oracle.pack,
    "compare": oracle.compare,
    "trace": oracle.trace,
    "plants": oracle.plants,
}
# Which parameter a single word is, where it could be several.
LONE: dict[Callable[..., None], Callable[[str], str]] = {
    complete: lambda word: folder_or_prompt(word),
    evaluate.perplexity: lambda word: "folder" if os.path.isdir(word) else "file",
    oracle.trace: lambda word: folder_or_prompt(word),
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
        raise UsageError(f"no command: {', '.join(COMMANDS)}; see --help")
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
        raise UsageError(f"no command {name!r}: {', '.join(COMMANDS)}; see --help")
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
    "attention": "sdpa, eager, flash or xformers; left out: the device's default",
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
    "trace --attention": "sdpa or eager; left out: sdpa, in float64 eager",
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
