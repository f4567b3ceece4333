"""The story of long-context fine-tuning on the bundled model, which has 6.3 M parameters and a window of 64.

    python -m tools.long_context_demo OUT [--steps 300] [--cases 30] [--seed 1]

A model learns to find a pass key and a line in short texts, with its own window and theta; then that model goes on with
a wider window, a larger theta and longer texts, as MistralLite did from Mistral 7B. Both, and the first one with only
its settings changed, are asked at lengths up to twice what was trained. OUT gets the models, results.json, results.md
and long_context.svg. What is there already is not done again, and training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral.eval.lines import Lines
from mistral.eval.passkey import PassKey
from mistral.eval.tasks import Case, Task, fit
from mistral.formats.folder import BUNDLED
from mistral.formats.tokenizers import load_tokenizer
from mistral.generate import complete
from mistral.loader.load import load
from mistral.loader.options import LoadOptions
from mistral.tokenizer import Tokenizer
from mistral.train.loop import Report
from mistral.train.options import TrainOptions
from mistral.train.run import finetune
from mistral.train.state import STATE
from mistral.util.files import write_atomic

SAMPLES = 4000
LENGTHS = (80, 128, 192, 256, 384, 512, 768, 1024)
TASKS: tuple[Task, ...] = (PassKey(), Lines())
# Most units of filler or of lines in a sample: about 140 tokens, and about 500.
SHORT, LONG = {"passkey": 10, "lines": 2}, {"passkey": 55, "lines": 20}
WINDOW, THETA = 512, 1e6
OPTIONS = TrainOptions(full=True, lr=1e-3, seq_len=512, batch_size=4, weight_decay=0.0, save_every=20, recompute="none")


def write_samples(path: Path, sizes: dict[str, int], seed: int) -> None:
    """Prompts of both tasks, of any size up to the largest, with their answers: a file for finetune."""
    rng = random.Random(f"{path.name} {seed}")
    lines = []
    for i in range(SAMPLES):
        task = TASKS[i % len(TASKS)]
        case = Case(seed=1_000_000 + seed, index=i, n=SAMPLES, filler=task.filler(0))
        made = task.make(case, rng.randint(0, sizes[task.name]))
        lines.append(json.dumps({"prompt": made.prompt, "completion": f" {made.answer}"}) + "\n")
    with write_atomic(path) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def train(base: Path | None, data: Path, out: Path, options: TrainOptions, **changes: Any) -> None:
    """A model in `out`, unless it is there."""
    if (out / "params.json").is_file():
        return

    def report(now: Report) -> None:
        if now.step % 10 == 0 or now.step == now.steps:
            print(f"{out.name}: step {now.step}/{now.steps}, loss {now.loss:.3f}, {now.rate:.0f} tokens/s", flush=True)

    load = LoadOptions(device="cpu", **changes)
    finetune(base, data, out, options=options, load=load, resume=(out / STATE).is_file(), say=print, on_report=report)


def ask(folder: Path, tokenizer: Tokenizer, options: LoadOptions, cases: int, seed: int) -> dict[str, dict[str, float]]:
    """By task and length: the share of right answers, and of digits that are right and in their place."""
    loaded = load(folder, options=options)
    found: dict[str, dict[str, float]] = {}
    for task in TASKS:
        for length in LENGTHS:
            made = [Case(seed, i, cases, task.filler(seed)) for i in range(cases)]
            if len(tokenizer.encode(task.make(made[0], 0).prompt)) > length:
                continue
            fitted = [fit(task, case, length, tokenizer.encode) for case in made]
            prompts = [one.ids for one in fitted]
            results = complete(prompts, loaded.model, loaded.tokenizer, max_tokens=8, temperature=0)
            pairs = [(result.text, one.answer) for result, one in zip(results, fitted, strict=True)]
            right = sum(task.score(text, answer) for text, answer in pairs) / cases
            places = sum(digits(text, answer) for text, answer in pairs) / cases
            found.setdefault(task.name, {})[str(length)] = right
            found.setdefault(f"{task.name}, digits", {})[str(length)] = places
            window = loaded.args.window_text
            print(
                f"{folder.name}, window {window}: {task.name} at {length}: {right:.0%}, digits {places:.0%}", flush=True
            )
    return found


def digits(text: str, answer: str) -> float:
    """The share of the answer's digits that the first number of a text has in the same places; 10% is chance."""
    number = re.search(r"[0-9]+", text)
    told = number[0] if number else ""
    return sum(a == b for a, b in zip(told, answer, strict=False)) / len(answer)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a model and task."""
    lengths = [str(length) for length in LENGTHS]
    lines = ["| | task | " + " | ".join(lengths) + " |", "|---|---|" + "--:|" * len(lengths)]
    for name, found in results.items():
        for task, shares in found.items():
            cells = [f"{shares[n]:.0%}" if n in shares else "" for n in lengths]
            lines.append(f"| {name} | {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Right answers over the length, a panel a task."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "long context"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for (name, found), style, colour in zip(results.items(), ("s--", "^:", "o-"), ("C0", "C2", "C1"), strict=False):
            points = [(int(n), 100 * share) for n, share in found.get(task.name, {}).items()]
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, color=colour)
            points = [(int(n), 100 * share) for n, share in found.get(f"{task.name}, digits", {}).items()]
            axes.plot(*zip(*points, strict=True), style[1:], linewidth=0.8, color=colour, alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set(title=task.name, xlabel="tokens of the prompt", ylim=(-3, 103), xticks=LENGTHS)
        axes.set_xticklabels([str(n) for n in LENGTHS], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right answers, % (thin: digits)")
    figure.axes[-1].legend(fontsize=8)
    with write_atomic(path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of each of the two trainings")
    parser.add_argument("--cases", type=int, default=30, help="prompts of each task and length")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    out, began = given.out, time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    options = replace(OPTIONS, steps=given.steps, seed=given.seed)
    tokenizer = load_tokenizer(BUNDLED, 4096)
    for name, sizes in (("short", SHORT), ("long", LONG)):
        if not (out / f"{name}.jsonl").is_file():
            write_samples(out / f"{name}.jsonl", sizes, given.seed)
    train(None, out / "short.jsonl", out / "before", options)
    long = replace(options, rope_theta=THETA)
    train(out / "before", out / "long.jsonl", out / "after", long, sliding_window=WINDOW)
    usual, wide = LoadOptions(device="cpu"), LoadOptions(device="cpu", sliding_window=WINDOW)
    for name, folder, how in (
        ("before: window 64, theta 1e4, up to 150 tokens", "before", usual),
        (f"before, with window {WINDOW}", "before", wide),
        (f"after: window {WINDOW}, theta 1e6, up to 500 tokens", "after", usual),
    ):
        path = out / "results.json"
        results = json.loads(path.read_text()) if path.is_file() else {}
        if name not in results:
            results[name] = ask(out / folder, tokenizer, how, given.cases, given.seed)
            with write_atomic(path) as beside:
                beside.write_text(json.dumps(results, indent=2) + "\n")
        (out / "results.md").write_text(table(results))
        plot(results, out / "long_context.svg")
    print(table(results))
    print(f"{time.process_time() - began:.0f} s of CPU in this run", file=sys.stderr)


if __name__ == "__main__":
    main()
