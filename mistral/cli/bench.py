"""bench: how fast a model runs here."""

from __future__ import annotations

from typing import Any

from mistral.cli import flags
from mistral.util.errors import UsageError


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
        raise UsageError("FOLDER and --shape: give one of them")
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
