"""A whole run of fine-tuning: read and check everything, refuse what will not do, train, write, describe."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.finite import broken_weight
from mistral.formats.broken import require_whole
from mistral.formats.weights import WeightsError
from mistral.loader.options import LoadOptions, OptionError
from mistral.model import Transformer
from mistral.train import needs
from mistral.train.data import Sample, Samples
from mistral.train.finish import CARD, Finished, finish
from mistral.train.log import LOG, read_log
from mistral.train.loop import Loop, Report
from mistral.train.options import TrainOptions
from mistral.train.packing import Schedule, pack, split
from mistral.train.ranks import Ranks
from mistral.train.setup import Setup
from mistral.train.state import STATE
from mistral.util.english import counted
from mistral.util.errors import FormatError, UsageError
from mistral.util.files import locked_folder
from mistral.util.memory import as_text


def finetune(
    folder: str | PathLike[str] | None,
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    options: TrainOptions,
    load: LoadOptions,
    eval_data: str | PathLike[str] | None = None,
    merge: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_report: Callable[[Report], None] = lambda report: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Finished:
    """Fine-tune a model on a file of samples.

    Args:
        folder: as in `load`; None is the bundled model.
        data: JSON lines; see `data.read_samples`.
        out: a folder that is new or empty, or, with `resume`, that of a run that was stopped.
        eval_data: samples to evaluate, in the place of a split of `data`.
        merge: also write the model with the adapter in it.
        resume: go on from the state in `out`.
        say: called with what was read and decided, a line each.
        on_report, should_stop: see `loop.Loop`.

    In a group of processes (`parallel.launch`) each has a share of every step, and the first one writes; what the
    others return tells how far the run came.

    Raises:
        MistralError: a subclass that names what is wrong with the options, the samples, the memory or the disk.
        KeyboardInterrupt: `should_stop` said so; the state is saved.
    """
    setup, place, ranks = Setup(folder, options, load, say), Path(out), Ranks.joined()
    _check(setup, merge, eval_data is not None)
    if ranks.first:
        _check_out(place, resume)
    if merge or options.full:
        require_whole(setup.base.path)  # its files go along with the model that is written
    for note in setup.base.notes:
        setup.note(note)
    found = setup.samples(Path(data))
    kept, held_out = split(len(found.samples), options.eval_split, options.seed)
    samples, held = [found.samples[i] for i in kept], [found.samples[i] for i in held_out]
    names = {"folder": setup.base_name, "eval_data": None}
    if eval_data is not None:
        others = setup.samples(Path(eval_data))
        held, found.notes = others.samples, found.notes + others.notes
        names["eval_data"] = others.sha256
    rows = pack([len(sample.ids) - 1 for sample in samples], options.seq_len, options.seed)
    schedule = Schedule(rows, options.batch_size, options.accumulate, options.seed)
    steps = options.steps or max(1, round(options.epochs * schedule.steps_per_epoch))
    _tell(setup, found, samples, held, schedule, steps)
    _require(setup, place, schedule, samples, merge)
    model, weights = setup.model()
    _require_sound(model)
    identity = {**_identity(setup, found, steps), **names}
    loop = Loop(model, weights, samples, held, schedule, steps, options, place, identity, on_report, should_stop, ranks)
    loop.require_a_loss()
    with _made(place, resume) if ranks.first else nullcontext():
        history = loop.go(resume)
        if not ranks.first:
            return Finished(place, loop.progress, (math.nan, math.nan), None, ())
        return finish(setup, loop, history, found, merge, _command(setup, data, out, merge, eval_data))


def _check(setup: Setup, merge: bool, eval_data: bool) -> None:
    """Refuse what cannot be meant, before anything is read."""
    options = setup.options
    if merge and options.full:
        raise OptionError("--merge is for adapters; --full writes the whole model")
    if options.rope_theta is not None and not options.full and not merge:
        raise OptionError("rope_theta is part of a model, not of an adapter: add --merge or --full")
    if eval_data and options.eval_split:
        raise OptionError("eval_split and --eval_data: give one of them")
    for name in ("patience", "eval_every"):
        if getattr(options, name) is not None and not (options.eval_split or eval_data):
            raise OptionError(f"{name} needs evaluations: add --eval_split 0.05 or --eval_data")
    parallel = setup.load.parallel
    if parallel > options.accumulate:
        raise OptionError(
            f"parallel {parallel} shares the {counted(options.accumulate, 'forward')} of a step: add --accumulate "
            f"{parallel}, or a multiple of it"
        )
    setup.check_options()


def _check_out(out: Path, resume: bool) -> None:
    """Refuse a folder of results that holds something.

    Raises:
        UsageError: it does, or there is nothing in it to go on from.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder that is new or empty")
    if (out / CARD).is_file() and (out / LOG).is_file() and not (out / STATE).is_file():
        raise UsageError(f"the run in {out} is finished: give another folder for a new one")
    if resume and not (out / STATE).is_file():
        raise UsageError(f"no {STATE} in {out}, from which to go on: omit --resume")
    if not resume and out.is_dir() and any(not _of_a_start(path) for path in out.iterdir()):
        go_on = "; --resume goes on with the run in it" if (out / STATE).is_file() else ""
        raise UsageError(f"{out} is there already and not empty: give another folder{go_on}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"no such folder: {out.absolute().parent}, in which to make {out.name}")


def _of_a_start(path: Path) -> bool:
    """Whether it is a file of a run that was killed before its first save, of which there is nothing to go on from."""
    if path.name == LOG and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return len(read_log(path)) >= len(lines) - 1 and (not lines or lines[0].startswith('{"step"'))
    return path.name.startswith(".") and path.name.endswith(".part")


@contextmanager
def _made(out: Path, resume: bool) -> Iterator[None]:
    """Make the folder of results, and have it alone; one that is gone on with loses what a kill left half written.

    Raises:
        UsageError: another run writes into it, or has done so meanwhile.
    """
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise FormatError(f"{out} cannot be made: {error.strerror}") from None
    with locked_folder(out, f"{out}: another finetune writes into it: wait for it, or give another folder"):
        _check_out(out, resume)
        for half in out.glob(".*.part"):
            with suppress(OSError):
                half.unlink()
        yield


def _tell(
    setup: Setup, found: Samples, samples: Sequence[Sample], held: Sequence[Sample], schedule: Schedule, steps: int
) -> None:
    """What there is to learn, in a line, and every note."""
    for note in found.notes:
        setup.note(note)
    if setup.options.steps is not None and setup.options.epochs != TrainOptions.epochs:
        setup.note(f"epochs {setup.options.epochs:g} has no effect beside steps {steps}")
    tokens = sum(len(sample.ids) - 1 for sample in samples)
    learned = sum(sum(weight > 0 for weight in sample.weights) for sample in samples)
    fill = tokens / (len(schedule.rows) * setup.options.seq_len)
    setup.say(
        f"{counted(len(samples), 'sample')}, {counted(tokens, 'token')}, {learned:,} of them learned; "
        f"{counted(len(schedule.rows), 'row')} of {setup.options.seq_len} ({fill:.0%} full); "
        f"{counted(len(held), 'sample')} held out; {counted(steps, 'step')}, "
        f"{schedule.steps_per_epoch} an epoch"
    )


def _require(setup: Setup, out: Path, schedule: Schedule, samples: Sequence[Sample], merge: bool) -> None:
    """Refuse a run that memory or disk do not allow; report what it needs."""
    lengths = sorted(sum(len(samples[i].ids) - 1 for i in row) for row in schedule.rows)
    parts = setup.needed(sum(lengths[-setup.options.batch_size :]))
    needs.require_memory(parts, setup.device, setup.options)
    each = f", in each of {setup.load.parallel} processes" if setup.load.parallel > 1 else ""
    setup.say("memory: about " + ", ".join(f"{as_text(n)} of {what}" for what, n in parts.items() if n) + each)
    written = 4 * setup.base.parameters if setup.options.full or merge else 0
    written += 0 if setup.options.full else 2 * 4 * setup.count  # in two forms
    needs.require_disk(out if out.is_dir() else out.absolute().parent, setup.count, written, setup.options)


def _require_sound(model: Transformer) -> None:
    """Refuse weights of which some are no numbers: no learning rate mends them.

    Raises:
        WeightsError: it names the first such tensor.
    """
    if (broken := broken_weight(model)) is not None:
        raise WeightsError(broken)


def _identity(setup: Setup, found: Samples, steps: int) -> dict[str, Any]:
    """What makes a run what it is: a state goes on only with the same."""
    options = asdict(replace(setup.options, save_every=TrainOptions.save_every))
    load = {name: getattr(setup.load, name) for name in ("adapter", "quant", "dtype")}
    return {"data": found.sha256, "args": setup.base.args.to_params(), **options, **load, "steps": steps}


def _command(
    setup: Setup,
    data: str | PathLike[str],
    out: str | PathLike[str],
    merge: bool,
    eval_data: str | PathLike[str] | None,
) -> str:
    """The command line of a run."""
    words = ["python", "-m", "main", "finetune", *([] if setup.folder is None else [str(setup.folder)])]
    words += ["--data", str(data), "--out", str(out)]
    words += [] if eval_data is None else ["--eval_data", str(eval_data)]
    for given, usual in ((setup.options, TrainOptions()), (setup.load, LoadOptions())):
        for name, value in asdict(given).items():
            if value != getattr(usual, name):
                several = value if isinstance(value, list | tuple) else [value]
                for one in several:
                    words += [f"--{name}"] if one is True else [f"--{name}", "none" if one is None else str(one)]
    return shlex.join([*words, *(["--merge"] if merge else [])])
