"""Pictures of what the evaluations found, by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral.eval.position import ByContext
from mistral.eval.reach import NOTICEABLE, Reach
from mistral.util.files import spelled_out, write_atomic

DISTANCE = "distance of the changed token, tokens"


def draw_accuracy(report: dict[str, Any], path: str) -> None:
    """Accuracy against length with 95% confidence intervals, and how far the windows reach."""
    figure, axes = _figure(report, 1, (7.0, 3.6))
    rows = report["rows"]
    lengths, shares = [row["tokens_mean"] for row in rows], [row["accuracy"] for row in rows]
    bars = [[row["accuracy"] - row["low"] for row in rows], [row["high"] - row["accuracy"] for row in rows]]
    axes[0].errorbar(lengths, shares, yerr=bars, fmt="o-", capsize=4, label="right answers, 95% interval")
    axes[0].set(xlabel="tokens of the prompt", ylabel="share of right answers", ylim=(-0.03, 1.03), xscale="log")
    _limits(axes[0], report["window"], report["reach"])
    axes[0].set_xticks(lengths, [f"{length:,.0f}" for length in lengths], minor=False)
    axes[0].minorticks_off()
    axes[0].legend()
    _save(figure, path)


def draw_depths(report: dict[str, Any], path: str) -> None:
    """Needle: which lengths and depths were right."""
    figure, axes = _figure(report, 1, (7.0, 3.6))
    found, n = report["cases"], report["n"]
    groups = [row["group"] for row in report["rows"]]
    grid = [[float(found[f"{group}/{i}"]) for group in groups] for i in range(n)]
    axes[0].imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn", interpolation="nearest")
    axes[0].set(xlabel="tokens of the prompt", ylabel="depth of the needle")
    axes[0].set_xticks(range(len(groups)), [f"{int(g):,}" for g in groups])
    shown = sorted({0, (n - 1) // 2, n - 1})
    axes[0].set_yticks(shown, [f"{i / max(1, n - 1):.0%}" for i in shown])
    axes[0].set_title("green: found", fontsize=8)
    _save(figure, path)


def draw_reach(report: dict[str, Any], found: Sequence[Reach], path: str) -> None:
    """Left: what a changed token does to the prediction, by distance and window. Right: by layer, first window."""
    figure, axes = _figure(report, 2, (10.0, 4.0))
    for number, one in enumerate(found):
        seen = [(d, kl) for d, kl in zip(one.distances, one.kl, strict=True) if kl > 0]
        noticed = "nowhere" if one.noticeable is None else f"up to {one.noticeable:,}"
        label = f"window {one.window}: noticed {noticed}"
        axes[0].plot([d for d, _ in seen], [kl for _, kl in seen], ".-", color=f"C{number}", label=label)
        if one.edge is not None:
            axes[0].axvline(one.edge, color=f"C{number}", linestyle="--", linewidth=1)
            axes[0].annotate(
                f"reach {one.edge:,}", (one.edge, 0.5), xycoords=("data", "axes fraction"), rotation=90, fontsize=7
            )
    axes[0].axhline(NOTICEABLE, color="grey", linestyle=":", linewidth=1, label=f"noticed: {NOTICEABLE:g} nats")
    axes[0].set(xscale="log", yscale="log", xlabel=DISTANCE, ylabel="change of the prediction (KL), nats")
    _whole_numbers(axes[0])
    axes[0].legend(fontsize=7)
    axes[0].set_title("how far a changed token moves the prediction; beyond the dashed line: exactly 0", fontsize=8)
    _draw_layers(axes[1], found[0])
    _save(figure, path)


def _draw_layers(axes: Any, one: Reach) -> None:
    from matplotlib import colormaps

    for layer, (moved, edge) in enumerate(zip(one.layers, one.layer_edges, strict=True)):
        colour = colormaps["viridis"](layer / max(1, len(one.layers) - 1))
        seen = [(d, share) for d, share in zip(one.distances, moved, strict=True) if share > 0]
        few = len(one.layers) <= 8 or layer in (0, len(one.layers) // 2, len(one.layers) - 1)
        label = f"behind layer {layer + 1}" if few else None
        axes.plot([d for d, _ in seen], [s for _, s in seen], "-", color=colour, linewidth=1.2, label=label)
        if edge is not None and few:
            axes.axvline(edge, color=colour, linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel=DISTANCE, ylabel="change of the last state, relative")
    _whole_numbers(axes)
    axes.set_title(f"layer by layer, window {one.window}; dashed: reach of the layer, layers × (W − 1)", fontsize=8)
    axes.legend(fontsize=7)


def draw_position(report: dict[str, Any], found: Sequence[ByContext], path: str) -> None:
    """The loss against the context, by window."""
    figure, axes = _figure(report, 1, (7.0, 3.6))
    for number, one in enumerate(found):
        axes[0].errorbar(
            one.contexts,
            one.losses,
            yerr=one.errors,
            fmt=".-",
            capsize=3,
            color=f"C{number}",
            label=f"window {one.window}",
        )
    axes[0].set(xscale="log", xlabel="tokens of context", ylabel="loss, nats a token")
    _limits(axes[0], report["window"], report["reach"])
    contexts = sorted({context for one in found for context in one.contexts})
    axes[0].set_xticks(contexts, [f"{context:,}" for context in contexts], minor=False)
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    axes[0].set_title("the same tokens predicted; bars: standard error of the difference to the right end", fontsize=8)
    _save(figure, path)


def _whole_numbers(axes: Any) -> None:
    """A logarithmic axis of x with 1, 10, 100 in the place of powers."""
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _limits(axes: Any, window: int | None, reach: int | None) -> None:
    """Lines at the window and at layers x (W - 1), if the model has one window."""
    for at, text, style in ((window, "W", ":"), (reach, "layers × (W − 1)", "--")):
        if at is not None:
            axes.axvline(at, color="grey", linestyle=style, linewidth=1, label=f"{text} = {at:,}")


def _figure(report: dict[str, Any], columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mistral"})
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    n = f"n = {report['n']}, " if report["n"] is not None else ""
    title = f"{report['task']}: {report['model']}\n{n}seed {report['seed']}; {report['machine']}"
    figure.suptitle(spelled_out(title), fontsize=9, parse_math=False)  # a name may have any $
    return figure, list(axes)


def _save(figure: Any, path: str) -> None:
    kind = Path(path).suffix[1:].lower()
    dated = {"metadata": {"Date": None}} if kind == "svg" else {}  # the same picture of the same numbers
    with write_atomic(path) as beside:
        figure.savefig(beside, format=kind, **dated)
