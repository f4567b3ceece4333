"""One evaluation from start to end: a loaded model, a task, what was asked; a report, a text and a picture of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mistral import __version__
from mistral.chat.templates import Template, ends_of
from mistral.eval import plots
from mistral.eval.bench import processor
from mistral.eval.filler import Filler, filler_of
from mistral.eval.longchat import read_questions
from mistral.eval.position import SPAN, ByContext, by_context, places_in
from mistral.eval.reach import NOTICEABLE, SHARE, Reach, edges, reach, samples, window_args
from mistral.eval.results import ResultFile
from mistral.eval.retrieval import TASKS, Item, answer, digest, items_of, make_items, report_rows
from mistral.eval.tasks import Encode
from mistral.loader.load import Loaded
from mistral.tokenizer import encode, outside
from mistral.util.english import counted
from mistral.util.errors import UsageError
from mistral.window import Window

LENGTHS = (512, 1024, 2048)
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024)
CASES = {"passkey": 50, "lines": 50, "topics": 50, "needle": 11, "reach": 8, "position": 64}  # where --n is not given
LONGEST_REACH = 2048  # tokens of a text of `reach`, unless a length is given
Bar = Callable[[str, str], Callable[[int, int], None]]  # what is done, and its unit, to a progress
Within = Callable[[int], None]  # told the longest sequence before it is computed


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated.

    Args:
        task: one of CASES.
        lengths: in tokens; None takes the task's own.
        n: cases, texts or places; None takes the task's own.
        seed: of everything random.
        text: what `--filler` holds, and its name; None: the task's own.
        questions: LongChat's files.
        windows: to measure with, of `reach` and `position`; None: the model's own.
        output: a file for the results of single cases, continued if it is there.
        rows: the most prompts at once.
    """

    task: str
    lengths: tuple[int, ...] | None = None
    n: int | None = None
    seed: int = 0
    text: tuple[str, str] | None = None
    questions: tuple[str, ...] = ()
    windows: tuple[Window, ...] | None = None
    output: str | None = None
    rows: int = 8


@dataclass(frozen=True)
class Evaluation:
    """What was found: a report for JSON, and a way to draw it."""

    report: dict[str, Any]
    text: str
    draw: Callable[[str], None]


def evaluate(
    loaded: Loaded,
    asked: Asked,
    *,
    prompt: Encode,
    template: Template | None,
    bar: Bar,
    say: Callable[[str], None] = lambda note: None,
) -> Evaluation:
    """Run a task on a model.

    Args:
        prompt: a prompt as ids, within the template if there is one.
        template: that one; None: prompts are continued as they are.
        bar: progress.
        say: called with what should be known before it begins, a sentence each.

    Raises:
        MistralError: a subclass that names what cannot be.
    """
    began = time.perf_counter()
    facts = _facts(loaded, asked, template)
    within = partial(_note_length, loaded, say)
    if asked.task == "reach":
        done = _reach(loaded, asked, facts, bar, within)
    elif asked.task == "position":
        done = _position(loaded, asked, facts, bar, within)
    else:
        done = _retrieval(loaded, asked, facts, prompt, ends_of(loaded.tokenizer, template), bar, within)
    done.report["seconds"] = time.perf_counter() - began
    return done


def _note_length(loaded: Loaded, say: Callable[[str], None], longest: int) -> None:
    """A sentence, if sequences go beyond what the model was trained on."""
    if note := loaded.beyond_training(longest):
        say(note)


def _facts(loaded: Loaded, asked: Asked, template: Template | None) -> dict[str, Any]:
    """What every report begins with."""
    args, device = loaded.args, loaded.model.device
    count = torch.get_num_threads()
    threads = "" if device.type != "cpu" else f", {count} thread{'s' if count > 1 else ''}"
    windows = set(args.windows)
    return {
        "task": asked.task,
        "model": f"{loaded.folder.name}, {loaded.parameters / 1e6:.1f} M parameters, "
        f"window {args.window_text}, rope_theta {args.rope_theta:g}",
        "loaded": loaded.describe(),
        "machine": f"{processor(device)}{threads}, torch {torch.__version__}",
        "version": __version__,
        "window": next(iter(windows)) if len(windows) == 1 else None,
        "reach": edges(args)[-1],
        "trained_length": loaded.trained_length,
        "template": None if template is None else template.name,
        "n": None if asked.questions else asked.n or CASES[asked.task],
        "seed": asked.seed,
    }


