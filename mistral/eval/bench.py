"""How fast a model runs here, beside what this machine could do at best; measured on the spot.

Decoding reads every weight once a token, so its limit is the memory's; the rate of reading memory is measured in the
same run, before and after. Prefill is held against the rate of one large product. Knows nothing about the command line.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mistral.args import ModelArgs, Moe
from mistral.engine import STEP_TOKENS
from mistral.formats.random import random_folder
from mistral.formats.releases import COMPARED, RELEASES
from mistral.loader.assemble import assemble
from mistral.loader.load import load, windowed
from mistral.loader.options import LoadOptions
from mistral.model import Transformer
from mistral.parameters import EMBEDDINGS, parameters
from mistral.quant.linear import QuantizedLinear
from mistral.util import memory
from mistral.util.errors import UsageError
from mistral.util.progress import Bar

# Shapes that can be measured without weights.
SHAPES = {
    "7b": ModelArgs(**{name: getattr(RELEASES[0], name) for name in COMPARED}),
    "1b": ModelArgs(
        dim=2048,
        n_layers=16,
        head_dim=128,
        hidden_dim=7168,
        n_heads=16,
        n_kv_heads=4,
        norm_eps=1e-5,
        vocab_size=32000,
        sliding_window=4096,
        rope_theta=1e4,
    ),
    "moe": ModelArgs(  # half of Mixtral 8x7B's widths: 1.6 B weights, of which a token goes through 0.5 B
        dim=2048,
        n_layers=4,
        head_dim=128,
        hidden_dim=7168,
        n_heads=16,
        n_kv_heads=4,
        norm_eps=1e-5,
        vocab_size=32000,
        moe=Moe(8, 2),
    ),
}
PROBE = 1 << 28  # bytes read to see how fast memory is
EXPERTS = ".experts."  # in the names of experts' weights
STEPS = 8  # decode steps in a repeat
PRODUCT = 2048  # rows and columns of the product to see how fast arithmetic is


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        what: "prefill", "decode" (steps at a context), or "generate" (as many tokens from an empty cache).
        context: positions in the cache (decode, generate), or tokens of the prompt (prefill).
        batch: sequences.
        tokens: that a repeat processes or generates of each sequence.
        rate: tokens a second, the median over the repeats.
        low, high: the slowest and the fastest repeat.
        mean, deviation: over the repeats; the standard deviation is that of a sample, 0 of one repeat.
        limit: tokens a second at the rates measured beside it: what memory (decode) or arithmetic (prefill) allow.
    """

    what: str
    context: int
    batch: int
    tokens: int
    rate: float
    low: float
    high: float
    mean: float
    deviation: float
    limit: float

    @property
    def test(self) -> str:
        """What llama-bench calls it: pp512, tg128, tg8 @ d4096; of several sequences, x 8."""
        if self.what == "prefill":
            return f"pp{self.tokens}"
        depth = f" @ d{self.context}" if self.context else ""
        return f"tg{self.tokens}{depth}{f' x {self.batch}' if self.batch > 1 else ''}"


