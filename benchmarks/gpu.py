"""Every row of docs/speed.md about a GPU, measured on the one that is there, at the shape of 7B with random weights.

    python -m benchmarks.gpu [--rounds 5] [--shape 7b] [--json FILE]

Wants some 50 GB of the GPU's memory and, for the rows beside it, `pip install transformers`. Programs take turns within
a round; a figure is the median over the rounds, a ratio the median of the ratios within rounds. The limits (rates of a
copy and of a large product) are measured in the same rounds. Sizes that a program meets for the first time are compiled
before the first round. `--device cpu` tries the script itself, with a small `--shape`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mistral.args import ModelArgs
from mistral.eval import bench
from mistral.eval.bench import seconds
from mistral.formats.random import random_folder
from mistral.loader.load import assemble
from mistral.model import Transformer
from mistral.oracle.layerwise import their_config

SHAPES = {
    **bench.SHAPES,
    "tiny": ModelArgs(
        dim=64,
        n_layers=2,
        head_dim=16,
        hidden_dim=96,
        n_heads=4,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=500,
        sliding_window=32,
        rope_theta=1e4,
    ),
}
STEPS = 32  # decode steps that are timed
COPY = 1 << 30  # bytes
SIDE = 8192  # of the product

Rates = dict[str, Callable[[], float]]


class Limits:
    """What the device can do at best: bytes a second of a copy, operations a second of a bf16 product."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        size, side = (COPY >> 8, SIDE >> 5) if tiny else (COPY, SIDE)
        self.device = device
        # Numbers that vary: a product of zeros runs faster than one of weights.
        self.source = torch.randn(size // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.x, self.w = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def copy(self) -> float:
        """Bytes read and written a second."""
        times = [seconds(lambda: self.target.copy_(self.source), self.device) for _ in range(9)]
        return 2 * self.source.nbytes / statistics.median(times)

    def product(self) -> float:
        """Operations a second."""
        times = [seconds(lambda: self.x @ self.w, self.device) for _ in range(9)]
        return 2 * len(self.x) ** 3 / statistics.median(times)


def ours(args: ModelArgs, device: torch.device, quant: str | None) -> Transformer:
    """Our model, its decode steps captured where there is a GPU."""
    options: dict[str, Any] = {"quant": quant} if device.type == "cuda" or quant is None else {}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    execution = "cuda_graph" if device.type == "cuda" else "auto"
    return assemble(random_folder(args, Path()), device=device, dtype=dtype, execution=execution, **options)[0]


def our_rates(model: Transformer, name: str, questions: list[tuple[str, int, int]]) -> Rates:
    """Tokens a second of ours, by what is asked."""

    def one(what: str, context: int, batch: int) -> float:
        if what == "prefill":
            return context / bench.prefill(model, context)
        return batch / statistics.median(bench.decode(model, context, batch, STEPS))

    return {f"{name}: {w} {c} x {b}": functools.partial(one, w, c, b) for w, c, b in questions}


def their_rates(args: ModelArgs, device: torch.device, questions: list[tuple[str, int, int]]) -> Rates:
    """The same of transformers, eager, and with a static cache and compiled steps."""
    from transformers import MistralForCausalLM

    config = their_config(args, max_position_embeddings=2**16, eos_token_id=None)
    with device:
        model = MistralForCausalLM(config).bfloat16().eval()

    def ids(context: int, batch: int) -> torch.Tensor:
        return torch.randint(3, args.vocab_size, (batch, context), device=device)

    def decode(context: int, batch: int, kind: str | None) -> float:
        prompt = ids(context, batch)

        def run(new: int) -> float:
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "cache_implementation": kind}
            return seconds(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), device)

        return batch * STEPS / (run(STEPS + 4) - run(4))

    @torch.inference_mode()
    def prefill(context: int) -> float:
        prompt = ids(context, 1)
        return context / seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1), device)

    rates: Rates = {}
    for what, context, batch in questions:
        if what == "prefill":
            rates[f"transformers: prefill {context} x 1"] = functools.partial(prefill, context)
            continue
        for kind, name in ((None, "transformers eager"), ("static", "transformers static, compiled")):
            rates[f"{name}: decode {context} x {batch}"] = functools.partial(decode, context, batch, kind)
    return rates


