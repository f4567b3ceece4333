"""Mixtral's files: the parts of its first release, the later form, and what transformers 5 fuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral import load
from mistral.cache import RollingBufferCache
from mistral.formats import mistral
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.util.errors import MistralError
from tests.core.test_moe import LENS, mixtral
from tests.formats.test_family import NEW, greedy, their_greedy, theirs
from tests.support.folders import make_folder, write_params
from tests.support.tiny import TOLERANCE, distance, play, prefill_then_decode, ragged, whole

State = dict[str, Tensor]
EXPERTS, LAYERS = 4, 2


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A tiny Mixtral: transformers' folder, the same in Mistral's later form, and transformers' model."""
    folder = tmp_path_factory.mktemp("mixtral")
    other = mixtral(folder / "hf")
    convert(folder / "hf", folder / "later", "mistral")
    return folder / "hf", folder / "later", other


def stacked(later: State) -> State:
    """The names and shapes of the first release: w2 as w1 and w3 lie, [experts * hidden, dim]."""
    state = {n: t for n, t in later.items() if ".feed_forward." not in n}
    for i in range(LAYERS):
        at, there = f"layers.{i}.feed_forward", f"layers.{i}.block_sparse_moe"
        state[f"{there}.gate.weight"] = later[f"{at}.gate.weight"]
        for part in ("w1", "w2", "w3"):
            experts = [later[f"{at}.experts.{e}.{part}.weight"] for e in range(EXPERTS)]
            state[f"{there}.{part}"] = torch.cat([w.T if part == "w2" else w for w in experts]).contiguous()
    return state


def first_release(folder: Path, later: Path, end: str = "pt", parts: int = 3) -> Path:
    """The first release's folder: parts that hold different tensors, with the keys of its params.json."""
    state = stacked(load_file(later / "consolidated.safetensors"))
    params = json.loads((later / "params.json").read_text())
    for key in ("sliding_window", "rope_theta", "max_seq_len"):
        params.pop(key, None)
    folder.mkdir()
    write_params(folder, params)
    for i in range(parts):
        torch.save({n: state[n] for n in list(state)[i::parts]}, folder / f"consolidated.{i:02}.{end}")
    (folder / "tokenizer.model").write_bytes((later / "tokenizer.model").read_bytes())
    return folder


@pytest.mark.parametrize(("end", "parts"), [("pt", 3), ("pth", 1)])
def test_the_first_release_is_transformers(tmp_path: Path, release: Any, end: str, parts: int) -> None:
    """Logits and 50 greedy tokens; converted to both other forms, bit for bit."""
    hf, later, other = release
    folder = first_release(tmp_path / "first", later, end, parts)
    prompts = ragged(LENS, 4096, seed=3)
    want, want_ids = theirs(other, prompts), their_greedy(other, prompts[0])
    assert len(want_ids) == NEW
    found = load(folder, device="cpu")
    assert len(found.files) == parts
    assert found.args == load(later, device="cpu").args
    with torch.inference_mode():
        assert distance(whole(found.model, prompts), want) < TOLERANCE
        cache = RollingBufferCache(found.args, len(prompts), positions=max(LENS))
        assert distance(play(found.model, prompts, prefill_then_decode(LENS, 4), cache), want) < TOLERANCE
    assert greedy(found.model, prompts[0]) == want_ids
    for to, file, same in (("mistral", "consolidated.safetensors", later), ("hf", "model.safetensors", hf)):
        convert(folder, tmp_path / to, to)
        got, expected = load_file(tmp_path / to / file), load_file(same / file)
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_only_an_experts_part_of_a_stack_is_read(tmp_path: Path, release: Any) -> None:
    found = read_folder(first_release(tmp_path / "first", release[1]))
    sizes: list[int] = []
    for name in found.tensors:
        before = sum(sizes)
        tensor = found.weights.get(name, sizes.append)
        assert sum(sizes) - before == tensor.nbytes == found.weights.tensors[name].nbytes