def read_rate(device: torch.device) -> float:
    """Bytes a second that are read from memory, the best of five."""
    x = torch.ones(PROBE // 4, device=device)
    return PROBE / min(seconds(lambda: x.sum(), device) for _ in range(5))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product, the best of three."""
    x, w = (torch.ones(PRODUCT, PRODUCT, device=device, dtype=dtype) for _ in range(2))
    return 2 * PRODUCT**3 / min(seconds(lambda: x @ w, device) for _ in range(3))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def stored_bytes(model: Transformer) -> int:
    """Bytes of the weights in memory: a matrix that embeddings and output share counts once."""
    places = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.nbytes}
    return sum(places.values())


def weight_bytes(model: Transformer, batch: int = 1) -> int:
    """Bytes of weights that a decode step reads: all but the embeddings, of which it reads a row.

    Of experts, those that tokens of a batch choose: on average, where each chooses on its own.
    """
    moe = model.args.moe
    chosen = 1.0 if moe is None else 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
    within = EMBEDDINGS.removesuffix("weight")
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items() if not name.startswith(within)}
    experts = sum(size for name, size in sizes.items() if EXPERTS in name)
    return round(sum(sizes.values()) - experts + experts * chosen)


def weights_in_products(model: Transformer) -> int:
    """Weights that each token is multiplied with, but for the output matrix, which only a prompt's last one is."""
    moe, total = model.args.moe, 0.0
    for name, module in model.layers.named_modules():
        if isinstance(module, torch.nn.Linear | QuantizedLinear):
            share = 1.0 if moe is None or EXPERTS not in name else moe.num_experts_per_tok / moe.num_experts
            total += share * module.in_features * module.out_features
    return round(total)


@torch.inference_mode()
def prefill(model: Transformer, tokens: int, chunk: int = STEP_TOKENS) -> float:
    """Seconds to process a prompt of random ids and make the first token's logits."""
    ids = torch.randint(3, model.args.vocab_size, (tokens,), device=model.device)
    cache = model.make_cache(1, tokens)

    def work() -> None:
        for piece in ids.split(chunk):
            plan = replace(cache.plan([len(piece)]), prompts=frozenset({0}))  # as the engine has it
            h = model.step(piece, plan, cache)
            cache.commit(plan)
        model.logits(h[-1:])

    return seconds(work, model.device)


@torch.inference_mode()
def decode(model: Transformer, context: int, batch: int, steps: int) -> list[float]:
    """Seconds of each of `steps` greedy decode steps after `context` positions, the first left out."""
    cache = model.make_cache(batch, context + steps + 1)
    cache.lengths = [context] * batch
    for layer in cache.layers:  # memory that was never written is one page of zeros, whatever its size
        for storage in layer.storage:
            storage.fill_(1)
    ids = torch.randint(3, model.args.vocab_size, (batch,), device=model.device)
    times = []

    def work() -> None:
        nonlocal ids
        ids = model.logits(model.forward_partial(ids, [1] * batch, cache)).argmax(-1)
        ids.tolist()

    for _ in range(steps + 1):
        times.append(seconds(work, model.device))
    return times[1:]


def measure(
    model: Transformer,
    *,
    prompts: Sequence[int] = (512,),
    generate: Sequence[int] = (128,),
    contexts: Sequence[int] = (32, 4096),
    batches: Sequence[int] = (1, 8),
    repeats: int = 5,
) -> Iterator[Row]:
    """Measure, one row after the other; see `Row`.

    Args:
        prompts: lengths of prompts to prefill.
        generate: tokens to generate, from an empty cache.
        contexts: positions in the cache when decoding.
        batches: sequences decoded together, at the first of the contexts; the other contexts have one.
        repeats: of everything.
    """
    device = model.device
    decode(model, contexts[0], 1, 1)  # the first step of a process is slower
    cases = [*((contexts[0], b) for b in batches), *((c, 1) for c in contexts[1:])]
    taken: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    memory: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(repeats):  # in turn: a machine's variance lasts longer than a case, and their ratios matter
        for context, batch in cases:
            memory[context, batch].append(read_rate(device))
            taken[context, batch].append(batch / statistics.median(decode(model, context, batch, STEPS)))
    for (context, batch), rates in taken.items():
        keys = batch * model.cache_bytes(context + 1)
        rate = statistics.median(memory[context, batch])
        yield _row("decode", context, batch, STEPS, rates, batch * rate / (weight_bytes(model, batch) + keys))
    for tokens in generate:
        rates, reading = [], []
        for _ in range(repeats):
            reading.append(read_rate(device))
            rates.append(tokens / sum(decode(model, 0, 1, tokens)))
        keys = model.cache_bytes(tokens // 2 + 1)  # on average
        yield _row("generate", 0, 1, tokens, rates, statistics.median(reading) / (weight_bytes(model) + keys))
    in_prompts = torch.bfloat16 if model.rounds_prompts else model.dtype
    for tokens in prompts:
        rates, arithmetic = [], []
        for _ in range(repeats):
            arithmetic.append(product_rate(device, in_prompts))
            rates.append(tokens / prefill(model, tokens))
        limit = statistics.median(arithmetic) / (2 * weights_in_products(model))
        yield _row("prefill", tokens, 1, tokens, rates, limit)


def _row(what: str, context: int, batch: int, tokens: int, rates: list[float], limit: float) -> Row:
    found = statistics.median(rates), min(rates), max(rates), statistics.fmean(rates)
    return Row(what, context, batch, tokens, *found, statistics.stdev(rates) if len(rates) > 1 else 0.0, limit)


def report(
    folder: str | None,
    shape: str | None,
    options: LoadOptions,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    prompts: Sequence[int],
    generate: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Load a model and measure it; everything there is to say, ready for JSON.

    Args:
        folder: see `mistral.load`; shape: one of SHAPES, for random weights instead.
        options: of loading.
        contexts, batches, prompts, generate, repeats: see `measure`.

    Raises:
        ValueError: a subclass that names what cannot be.
    """
    if shape is not None and shape.lower() not in SHAPES:
        raise UsageError(f"no shape is called {shape!r}: {', '.join(SHAPES)}")
    before, began = _peak(), time.perf_counter()
    if shape is None:
        loaded = load(folder, options=options)
        model, run, what = loaded.model, loaded.runtime, loaded.describe()
        name, count = Path(loaded.folder).name.removesuffix(".gguf"), loaded.parameters
    else:
        found = windowed(random_folder(SHAPES[shape.lower()], Path()), options)
        model, run = assemble(found, options=options)
        what = f"random weights in the shape {shape.lower()}; {run.describe()}"
        name, count = shape.lower(), sum(parameter.numel for parameter in parameters(model.args).values())
    loading = time.perf_counter() - began
    for context, batch in ((contexts[0], max(batches)), (max(contexts), 1)):
        keys = batch * model.cache_bytes(context + 1)
        memory.require(keys, model.device, f"keys and values of {batch:,} x {context:,} positions", "measure less")
    first = prefill(model, 8)
    total = len(batches) + len(contexts) - 1 + len(generate) + len(prompts)
    measured = measure(model, prompts=prompts, generate=generate, contexts=contexts, batches=batches, repeats=repeats)
    rows = []
    with Bar("measuring", "row", total) as bar:
        for row in measured:
            rows.append(row)
            bar.update(1)
    return {
        "model": what,
        "name": f"{name} {run.quant or '+'.join(run.blocks) or str(run.weights).removeprefix('torch.')}",
        "parameters": count,
        "size_bytes": stored_bytes(model),
        "backend": model.device.type.upper(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(model.device),
        "repeats": repeats,
        "load_seconds": None if shape else loading,
        "first_token_seconds": first,
        "weight_bytes": weight_bytes(model),
        "peak_bytes": max(0, _peak() - before),
        "rows": [vars(row) for row in rows],
    }


def _peak() -> int:
    """Most bytes that this process had in memory so far, files' pages included; 0 where nobody can say."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
