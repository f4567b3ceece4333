"""bench: how fast a model runs here."""

from __future__ import annotations

from mistral.cli import flags
from mistral.cli.prompts import default_folder
from mistral.cli.starting import starting
from mistral.loader.options import LoadOptions
from mistral.util.errors import UsageError
from mistral.util.flat import flat


@flat(options=LoadOptions(), omit=("max_batch_size", "draft", "parallel"))
def bench(
    folder: str | None = None,
    *,
    shape: str | None = None,
    contexts: str = "32,4096",
    batches: str = "1,8",
    prompts: str = "512",
    generate: str = "128",
    repeats: int = 5,
    json: bool = False,
    plot: str | None = None,
    options: LoadOptions,
) -> None:
    """Measure prefill and decoding, beside what memory and arithmetic would allow at best.

    python -m main bench
    python -m main bench mistral-7B-v0.1 --quant int4
    python -m main bench --shape 7b --contexts 32,4096 --batches 1,8 --prompts 512,8192
    python -m main bench --shape 1b --json > bench.json
    python -m main bench mistral-7B-v0.1 -p 512 -n 128 -d 32,4096 -r 5

    The first table is that of llama-bench: pp512 is a prompt of 512 tokens, tg128 generates 128 from an empty cache,
    tg8 @ d4096 generates 8 with 4096 positions in the cache (x 8: in each of 8 sequences, all counted). It has means
    and standard deviations over the repeats. llama-bench's flags -p, -n, -d, -r and -t mean the same here.

    The second table has medians over the repeats, and the slowest and fastest of them. The limit of decoding is the
    rate at which memory is read, measured between the repeats; that of prefill is the rate of one large product in
    the dtype of the arithmetic, which weights of few bits may exceed: theirs are products of integers. Close other
    programs: on a busy machine every figure is too low.

    Args:
        shape: random weights in the shape of a model: 7b, 1b or moe (1.6 B, a small Mixtral)
        contexts: positions in the cache when decoding, with commas between; the first one also for the batches
        batches: sequences decoded together
        prompts: lengths of prompts to prefill
        generate: tokens to generate from an empty cache; 0 for none
        repeats: how often everything is measured
        json: print one JSON object instead of a table
        plot: a file for a picture of the rates against the positions (.svg, .png; needs matplotlib)
    """
    asked = {
        "contexts": flags.numbers("contexts", contexts, 0),
        "batches": flags.numbers("batches", batches),
        "prompts": flags.numbers("prompts", prompts),
        "generate": [n for n in flags.numbers("generate", generate, 0) if n],
    }
    if not 1 <= repeats <= 1000:
        raise UsageError(f"--repeats is {repeats}; it must be between 1 and 1000")
    if folder is not None and shape is not None:
        raise UsageError("FOLDER and --shape: give one of them")
    with starting("starting PyTorch"):
        from mistral.eval import bench as measuring
    from mistral.eval import bench_text

    if plot is not None:
        bench_text.require_plotting(plot)
    chosen = folder if shape is not None else default_folder(folder)
    report = measuring.report(chosen, shape, options, repeats=repeats, **asked)
    print(bench_text.as_json(report) if json else bench_text.as_text(report))
    if plot is not None:
        bench_text.plot(report, plot)