def prefill_operations(args: ModelArgs, model: Transformer, tokens: int) -> float:
    """What a prompt costs: its products, and scores and values of the keys that its windows show."""
    total = 2.0 * bench.weights_in_products(model) * tokens
    for window in args.windows:
        seen = min(window or tokens, tokens)
        keys = seen * (seen + 1) / 2 + (tokens - seen) * seen
        total += 4 * args.n_heads * args.head_dim * keys
    return total


def machine(device: torch.device) -> dict[str, str]:
    """What the figures are of."""
    found = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        values = done.stdout.splitlines()[0].split(", ") if done.stdout else []
        found |= dict(zip(asked.split(","), values, strict=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, args, tiny = torch.device(options.device), SHAPES[options.shape], options.shape == "tiny"
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: `--device cpu --shape tiny` tries the script itself")
    about = machine(device)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)

    short, long, longest, wide = (32, 64, 128, 4) if tiny else (1024, 8192, 32768, 64)
    model, small, limits = ours(args, device, None), ours(args, device, "int8"), Limits(device, tiny)
    questions = [("decode", 32, 1), ("decode", short, wide), ("prefill", long, 1), ("prefill", longest, 1)]
    rates: Rates = {"copy": limits.copy, "product": limits.product}
    rates |= our_rates(model, "bf16", questions) | our_rates(small, "int8", questions[:1])
    if importlib.util.find_spec("transformers") is not None:
        rates |= their_rates(args, device, questions[:3])
    found: dict[str, list[float]] = {name: [] for name in rates}
    for n in range(options.rounds + 1):
        for name, rate in rates.items():
            value = rate()
            if n:  # the first round compiles and captures
                found[name].append(value)
        print(f"round {n} of {options.rounds}", file=sys.stderr, flush=True)

    def ratio(a: str, b: str, factor: float = 1.0) -> float:
        return statistics.median(factor * x / y for x, y in zip(found[a], found[b], strict=True))

    one, many = "bf16: decode 32 x 1", f"bf16: decode {short} x {wide}"
    first, second = f"bf16: prefill {long} x 1", f"bf16: prefill {longest} x 1"
    step = {b: bench.weight_bytes(model) + b * model.cache_bytes(c + 1) for c, b in ((32, 1), (short, wide))}
    costs = {n: prefill_operations(args, model, n) / n for n in (long, longest)}
    rows = [
        ("decode, one, share of the copy rate", 0.85, ratio(one, "copy", step[1])),
        ("decode, one, int8 over bf16", 1.6, ratio("int8: decode 32 x 1", one)),
        (f"decode, {wide} at {short}, share of the copy rate", 0.6, ratio(many, "copy", step[wide] / wide)),
        (f"prefill {long}, share of the product rate", 0.65, ratio(first, "product", costs[long])),
        (f"prefill {longest}, share of the product rate", 0.65, ratio(second, "product", costs[longest])),
        (f"seconds of prefill {longest} over {long}, at most", 4.3, ratio(first, second, longest / long)),
    ]
    for what in ("decode 32 x 1", f"decode {short} x {wide}", f"prefill {long} x 1"):
        rows += [
            (f"{what}, over {t}", 1.2, ratio(f"bf16: {what}", t)) for t in found if t.startswith("tr") and what in t
        ]
    print()
    for name, values in found.items():
        print(f"{name:45} {statistics.median(values):16.1f}")
    print()
    for name, aim, value in rows:
        print(f"{name:70} {value:6.2f}   aim {aim}")
    if options.json:
        told = {
            "machine": about,
            "rates": found,
            "rows": [dict(zip(("row", "aim", "here"), r, strict=True)) for r in rows],
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
