"""Fewer threads where other programs leave too few cores for all: who takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral import quant
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.loader.load import load
from mistral.loader.options import LoadOptions
from mistral.oracle.inputs import WeightReader, random_prompts, through
from mistral.oracle.truth import Truth
from mistral.train import loop
from mistral.train.options import TrainOptions
from mistral.train.run import finetune
from mistral.util.cores import FreeCores
from mistral.util.threads import Sharing
from tests.support.folders import make_folder


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_cores_that_others_leave_are_no_matter_of_trying() -> None:
    free = 4
    sharing = Sharing(lambda: free)
    torch.set_num_threads(4)
    for free, few in ((4, False), (3, True), (9, False), (1, True)):
        with sharing():
            assert (torch.get_num_threads(), sharing.few) == (min(free, 4), few)
            with sharing():
                assert (torch.get_num_threads(), sharing.few) == (min(free, 4), few)
            assert (torch.get_num_threads(), sharing.few) == (min(free, 4), few)
        assert (torch.get_num_threads(), sharing.few) == (4, False)
    with pytest.raises(KeyError), sharing():
        raise KeyError
    assert (torch.get_num_threads(), sharing.few) == (4, False)


@pytest.mark.usefixtures("threads")
def test_what_takes_long_asks_again_in_between() -> None:
    free = iter((1, 4, 2, 4))
    sharing = Sharing(lambda: next(free))
    torch.set_num_threads(4)
    with sharing():
        seen = [(torch.get_num_threads(), sharing.few)]
        for _ in range(3):
            with sharing():
                seen.append((torch.get_num_threads(), sharing.few))
            assert (torch.get_num_threads(), sharing.few) == (1, True)
    assert seen == [(1, True), (4, False), (2, True), (4, False)]
    assert (torch.get_num_threads(), sharing.few) == (4, False)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("free", [1, 2])
def test_the_oracle_leaves_cores_to_others(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreeCores, "__call__", lambda self: free)
    torch.set_num_threads(2)
    found = read_folder(make_folder(tmp_path / "model", tokenizer=False))
    truth, seen = Truth(found.args, random_prompts(found.args, [9, 3])), []
    layer = truth.layer

    def noted(i: int, weights: dict[str, Tensor]) -> None:
        seen.append(torch.get_num_threads())
        layer(i, weights)

    monkeypatch.setattr(truth, "layer", noted)
    for _ in through(WeightReader(found), [(truth, None)], found.args.n_layers):
        assert torch.get_num_threads() == 2
    assert seen == [free] * found.args.n_layers


@pytest.mark.usefixtures("threads")
def test_training_leaves_cores_to_others_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails, --resume goes on bit for bit only with --threads 1."""
    data, seen = tmp_path / "train.jsonl", []
    data.write_text("".join(json.dumps({"text": f"The king had {n} daughters."}) + "\n" for n in range(20)))
    add_gradients = loop.add_gradients

    def noted(*given: Any) -> float:
        seen.append(torch.get_num_threads())
        return add_gradients(*given)

    monkeypatch.setattr(loop, "add_gradients", noted)
    torch.set_num_threads(2)
    folder = make_folder(tmp_path / "model")
    for free in (1, 2):
        monkeypatch.setattr(FreeCores, "__call__", lambda self, free=free: free)
        options = TrainOptions(seq_len=40, steps=3, lora=3)
        finetune(folder, data, tmp_path / str(free), options=options, load=LoadOptions(device="cpu"))
    assert seen == [1] * 3 + [2] * 3
    one, two = ((tmp_path / free / "adapter_model.safetensors").read_bytes() for free in "12")
    assert one == two


@pytest.mark.usefixtures("threads")
def test_loading_and_converting_leave_cores_to_others_and_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads beside a busy program `--quant int4` of a GGUF file took twice as long to load as with one."""
    seen, quantize = [], quant.quantize

    def noted(*given: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return quantize(*given, **named)

    monkeypatch.setattr(quant, "quantize", noted)
    torch.set_num_threads(2)
    folder, written, loaded = make_folder(tmp_path / "model"), [], []
    for free in (1, 2):
        monkeypatch.setattr(FreeCores, "__call__", lambda self, free=free: free)
        loaded.append(load(folder, device="cpu", quant="int8").model.state_dict())
        convert(folder, tmp_path / str(free), "mistral", quant="int8")
        written.append((tmp_path / str(free) / "consolidated.safetensors").read_bytes())
        assert torch.get_num_threads() == 2
    assert seen == [1] * (len(seen) // 2) + [2] * (len(seen) // 2)
    assert written[0] == written[1]
    assert all(torch.equal(one, loaded[1][name]) for name, one in loaded[0].items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_process_does_not_wait_for_threads_that_are_not_there() -> None:
    """In a process of its own: the hook stays, and the failure is that it never ends."""
    words = """
import os, warnings
import torch
from mistral.util.threads import Sharing
warnings.simplefilter("ignore")
torch.set_num_threads(2)
sharing, x = Sharing(lambda: 2), torch.ones(600, 600)
with sharing():
    x @ x
child = os.fork()
with sharing():
    x @ x
if child == 0:
    os._exit(10 + torch.get_num_threads())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
assert torch.get_num_threads() == 2
"""
    subprocess.run([sys.executable, "-c", words], check=True, timeout=120)
