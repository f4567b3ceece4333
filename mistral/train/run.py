"""A whole run of fine-tuning: read and check everything, refuse what will not do, train, write, describe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral import __version__
from mistral.args import ModelArgs
from mistral.chat.templates import Template, find_template
from mistral.fast.layout import bytes_of
from mistral.formats.adapter import read_adapter
from mistral.formats.folder import BUNDLED, Folder, read_folder, short
from mistral.formats.hub import locate
from mistral.formats.merge import updates
from mistral.formats.releases import identify
from mistral.formats.tokenizers import load_tokenizer
from mistral.loader.load import assemble, windowed
from mistral.loader.options import DTYPE_NAMES, LoadOptions, OptionError
from mistral.loader.runtime import pick_device
from mistral.model import Transformer
from mistral.parameters import parameters
from mistral.tokenizer import Tokenizer
from mistral.train import log, needs, output
from mistral.train.attention import shared_masks
from mistral.train.card import card
from mistral.train.conversations import Marked, Turn, mark_text, mark_turns
from mistral.train.data import Sample, Samples, read_samples
from mistral.train.loop import Loop, Report
from mistral.train.lora import freeze, fresh, put_lora
from mistral.train.options import TrainOptions
from mistral.train.packing import Schedule, pack, split
from mistral.train.recompute import recompute
from mistral.train.state import BEST, STATE, Progress
from mistral.util.errors import FormatError, UsageError
from mistral.util.files import write_atomic
from mistral.util.memory import as_text

CARD = "README.md"


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Args:
        out: the folder of the results.
        files: the weights that were written.
        progress: how far it came.
        first_loss, last_loss: of training, each a mean over the first and last tenth of the steps, nats a token.
        eval_losses: of the first and the last evaluation, where samples were held out.
        notes: what was assumed, cut or rounded, a sentence each.
    """

    out: Path
    files: tuple[Path, ...]
    progress: Progress
    first_loss: float
    last_loss: float
    eval_losses: tuple[float, float] | None
    notes: tuple[str, ...]