# --- retrieval


def _retrieval(
    loaded: Loaded,
    asked: Asked,
    facts: dict[str, Any],
    prompt: Encode,
    ends: frozenset[int],
    bar: Bar,
    within: Within,
) -> Evaluation:
    task = TASKS[asked.task]
    items: list[Item]
    marks: dict[str, Any] = {}
    if asked.questions:
        source = "questions of LongChat's form"
        items = items_of([q for path in asked.questions for q in read_questions(path, task.name)], prompt)
        marks["questions"] = sorted({item.group for item in items})
    else:
        filler = task.filler(asked.seed) if asked.text is None else filler_of(*asked.text)
        source = filler.source
        marks["filler"] = digest(filler)
        lengths = asked.lengths or LENGTHS
        items = make_items(task, lengths, facts["n"], asked.seed, filler, prompt, bar("making prompts", "prompt"))
    within(max(len(item.ids) for item in items) + task.max_tokens)
    header = {key: facts[key] for key in ("task", "loaded", "template", "n", "seed")} | marks
    results = ResultFile(asked.output, header)
    try:
        work = answer(
            loaded.model,
            loaded.tokenizer,
            task,
            items,
            results,
            rows=asked.rows,
            eos_ids=ends,
            progress=bar("answers", "case"),
        )
    finally:
        results.close()
    report = {
        **facts,
        "filler": source,
        "rule": task.rule,
        "rows": report_rows(items, results),
        "resumed": results.resumed,
        "prompt_tokens": work.prompt_tokens,
        "processed_tokens": work.processed,
        "shared_beginnings": work.sharing,
        "cases": {f"{group}/{index}": result.correct for (group, index), result in sorted(results.found.items())},
    }
    needle = task.name == "needle" and not asked.questions
    return Evaluation(
        report, _table(report), lambda path: (plots.draw_depths if needle else plots.draw_accuracy)(report, path)
    )


def _table(report: dict[str, Any]) -> str:
    """A table human-readable."""
    lines = [
        f"{report['task']}: {report['rule']}",
        f"{report['n']} cases a length, seed {report['seed']}; filler: {report['filler']}"
        if report["n"] is not None
        else report["filler"],
        "",
        f"{'length':>10} {'tokens':>15} {'right':>9} {'accuracy':>9}  95% interval",
    ]
    for row in report["rows"]:
        least, most = row["tokens_min"], row["tokens_max"]
        tokens = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        right = f"{row['correct']}/{row['cases']}"
        lines.append(f"{row['group']:>10} {tokens:>15} {right:>9} {row['accuracy']:>9.1%}  {interval}")
    return "\n".join(lines)


# --- what windows let through


def _text_ids(loaded: Loaded, asked: Asked, needed: int) -> tuple[list[int], list[int], str]:
    """Ids of the text without bos, bos as a list, and where the text is from."""
    if asked.text is None:
        filler: Filler = TASKS["needle"].filler(asked.seed)
    else:
        filler = Filler((asked.text[0],), asked.text[1])
    text = filler.text(0, len(filler.sentences))
    ids = encode(loaded.tokenizer, text)
    if (what := outside(ids, loaded.tokenizer, loaded.args.vocab_size)) is not None:
        raise UsageError(f"{filler.source} has {what}")
    bos = ids[:1] if ids[:1] == [loaded.tokenizer.bos_id] else []
    ids = ids[len(bos) :]
    if asked.text is None:
        while len(ids) < needed:  # made text may go on for ever
            ids += ids
    return ids, bos, filler.source


def _windows(loaded: Loaded, asked: Asked) -> list[Any]:
    """The model's args with each window that was asked for."""
    if asked.windows is None:
        return [loaded.args]
    return [window_args(loaded.args, window) for window in asked.windows]


