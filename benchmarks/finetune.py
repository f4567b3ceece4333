"""Fine-tuning beside transformers and PEFT: tokens a second, peak memory, and the losses, from one start.

    python -m main convert MODEL model-hf --to hf --dtype float32
    python -m benchmarks.finetune model-hf tests/data/dwarf_long_nose.txt --length 512 --steps 4
    python -m benchmarks.finetune model-hf tests/data/dwarf_long_nose.txt --length 512 --full

MODEL is in Hugging Face's layout. Each side runs in a process of its own: one row of the text a step, all of whose
tokens are learned, AdamW, fp32, the same adapter at the start. The first step is not timed. Rates are in seconds of CPU
time, which other programs disturb less than the clock; with one thread the two are the same on a machine of one's own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.formats.folder import read_folder
from mistral.formats.tokenizers import load_tokenizer
from mistral.loader.options import LoadOptions
from mistral.train.optimizer import adamw, change, clipped
from mistral.train.options import TrainOptions
from mistral.train.output import write_adapter
from mistral.train.setup import Pairs, Setup
from mistral.train.step import Batch, add_gradients
from mistral.util.memory import as_text

LR, CLIP = 1e-4, 1.0
Step = Callable[[Tensor], float]


def rows_of(model: Path, text: Path, length: int, count: int) -> list[Tensor]:
    """[length + 1] ids a row."""
    tokenizer = load_tokenizer(model, read_folder(model).args.vocab_size)
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))
    ids = ids.repeat(1 + count * (length + 1) // len(ids))
    return [ids[i * length : (i + 1) * length + 1] for i in range(count)]


def ours(model: Path, adapter: Path, options: TrainOptions) -> Step:
    load = LoadOptions(device="cpu", dtype="float32", adapter=() if options.full else (str(adapter),))
    tuned, weights = Setup(model, options, load).model()
    optimizer = adamw(weights, options)

    def step(row: Tensor) -> float:
        n = len(row) - 1
        nats = add_gradients(tuned, Batch(row[:-1], (n,), row[1:], torch.ones(n)), n)
        clipped(weights, CLIP)
        change(optimizer, LR)
        return nats / n

    return step


def theirs(model: Path, adapter: Path, options: TrainOptions) -> Step:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not options.full:
        tuned = PeftModel.from_pretrained(tuned, adapter, is_trainable=True)
    tuned.config.use_cache = False
    if options.recompute == "layers":
        tuned.gradient_checkpointing_enable()
        tuned.enable_input_require_grads()
    tuned.train()
    weights = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    optimizer = adamw(weights, options)

    def step(row: Tensor) -> float:
        loss = tuned(input_ids=row[None, :-1], labels=row[None, :-1], shift_labels=row[None, 1:]).loss
        loss.backward()
        clipped(weights, CLIP)
        change(optimizer, LR)
        return float(loss.detach())

    return step


def _named(pairs: Pairs) -> dict[str, Tensor]:
    """A and B under the names that `write_adapter` wants."""
    paths = [(name.removesuffix(".weight"), pair) for name, pair in pairs.items()]
    return {f"{path}.lora_{part}.weight": t for path, pair in paths for part, t in zip("AB", pair, strict=True)}


def measure(side: str, given: argparse.Namespace) -> dict[str, Any]:
    """Losses, tokens a second of each step but the first, and the most memory that the process had."""
    torch.set_num_threads(given.threads)
    options = TrainOptions(full=given.full, lr=LR, recompute=given.recompute)
    rows = rows_of(given.model, given.text, given.length, given.steps)
    step = (ours if side == "ours" else theirs)(given.model, given.adapter, options)
    losses, rates = [], []
    for row in rows:
        began = time.process_time()
        losses.append(step(row))
        rates.append(given.length / (time.process_time() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"losses": losses, "rate": sorted(rates[1:])[len(rates[1:]) // 2], "rates": rates[1:], "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--recompute", default="cheap", help="ours; layers is also set on their side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not given.full:
            setup = Setup(given.model, TrainOptions(), LoadOptions(device="cpu"))
            (pairs, scale), args = setup.start, setup.base.args
            named = _named(pairs)
            write_adapter(Path(folder), named, args, setup.options, scale, str(given.model))
        found = {}
        for side in ("ours", "theirs"):
            words = [sys.executable, "-m", "benchmarks.finetune", *sys.argv[1:], "--side", side, "--adapter", folder]
            one = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            rates = f"{one['rate']:.1f} tokens a CPU second ({min(one['rates']):.1f} to {max(one['rates']):.1f})"
            print(f"{side}: {rates}, {as_text(one['peak'])} at most", flush=True)
            found[side] = one
    a, b = found["ours"], found["theirs"]
    apart = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))
    print(
        f"ours / theirs: {a['rate'] / b['rate']:.2f} of tokens a CPU second, {a['peak'] / b['peak']:.2f} of memory; "
        f"losses of {given.steps} steps differ by {apart:.1e} at most"
    )


if __name__ == "__main__":
    main()
