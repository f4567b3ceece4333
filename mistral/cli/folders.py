"""convert and inspect: what a folder is, and another one made of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.cli import prompts, terminal
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.formats.convert import Calibrate


def convert(
    src: str,
    dst: str,
    *,
    to: str,
    dtype: str | None = None,
    quant: str | None = None,
    calibrate: str | None = None,
    adapter: str | None = None,
    sliding_window: str | int = "auto",
) -> None:
    """Write a model folder again: in the other layout, as safetensors, in another dtype, merged, or quantized.

    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-hf --to hf
    python -m main convert mistral-7B-v0.1-hf mistral-7B-v0.1-again --to mistral
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-fp16 --to mistral --dtype float16
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-int4 --to mistral --quant int4
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-int4 --to mistral --quant int4 --calibrate texts.txt
    python -m main convert mistral-7B-v0.1 mistral-7B-v0.1-mine --to hf --adapter my-lora

    SRC is a folder in either layout, a .gguf file, a hub id, or a pack with weights; DST a folder that does not exist
    yet. Weights stay the same bit for bit unless --dtype, --quant or --adapter is given, and are never all in memory.
    DST appears when it is complete, not before. A folder written with --quant loads at once, and only this library
    reads it. An adapter is merged in float32, and rounded once to the dtype of the weights.

    Args:
        to: the layout to write: mistral or hf
        dtype: of the weights written: float32, bfloat16 or float16; default: as they are
        quant: int8 or int4: write quantized weights; default: as they are
        calibrate: a text to run the model on first, which shows where int4 must err least; needs the memory to load it
        adapter: a LoRA adapter to merge into the weights: a folder of PEFT's or of mistral-finetune's
        sliding_window: a number, or none, to be written; default: what SRC says
    """
    from mistral.formats.convert import convert as convert_folder
    from mistral.formats.convert import write_folder
    from mistral.formats.folder import with_window
    from mistral.loader.options import window_of

    window = window_of(sliding_window)
    calibration: Calibrate | None = None
    if calibrate is not None:
        if quant != "int4":
            raise UsageError("--calibrate is for --quant int4: add that, or omit it")
        from mistral.loader.calibration import calibrate as calibrate_on

        calibration = partial(calibrate_on, file=Path(calibrate))
    if src.endswith(".safetensors"):
        with prompts.model_of(src) as found:
            if not isinstance(window, str):
                found = with_window(found, window)
            written = write_folder(found, dst, to, dtype=dtype, quant=quant, adapter=adapter, calibrate=calibration)
    else:
        written = convert_folder(
            src, dst, to, dtype=dtype, quant=quant, adapter=adapter, sliding_window=window, calibrate=calibration
        )
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
    from mistral.formats.inspect import as_json, as_text
    from mistral.formats.inspect import inspect_folder as report_on

    chosen = prompts.default_folder(folder)
    if chosen is not None and inspect_adapter.is_one(chosen):
        told = inspect_adapter.report(chosen)
        print(as_json(told) if json else inspect_adapter.as_text(told))
        return
    report = report_on(chosen)
    print(as_json(report) if json else as_text(report))