def test_w2_not_transposed_shows(tmp_path: Path, release: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """dim and hidden_dim are equal here, so that nothing but the numbers tells."""
    shape: dict[str, Any] = {"dim": 40, "hidden_dim": 40, "moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2}}
    args = mistral.to_args({**json.loads((release[1] / "params.json").read_text()), **shape})
    from tests.support.tiny import tiny_model

    later = make_folder(tmp_path / "later", dict(tiny_model(args).state_dict()), **{"sliding_window": None, **shape})
    folder = first_release(tmp_path / "first", later)
    prompts = ragged(LENS, 4096, seed=3)
    with torch.inference_mode():
        want = whole(load(later, device="cpu").model, prompts)
        assert distance(whole(load(folder, device="cpu").model, prompts), want) < TOLERANCE
        monkeypatch.setattr(Tensor, "T", property(lambda self: self), raising=False)
        assert distance(whole(load(folder, device="cpu").model, prompts), want) > 1e-3


def test_what_transformers_fuses_in_memory(tmp_path: Path, release: Any) -> None:
    """A state dict saved as it is, not by save_pretrained: w1 above w3, all experts in one tensor."""
    hf, _, other = release
    state = {name: tensor.contiguous() for name, tensor in other.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    for file in hf.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    got, want = (read_folder(folder) for folder in (tmp_path, hf))
    assert set(got.tensors) == set(want.tensors)
    for name in want.tensors:
        assert torch.equal(got.weights.get(name), want.weights.get(name)), name


BROKEN: dict[str, tuple[Callable[[State], Any], str]] = {
    "no whole number": (
        lambda s: s.update({"layers.0.block_sparse_moe.w1": torch.zeros(7, 24)}),
        r"layers.0.block_sparse_moe.w1 \[7, 24\] is no stack of 4 experts",
    ),
    "no router": (lambda s: s.pop("layers.1.block_sparse_moe.gate.weight"), r"is no stack of 0 experts"),
    "no w3": (lambda s: s.pop("layers.1.block_sparse_moe.w3"), r"lack layers.1.feed_forward.experts.0.w3.weight"),
    "another size": (
        lambda s: s.update({"layers.0.block_sparse_moe.w1": torch.zeros(4 * 41, 24)}),
        r"makes layers.0.feed_forward.experts.0.w1.weight \[40, 24\], but",
    ),
    "another dtype": (
        lambda s: s.update({"layers.0.block_sparse_moe.w1": torch.zeros(4 * 40, 24, dtype=torch.complex64)}),
        r"is torch.complex64; weights are",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused(tmp_path: Path, release: Any, kind: str) -> None:
    change, message = BROKEN[kind]
    folder = first_release(tmp_path / "first", release[1], parts=1)
    path = folder / "consolidated.00.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(MistralError, match=message):
        load(folder, device="cpu")


def test_parts_of_one_tensor_are_refused(tmp_path: Path, release: Any) -> None:
    folder = first_release(tmp_path / "first", release[1], end="pth", parts=2)
    state = torch.load(folder / "consolidated.00.pth")
    torch.save(dict(list(state.items())[:1]), folder / "consolidated.02.pth")
    with pytest.raises(
        MistralError, match=r"several \.pth files.*is in consolidated.00.pth and in consolidated.02.pth"
    ):
        load(folder, device="cpu")


def test_inspect_describes_it(tmp_path: Path, release: Any) -> None:
    report = inspect_folder(first_release(tmp_path / "first", release[1]))
    text = as_text(report)
    assert "experts     4 in each layer, 2 for each token, which goes through 0.2 M parameters" in text
    assert "consolidated.00.pt and 2 more" in text
    assert [f["role"] for f in report["files"] if f["name"].endswith(".pt")] == ["weights"] * 3
    assert "vLLM does not read .pth files" in text


@pytest.mark.parametrize("router", [True, False], ids=["router", "experts"])
@pytest.mark.parametrize("form", ["first", "fused"])
def test_experts_in_two_forms_are_refused(
    tmp_path: Path, release: tuple[Path, Path, Any], form: str, router: bool
) -> None:
    """Of two that differ the last was taken, without a word."""
    hf, later, other = release
    source, name = (later, "consolidated.safetensors") if form == "first" else (hf, "model.safetensors")
    apart = load_file(source / name)
    both = stacked(apart) if form == "first" else dict(other.state_dict())
    both |= {n: t for n, t in apart.items() if ("gate.weight" in n if router else ".experts.1.w2" in n)}
    folder = tmp_path / "both"
    folder.mkdir()
    for file in source.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({n: t.clone() for n, t in both.items()}, folder / name)
    with pytest.raises(MistralError, match=r"one weight in two forms, .*, and do not say which is meant"):
        read_folder(folder)