@dataclass
class Run:
    """A run before it begins; see `finetune`."""

    folder: str | PathLike[str] | None
    data: Path
    out: Path
    options: TrainOptions
    load: LoadOptions
    say: Callable[[str], None] = lambda line: None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def base(self) -> Folder:
        """The model's folder, with the window and theta that were asked for."""
        found = read_folder(BUNDLED if self.folder is None else locate(self.folder))
        found = windowed(found, self.load)
        theta = self.options.rope_theta
        if theta is None:
            return found
        args = replace(found.args, rope_theta=theta, theta_rule="as requested")
        note = f"rope_theta {theta:g}: as requested, in the place of {found.args.rope_theta:g}"
        return replace(found, args=args, notes=(*found.notes, note))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.base.path, self.base.args.vocab_size)

    @cached_property
    def template(self) -> Template:
        release, _ = identify(self.base.args, self.tokenizer.kind, self.tokenizer.version)
        name = None if release is None else release.template
        found = find_template(self.tokenizer, name=self.options.template, release=name, folder=self.base.path)
        self.say(f"template {found.name}" + ("" if found.source == found.name else f", by {found.source}"))
        return found

    def samples(self) -> Samples:
        def text(prompt: str, value: str) -> Marked:
            return mark_text(self.tokenizer, prompt, value)

        def turns(value: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
            return mark_turns(self.template, value, tools, self.tokenizer.eos_ids)

        return read_samples(self.data, text, turns, self.options.seq_len)

    def trained(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that an adapter changes, or of all weights."""
        known = parameters(self.base.args)
        if self.options.full:
            return {name: parameter.shape for name, parameter in known.items()}
        targets = self.options.targets
        if self.base.args.moe is not None:
            targets = tuple(target for target in targets if target in ("wq", "wk", "wv", "wo"))
            if self.options.lora_targets is not None and targets != self.options.targets:
                raise OptionError("experts have no adapters here: use --lora_targets wq,wk,wv,wo")
        found = {n: p.shape for n, p in known.items() if p.role == "matrix" and n.split(".")[-2] in targets}
        return found

    def start(self) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """A and B to begin with, and what their product is multiplied by."""
        if self.load.adapter is None:
            return fresh(self.trained(), self.options.rank, self.options.seed), self.options.scale
        found = read_adapter(self.load.adapter)
        ranks, scales = ({getattr(pair, key) for pair in found.pairs.values()} for key in ("rank", "scale"))
        if found.dora or len(ranks) > 1 or len(scales) > 1:
            raise OptionError(f"{self.load.adapter} has DoRA, or several ranks or scales: it cannot be trained on here")
        if self.options.lora not in (None, *ranks) or self.options.lora_targets or self.options.lora_alpha:
            raise OptionError(
                f"{found.describe()}: training goes on with the same matrices, rank and scale: omit --lora, --lora_alpha and "
                "--lora_targets"
            )
        start = {n: (u.a().float(), u.b().float()) for n, u in updates(found, self.base.args).items()}
        return start, scales.pop()

    def check_options(self) -> None:
        """Refuse options that cannot be meant together, before anything is read.

        Raises:
            OptionError: it names them.
        """
        load, options = self.load, self.options
        if load.execution not in ("auto", "eager"):
            raise OptionError(f"execution {load.execution} computes no gradients: omit --execution")
        if load.attention not in (None, "auto", "sdpa"):
            raise OptionError(f"attention {load.attention} is not for training, which uses sdpa: omit --attention")
        if load.quant is not None and options.full:
            raise OptionError("quantized weights cannot be trained: omit --quant, or --full for an adapter beside them")
        if load.dtype is not None and DTYPE_NAMES.get(load.dtype) == "float16":
            raise OptionError("float16 needs a loss that is scaled, which is not supported: use --dtype bfloat16")
        if options.full and self.base.quant is not None:
            raise OptionError(
                f"the weights of {self.base.path} are quantized to {self.base.quant}: train without --full"
            )

    def model(self) -> tuple[Transformer, dict[str, Tensor], float]:
        """The model with what is trained in place, what is trained by name, and the scale of an adapter."""
        options, full = self.options, self.options.full
        wanted = replace(self.load, execution="eager", attention="sdpa")
        dtype = wanted.dtype
        if full:  # weights are trained in fp32, whatever the arithmetic
            wanted = replace(wanted, dtype=None if dtype in (None, "auto") else "float32")
            if pick_device(wanted.device).type != "cpu":
                wanted = replace(wanted, dtype="float32")
        else:
            start, scale = self.start()
            wanted = replace(wanted, adapter=None)
        model, run = assemble(self.base, options=wanted)
        self.notes += run.notes
        for layer in model.layers:
            layer.attention.attend = shared_masks
        if full:
            model.float()
            compute = None if dtype in (None, "auto") else getattr(torch, DTYPE_NAMES[str(dtype)])
            model.compute_dtype = None if compute == torch.float32 else compute
            model.requires_grad_(True)
            weights: dict[str, Tensor] = dict(model.named_parameters())
            scale = 1.0
        else:
            freeze(model)
            weights = dict(put_lora(model, start, scale, options.lora_dropout))
        what = "all weights" if full else f"LoRA of rank {next(iter(start.values()))[0].shape[0]}, scale {scale:g}"
        self.say(f"training {what}: {sum(w.numel() for w in weights.values()) / 1e6:.2f} M numbers; {run.describe()}")
        recompute(model, options.recompute, 0 if full else options.rank, bool(options.lora_dropout))
        return model, weights, scale


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

    Raises:
        MistralError: a subclass that names what is wrong with the options, the samples, the memory or the disk.
        KeyboardInterrupt: `should_stop` said so; the state is saved.
    """
    run = Run(folder, Path(data), Path(out), options, load, say)
    run.check_options()
    changed = options.rope_theta is not None
    if changed and not options.full and not merge:
        raise OptionError("rope_theta is part of a model, not of an adapter: add --merge or --full")
    if merge and options.full:
        raise OptionError("--merge is for adapters; --full writes the whole model")
    _out_folder(run.out, resume)
    for note in run.base.notes:
        say(f"note: {note}")
    found = run.samples()
    if eval_data is not None and options.eval_split:
        raise OptionError("eval_split and --eval_data: give one of them")
    kept, held = split(len(found.samples), options.eval_split, options.seed)
    samples = [found.samples[i] for i in kept]
    others = [found.samples[i] for i in held]
    if eval_data is not None:
        more = replace_data(run, Path(eval_data)).samples()
        found.notes += more.notes
        others = more.samples
    if options.patience is not None and not others:
        raise OptionError("patience needs evaluations: add --eval_split 0.05 or --eval_data")
    schedule = _schedule(samples, options)
    steps = options.steps or max(1, round(options.epochs * schedule.steps_per_epoch))
    _describe_data(run, found, samples, others, schedule, steps)
    _require(run, schedule, samples, merge)
    model, weights, scale = run.model()
    identity = {
        "version": __version__,
        "base": str(short(run.base.path)),
        "data": found.sha256,
        "args": json.loads(json.dumps(run.base.args.to_params())),
        "options": {**asdict(options), "save_every": None},
        "adapter": load.adapter,
        "quant": load.quant,
        "dtype": load.dtype,
        "eval_data": None if eval_data is None else str(eval_data),
        "steps": steps,
    }
    loop = Loop(model, weights, samples, others, schedule, steps, options, run.out, identity, on_report, should_stop)
    history = loop.go(resume)
    command = _command(run, merge, eval_data)
    return _finish(run, loop, history, found, scale, merge, command)


def replace_data(run: Run, data: Path) -> Run:
    """The same run over other samples."""
    other = replace(run, data=data)
    for name in ("base", "tokenizer", "template"):
        if name in run.__dict__:
            other.__dict__[name] = run.__dict__[name]
    return other


def _out_folder(out: Path, resume: bool) -> None:
    """Make the folder of the results.

    Raises:
        UsageError, FormatError: it holds something, or cannot be made.
    """
    if not resume and out.is_dir() and any(out.iterdir()):
        go_on = "; --resume goes on with the run in it" if (out / STATE).is_file() else ""
        raise UsageError(f"{out} is there already and not empty: give another folder{go_on}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{out} cannot be made: {error.strerror}") from None


def _schedule(samples: Sequence[Sample], options: TrainOptions) -> Schedule:
    rows = pack([len(sample.ids) - 1 for sample in samples], options.seq_len, options.seed)
    return Schedule(rows, options.batch_size, options.accumulate, options.seed)


def _describe_data(
    run: Run, found: Samples, samples: Sequence[Sample], held: Sequence[Sample], schedule: Schedule, steps: int
) -> None:
    for note in found.notes:
        run.say(f"note: {note}")
    run.notes += found.notes
    tokens = sum(len(sample.ids) - 1 for sample in samples)
    learned = sum(sum(weight > 0 for weight in sample.weights) for sample in samples)
    rows = len(schedule.rows)
    fill = tokens / (rows * run.options.seq_len)
    run.say(
        f"{len(samples)} samples, {tokens:,} tokens, {learned:,} of them learned; {rows} rows of {run.options.seq_len} "
        f"({fill:.0%} full); {len(held)} samples held out; {steps} steps, {schedule.steps_per_epoch} an epoch"
    )


def _require(run: Run, schedule: Schedule, samples: Sequence[Sample], merge: bool) -> None:
    """Refuse a run that memory or disk do not allow; report what it needs."""
    options, args, full = run.options, run.base.args, run.options.full
    known = parameters(args)
    device = pick_device(run.load.device)
    trained = _count(run, args)
    quant = run.load.quant or run.base.quant
    each = (
        4
        if full
        else min(
            torch.finfo(getattr(torch, t.dtype)).bits // 8
            for t in run.base.tensors.values()
            if t.dtype.startswith(("float", "bfloat"))
        )
        if quant is None
        else 4
    )
    size = sum(p.numel * each if quant is None else bytes_of(p, quant, 4) for p in known.values())
    lengths = [sum(len(samples[i].ids) - 1 for i in row) for row in schedule.rows]
    tokens = sum(sorted(lengths)[-options.batch_size :])
    narrow = run.load.dtype is not None and DTYPE_NAMES.get(run.load.dtype) == "bfloat16"
    parts = needs.memory_parts(args, options, weights=size, trained=trained, tokens=tokens, itemsize=2 if narrow else 4)
    needs.require_memory(parts, device, options)
    run.say("needs " + ", ".join(f"{as_text(n)} of {what}" for what, n in parts.items() if n))
    whole = sum(p.numel for p in known.values()) * 4
    needs.require_disk(run.out, trained, whole if full or merge else 2 * trained * 4, options)


def _count(run: Run, args: ModelArgs) -> int:
    if run.options.full:
        return sum(p.numel for p in parameters(args).values())
    shapes = run.trained() if run.load.adapter is None else None
    if shapes is None:
        start, _ = run.start()
        return sum(a.numel() + b.numel() for a, b in start.values())
    return sum((out + inner) * run.options.rank for out, inner in shapes.values())


def _command(run: Run, merge: bool, eval_data: str | PathLike[str] | None) -> str:
    """The command line of a run."""
    words = ["python", "-m", "main", "finetune", *([] if run.folder is None else [str(run.folder)])]
    words += ["--data", str(run.data), "--out", str(run.out)]
    words += [] if eval_data is None else ["--eval_data", str(eval_data)]
    for given, usual in ((run.options, TrainOptions()), (run.load, LoadOptions())):
        for name, value in asdict(given).items():
            if value != getattr(usual, name):
                words += [f"--{name}"] if value is True else [f"--{name}", "none" if value is None else str(value)]
    return shlex.join([*words, *(["--merge"] if merge else [])])


def _finish(
    run: Run, loop: Loop, history: log.Log, found: Samples, scale: float, merge: bool, command: str
) -> Finished:
    """Write what was trained, its card and the picture; the state is not needed any more."""
    options, out = run.options, run.out
    losses = [entry["loss"] for entry in history.entries if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history.entries if "eval_loss" in entry]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    stored = {tensor.dtype for tensor in run.base.tensors.values() if not tensor.widened}
    rounded = "float32" if "float32" in stored else "float16" if stored == {"float16"} else "bfloat16"
    base = str(short(run.base.path) if run.folder is None else run.folder)
    if options.full:
        run.notes += output.write_model(out, run.base, loop.weights, rounded)
        files = [path for path in sorted(out.glob("*.safetensors")) if path.name not in (STATE, BEST)]
        run.notes.append(
            f"weights are written in {rounded}, rounded once from float32"
        ) if rounded != "float32" else None
    else:
        files = output.write_adapter(out, loop.weights, run.base.args, options, scale, base)
        if merge:
            run.notes += output.write_merged(out, run.base, rounded)
        if run.base.args.windows != read_folder(BUNDLED if run.folder is None else locate(run.folder)).args.windows:
            run.notes.append(f"use the adapter with --sliding_window {run.base.args.window_text}, as it was trained")
    progress = loop.progress
    if options.patience is not None:
        run.notes.append(f"the weights are those of step {progress.best_step}, whose evaluation was best")
    if not log.plot(history.entries, out / log.PLOT):
        run.notes.append(f"no {log.PLOT}: it needs matplotlib (pip install matplotlib)")
    facts = {
        "base": base,
        "data": f"{run.data.name}, {len(loop.samples)} samples, sha256 {found.sha256}",
        "steps": f"{progress.step} of {loop.steps}, {progress.tokens:,} tokens in {progress.seconds:.0f} s",
        "loss": f"{first:.4f} at the start, {last:.4f} at the end (nats a token, means of a tenth of the steps)",
        **({"held out": f"{evals[0]:.4f} before, {evals[-1]:.4f} after"} if evals else {}),
        "arithmetic": f"{str(loop.model.dtype).removeprefix('torch.')} on {loop.model.device.type}, state in float32",
        "made with": f"mistral-oracle-ref {__version__}, torch {torch.__version__}",
    }
    with write_atomic(out / CARD) as beside:
        beside.write_text(card(out.resolve().name, base, not options.full, facts, options, command), encoding="utf-8")
    for name in (STATE, BEST):
        (out / name).unlink(missing_ok=True)
    pair = (evals[0], evals[-1]) if evals else None
    return Finished(out, tuple(files), progress, first, last, pair, tuple(run.notes))
