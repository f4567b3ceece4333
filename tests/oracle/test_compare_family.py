"""compare names the mistakes that only other members can make, each of them made without the kit that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import one_file_ref
from mistral import cli
from mistral.formats import merge
from mistral.formats.adapter import read_adapter
from mistral.formats.folder import read_folder
from mistral.formats.mistral import to_args
from mistral.oracle.inputs import prompts_for
from tests.support import truth
from tests.support.adapters import peft_tensors, write_native, write_peft
from tests.support.folders import PARAMS, make_folder
from tests.support.tiny import shapes_of, tiny_model

SMALL = {**PARAMS, "vocab_size": 61, "head_dim": 16, "sliding_window": 25, "rope_theta": 1e6}
ORIGINAL = "original_max_position_embeddings"
YARN = {"factor": 4, ORIGINAL: 8, "beta": 1, "alpha": 0.001, "apply_scale": True}
GROWS = {"llama_4_scaling": {ORIGINAL: 8, "beta": 0.3}}
MOE = {"moe": {"num_experts": 4, "num_experts_per_tok": 2}, "sliding_window": None}
State = dict[str, Tensor]


def folder_of(place: Path, state: State | None = None, **params: Any) -> Path:
    """A folder of weights that look at some keys more than at others."""
    given = {**SMALL, **params}
    args = to_args(given)
    if state is None:
        state = dict(tiny_model(args, seed=7).state_dict())
        state = {n: w * 3 if n.endswith(("wq.weight", "wk.weight", "gate.weight")) else w for n, w in state.items()}
    known = shapes_of(args)
    return make_folder(place, {n: w.clone() for n, w in state.items() if n in known}, tokenizer=False, **given)


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = cli.main(["compare", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def engine(folder: Path, place: Path, compute: Callable[[Tensor], Any]) -> Path:
    """What an engine says of the prompts that `compare` takes for a folder."""
    prompts = prompts_for(read_folder(folder).args)
    scores = np.concatenate([np.asarray(compute(p)) for p in prompts])
    np.savez(place, prompt_ids=torch.cat(prompts), prompt_lens=[len(p) for p in prompts], logprobs=scores)
    return place


def by_one_file(folder: Path) -> Callable[[Tensor], np.ndarray]:
    model = one_file_ref.load(folder, dtype=torch.float64)

    def compute(ids: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model(ids, [len(ids)]).log_softmax(-1).numpy()

    return compute


def test_a_factor_in_params(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    applied = folder_of(tmp_path / "applied", yarn=YARN, **GROWS)
    ignored = folder_of(tmp_path / "ignored", yarn={**YARN, "apply_scale": False}, **GROWS)
    assert ask(capsys, applied, applied)["same"]
    assert list(ask(capsys, applied, ignored)["mistakes"]) == ["yarn_factor_ignored"]
    assert list(ask(capsys, ignored, applied)["mistakes"]) == ["yarn_factor_always"]


def rounded_ramp(right: Callable[..., Any], args: Any) -> Any:
    """Each pair has its own frequency or a quarter of it, whichever is nearer on the ramp."""
    found, factor = right(args)
    kept = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    ramp = (1 - found / kept) / (1 - 1 / args.yarn["factor"])
    assert ((ramp > 0.01) & (ramp < 0.99)).any()
    return torch.where(ramp.round() == 1, kept / args.yarn["factor"], kept), factor


def no_floor(right: Callable[..., Any], positions: Tensor, args: Any) -> Any:
    cos, sin, _ = right(positions, args)
    grows = args.llama_4_scaling
    return cos, sin, (1 + grows["beta"] * torch.log(1 + positions.float() / grows[ORIGINAL]))[:, None]


def keys_too(right: Callable[..., Any], positions: Tensor, args: Any) -> Any:
    cos, sin, growth = right(positions, args)
    return cos * growth, sin * growth, torch.ones_like(growth)


IN_ONE_FILE = {
    "yarn_ramp_rounded": ("frequencies", rounded_ramp),
    "query_floor_missing": ("rope_angles", no_floor),
    "keys_scaled_too": ("rope_angles", keys_too),
}


@pytest.mark.parametrize("mistake", IN_ONE_FILE)
def test_inside_another_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    folder = folder_of(tmp_path / "model", yarn=YARN, **GROWS)
    assert ask(capsys, folder, engine(folder, tmp_path / "right.npz", by_one_file(folder)))["same"]
    name, wrong = IN_ONE_FILE[mistake]
    right = getattr(one_file_ref, name)
    monkeypatch.setattr(one_file_ref, name, lambda *given: wrong(right, *given))
    told = ask(capsys, folder, engine(folder, tmp_path / "wrong.npz", by_one_file(folder)))
    assert list(told["mistakes"]) == [mistake]


def test_a_softmax_over_all_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "model", **MOE)
    state, args = load_file(folder / "consolidated.safetensors"), read_folder(folder).args
    right = engine(folder, tmp_path / "right.npz", lambda ids: truth.truth(state, args, ids)[0])
    assert ask(capsys, folder, right)["same"]

    def over_all(w: Any, at: str, x: np.ndarray, moe: Any) -> np.ndarray:
        out = np.zeros_like(x)
        for t, logits in enumerate(x @ w[at + "gate.weight"].T):
            shares = np.exp(logits) / np.exp(logits).sum()
            for expert in np.argsort(-logits)[: moe.num_experts_per_tok]:
                out[t] += shares[expert] * truth.swiglu(w, f"{at}experts.{expert}.", x[t : t + 1])[0]
        return out

    monkeypatch.setattr(truth, "experts", over_all)
    wrong = engine(folder, tmp_path / "wrong.npz", lambda ids: truth.truth(state, args, ids)[0])
    assert list(ask(capsys, folder, wrong)["mistakes"]) == ["experts_not_renormalised"]


def swapped(state: State) -> State:
    return {n.replace("w1", "?").replace("w3", "w1").replace("?", "w3"): w for n, w in state.items()}


def turned(state: State) -> State:
    """Each expert's w2 as the first release's file has it, without turning it back."""
    return {n: w.T.contiguous().view(w.shape) if n.endswith("w2.weight") else w for n, w in state.items()}


@pytest.mark.parametrize(
    ("mistake", "change"), [("experts_w1_w3_swapped", swapped), ("experts_w2_not_transposed", turned)]
)
def test_experts_read_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str, change: Callable[[State], State]
) -> None:
    right = folder_of(tmp_path / "right", **MOE)
    wrong = folder_of(tmp_path / "wrong", change(load_file(right / "consolidated.safetensors")), **MOE)
    told = ask(capsys, right, wrong)
    assert list(told["mistakes"]) == [mistake]
    assert told["first_activation"]["name"].startswith("layers.0.feed_forward")


def test_an_output_that_is_not_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = folder_of(tmp_path / "tied", tied_embeddings=True)
    state = load_file(tied / "consolidated.safetensors")
    assert "output.weight" not in state
    untied = folder_of(tmp_path / "untied", state | {"output.weight": torch.zeros(61, 24)}, tied_embeddings=False)
    assert list(ask(capsys, tied, untied)["mistakes"]) == ["output_not_tied"]


def test_rows_of_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_of(tmp_path / "base", head_dim=8, sliding_window=5)
    peft = write_peft(tmp_path / "peft", peft_tensors())
    wrongly = load_file(base / "consolidated.safetensors")
    for name, pair in read_adapter(peft).pairs.items():  # lora_B as it is, in whatever order
        tensors = load_file(peft / "adapter_model.safetensors")
        wrongly[name] = wrongly[name] + 2.0 * tensors[pair.b] @ tensors[pair.a]
    merged = folder_of(tmp_path / "merged", wrongly, head_dim=8, sliding_window=5)
    told = ask(capsys, base, merged, "--adapter", peft)
    assert list(told["mistakes"]) == ["adapter_rows_not_permuted"]
    assert told["a"] == f"{base} (adapter {peft})"
    assert told["first_activation"]["name"] == "layers.0.attention.wq"
    rightly = merge.merge_into(read_folder(base), read_adapter(peft))
    right = folder_of(
        tmp_path / "right", {n: rightly.weights.get(n) for n in rightly.tensors}, head_dim=8, sliding_window=5
    )
    assert ask(capsys, base, right, "--adapter", peft)["same"]
    native = write_native(tmp_path / "native")  # of which no row is permuted: the mistake is none
    told = ask(capsys, base, merged, "--adapter", native)
    assert not told["mistakes"]
