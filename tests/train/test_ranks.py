"""Data parallel: two processes that share every step take the steps of one, and go on where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mistral.loader.options import LoadOptions, OptionError
from mistral.parallel import launch
from mistral.train.log import read_log
from mistral.train.loop import Report
from mistral.train.options import TrainOptions
from mistral.train.ranks import Ranks
from mistral.train.run import finetune
from mistral.train.state import STATE
from tests.support.folders import make_folder

# A step has three forwards, of which the second rank takes one; the last step of an epoch has fewer. Clipped, so that
# the length of the whole gradient counts.
OPTIONS = TrainOptions(
    seq_len=24, steps=5, lr=0.01, accumulate=3, lora_dropout=0.2, eval_split=0.2, eval_every=2, patience=9, clip=0.05
)


def tune(folder: Path, out: Path, ranks: int, stop: int | None = None, resume: bool = False) -> list[Path]:
    """A run, by however many ranks are in this process's group; which files this one sees at its end."""
    done = []

    def count(report: Report) -> None:
        done.append(report.step)

    finetune(
        folder,
        folder.parent / "train.jsonl",
        out,
        options=OPTIONS,
        load=LoadOptions(device="cpu", parallel=ranks),
        resume=resume,
        on_report=count,
        should_stop=lambda: len(done) == stop and Ranks.joined().first,
    )
    return sorted(path.relative_to(out) for path in out.rglob("*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    lines = [json.dumps({"text": f"The king had {i} rings of gold. " * (1 + i % 3)}) for i in range(11)]
    (place / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return make_folder(place / "base")


def logged(out: Path) -> list[dict[str, Any]]:
    return [{**entry, "seconds": 0} for entry in read_log(out / "log.jsonl")]


def test_two_processes_take_the_steps_of_one(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    files = tune(folder, one, 1)
    assert launch.run(2, tune, folder, two, 2) == files
    for left, right in zip(logged(one), logged(two), strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    a, b = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    assert any(t.any() for name, t in a.items() if "lora_B" in name)


@pytest.mark.long  # it starts four processes more
def test_they_go_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    launch.run(2, tune, folder, whole, 2)
    with pytest.raises(KeyboardInterrupt):
        launch.run(2, tune, folder, out, 2, 3)
    assert (out / STATE).is_file()
    launch.run(2, tune, folder, out, 2, None, True)
    assert logged(out) == logged(whole)
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_step_has_a_forward_for_every_process(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="parallel 4 shares the 3 forwards of a step: add --accumulate 4"):
        tune(folder, tmp_path / "out", 4)


def test_shares_are_everything_once() -> None:
    things = list("abcdefg")
    shares = [Ranks(rank, 3).share(things) for rank in range(3)]
    assert sorted(pair for share in shares for pair in share) == list(enumerate(things))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_adds_nothing() -> None:
    weight = torch.ones(2, requires_grad=True)
    Ranks().add_gradients([weight])
    assert weight.grad is None
    assert Ranks.joined() == Ranks()
    assert Ranks().sum(0.25) == 0.25
    assert Ranks().any_stop(True)
    assert not Ranks().any_stop(False)
