"""Every row of docs/speed.md about a GPU, measured on the one that is there, at the shape of 7B with random weights.

    python -m benchmarks.gpu [--part decode] [--rounds 5] [--shape 7b] [--json FILE]

benchmarks/gpu.sh runs each part with a limit of its own. Needs some 50 GB of the GPU's memory and, for the rows beside
it, `pip install transformers`. Programs take turns within a round; a figure is the median over the rounds, a ratio the
median of the ratios within rounds. The limits (rates of a copy and of a large product) are measured in the same rounds.
Sizes that a program meets for the first time are compiled before the first round. `--device cpu` tries the script
itself, with a small `--shape`.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mistral.args import ModelArgs
from mistral.eval import bench
from mistral.eval.bench import seconds
from mistral.formats.random import random_folder
from mistral.loader.assemble import assemble
from mistral.model import Transformer
from mistral.oracle.layerwise import their_config
from mistral.util.files import write_atomic

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
SHALLOW = 8  # layers, where not all are needed
COPY = 1 << 30  # bytes
SIDE = 8192  # of the product

Rates = dict[str, Callable[[], float]]
Question = tuple[str, int, int]  # "prefill" or "decode", context, batch
Ratio = Callable[..., float]  # of two rates by their names, times a factor: the median over the rounds
Row = tuple[str, float | None, float]  # what it is, what is aimed at, what it is here


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


def ours(args: ModelArgs, device: torch.device, **options: Any) -> Transformer:
    """Our model: in bf16, its decode steps captured, unless options differ. On a CPU, for a trial, in fp32."""
    if device.type != "cuda":
        options = {"execution": "eager"} if options.get("execution") == "eager" else {}
    standard = {"dtype": "bfloat16", "execution": "cuda_graph"} if device.type == "cuda" else {"dtype": "float32"}
    return assemble(random_folder(args, Path()), device=device, **{**standard, **options})[0]


def our_rates(model: Transformer, name: str, questions: list[Question]) -> Rates:
    """Tokens a second of ours, by what is asked."""

    def one(what: str, context: int, batch: int) -> float:
        if what == "prefill":
            return context / bench.prefill(model, context)
        return batch / statistics.median(bench.decode(model, context, batch, STEPS))

    return {f"{name}: {w} {c} x {b}": functools.partial(one, w, c, b) for w, c, b in questions}


def their_rates(args: ModelArgs, device: torch.device, questions: list[Question]) -> Rates:
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


@dataclass(frozen=True)
class Setting:
    """Where and on what the parts below are measured; sizes are smaller for the tiny shape."""

    args: ModelArgs
    device: torch.device
    tiny: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """A short context, a long prompt, the longest, and the sequences of a wide batch."""
        return (32, 64, 128, 4) if self.tiny else (1024, 8192, 32768, 64)

    def shallow(self) -> Setting:
        """With fewer layers: for ratios between ways of computing one, some of which take long to get ready."""
        layers, windows = min(self.args.n_layers, SHALLOW), self.args.sliding_window
        fewer = windows[:layers] if isinstance(windows, tuple) else windows
        args = replace(self.args, n_layers=layers, sliding_window=fewer)
        return replace(self, args=args)


def decode_part(at: Setting) -> tuple[Rates, Callable[[Ratio], list[Row]]]:
    """Decoding, captured and eager, as a share of the rate of a copy."""
    short, _, _, wide = at.sizes
    questions = [("decode", 32, 1), ("decode", short, wide)]
    model, limits = ours(at.args, at.device), Limits(at.device, at.tiny)
    eager = ours(at.args, at.device, execution="eager")
    rates = {"copy": limits.copy} | our_rates(model, "bf16", questions) | our_rates(eager, "eager", questions)
    step = [bench.weight_bytes(model) + b * model.cache_bytes(c + 1) for _, c, b in questions]

    def rows(ratio: Ratio) -> list[Row]:
        one, many = (f"decode {c} x {b}" for _, c, b in questions)
        return [
            ("decode, one, share of the copy rate", 0.85, ratio(f"bf16: {one}", "copy", step[0])),
            (f"decode, {wide} at {short}, share of the copy rate", 0.6, ratio(f"bf16: {many}", "copy", step[1] / wide)),
            ("decode, one, captured over eager", None, ratio(f"bf16: {one}", f"eager: {one}")),
        ]

    return rates, rows


def quant_part(at: Setting) -> tuple[Rates, Callable[[Ratio], list[Row]]]:
    """Decoding with quantized weights over bf16, with few layers."""
    at, asked = at.shallow(), [("decode", 32, 1)]
    rates: Rates = our_rates(ours(at.args, at.device), "bf16", asked)
    for quant in ("int8", "int4"):
        rates |= our_rates(ours(at.args, at.device, quant=quant), quant, asked)

    def rows(ratio: Ratio) -> list[Row]:
        aims = {"int8": 1.6, "int4": None}
        names = {quant: (f"{quant}: decode 32 x 1", "bf16: decode 32 x 1") for quant in aims}
        return [(f"decode, one, {quant} over bf16", aim, ratio(*names[quant])) for quant, aim in aims.items()]

    return rates, rows


def prefill_part(at: Setting) -> tuple[Rates, Callable[[Ratio], list[Row]]]:
    """Long prompts, as a share of the rate of a product."""
    _, long, longest, _ = at.sizes
    model = ours(at.args, at.device, execution="eager")
    limits = Limits(at.device, at.tiny)
    rates = {"product": limits.product} | our_rates(model, "bf16", [("prefill", long, 1), ("prefill", longest, 1)])
    costs = {n: prefill_operations(at.args, model, n) / n for n in (long, longest)}

    def rows(ratio: Ratio) -> list[Row]:
        first, second = (f"bf16: prefill {n} x 1" for n in (long, longest))
        return [
            (f"prefill {long}, share of the product rate", 0.65, ratio(first, "product", costs[long])),
            (f"prefill {longest}, share of the product rate", 0.65, ratio(second, "product", costs[longest])),
            (f"seconds of prefill {longest} over {long}, at most", 4.3, ratio(first, second, longest / long)),
        ]

    return rates, rows


def attention_part(at: Setting) -> tuple[Rates, Callable[[Ratio], list[Row]]]:
    """Prompts by each attention that runs here over PyTorch's, with few layers."""
    at, long = at.shallow(), at.sizes[1]
    rates: Rates = {}
    for attention in ("sdpa", "flash", "xformers") if at.device.type == "cuda" else ("sdpa",):
        try:
            model = ours(at.args, at.device, execution="eager", attention=attention)
            bench.prefill(model, 3)
        except (ValueError, RuntimeError, ImportError) as error:
            print(f"{attention}: not here: {error}", flush=True)
            continue
        rates |= our_rates(model, attention, [("prefill", long, 1)])

    def rows(ratio: Ratio) -> list[Row]:
        others = [name for name in rates if not name.startswith("sdpa")]
        return [(f"{name}, over sdpa", None, ratio(name, f"sdpa: prefill {long} x 1")) for name in others]

    return rates, rows


