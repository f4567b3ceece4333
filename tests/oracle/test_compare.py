"""compare: sides that agree, and for each named mistake a side that makes it, which must be named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral import cli
from mistral.formats.folder import read_folder
from mistral.loader.assemble import assemble
from mistral.oracle import mutants, pack
from mistral.oracle.compare import compare, differences
from mistral.oracle.inputs import prompts_for
from mistral.oracle.outputs import Outputs
from mistral.oracle.sides import FolderSide, side
from mistral.util import progress
from mistral.util.errors import FormatError, UsageError
from tests.support.folders import make_folder, random_state
from tests.support.tiny import tiny_args, tiny_model
from tests.support.truth import truth

PARAMS = {"n_layers": 3, "vocab_size": 61, "sliding_window": 5, "rope_theta": 1e6, "hidden_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("right") / "model", hot(), tokenizer=False, **PARAMS)


def hot():
    """Weights of a model that looks at some keys more than at others: mistakes in positions show."""
    state = dict(tiny_model(tiny_args(n_layers=3, hidden_dim=24), seed=7).state_dict())
    for name in state:
        if name.endswith(("wq.weight", "wk.weight")):
            state[name] = state[name] * 3
    return state


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(path), "--weights"]) == 0
    return path


def ask(capsys, *words) -> dict:
    """What `compare --json` says."""
    capsys.readouterr()
    code = cli.main(["compare", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    told = json.loads(captured.out)
    assert (code == 0) is told["same"]
    return told


# --- sides that agree


def test_a_folder_and_its_conversion(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "hf"), "--to", "hf"]) == 0
    told = ask(capsys, folder, tmp_path / "hf")
    assert told["same"]
    assert told["activations_compared"] == 3 * 14 + 3
    assert told["top1_agreement"] == 1
    assert told["max_delta_logprob"] < 1e-12


def test_weights_that_were_rounded_are_the_same_where_they_are_told_apart_by_rounding_only(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "b"), "--to", "mistral", "--dtype", "bfloat16"]) == 0
    told = ask(capsys, folder, tmp_path / "b")
    assert told["same"]
    assert told["dtypes"] == "bf16/fp32"
    assert told["max_delta_logprob"] > 1e-4


def test_a_pack_and_its_folder(folder, packed, capsys):
    for sides in ((packed, folder), (folder, packed), (packed, packed)):
        told = ask(capsys, *sides)
        assert told["same"]
        assert told["activations_compared"] == 45


def arrays(path: Path, prompts, scores, **more) -> Path:
    lens = [len(p) for p in prompts]
    np.savez(path, prompt_ids=torch.cat(list(prompts)).numpy(), prompt_lens=lens, logits=scores, **more)
    return path


def our_logits(folder, prompts, dtype="float32"):
    model, _ = assemble(read_folder(folder), device="cpu", dtype=dtype, execution="eager")
    with torch.inference_mode():
        return model.forward(torch.cat(prompts), [len(p) for p in prompts])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_another_program(folder, packed, tmp_path, capsys, dtype):
    prompts = pack.read(packed).prompts
    path = arrays(tmp_path / "x.npz", prompts, our_logits(folder, prompts, dtype).numpy())
    assert ask(capsys, packed, path, "--dtype", dtype)["same"]
    assert ask(capsys, path, folder, "--dtype", dtype)["same"]
    if dtype == "bfloat16":
        assert not ask(capsys, packed, path, "--dtype", "float32")["same"]


def test_a_pack_without_weights_has_its_budget(folder, tmp_path, capsys):
    path = tmp_path / "bare.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(path)]) == 0
    prompts = pack.read(path).prompts
    right = arrays(tmp_path / "right.npz", prompts, our_logits(folder, prompts).numpy())
    assert ask(capsys, path, right)["same"]
    wrong = arrays(tmp_path / "wrong.npz", prompts, our_logits(folder, prompts).numpy()[::-1])
    told = ask(capsys, path, wrong)
    assert not told["same"]
    assert told["first_position"] == [0, 0]
    assert "no model is available" in told["notes"][0]
    assert ask(capsys, right, right)["error_budget"] is None


def test_a_trace_is_a_side(folder, tmp_path, capsys):
    whole = make_folder(tmp_path / "model", sliding_window=5)
    out = tmp_path / "t.safetensors"
    assert cli.main(["trace", str(whole), "Once upon a time there was", "-o", str(out)]) == 0
    told = ask(capsys, whole, out)
    assert told["same"]
    assert told["activations_compared"] == 2 * 14 + 3
    tensors = load_file(out)
    tensors["layers.1.attention.heads"][3] += 0.01
    save_file(tensors, out)
    told = ask(capsys, whole, out)
    assert told["first_activation"] == {"name": "layers.1.attention.heads", "prompt": 0, "position": 3}
    assert told["first_position"] is None
    assert told["max_delta_logprob"] < told["limit"]
    assert told["verdict"].startswith(
        "DIFFERENT: log-probs agree within what rounding explains, but the activation layers.1.attention.heads differs"
    )


@pytest.mark.long
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)])
def test_numbers_that_are_none_are_a_difference(folder, packed, tmp_path, capsys, number, rows):
    prompts = pack.read(packed).prompts
    scores = our_logits(folder, prompts).log_softmax(-1).clone()
    scores[rows, 7] = number
    lens = [len(p) for p in prompts]
    for name in ("logits", "logprobs"):
        path = tmp_path / f"{name}.npz"
        np.savez(path, prompt_ids=torch.cat(prompts), prompt_lens=lens, **{name: scores.numpy()})
        if name == "logits" and number < 0:
            continue  # a token that is ruled out: its log-prob is -inf, the others' are not
        assert not ask(capsys, folder, path)["same"]
        if rows == slice(None):  # of one row the pack may not tell this token
            assert not ask(capsys, path, packed)["same"]


def test_log_probs_that_do_not_sum_to_one(folder, packed, tmp_path, capsys):
    prompts = pack.read(packed).prompts
    scores = our_logits(folder, prompts).log_softmax(-1).numpy() + 0.01
    lens = [len(p) for p in prompts]
    np.savez(tmp_path / "x.npz", prompt_ids=torch.cat(prompts), prompt_lens=lens, logprobs=scores)
    assert not ask(capsys, folder, tmp_path / "x.npz")["same"]
    np.savez(tmp_path / "x.npz", prompt_ids=torch.cat(prompts), prompt_lens=lens, logits=scores)
    assert ask(capsys, folder, tmp_path / "x.npz")["same"]


def test_a_dtype_in_which_the_model_is_infinite(folder, tmp_path, capsys):
    def hotter(state):
        return {n: w * 1e4 if w.dim() > 1 else w for n, w in state.items()}

    wrong = spoilt(folder, tmp_path, None, hotter)
    assert cli.main(["compare", str(wrong), str(wrong), "--dtype", "float16"]) == 2
    assert "rounding to fp16 makes numbers of this model infinite" in capsys.readouterr().err


# --- sides that make a mistake, each made without the kit that diagnoses it


def spoilt(folder: Path, tmp_path: Path, params=None, state=None) -> Path:
    made = tmp_path / "wrong"
    weights = load_file(folder / "consolidated.safetensors")
    return make_folder(made, state(weights) if state else weights, tokenizer=False, **{**PARAMS, **(params or {})})


def in_halves(name: str, w: torch.Tensor, back: bool = False) -> torch.Tensor:
    if not name.endswith(("wq.weight", "wk.weight")):
        return w
    heads = w.shape[0] // 8
    shape = (heads, 2, 4, -1) if back else (heads, 4, 2, -1)
    return w.view(*shape).transpose(1, 2).reshape(w.shape)


def renamed(state, a, b):
    return {n.replace(a, "?").replace(b, a).replace("?", b): w for n, w in state.items()}


IN_FOLDERS = {
    "window_one_more": ({"sliding_window": 6}, None, "layers.0.attention.heads", 5),
    "window_one_fewer": ({"sliding_window": 4}, None, "layers.0.attention.heads", 4),
    "no_window": ({"sliding_window": None}, None, "layers.0.attention.heads", 5),
    "theta_1e4": ({"rope_theta": 1e4}, None, "layers.0.attention.q", 1),
    "rows_not_permuted": (None, lambda s: {n: in_halves(n, w) for n, w in s.items()}, "layers.0.attention.wq", 0),
    "rows_permuted_needlessly": (
        None, lambda s: {n: in_halves(n, w, True) for n, w in s.items()}, "layers.0.attention.wq", 0,
    ),
    "w2_w3_swapped": (None, lambda s: renamed(s, "w2", "w3"), "layers.0.feed_forward.w3", 0),
    "first_layers_swapped": (
        None, lambda s: renamed(s, "layers.0.", "layers.1."), "layers.0.attention_norm", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", IN_FOLDERS)
def test_a_folder_with_a_mistake_is_diagnosed(folder, tmp_path, capsys, mistake):
    params, state, activation, position = IN_FOLDERS[mistake]
    told = ask(capsys, folder, spoilt(folder, tmp_path, params, state))
    assert not told["same"]
    assert told["verdict"] == "DIFFERENT: log-probs differ by more than what rounding explains"
    assert list(told["mistakes"]) == [mistake]
    assert told["first_activation"] == {"name": activation, "prompt": 0, "position": position}


@pytest.mark.parametrize("mistake", IN_FOLDERS)
def test_log_probs_alone_are_enough(folder, packed, tmp_path, capsys, mistake):
    """An .npz of a wrong engine in fp32, against a pack: no activations to go by."""
    params, state, *_ = IN_FOLDERS[mistake]
    prompts = pack.read(packed).prompts
    wrong = spoilt(folder, tmp_path, params, state)
    path = arrays(tmp_path / "wrong.npz", prompts, our_logits(wrong, prompts).numpy())
    told = ask(capsys, packed, path)
    assert not told["same"]
    assert list(told["mistakes"]) == [mistake]
    assert told["activations_compared"] == 0
    assert told["first_position"] is not None


def scored(folder, prompts) -> np.ndarray:
    """By the float64 model of the tests."""
    state = load_file(folder / "consolidated.safetensors")
    args = read_folder(folder).args
    return np.concatenate([truth(state, args, p)[0] for p in prompts])


def test_bos_doubled_and_absent(folder, tmp_path, capsys):
    """An engine that was asked about [1, ..] and puts another 1 in front, or takes it away."""
    prompts = prompts_for(read_folder(folder).args)
    lens = [len(p) for p in prompts]
    one = torch.tensor([1])
    doubled = scored(folder, [torch.cat([one, p]) for p in prompts])
    keep = np.ones(len(doubled), bool)
    keep[np.cumsum([0, *(n + 1 for n in lens[:-1])])] = False
    told = ask(capsys, folder, arrays(tmp_path / "two.npz", prompts, doubled[keep]))
    assert list(told["mistakes"]) == ["bos_doubled"]
    rows = [scored(folder, [p[1:]]) if len(p) > 1 else np.empty((0, 61)) for p in prompts]
    nothing = np.full((1, 61), np.nan)
    absent = np.concatenate([np.concatenate([nothing, r]) for r in rows])
    told = ask(capsys, folder, arrays(tmp_path / "none.npz", prompts, absent))
    assert list(told["mistakes"]) == ["bos_absent"]


@pytest.mark.parametrize("mistake", ["rotary_bf16", "mask_leak"])
def test_mistakes_inside_an_engine(folder, packed, tmp_path, capsys, mistake, monkeypatch):
    """Made in one_file_ref.py, which shares nothing with the library."""
    import one_file_ref as ref

    prompts = pack.read(packed).prompts
    model = ref.load(folder)
    if mistake == "mask_leak":
        monkeypatch.setattr(ref.Attention, "forward", leaky(ref))
    else:
        right = ref.rope_angles
        monkeypatch.setattr(ref, "rope_angles", lambda *a: [x.bfloat16().to(x.dtype) for x in right(*a)])
    with torch.inference_mode():
        logits = model(torch.cat(prompts), [len(p) for p in prompts], None)
    told = ask(capsys, packed, arrays(tmp_path / "x.npz", prompts, logits.numpy()))
    assert list(told["mistakes"]) == [mistake]


def leaky(ref):
    """The mask of one long sequence, angles as they should be."""
    right = ref.Attention.forward

    def forward(self, x, where, seqlens, cache):
        *angles, positions = where
        return right(self, x, [*angles, torch.arange(len(positions))], [sum(seqlens)], cache)

    return forward


def test_a_mistake_that_has_no_name_is_not_given_one(folder, tmp_path, capsys):
    def wrong(state):
        state["layers.1.feed_forward.w2.weight"] *= 1.01
        return state

    told = ask(capsys, folder, spoilt(folder, tmp_path, None, wrong))
    assert not told["same"]
    assert told["mistakes"] == {}
    assert told["mistakes_tried"] > 8
    assert told["nearest"][0] in mutants.MUTANTS
    assert told["first_activation"]["name"] == "layers.1.feed_forward.w2"


# --- what cannot be compared


def test_what_is_no_side(tmp_path, folder, packed):
    (tmp_path / "x.txt").write_text("hello")
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    np.savez(tmp_path / "ragged.npz", prompt_ids=np.zeros(3, int), logits=np.zeros((4, 61)))
    np.savez(tmp_path / "code.npz", prompt_ids=np.array([print], object), logits=np.zeros((1, 61)))
    for name, said in (
        ("x.txt", "none of: a folder, a .gguf file, a pack"),
        ("empty.npz", "must have prompt_ids"),
        ("ragged.npz", "must be \\[T, V\\]"),
        ("code.npz", "cannot be read as arrays"),
        ("missing", "no such folder"),
    ):
        with pytest.raises(ValueError, match=said):
            side(str(tmp_path / name))
    with pytest.raises(FormatError):
        side(str(tmp_path / "x.txt"))


def test_sides_that_have_nothing_in_common(folder, packed, tmp_path):
    other = make_folder(tmp_path / "other", vocab_size=50, tokenizer=False)
    with pytest.raises(UsageError, match="vocabularies differ: .* know 61 and 50 tokens"):
        compare(side(str(folder)), side(str(other)))
    with pytest.raises(UsageError, match="outside the vocabulary of 61"):
        compare(side(str(folder)), side(str(folder)), prompts=[torch.tensor([1, 61])])
    with pytest.raises(UsageError, match="two servers"):
        compare(side("http://a"), side("http://b"))
    bound = side(str(packed))
    with pytest.raises(UsageError, match="speaks of its own prompts"):
        compare(bound, FolderSide(read_folder(folder), "x"), prompts=[torch.tensor([1])])
    moved = dataclasses.replace(bound.pack, prompts=[p.flip(0) for p in bound.pack.prompts])
    again = side(str(packed))
    again.prompts = moved.prompts
    with pytest.raises(UsageError, match="different prompts"):
        compare(bound, again)


def test_differences_of_what_is_told():
    dense = Outputs(None, torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], dtype=torch.float64))
    sparse = Outputs(torch.tensor([[2, -1], [0, 2]]), torch.tensor([[2.5, 9.0], [3.0, 7.0]], dtype=torch.float64))
    assert differences(dense, sparse).tolist() == [0.5, 2.0]
    assert differences(sparse, dense).tolist() == [0.5, 2.0]
    other = Outputs(torch.tensor([[1], [2]]), torch.tensor([[1.0], [7.5]], dtype=torch.float64))
    assert differences(sparse, other)[0].isnan()
    assert differences(sparse, other)[1] == 0.5
    endless = Outputs(None, torch.full((2, 3), float("inf"), dtype=torch.float64))
    assert differences(dense, endless).tolist() == [float("inf")] * 2


def test_a_model_that_rounding_does_not_change(tmp_path, capsys):
    """All of its log-probs are -log V: told in fp32 they are still the same."""
    state = {name: torch.zeros_like(w) for name, w in random_state().items()}
    folder = make_folder(tmp_path / "flat", state, tokenizer=False)
    scores = np.full((3, 4096), -np.log(4096), np.float32)
    np.savez(tmp_path / "flat.npz", prompt_ids=np.array([1, 5, 9]), logprobs=scores)
    assert cli.main(["compare", str(folder), str(tmp_path / "flat.npz")]) == 0
    assert "rounding changes nothing" in capsys.readouterr().out
    np.savez(tmp_path / "flat.npz", prompt_ids=np.array([1, 5, 9]), logprobs=scores * 1.00001)
    assert cli.main(["compare", str(folder), str(tmp_path / "flat.npz")]) == 1


# --- a side that is declared quantized, and a window that is given


def test_a_side_may_be_declared_quantized(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "int8"), "--to", "mistral", "--quant", "int8"]) == 0
    plain = ask(capsys, folder, tmp_path / "int8")
    assert not plain["same"]
    assert any("--quantized int4" in note for note in plain["notes"])
    told = ask(capsys, folder, tmp_path / "int8", "--quantized", "int8")
    assert told["same"]
    assert told["verdict"] == "the same, within what rounding the weights to int8 explains"
    assert told["quantized"] == told["dtypes"] == "int8"
    assert plain["limit"] < told["max_delta_logprob"] < told["limit"]
    coarse = ask(capsys, folder, tmp_path / "int8", "--quantized", "int4")
    assert coarse["limit"] > 5 * told["limit"]
    capsys.readouterr()
    assert cli.main(["compare", str(folder), str(tmp_path / "int8"), "--quantized", "int8"]) == 0
    assert "rounding the weights to int8 changes" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", ["window_one_more", "rows_not_permuted", "w2_w3_swapped"])
def test_a_mistake_shows_in_a_quantized_side_too(folder, tmp_path, capsys, mistake):
    params, state, *_ = IN_FOLDERS[mistake]
    wrong = spoilt(folder, tmp_path, params, state)
    assert cli.main(["convert", str(wrong), str(tmp_path / "int8"), "--to", "mistral", "--quant", "int8"]) == 0
    told = ask(capsys, folder, tmp_path / "int8", "--quantized", "int8")
    assert not told["same"]
    assert list(told["mistakes"]) == [mistake]
    assert told["verdict"] == "DIFFERENT: log-probs differ by more than what rounding the weights to int8 explains"


def test_what_quantized_cannot_mean(folder, tmp_path, capsys):
    assert cli.main(["compare", "a", "b", "--quantized", "int3"]) == 2
    assert "--quantized 'int3' is not one of int8, int4" in capsys.readouterr().err
    bare = tmp_path / "bare.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(bare)]) == 0
    assert cli.main(["compare", str(bare), str(bare), "--quantized", "int8"]) == 2
    assert "what quantized weights change is measured on a model" in capsys.readouterr().err


@pytest.mark.long
def test_a_window_that_is_given(folder, tmp_path, capsys):
    """For folders and files that do not say theirs: in compare, verify, pack and mutants."""
    silent = spoilt(folder, tmp_path, {"sliding_window": None})
    assert not ask(capsys, folder, silent)["same"]
    told = ask(capsys, folder, silent, "--sliding_window", "5")
    assert told["same"]
    assert told["b"] == f"{silent} (window 5)"
    packed = tmp_path / "x.safetensors"
    assert cli.main(["pack", str(silent), "-o", str(packed), "--sliding_window", "5", "--weights"]) == 0
    assert pack.read(packed).args.sliding_window == 5
    assert ask(capsys, folder, packed)["same"]
    words = ["mutants", str(silent), "-o", str(tmp_path / "m"), "--sliding_window", "5", "--mutant", "window_one_more"]
    assert cli.main(words) == 0
    made = np.load(tmp_path / "m" / "window_one_more.npz")["logprobs"]
    assert np.abs(made - np.load(tmp_path / "m" / "right.npz")["logprobs"]).max() > 1e-3
    capsys.readouterr()
    assert cli.main(["verify", str(silent), "--sliding_window", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["window"] for row in rows} == {"5"}


def test_an_adapter_needs_a_folder(packed, capsys):
    assert cli.main(["compare", str(packed), str(packed), "--adapter", "x"]) == 2
    assert "neither side is one" in capsys.readouterr().err


def test_where_there_is_no_terminal_lines_report_how_far_it_is(folder, tmp_path, capsys, monkeypatch):
    """The truth about both sides, the error budget, and mutants: each of them takes minutes for a model of 1 B."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    one, other = (make_folder(tmp_path / str(seed), random_state(seed)) for seed in (2, 3))
    assert cli.main(["compare", str(one), str(other)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("comparing: ")]
    starts = [i for i, line in enumerate(lines) if line.startswith("comparing: 1 of ")]
    assert len(starts) == 4
    assert all(line.endswith(" steps") for line in lines)
    assert cli.main(["compare", str(folder), str(folder), "--quiet"]) == 0
    assert "comparing" not in capsys.readouterr().err
