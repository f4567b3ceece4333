"""The oracle and caches in fewer bits: rows of verify, the budgets they have, and what compare takes for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mistral.buffers import Int8Buffer, RollingBuffer
from mistral.formats.folder import read_folder
from mistral.loader.assemble import assemble
from mistral.oracle import verify
from mistral.oracle.compare import compare
from mistral.oracle.inputs import prompts_for
from mistral.oracle.sides import FolderSide, side
from mistral.oracle.truth import Truth
from tests.core.test_cache_dtypes import through, wrong_position
from tests.oracle.test_verify import run
from tests.support.folders import make_folder, random_state
from tests.support.tiny import ragged, tiny_args, tiny_model

CACHES = (torch.float16, torch.bfloat16, torch.int8)
LENS = [33, 1, 6, 21]
PARAMS = {"n_layers": 3, "vocab_size": 61, "sliding_window": 5, "rope_theta": 1e6, "hidden_dim": 24}


def hot() -> dict[str, torch.Tensor]:
    """Weights of a model that looks at some keys more than at others."""
    state = dict(tiny_model(tiny_args(n_layers=3, hidden_dim=24), seed=7).state_dict())
    return {n: w * 3 if n.endswith(("wq.weight", "wk.weight")) else w for n, w in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("right") / "model", hot(), tokenizer=False, **PARAMS)


@pytest.mark.parametrize("dtype", [torch.float32, *CACHES])
def test_the_truth_keeps_keys_as_the_cache_does(dtype: torch.dtype) -> None:
    model = tiny_model(tiny_args(sliding_window=4), seed=2).double()
    model.kept_in = {torch.float64: dtype}
    prompts = ragged([20, 3], model.args.vocab_size)
    with torch.inference_mode():
        got = model(torch.cat(prompts), [20, 3], model.make_cache(2))
    want = run(Truth(model.args, prompts, cache=dtype), model)
    # A scale of int8 is in fp32 in the one, and from float64 keys in the other.
    assert float((got - want).abs().max()) < (1e-6 if dtype == torch.int8 else 1e-9)


def test_what_float16_cannot_hold_is_not_kept_in_it() -> None:
    model = tiny_model(tiny_args())
    truth = Truth(model.args, ragged([3], 61), cache=torch.float16)
    large = torch.tensor([[[70000.0, 1 / 3]]], dtype=torch.float64)
    assert torch.equal(truth._kept(large), large)
    assert torch.equal(truth._kept(large / 2), through(large / 2, torch.float16))


def test_every_cache_is_a_row_and_passes(tmp_path: Path) -> None:
    state = random_state(dtype=torch.bfloat16)
    report = verify.verify(read_folder(make_folder(tmp_path, state, tokenizer=False)), lens=LENS)
    assert report.passes, verify.as_text(report)
    rows = {(row.name, row.attention, row.cache) for row in report.rows if row.dtypes[1] == torch.float32}
    fast = verify.has_kernels()
    for cache in (torch.float32, *CACHES):
        assert ("stepwise", "sdpa", cache) in rows
        assert not fast or ("stepwise", "sdpa, kernels", cache) in rows
    assert ("whole", "sdpa", None) in rows
    text = verify.as_text(report)
    assert "weights/compute/cache" in text
    assert "fp32/fp32/none" in text
    assert "fp32/fp32/int8" in text
    ratios = [row.verdict.ratio for row in report.rows if row.cache in CACHES and row.dtypes[1] == torch.float32]
    assert all(0.3 < ratio < 1.6 for ratio in ratios), ratios  # the budget is what the cache costs


def test_scales_of_another_position_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_folder(make_folder(tmp_path, random_state(dtype=torch.bfloat16), tokenizer=False))
    monkeypatch.setattr(Int8Buffer, "decode", wrong_position)
    report = verify.verify(found, lens=LENS)
    failed = {(row.name, row.attention, row.cache) for row in report.rows if not row.verdict.passes}
    assert ("stepwise", "sdpa", torch.int8) in failed
    assert {cache for _, _, cache in failed} == {torch.int8}


def test_a_cache_in_fewer_bits_than_it_says_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 where fp16 is said: eight times as coarse."""
    found = read_folder(make_folder(tmp_path, random_state(dtype=torch.bfloat16), tokenizer=False))
    right = RollingBuffer.encode

    def coarse(self: RollingBuffer, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        return right(self, k.bfloat16(), v.bfloat16())

    monkeypatch.setattr(RollingBuffer, "encode", coarse)
    report = verify.verify(found, lens=LENS)
    failed = {(row.attention, row.cache) for row in report.rows if not row.verdict.passes}
    assert ("sdpa", torch.float16) in failed
    assert ("sdpa", torch.bfloat16) not in failed


@pytest.mark.parametrize("cache", ["float16", "bfloat16", "int8"])
def test_compare_takes_a_cache_for_what_it_is(cache: str, folder: Path, tmp_path: Path) -> None:
    found = read_folder(folder)
    prompts = prompts_for(found.args)
    model, _ = assemble(found, device="cpu", cache_dtype=cache, execution="eager")
    lens = [len(p) for p in prompts]
    with torch.inference_mode():
        logits = model(torch.cat(prompts), lens, model.make_cache(len(lens)))
    path = tmp_path / "theirs.npz"
    np.savez(path, prompt_ids=torch.cat(prompts).numpy(), prompt_lens=np.array(lens), logits=logits.numpy())
    theirs = side(str(path))
    assert not compare(FolderSide(found, "ours"), theirs).same
    told = side(str(folder), options=_options(cache_dtype=cache))
    report = compare(told, theirs)
    assert report.same
    narrower = {"bfloat16": "float16", "int8": "float16"}.get(cache)
    if narrower is not None:
        assert not compare(side(str(folder), options=_options(cache_dtype=narrower)), theirs).same


def _options(**options: str):
    from mistral.loader.options import LoadOptions

    return LoadOptions(**options)  # type: ignore[arg-type]


def test_a_cache_needs_a_model(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mistral import cli

    pack = tmp_path / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(pack)]) == 0
    assert cli.main(["compare", str(pack), str(pack), "--cache_dtype", "int8"]) == 2
    assert "--cache_dtype is measured on a folder" in capsys.readouterr().err
    assert cli.main(["verify", str(folder), "--cache_dtype", "int8"]) == 2
