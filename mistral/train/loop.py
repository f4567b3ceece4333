"""The loop: steps, evaluations, saves; live figures out. Where it is told to stop it saves, and goes on from there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.finite import why_not_finite
from mistral.formats.weights import WeightsError
from mistral.model import Transformer
from mistral.train.data import Sample
from mistral.train.log import LOG, Log
from mistral.train.optimizer import adamw, change, clipped, learning_rate
from mistral.train.options import TrainOptions
from mistral.train.packing import Schedule, batch_of
from mistral.train.ranks import Ranks
from mistral.train.state import BEST, STATE, Progress, load_state, load_tensors, save_state, save_tensors
from mistral.train.step import add_gradients, nats_of
from mistral.util.errors import MistralError
from mistral.util.threads import Sharing


class Diverged(MistralError):
    """The loss, or its gradient, is no number any more."""

    exit_code = 1


@dataclass(frozen=True)
class Report:
    """What is known after a step.

    Args:
        step, steps: those that are done, and all.
        loss: nats a token of the step; NaN is none.
        eval_loss: of the newest evaluation, if there was one.
        rate: tokens a second, of the last steps.
        left: seconds to the end, at this rate.
    """

    step: int
    steps: int
    loss: float
    eval_loss: float | None
    rate: float
    left: float


@dataclass
class Loop:
    """A run of fine-tuning.

    Args:
        model: with what is trained in place; on its device.
        weights: what is trained, by name, fp32.
        samples, held: what is learned, and what is held out.
        schedule: which samples are when.
        steps: in all.
        out: the folder of state and log.
        run: what makes the run what it is; see `state`.
        on_report: called after every step.
        should_stop: asked after every step.
        ranks: the processes that share every step; the first one writes.
    """

    model: Transformer
    weights: Mapping[str, Tensor]
    samples: Sequence[Sample]
    held: Sequence[Sample]
    schedule: Schedule
    steps: int
    options: TrainOptions
    out: Path
    run: Mapping[str, Any]
    on_report: Callable[[Report], None] = lambda report: None
    should_stop: Callable[[], bool] = lambda: False
    ranks: Ranks = field(default_factory=Ranks)
    progress: Progress = field(default_factory=Progress)
    eval_loss: float | None = None
    sharing: Sharing = field(default_factory=Sharing)

    def require_a_loss(self) -> None:
        """Compute a loss with the model as it is, before anything is written.

        Raises:
            WeightsError: it is NaN or infinite.
        """
        batch = batch_of([self.samples[i] for i in self.schedule.forwards(0)[0]])
        self.model.eval()
        nats = nats_of(self.model, batch.to(self.model.device))
        if not math.isfinite(nats):
            raise WeightsError(f"the loss before the first step is {nats}: {self._at_fault()}")

    def go(self, resume: bool = False) -> Log:
        """Train to the end; or to where it is stopped, which is saved.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite; the last state that was saved is as it was.
            KeyboardInterrupt: it was stopped.
        """
        optimizer = adamw(self.weights, self.options)
        if resume:
            self.progress = load_state(self.out / STATE, self.weights, optimizer, self.run)
        log = Log(self.out / LOG if self.ranks.first else None, self.progress.step)
        try:
            self._steps(optimizer, log)
        finally:
            log.close()
        if self.ranks.first and self.options.patience is not None and self.held and (self.out / BEST).is_file():
            load_tensors(self.out / BEST, self.weights)
        return log

    def _steps(self, optimizer: torch.optim.AdamW, log: Log) -> None:
        progress, options = self.progress, self.options
        every = options.eval_every or max(1, self.steps // 10)
        if self.held and not progress.step:
            self._evaluate(log)
        while progress.step < self.steps and not self._has_enough():
            with self.sharing():
                report = self._step(optimizer, log)
            self.on_report(report)
            last = progress.step == self.steps
            if self.held and (progress.step % every == 0 or last):
                with self.sharing():
                    self._evaluate(log)
            stop = self.ranks.any_stop(self.should_stop())
            if self.ranks.first and (stop or (progress.step % options.save_every == 0 and not last)):
                save_state(self.out / STATE, self.weights, optimizer, progress, self.run)
            if stop:
                raise KeyboardInterrupt

    def _has_enough(self) -> bool:
        return self.options.patience is not None and self.progress.bad >= self.options.patience

    def _step(self, optimizer: torch.optim.AdamW, log: Log) -> Report:
        progress, began = self.progress, time.perf_counter()
        forwards = [[self.samples[i] for i in chosen] for chosen in self.schedule.forwards(progress.step)]
        batches = [batch_of(samples) for samples in forwards]
        total = sum(batch.total for batch in batches)
        self.model.train()
        nats = 0.0
        for i, batch in self.ranks.share(batches):
            if self.options.lora_dropout:  # drawn from the step alone, so that a run that goes on needs no state of it
                torch.manual_seed(hash((self.options.seed, progress.step, i)) % 2**63)
            nats += add_gradients(self.model, batch.to(self.model.device), total)
        nats = self.ranks.sum(nats)
        self._require_finite("loss", nats)
        self.ranks.add_gradients(self.weights.values())
        lr = learning_rate(progress.step, self.steps, self.options)
        norm = clipped(self.weights, self.options.clip)
        self._require_finite("gradient's length", norm)
        change(optimizer, lr)
        tokens, seconds = sum(len(batch.ids) for batch in batches), time.perf_counter() - began
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        loss = nats / total
        log.add(step=progress.step, loss=loss, lr=lr, norm=norm, tokens=tokens, seconds=round(seconds, 4))
        recent = [entry for entry in log.entries[-20:] if "loss" in entry]
        took = sum(entry["seconds"] for entry in recent) or math.inf
        left = (self.steps - progress.step) * took / len(recent)
        rate = sum(entry["tokens"] for entry in recent) / took
        return Report(progress.step, self.steps, loss, self.eval_loss, rate, left)

    def _require_finite(self, what: str, value: float) -> None:
        """Refuse to change weights by a gradient that is none."""
        if math.isfinite(value):
            return
        too_fast = (
            f"the learning rate {self.options.peak_lr:g} may be too high (--lr); {self.out / STATE}, if it is there, "
            "is of an earlier step"
        )
        reason = too_fast if self.progress.step else self._at_fault()  # nothing has been learned before the first step
        raise Diverged(f"the {what} of step {self.progress.step + 1} is {value}: {reason}")

    def _at_fault(self) -> str:
        return why_not_finite(self.model, self.model.dtype)

    def _evaluate(self, log: Log) -> None:
        self.model.eval()
        size = max(1, self.options.batch_size)
        rows = [self.held[i : i + size] for i in range(0, len(self.held), size)]
        batches = [batch_of(row) for row in rows]
        nats = sum(nats_of(self.model, batch.to(self.model.device)) for _, batch in self.ranks.share(batches))
        loss = self.ranks.sum(nats) / sum(batch.total for batch in batches)
        progress, self.eval_loss = self.progress, loss
        log.add(step=progress.step, eval_loss=loss)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.bad = loss, progress.step, 0
            if self.ranks.first and self.options.patience is not None:
                save_tensors(self.out / BEST, self.weights)
        else:
            progress.bad += 1
