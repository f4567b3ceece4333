"""Mixtral as a GGUF file: experts of a layer in one tensor, or apart as in older files; packed or dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral import load
from mistral.args import Moe
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.gguf import name_of, to_mistral
from mistral.formats.gguf_header import read_gguf
from mistral.formats.gguf_parts import experts_apart
from mistral.util.errors import MistralError
from tests.formats.test_gguf_layout import TOKENIZER
from tests.support.gguf_files import gguf_args, write_gguf
from tests.support.tiny import distance, make_cache, play, prefill_then_decode, ragged

LENS = [9, 3, 6]


def make(path: Path, kind: str, **more: Any) -> dict[str, np.ndarray]:
    wide = {"dim": 256, "hidden_dim": 512, "n_heads": 8, "head_dim": 64} if kind == "Q4_K" else {}
    args = gguf_args(vocab_size=4096, moe=Moe(4, 2), **wide)
    return write_gguf(path, kind, args, extra=TOKENIZER, **more)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one for each"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_experts_are_what_the_gguf_package_reads(tmp_path: Path, kind: str, stacked: bool) -> None:
    held = make(tmp_path / "m.gguf", kind, stacked=stacked)
    loaded = load(tmp_path / "m.gguf", device="cpu", quant="none")
    assert loaded.args.moe == Moe(4, 2)
    state = loaded.model.state_dict()
    assert state.keys() == held.keys()
    for name, weight in held.items():
        assert np.array_equal(state[name].float().numpy(), weight), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_blocks_stay_and_give_the_same_model(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "m.gguf", kind)
    packed, plain = (load(tmp_path / "m.gguf", device="cpu", quant=quant) for quant in (None, "none"))
    name = "layers.1.feed_forward.experts.3.w2"
    if packed.runtime.blocks:  # there is a compiler
        assert type(packed.model.get_submodule(name)).__name__ == "BlockLinear"
        assert packed.model.stands_aside() is None  # type: ignore[operator]
    prompts = ragged(LENS, 4096)
    with torch.inference_mode():
        got = play(packed.model, prompts, prefill_then_decode(LENS, 2), make_cache(packed.model, 3))
        want = play(plain.model, prompts, prefill_then_decode(LENS, 2), make_cache(plain.model, 3))
    assert distance(got, want) < 0.02  # inputs of products are rounded to 16 bits


def test_it_converts_and_is_described(tmp_path: Path) -> None:
    held = make(tmp_path / "m.gguf", "Q8_0")
    for to in ("mistral", "hf"):
        convert(tmp_path / "m.gguf", tmp_path / to, to)
        found = read_folder(tmp_path / to)
        assert found.args.moe == Moe(4, 2)
        for name in ("layers.0.feed_forward.experts.2.w3.weight", "layers.1.feed_forward.gate.weight"):
            assert np.array_equal(found.weights.get(name).numpy(), held[name])


def test_names_there_and_back() -> None:
    for ours, theirs in {
        "layers.10.feed_forward.experts.3.w1.weight": "blk.10.ffn_gate.3.weight",
        "layers.3.feed_forward.experts.3.w2.weight": "blk.3.ffn_down.3.weight",
        "layers.0.feed_forward.gate.weight": "blk.0.ffn_gate_inp.weight",
        "layers.7.feed_forward.w1.weight": "blk.7.ffn_gate.weight",
    }.items():
        assert name_of(ours) == theirs
        assert to_mistral(theirs) == ours
    for unknown in ("blk.0.ffn_gate.1.2.weight", "blk.0.ffn_gate_shexp.weight"):
        assert to_mistral(unknown) == unknown


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf", "F32", without=("layers.1.feed_forward.experts.3.w2.weight",))
    with pytest.raises(MistralError, match=r"lack blk\.1\.ffn_down\.3\.weight"):
        load(tmp_path / "m.gguf", device="cpu")


def test_experts_in_two_forms_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "m.gguf", "F32")
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert "blk.0.ffn_up.1.weight" in experts_apart(tensors)
    one = tensors["blk.1.ffn_down_exps.weight"]
    for both in (tensors | {"blk.1.ffn_down.0.weight": one}, {"blk.1.ffn_down.0.weight": one} | tensors):
        with pytest.raises(MistralError, match=r"one weight in two forms, blk\.1\.ffn_down.* and blk\.1\.ffn_down"):
            experts_apart(both)
