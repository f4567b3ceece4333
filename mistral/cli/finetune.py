"""finetune: a model and samples in, an adapter or a model out."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from mistral.cli import terminal
from mistral.cli.interrupts import keeping_interrupts
from mistral.cli.parallel import divisible
from mistral.cli.prompts import default_folder
from mistral.cli.starting import starting
from mistral.loader.options import LoadOptions
from mistral.train.options import TrainOptions
from mistral.util.english import counted
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.train.loop import Report

# Of LoadOptions: what training decides for itself, and what is for generating.
OMITTED = ("max_batch_size", "adapter_mode", "execution", "attention", "draft", "prompt_dtype", "cache_dtype")
EVERY = 10  # seconds between lines where there is no terminal


@flat(train=TrainOptions(), options=LoadOptions(), omit=OMITTED)
@divisible
def finetune(
    folder: str | None = None,
    *,
    data: str,
    out: str,
    eval_data: str | None = None,
    merge: bool = False,
    resume: bool = False,
    train: TrainOptions,
    options: LoadOptions,
) -> None:
    """Fine-tune a model on a file of samples: an adapter (LoRA), or all weights with --full.

    python -m main finetune --data train.jsonl --out mine --seq_len 256
    python -m main finetune mistral-7B-v0.1 --data train.jsonl --out mine --dtype bfloat16 --merge
    python -m main finetune model --data train.jsonl --out mine --eval_split 0.05 --patience 3
    python -m main finetune model --data long.jsonl --out longer --full --sliding_window 16384 --rope_theta 1e6
    python -m main finetune model --data train.jsonl --out mine --resume

    A line of the file is {"messages": [..]}, as OpenAI and mistral-finetune have it, of which answers are learned, or
    {"text": ..}, of which all is, or {"prompt": .., "completion": ..}. All lines are checked before anything else. OUT
    gets the adapter as PEFT and vLLM read it (--adapter OUT uses it) and in mistral-finetune's form, or with --full the
    model; log.jsonl, loss.svg and a card. Ctrl-C, SIGTERM and a closed terminal save: the same command with --resume
    goes on, on a CPU bit for bit.

    Args:
        data: a file of JSON lines
        out: a folder for the results, new or empty
        eval_data: samples to evaluate; default: a split of DATA, if --eval_split is given
        merge: also write the model with the adapter in it, into OUT/merged
        resume: go on with the run in OUT that was stopped
        dtype: of the arithmetic: float32 or bfloat16; what is trained is float32; default: what suits the device
        quant: int8 or int4: an adapter beside quantized weights
        adapter: a LoRA adapter to go on from; with --full it is merged first
        parallel: processes that share the forwards of each step, of which --accumulate says how many there are
    """
    with keeping_interrupts(), starting("starting PyTorch"):
        from mistral.train.run import finetune as run
    line = _Line()
    stop = _Stop(line)
    try:
        with stop, line:
            finished = run(
                default_folder(folder),
                data,
                out,
                options=train,
                load=options,
                eval_data=eval_data,
                merge=merge,
                resume=resume,
                say=terminal.echo_err,
                on_report=line.report,
                should_stop=lambda: stop.asked,
            )
    except KeyboardInterrupt:
        if stop.asked and not stop.at_once:
            terminal.echo_err(
                f"saved after step {line.step} in {out}; the same command with --resume goes on from there"
            )
        raise
    for note in finished.notes:
        terminal.echo_err(f"note: {note}")
    held = ""
    if finished.eval_losses is not None:
        held = "; held out {:.4f} to {:.4f}".format(*finished.eval_losses)
    progress = finished.progress
    means = " (means of the first and the last tenth of the steps)" if progress.step >= 20 else ""
    terminal.echo_err(
        f"{counted(progress.step, 'step')}, {counted(progress.tokens, 'token')} in {progress.seconds:.0f} s; "
        f"loss {finished.losses[0]:.4f} to {finished.losses[1]:.4f}{means}{held}"
    )
    print(finished.out)


class _Stop:
    """Ctrl-C while training: the first saves after the step that is running, a second one stops at once.

    So does SIGTERM, as at the end of a session, and a terminal that is closed, unless it is not to be heard (nohup).
    They may come several times, for one reason.
    """

    def __init__(self, line: _Line) -> None:
        self.asked = self.at_once = False
        self._line = line
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has not all of them
            if number is not None and (name == "SIGINT" or signal.getsignal(number) is signal.SIG_DFL):
                self._before[number] = signal.signal(number, self._hit)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _hit(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number != signal.SIGINT:
            return
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self.asked = True
        self._line.end()
        terminal.echo_err("stopping after this step; --resume goes on (Ctrl-C again: at once, without saving)")


class _Line:
    """Progress: a bar at a terminal, else a line on stderr now and then."""

    def __init__(self) -> None:
        self.step = 0  # the last one that is done
        self._bar: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def end(self) -> None:
        """Have what is printed next begin a line of its own, where a bar is shown."""
        if self._bar is not None and not self._bar.disable:
            terminal.echo_err("", asked=True)  # where the terminal has gone, training goes on to its save

    def report(self, report: Report) -> None:
        from tqdm import tqdm

        self.step = report.step
        held = "" if report.eval_loss is None else f", held out {report.eval_loss:.3f}"
        text = f"loss {report.loss:.3f}{held}, {report.rate:.0f} tokens/s"
        if self._bar is None:
            # What matters comes first: a narrow terminal cuts off the end.
            shown = "step {n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|"
            first = report.step - 1
            self._bar = tqdm(total=report.steps, initial=first, bar_format=shown, dynamic_ncols=True, disable=None)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(report.step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and (now - self._last >= EVERY or report.step == report.steps):
            self._last = now
            left = f", {report.left:.0f} s left" if report.left else ""
            terminal.echo_err(f"step {report.step}/{report.steps}: {text}{left}")