def transformers_part(at: Setting) -> tuple[Rates, Callable[[Ratio], list[Row]]]:
    """Decoding and a prompt, over transformers."""
    if importlib.util.find_spec("transformers") is None:
        sys.exit("transformers is not installed here: pip install transformers")
    short, long, _, wide = at.sizes
    questions = [("decode", 32, 1), ("decode", short, wide), ("prefill", long, 1)]
    rates = our_rates(ours(at.args, at.device), "bf16", questions) | their_rates(at.args, at.device, questions)

    def rows(ratio: Ratio) -> list[Row]:
        asked = [f"{what} {context} x {batch}" for what, context, batch in questions]
        theirs = [(what, name) for what in asked for name in rates if name.startswith("tr") and what in name]
        return [(f"{what}, over {name}", 1.2, ratio(f"bf16: {what}", name)) for what, name in theirs]

    return rates, rows


PARTS = {
    "decode": decode_part,
    "prefill": prefill_part,
    "quant": quant_part,
    "attention": attention_part,
    "transformers": transformers_part,
}


def measure(name: str, at: Setting, rounds: int, to: Path | None) -> dict[str, Any]:
    """A part, round by round; what there is after each round is written, so that a later one may be cut off."""
    rates, rows = PARTS[name](at)
    found: dict[str, list[float]] = {name: [] for name in rates}

    def ratio(a: str, b: str, factor: float = 1.0) -> float:
        return statistics.median(factor * x / y for x, y in zip(found[a], found[b], strict=True))

    told: dict[str, Any] = {}
    for n in range(rounds + 1):
        for what, rate in rates.items():
            value = rate()
            if n:  # the first round compiles and captures
                found[what].append(value)
        print(f"{name}: round {n} of {rounds}", file=sys.stderr, flush=True)
        if n:
            told = {
                "machine": machine(at.device),
                "rounds": n,
                "rates": found,
                "rows": [dict(zip(("row", "aim", "here"), row, strict=True)) for row in rows(ratio)],
            }
            if to is not None:
                with write_atomic(to) as beside:
                    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def show(told: dict[str, Any]) -> None:
    """A part's rates and rows."""
    for name, values in told["rates"].items():
        print(f"{name:45} {statistics.median(values):16.1f}")
    for row in told["rows"]:
        aim = "" if row["aim"] is None else f"   aim {row['aim']}"
        print(f"{row['row']:70} {row['here']:6.2f}{aim}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one part; default: all, one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where the part's figures are written, after each round")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: `--device cpu --shape tiny` tries the script itself")
    if options.json and not options.part:
        sys.exit("--json is for one part: benchmarks/gpu.sh measures all of them into one file")
    at = Setting(SHAPES[options.shape], device, options.shape == "tiny")
    print("\n".join(f"{name}: {value}" for name, value in machine(device).items()), flush=True)
    for name in [options.part] if options.part else PARTS:
        show(measure(name, at, options.rounds, options.json))


if __name__ == "__main__":
    main()
