"""The oracle's commands, thin: check what is requested, import what does it, print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mistral.cli import flags, terminal
from mistral.cli.prompts import (
    PromptLine,
    key_of,
    model_of,
    one_line,
    open_model,
    read_file,
    read_prompts,
    require_known_ids,
    require_there,
)
from mistral.cli.starting import starting
from mistral.fast.layout import QUANTS
from mistral.loader.options import LoadOptions
from mistral.util.dtypes import DTYPE_NAMES
from mistral.util.english import counted
from mistral.util.errors import ChecksFailed, UsageError
from mistral.util.flat import flat

if TYPE_CHECKING:
    from torch import Tensor

    from mistral.formats.folder import Folder
    from mistral.oracle.sides import Side
    from mistral.tokenizer import TokenizerLike

# What is measured is the folder as it is read: its window and its adapter may be given, how it runs may not.
WITHOUT_CACHE = (
    *("device", "dtype", "attention", "execution", "quant", "threads", "max_batch_size", "adapter_mode", "draft"),
    *("parallel", "prompt_dtype"),
)
AS_LOADED = ("cache_dtype", *WITHOUT_CACHE)


@flat(options=LoadOptions(), omit=AS_LOADED)
def verify(
    folder: str | None = None, *, full: bool = False, json: bool = False, seed: int = 0, options: LoadOptions
) -> None:
    """Run every available way of computing a model, on its own weights, against float64.

    python -m main verify
    python -m main verify mistral-7B-v0.1
    python -m main verify mistral-7B-v0.1 --full --json

    one_file_ref, transformers if it is installed, and ours: whole, batched, chunked, a token at a time, in each
    backend and dtype; rolled with windows of 64, or with --full the model's own. A layer at a time, in its memory.
    Errors are multiples of the error budget: the rounding error that no implementation in that dtype can avoid. A row
    says which weights, arithmetic and cache it tests: caches in fp32, fp16, bf16 and int8; whole and batched have none.
    FOLDER may also be a pack with weights. The exit code is 0 if all pass, else 1.

    Args:
        full: use prompts longer than the model's window, however wide it is
        json: print one JSON object instead of a table
        seed: of the random prompts
    """
    with starting("starting PyTorch"):
        from mistral.oracle import verify as verifying

    with model_of(folder, options) as found:
        report = verifying.verify(found, full=full, seed=seed, progress=terminal.Bar("verifying", "step"))
    print(verifying.as_json(report) if json else verifying.as_text(report))
    if not report.passes:
        raise ChecksFailed


@flat(options=LoadOptions(), omit=AS_LOADED)
def pack(
    folder: str | None = None,
    *,
    output: str,
    file: str | None = None,
    top: int = 20,
    weights: bool = False,
    full: bool = False,
    seed: int = 0,
    options: LoadOptions,
) -> None:
    """Write a golden pack: the outputs of a model for some prompts, in float64, to check other programs against.

    python -m main pack -o small.safetensors
    python -m main pack mistral-7B-v0.1 -o v0.1.safetensors --file prompts.jsonl
    python -m main pack mistral-7B-v0.1 -o v0.1.safetensors --full

    No cache is tested here: every prompt is computed at once.
    Ids of the prompts, the top tokens after each position and their log-probs, fingerprints of all activations,
    the error budget, and where all of it comes from; docs/packs.md reads one in twenty lines. Prompts
    are random ids, or the lines of --file (as `complete` reads them). Packs with weights
    can be converted to folders: python -m main convert x.safetensors DST --to hf

    Args:
        output: the file to write
        file: a file of prompts, as `complete` reads them; default: random prompts
        top: how many of the most likely tokens to keep of each position
        weights: put the weights in too
        full: use prompts longer than the model's window, however wide it is
        seed: of the random prompts
    """
    flags.require_at_least(1, top=top)
    from mistral.oracle import pack as packing
    from mistral.oracle.inputs import inside

    with model_of(folder, options) as found:
        prompts = _prompts(found, file, full, seed)
        bar = terminal.Bar("packing", "step")
        written = packing.pack(found, output, prompts, top=top, weights=weights, progress=bar)
        note = inside(found.args, [len(p) for p in prompts])
    terminal.echo_err(f"wrote {written}: {counted(len(prompts), 'prompt')}, {written.stat().st_size / 1e6:.1f} MB")
    if note:
        terminal.echo_err(f"note: {note}: {'--full uses' if file is None else 'give'} longer ones")


@flat(options=LoadOptions(), omit=WITHOUT_CACHE)
def compare(
    a: str,
    b: str,
    *,
    file: str | None = None,
    model: str | None = None,
    key_env: str = "MISTRAL_API_KEY",
    dtype: str = "float32",
    quantized: str | None = None,
    full: bool = False,
    json: bool = False,
    seed: int = 0,
    options: LoadOptions,
) -> None:
    """Compare two sides: whether they agree, where they first differ, and which mutant explains it.

    python -m main compare mistral-7B-v0.1 mistral-7B-v0.1-hf
    python -m main compare mistral-7B-v0.1 http://localhost:8000 --dtype bfloat16
    python -m main compare v0.1.safetensors logits.npz
    python -m main compare mistral-7b-v0.1.Q4_K_M.gguf http://localhost:8080 --quantized int8

    A and B are each a folder in either layout, a .gguf file, a hub id, a pack, an .npz (prompt_ids, and logits or
    logprobs [T, V]), a file that `trace` wrote, or the URL of an OpenAI-style server that returns log-probs (vLLM,
    llama-server). Differences beyond what rounding explains are named: the first activation and position that differ;
    and the mutants of our model that give the other side's numbers. The exit code is 0 if the sides agree, else 1.

    Args:
        file: a file of prompts, as `complete` reads them; default: random prompts
        model: the server's name for the model; default: the first that it lists
        key_env: the variable that holds the server's key, if it wants one
        dtype: of the arithmetic of the side that is not the truth
        quantized: int8 or int4: weights or inputs of a side are rounded to about as many bits, which is no mistake
        full: use prompts longer than the model's window, however wide it is
        json: print one JSON object instead of text
        seed: of the random prompts
        adapter: a LoRA adapter of the first side that is a folder or a .gguf file, merged as it is read
        cache_dtype: of keys and values of the side that is not the truth: float32, bfloat16, float16 or int8; default:
            that of --dtype
    """
    if quantized not in (*QUANTS, None):
        raise UsageError(f"--quantized {quantized!r} is not one of {', '.join(QUANTS)}")
    if dtype not in DTYPE_NAMES:  # before torch is imported
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(DTYPE_NAMES)}")
    if DTYPE_NAMES.get(options.cache_dtype or "") == "float64" != DTYPE_NAMES[dtype]:
        raise UsageError("--cache_dtype float64 is for arithmetic in float64: add --dtype float64, or omit it")
    if model is not None and not any(s.startswith(("http://", "https://")) for s in (a, b)):
        raise UsageError("--model is a server's name for it, and neither side is a server")
    if file is not None:
        _require_random(full, seed)
    with starting("starting PyTorch"):
        from mistral.loader.runtime import DTYPES
        from mistral.oracle import comparison
        from mistral.oracle.compare import compare as compare_sides

    sides, found = _sides(a, b, model, key_of(key_env), options)
    for one in sides:
        if one.prompts is not None:
            _require_random(full, seed, f"{one.name} has its own")
    prompts = None if file is None else _read_prompts(file, found)
    report = compare_sides(
        *sides,
        compute=DTYPES[dtype],
        quantized=quantized,
        prompts=prompts,
        full=full,
        seed=seed,
        progress=terminal.Bar("comparing", "step"),
    )
    print(comparison.as_json(report) if json else comparison.as_text(report))
    if not report.same:
        raise ChecksFailed


@flat(options=LoadOptions(), omit=AS_LOADED)
def mutants(
    folder: str | None = None,
    *,
    output: str | None = None,
    mutant: list[str] | None = None,
    file: str | None = None,
    full: bool = False,
    seed: int = 0,
    options: LoadOptions,
) -> None:
    """List the mutants, or write what a model with one of them outputs, to prove that a test would catch it.

    python -m main mutants
    python -m main mutants x.safetensors --output wrong
    python -m main mutants mistral-7B-v0.1 --output wrong --mutant window_one_more --mutant mask_leak

    A mutant is a named mistake, injected into the model. OUTPUT is a folder, for an .npz of each mutant that changes
    this model's numbers on these prompts: prompt_ids, prompt_lens and logprobs [T, V]; and right.npz, without a
    mistake. A test that reads an engine's log-probs must accept right.npz and no other. FOLDER may be a pack with
    weights, whose prompts are then used.

    Args:
        output: the folder to write to; default: list the mutants
        mutant: write only this one; default: all that matter here
        file: a file of prompts, as `complete` reads them; default: random prompts
        full: use prompts longer than the model's window, however wide it is
        seed: of the random prompts
    """
    from mistral.oracle.mutants import MUTANTS, find_mutant

    for name in mutant or ():
        find_mutant(name)  # refuse an unknown one before anything is loaded
    if output is None:
        if folder is not None or file is not None or mutant or full or seed:
            raise UsageError("give --output, a folder to write to; without any flag the mutants are listed")
        width = max(map(len, MUTANTS))
        for one in MUTANTS.values():
            print(f"{one.name:{width}}  {one.what}")
        return
    from mistral.oracle import pack as packing
    from mistral.oracle.mutant_files import write

    with model_of(folder, options) as found:
        if folder is not None and packing.is_pack(folder) and file is None:
            _require_random(full, seed, f"{folder} has its own")
            prompts = packing.read(folder).prompts
        else:
            prompts = _prompts(found, file, full, seed)
        wanted = mutant or list(MUTANTS)
        written = write(found, prompts, output, wanted, terminal.Bar("injecting", "mutant"))
    terminal.echo_err(f"wrote {counted(len(written), 'file')} in {output}: {', '.join(written)}")
    if left := [name for name in wanted if f"{name}.npz" not in written]:
        terminal.echo_err(f"note: these change nothing on this model and these prompts: {', '.join(left)}")


@flat(
    options=LoadOptions(device="cpu", execution="eager"),
    omit=(
        *("device", "execution", "cache_dtype", "quant", "threads", "max_batch_size", "draft", "parallel"),
        "prompt_dtype",
    ),
)
def trace(
    folder: str | None = None,
    prompt: str | None = None,
    *,
    output: str | None = None,
    file: str | None = None,
    plan: str | None = None,
    chunk_size: int | None = None,
    window: int | None = None,
    options: LoadOptions,
) -> None:
    """Write every activation of prompts to a file, or print what the steps of a plan do.

    python -m main trace "Once upon a time" -o t.safetensors
    python -m main trace mistral-7B-v0.1 "Once upon a time" -o t.safetensors --dtype float64
    python -m main trace mistral-7B-v0.1 --file prompts.jsonl -o t.safetensors
    python -m main trace --plan 7,3 --chunk_size 4 --window 3

    Activations are [T, width], under the names of the modules whose output they are (layers.0.attention.wq), computed
    eagerly and without a cache; `compare` accepts the file as a side. The prompts of --file are packed into one
    forward, one after the other. --plan prints as JSON, for prompts of these lengths and a layer of that window:
    positions, slots and masks of each step.

    Args:
        output: the file to write
        file: a file of prompts, as `complete` reads them
        plan: lengths of prompts, with commas between
        chunk_size: with --plan: tokens of each prompt in a step; default: all at once
        window: with --plan: of the layer; default: none
        dtype: of the arithmetic: float32, bfloat16, float16 or float64; default: float32
        attention: sdpa or eager; default: sdpa, in float64 eager
    """
    flags.require_at_least(1, chunk_size=chunk_size, window=window)
    if (plan is None) == (output is None):
        raise UsageError("give --output for activations, or --plan for slots and masks")
    if plan is not None:
        given = {"FOLDER": folder, "a prompt": prompt, "--file": file}
        given |= {"--dtype": options.dtype, "--attention": options.attention}
        if extra := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"--plan does not go with {extra[0]}: it is about lengths, a chunk and a window")
        from mistral.oracle.trace import plans

        lens = flags.numbers("plan", plan)
        print(one_line({"chunk": chunk_size, "window": window, "steps": plans(lens, chunk_size, window)}))
        return
    if chunk_size is not None or window is not None:
        raise UsageError("--chunk_size and --window belong to --plan; activations are those of one forward")
    require_there(folder, prompt)
    asked = read_prompts(prompt, None, file)
    loaded = open_model(folder, replace(options, max_batch_size=len(asked)))
    require_known_ids(asked, loaded)
    from mistral.oracle.trace import write

    assert output is not None
    prompts = _ids(asked, loaded.tokenizer, file)
    written, names = write(loaded, prompts, output)
    count = sum(map(len, prompts))
    what = f"{counted(names, 'activation')} of {counted(count, 'id')}"
    terminal.echo_err(f"wrote {written}: {what}, {written.stat().st_size / 1e6:.1f} MB")


def _sides(
    a: str, b: str, model: str | None, key: str | None, options: LoadOptions
) -> tuple[list[Side], Folder | None]:
    """What two words of `compare` mean, and the first folder of the two; an adapter is for that one alone."""
    from mistral.oracle.sides import FolderSide, side

    first = side(a, model, options, key)
    adapted = bool(options.adapter) and isinstance(first, FolderSide)
    sides = [first, side(b, model, replace(options, adapter=()) if adapted else options, key)]
    folders = [one for one in sides if isinstance(one, FolderSide)]
    if options.adapter and not any(one.adapted for one in folders):
        raise UsageError("--adapter is for a folder or a .gguf file, and neither side is one")
    if options.cache_dtype not in (None, "auto") and not folders:
        raise UsageError("--cache_dtype is measured on a folder or a .gguf file, and neither side is one")
    return sides, folders[0].found if folders else None


def _prompts(found: Folder, file: str | None, full: bool, seed: int) -> list[Tensor]:
    from mistral.oracle.inputs import prompts_for

    if file is None:
        return prompts_for(found.args, full, seed)
    _require_random(full, seed)
    return _read_prompts(file, found)


def _require_random(full: bool, seed: int, others: str = "--file gives others") -> None:
    """Refuse what says how random prompts are made, where something else gives the prompts."""
    for flag, given in (("--full", full), ("--seed", seed)):
        if given:
            raise UsageError(f"{flag} is about random prompts, and {others}: omit one")


def _read_prompts(file: str, found: Folder | None) -> list[Tensor]:
    """Ids of a file's prompts; text needs a tokenizer."""
    from mistral.formats.tokenizers import load_tokenizer
    from mistral.formats.words import words_of

    asked, tokenizer = read_file(file), None
    if any(isinstance(one.prompt, str) for one in asked):
        if found is None:
            raise UsageError(f"{file} has texts, and no side has a tokenizer: give lists of ids")
        tokenizer, notes = words_of(found.words, found.args, found.path)
        if tokenizer is None:
            tokenizer = load_tokenizer(found.words, found.args.vocab_size, found.path)  # which says what is missing
        for note in notes:
            terminal.echo_err(f"note: {note}")
    if found is not None:
        require_known_ids(asked, found)
    return _ids(asked, tokenizer, file)


def _ids(asked: Sequence[PromptLine], tokenizer: TokenizerLike | None, file: str | None) -> list[Tensor]:
    """Ids of prompts; the tokenizer is for those that are texts."""
    import torch

    from mistral.tokenizer import encode

    if any(one.suffix is not None for one in asked):
        raise UsageError(f"{file} has prompts with a suffix: here each is one text, or a list of ids")
    if any(one.adapter is not None for one in asked):
        raise UsageError(f"{file} has prompts with an adapter of their own: here there is one, by --adapter")
    found = []
    for one in asked:
        if isinstance(one.prompt, str):
            assert tokenizer is not None
            found.append(torch.tensor(encode(tokenizer, one.prompt)))
        else:
            found.append(torch.tensor(one.prompt))
    return found
