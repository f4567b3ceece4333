"""Twenty steps beside transformers and PEFT, from one start: the same losses, within the window and past it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral.formats.convert import convert
from mistral.loader.options import LoadOptions
from mistral.train.optimizer import adamw, change, clipped, learning_rate
from mistral.train.options import TrainOptions
from mistral.train.output import write_adapter
from mistral.train.setup import Setup
from mistral.train.step import Batch, add_gradients
from tests.support.folders import make_folder
from tests.support.tiny import ragged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
STEPS, LR = 20, 3e-3


def ours(setup: Setup, rows: list[Tensor], options: TrainOptions) -> list[float]:
    model, weights = setup.model()
    optimizer, losses = adamw(weights, options), []
    for i, row in enumerate(rows):
        n = len(row) - 1
        batch = Batch(row[:-1], (n,), row[1:], torch.ones(n))
        losses.append(add_gradients(model, batch, batch.total) / n)
        clipped(weights, options.clip)
        change(optimizer, learning_rate(i, STEPS, options))
    return losses


def theirs(model: Any, rows: list[Tensor], options: TrainOptions) -> list[float]:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = adamw(weights, options), []
    for i, row in enumerate(rows):
        loss = model(input_ids=row[None], labels=row[None]).loss
        loss.backward()
        losses.append(loss.item())
        clipped(weights, options.clip)
        change(optimizer, learning_rate(i, STEPS, options))
    return losses


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
@pytest.mark.parametrize("length", [9, 150], ids=["within the window", "past the window"])
def test_losses_are_those_of_peft(tmp_path: Path, full: bool, length: int) -> None:
    folder = make_folder(tmp_path / "base", sliding_window=9)
    convert(folder, tmp_path / "hf", "hf")
    options = TrainOptions(full=full, lr=LR, lora=None if full else 4)
    setup = Setup(folder, options, LoadOptions(device="cpu"))
    model = transformers.MistralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    if not full:
        start, scale = setup.start
        named = {f"{n[:-7]}.lora_{k}.weight": t for n, p in start.items() for k, t in zip("AB", p, strict=True)}
        (tmp_path / "start").mkdir()
        write_adapter(tmp_path / "start", named, setup.base.args, options, scale, "base")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    (row,) = ragged([length], 4096)
    rows = [row] * STEPS
    a, b = ours(setup, rows, options), theirs(model.train(), rows, options)
    assert a[-1] < a[0] - 0.05  # there is a curve to compare
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5