def _reach(loaded: Loaded, asked: Asked, facts: dict[str, Any], bar: Bar, within: Within) -> Evaluation:
    every = _windows(loaded, asked)
    if asked.lengths is not None and len(asked.lengths) > 1:
        raise UsageError(
            f"reach measures texts of one length: give one of --lengths {','.join(map(str, asked.lengths))}"
        )
    if asked.lengths == (1,):
        raise UsageError("reach changes one token and looks at the next: --lengths must be at least 2")
    furthest = max((edge for args in every if (edge := edges(args)[-1]) is not None), default=LONGEST_REACH)
    # A tenth beyond the edge, to show that nothing comes from there.
    length = asked.lengths[0] if asked.lengths else max(16, min(LONGEST_REACH, furthest + furthest // 10 + 8))
    ids, bos, source = _text_ids(loaded, asked, length)
    if len(ids) < length:
        raise UsageError(f"the text has {len(ids)} tokens, but {length} are needed: give a longer --filler")
    within(length)
    texts = samples(ids, facts["n"], length, asked.seed, bos)
    found: list[Reach] = []
    for args in every:
        progress = bar(f"window {args.window_text}", "distance")
        found.append(reach(loaded.model, texts, args=args, seed=asked.seed, progress=progress))
    rows = [
        {**asdict(one), "beyond": one.beyond, "noticeable": one.noticeable, "layers_noticeable": one.layers_noticeable}
        for one in found
    ]
    report = {**facts, "filler": source, "length": length, "rows": rows}
    return Evaluation(report, _reach_text(report, found), lambda path: plots.draw_reach(report, found, path))


def _reach_text(report: dict[str, Any], found: Sequence[Reach]) -> str:
    lines = [
        f"reach: one token of {report['length']:,} changed, {counted(report['n'], 'text')}, seed {report['seed']}; "
        f"text: {report['filler']}",
        "",
        f"{'window':>8} {'reach':>9} {'last moved':>11} {f'KL >= {NOTICEABLE:g}':>11} {'beyond reach':>13}",
    ]
    for one in found:
        edge = "any" if one.edge is None else f"{one.edge:,}"
        moved = max((d for d, kl in zip(one.distances, one.largest, strict=True) if kl > 0), default=0)
        beyond = "not measured" if one.beyond is None else f"{one.beyond:g}"
        noticed = "none" if one.noticeable is None else f"{one.noticeable:,}"
        lines.append(f"{one.window:>8} {edge:>9} {moved:>11,} {noticed:>11} {beyond:>13}")
    one = found[0]
    lines += [
        "",
        f"{'layer':>8} {'reach':>9} {f'moved by {SHARE:.0%}':>13}  (state of the last token, window {one.window})",
    ]
    for layer, (far, seen) in enumerate(zip(one.layer_edges, one.layers_noticeable, strict=True), 1):
        edge = "any" if far is None else f"{far:,}"
        lines.append(f"{layer:>8} {edge:>9} {'none' if seen is None else f'{seen:,}':>13}")
    lines += ["", f"{'distance':>10} " + " ".join(f"{'KL, W ' + one.window:>14}" for one in found)]
    for distance in sorted({d for one in found for d in one.distances}):
        values = (dict(zip(one.distances, one.kl, strict=True)).get(distance) for one in found)
        lines.append(f"{distance:>10,} " + " ".join(f"{'' if v is None else format(v, '.2e'):>14}" for v in values))
    return "\n".join(lines)


def _position(loaded: Loaded, asked: Asked, facts: dict[str, Any], bar: Bar, within: Within) -> Evaluation:
    contexts = sorted(set(asked.lengths or CONTEXTS))
    ids, bos, source = _text_ids(loaded, asked, 2 * contexts[-1] + 10 * SPAN)
    if asked.lengths is None:  # the usual ones, as far as the text goes
        contexts = [context for context in contexts if context + SPAN <= len(ids)] or contexts[:1]
    within(contexts[-1] + SPAN)
    places = places_in(ids, facts["n"], contexts[-1], asked.seed)
    found: list[ByContext] = []
    for args in _windows(loaded, asked):
        progress = bar(f"window {args.window_text}", "token")
        found.append(by_context(loaded.model, ids, contexts, places=places, bos=bos, args=args, progress=progress))
    report = {**facts, "filler": source, "span": SPAN, "rows": [asdict(one) for one in found]}
    return Evaluation(report, _position_text(report, found), lambda path: plots.draw_position(report, found, path))


def _position_text(report: dict[str, Any], found: Sequence[ByContext]) -> str:
    lines = [
        f"position: {SPAN} tokens at each of {report['n']} places, seed {report['seed']}; text: {report['filler']}",
        "",
    ]
    for one in found:
        lines.append(f"{'context':>10} {'nats a token':>13}  more than with the longest, window {one.window}")
        for context, loss, gain, error in zip(one.contexts, one.losses, one.gains, one.errors, strict=True):
            more = 0.0 - round(gain, 4)  # not -0
            lines.append(f"{context:>10,} {loss:>13.4f}  {more:.4f} ± {error:.4f}")
    return "\n".join(lines)
