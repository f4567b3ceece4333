"""What `bench` measured, for people, for programs, and as a picture. Measures nothing."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from mistral.eval.bench import Row
from mistral.util import memory
from mistral.util.english import counted
from mistral.util.errors import UsageError
from mistral.util.files import spelled_out, write_atomic


def as_json(report: dict[str, Any]) -> str:
    """The report as one object on one line."""
    return json.dumps(report)


def _machine(report: dict[str, Any]) -> str:
    return f"{report['processor']}, {counted(report['threads'], 'thread')}, torch {report['torch']}"


def as_text(report: dict[str, Any]) -> str:
    """A table human-readable."""
    load_text = "" if report["load_seconds"] is None else f"loaded in {report['load_seconds']:.2f} s, "
    lines = [
        report["model"],
        f"{_machine(report)}, medians of {report['repeats']}",
        f"{load_text}first token after {report['first_token_seconds']:.2f} s, "
        f"{memory.as_text(report['peak_bytes'])} at most beyond PyTorch",
        "",
        *_as_llama_bench(report),
        "",
        f"{'':8} {'context':>8} {'batch':>5} {'tokens/s':>10} {'slowest to fastest':>21} {'limit':>9} {'of it':>6}",
    ]
    for r in (Row(**row) for row in report["rows"]):
        spread, share = f"{r.low:.1f} to {r.high:.1f}", f"{r.rate / r.limit:.0%}"
        lines.append(f"{r.what:8} {r.context:8,} {r.batch:5} {r.rate:10.1f} {spread:>21} {r.limit:9.1f} {share:>6}")
    return "\n".join(lines)


def _as_llama_bench(report: dict[str, Any]) -> list[str]:
    """The rows as llama-bench prints its own: means and standard deviations, prompts first."""
    size, count = report["size_bytes"], report["parameters"]
    size = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
    count = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    about = [report["name"], size, count, report["backend"], str(report["threads"])]
    heads = ["model", "size", "params", "backend", "threads", "test", "t/s"]
    order = ("prefill", "generate", "decode")
    rows = sorted((Row(**row) for row in report["rows"]), key=lambda row: order.index(row.what))
    lines = [heads, *([*about, row.test, f"{row.mean:.2f} ± {row.deviation:.2f}"] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_left = {0, heads.index("backend")}
    rule = ["-" * w if i in to_the_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [c.ljust(w) if i in to_the_left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return [f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:])]


def require_plotting(path: str) -> None:
    """Refuse what `plot` could not draw or write, before anything is measured.

    Raises:
        UsageError: matplotlib is missing, knows no such kind of file, or the folder is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    kinds = dict(Figure().canvas.get_supported_filetypes())
    kinds.pop("pgf", None)  # wants LaTeX
    if Path(path).suffix[1:].lower() not in kinds:
        raise UsageError(f"--plot {path}: the name must end in one of .{', .'.join(sorted(kinds))}")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: that is a folder, or its folder is not there")


def plot(report: dict[str, Any], path: str) -> None:
    """Measured rates as bars, with their spread, below the limits of the machine; titled with model and machine.

    Raises:
        FormatError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [Row(**row) for row in report["rows"]]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    title = "\n".join(textwrap.wrap(spelled_out(report["model"]), 110))
    figure.suptitle(title, fontsize=9, parse_math=False)  # a name may have any $
    figure.supxlabel(_machine(report), fontsize=8)
    for axes, what in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        mine = sorted(
            (r for r in rows if (r.what == "prefill") == (what == "prefill")), key=lambda r: (r.batch, r.context)
        )
        places = list(range(len(mine)))
        spread = [[r.rate - r.low for r in mine], [r.high - r.rate for r in mine]]
        label = "measured, slowest to fastest"
        axes.bar(places, [r.rate for r in mine], 0.6, yerr=spread, capsize=3, label=label)
        ends = [place - 0.4 for place in places], [place + 0.4 for place in places]
        axes.hlines([r.limit for r in mine], *ends, color="black", label="limit of this machine")
        axes.set_xticks(places, [_case(r) for r in mine])
        highest = max((max(r.limit, r.high) for r in mine), default=1)
        axes.set(title=what, ylabel="tokens/s", ylim=(0, 1.4 * highest))  # room for the legend
        axes.legend(fontsize=8)
    with write_atomic(path) as beside:
        figure.savefig(beside, format=Path(path).suffix[1:].lower())


def _case(row: Row) -> str:
    """What was measured, and how fast it was, below its bar."""
    where = {"prefill": "prompt of {0:,}", "decode": "at {1:,}", "generate": "{0:,} from 0"}[row.what]
    where = where.format(row.tokens, row.context)
    several = f", {row.batch} sequences" if row.batch > 1 else ""
    return f"{where}{several}\n{row.rate:,.1f}/s\n{row.rate / row.limit:.0%} of the limit"
