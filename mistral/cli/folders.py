"""convert and inspect: what a folder is, and another one made of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.cli import prompts, terminal
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.formats.adapter_forms import ConvertedAdapter
    from mistral.formats.convert import Calibrate, Converted


def convert(
    src: str,
    dst: str,
    *,
    to: str,
    dtype: str | None = None,
    quant: str | None = None,
    calibrate: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    sliding_window: str | int = "auto",
    instruct: bool = False,
) -> None:
    """Write a model folder again: in the other layout, as safetensors, in another dtype, merged, or quantized.

    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-hf --to hf
    python -m main convert mistral-7B-v0.1-hf mistral-7B-v0.1-again --to mistral
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-fp16 --to mistral --dtype float16
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-int4 --to mistral --quant int4
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-int4 --to mistral --quant int4 --calibrate texts.txt
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-mine --to hf --adapter my-lora
    python -m main convert my-lora my-lora-finetune --to mistral --base mistral-7B-v0.1

    SRC is a folder in either layout, a .gguf file, a hub id, a pack with weights, or a LoRA adapter, which becomes one
    in the form of mistral-finetune (--to mistral) or of PEFT (--to hf); DST a folder that does not exist yet. Weights
    stay the same bit for bit unless --dtype, --quant or --adapter is given, and are never all in memory.
    DST appears when it is complete, not before. A folder written with --quant loads at once, and only this library
    reads it. An adapter is merged in float32, and rounded once to the dtype of the weights.

    Args:
        to: the layout to write: mistral or hf
        dtype: of the weights written: float32, bfloat16 or float16; default: as they are
        quant: int8 or int4: write quantized weights; default: as they are
        calibrate: a text to run the model on first, which shows where int4 must err least; needs the memory to load it
        adapter: a LoRA adapter to merge into the weights: a folder of PEFT's or of mistral-finetune's
        base: where SRC is an adapter: the folder of its base model, for its shape; default: the one that it names
        sliding_window: a number, or none, to be written; default: what SRC says
        instruct: SRC is for conversations, though nothing in it says so: with --to hf, write its tokenizer's template
    """
    from mistral.formats import inspect_adapter
    from mistral.formats.convert import convert as convert_folder
    from mistral.formats.convert import write_folder
    from mistral.formats.folder import with_window
    from mistral.formats.layouts import NATIVE
    from mistral.loader.options import window_of

    window = window_of(sliding_window)
    if inspect_adapter.is_one(src):
        given = {"--dtype": dtype, "--quant": quant, "--calibrate": calibrate, "--adapter": adapter}
        given |= {
            "--sliding_window": None if window == "auto" else "given",
            "--instruct": "given" if instruct else None,
        }
        _convert_adapter(src, dst, to, base, [flag for flag, value in given.items() if value is not None])
        return
    if base is not None:
        raise UsageError("--base is the base model of an adapter, and SRC is none")
    if instruct and to == NATIVE.to:
        raise UsageError("--instruct is for --to hf: Mistral's layout has no template in a file; omit it")
    how: dict[str, Any] = {"dtype": dtype, "quant": quant, "adapter": adapter, "instruct": instruct}
    how["calibrate"] = _calibration(calibrate, quant)
    if src.endswith(".safetensors"):
        with prompts.model_of(src) as found:
            windowed = found if isinstance(window, str) else with_window(found, window)
            written = write_folder(windowed, dst, to, **how)
    else:
        written = convert_folder(src, dst, to, sliding_window=window, **how)
    _report(written)


def _convert_adapter(src: str, dst: str, to: str, base: str | None, given: list[str]) -> None:
    """`convert` of a LoRA adapter.

    Args:
        given: flags that are about models.
    """
    if given:
        raise UsageError(f"{src} is an adapter, whose numbers stay the same: omit {given[0]}")
    from mistral.formats.adapter_forms import convert_adapter

    _report(convert_adapter(src, dst, to, base))


def _calibration(file: str | None, quant: str | None) -> Calibrate | None:
    """What finds out on a text where int4 must err least."""
    if file is None:
        return None
    if quant != "int4":
        raise UsageError("--calibrate is for --quant int4: add that, or omit it")
    from mistral.loader.calibration import calibrate

    return partial(calibrate, file=Path(file))


def _report(written: Converted | ConvertedAdapter) -> None:
    terminal.echo_err(f"wrote {written.describe()}")
    for note in written.notes:
        terminal.echo_err(f"note: {note}")


def inspect_folder(folder: str | None = None, *, json: bool = False) -> None:
    """Report what a folder is, what it needs, and what looks wrong; no tensor is read.

    python -m main inspect
    python -m main inspect mistral-7B-v0.1
    python -m main inspect mistral-7B-v0.1 --json

    Release, layout, files, dtypes, window and theta with the rule used, tokenizer, memory for weights
    and for the cache of one sequence, anything suspicious, and the vLLM command that serves the folder; of a
    LoRA adapter its base, rank, scale and matrices. Without FOLDER: the bundled model. Only a .pth file needs
    PyTorch, and seconds.

    Args:
        json: print one JSON object instead of text
    """
    from mistral.formats import inspect_adapter
    from mistral.formats.inspect import as_json
    from mistral.formats.inspect import inspect_folder as report_on
    from mistral.formats.inspect_text import as_text

    chosen = prompts.default_folder(folder)
    if chosen is not None and inspect_adapter.is_one(chosen):
        told = inspect_adapter.report(chosen)
        print(as_json(told) if json else inspect_adapter.as_text(told))
        return
    report = report_on(chosen)
    print(as_json(report) if json else as_text(report))
