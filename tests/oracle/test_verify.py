"""verify: every variant passes on right models, budgets are what they say, and mistakes fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from mistral import cli
from mistral.args import Moe
from mistral.attention import eager, sdpa, tiled
from mistral.formats.folder import read_folder
from mistral.loader.assemble import assemble
from mistral.logprobs import logprobs
from mistral.oracle import layerwise, verify
from mistral.oracle.inputs import WeightReader, random_prompts
from mistral.oracle.layerwise import LibraryRunner, OneFileRunner, TransformersRunner
from mistral.oracle.metrics import LARGEST, LIMITS, Errors, ErrorStats, judge, place
from mistral.oracle.pack import SHIPPED, folder_of
from mistral.oracle.truth import SUMS, Truth, error_budget, num_draws
from tests.support.folders import make_folder, random_state
from tests.support.tiny import ragged, tiny_args, tiny_model, true_logprobs
from tools import odd_shapes

LENS = [33, 1, 6, 21]


def run(stream, model):
    """A stream's logits, by the weights of a model."""
    state = model.state_dict()
    stream.embed(state["tok_embeddings.weight"])
    for i in range(model.args.n_layers):
        at = f"layers.{i}."
        stream.layer(i, {name.removeprefix(at): w for name, w in state.items() if name.startswith(at)})
    return torch.cat(list(stream.head(state["norm.weight"], state["output.weight"], 16)))


@pytest.fixture(scope="module", params=[5, None, (None, 7, 3)], ids=["window", "none", "per layer"])
def case(request):
    model = tiny_model(tiny_args(n_layers=3, sliding_window=request.param), seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    return model, prompts


def test_the_truth_is_that_of_the_tests(case):
    """Two float64 implementations of the contract, neither of which knows the other."""
    model, prompts = case
    ours = logprobs(run(Truth(model.args, prompts), model)).numpy()
    assert np.abs(ours - np.concatenate(true_logprobs(model, prompts))).max() < 1e-13


def test_its_activations_are_those_of_the_tests(case):
    from tests.support.truth import truth

    model, prompts = case
    seen = {}
    run(Truth(model.args, prompts, note=seen.__setitem__), model)
    first = 0
    for prompt in prompts:
        _, hidden = truth(model.state_dict(), model.args, prompt)
        for i, want in enumerate(hidden):
            got = seen[f"layers.{i}"][first : first + len(prompt)]
            assert np.abs(got.numpy() - want).max() < 1e-13
        first += len(prompt)


STREAMS = {
    "whole": (layerwise.whole, False),
    "batched": (layerwise.batched, False),
    "chunked": (lambda lens: layerwise.chunked(lens, 7), True),
    "stepwise": (layerwise.stepwise, True),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kernel", [eager, sdpa])
@pytest.mark.parametrize("name", STREAMS)
def test_each_schedule_is_within_its_budget(case, name, kernel, dtype):
    model, prompts = case
    schedule, cached = STREAMS[name]
    attend = tiled(kernel)
    stream = LibraryRunner(model.args, prompts, schedule(LENS), attend, weights=dtype, compute=dtype, cached=cached)
    verdict, errors = judged(model, prompts, stream, dtype)
    assert verdict.passes, (verdict, errors.largest)


def judged(model, prompts, stream, dtype):
    true = logprobs(run(Truth(model.args, prompts), model))
    budget = measured(true, *(run(one, model) for one in error_budget(model.args, prompts, dtype, dtype)))
    errors = measured(true, run(stream, model))
    return judge(errors, budget.scaled(verify.scale_of_rounding(dtype)), LIMITS[dtype], LENS), errors


def measured(true, *each) -> Errors:
    measure = ErrorStats()
    for logits in each:
        for a, b in zip(true.split(10), logits.split(10), strict=True):
            measure.add(a, b)
    return measure.errors()


def test_others_are_within_it_too(case):
    pytest.importorskip("transformers")
    model, prompts = case
    for stream in (
        OneFileRunner(layerwise.one_file_ref(), model.args, prompts, torch.float32),
        TransformersRunner(model.args, prompts, torch.float32),
    ):
        assert judged(model, prompts, stream, torch.float32)[0].passes


def test_a_stream_is_the_model(case):
    """A layer at a time gives the bits of all layers at once."""
    model, prompts = case
    for name, kernel in (("batched", eager), ("batched", sdpa)):
        schedule, cached = STREAMS[name]
        options = {"weights": torch.float32, "compute": torch.float32, "cached": cached}
        got = run(LibraryRunner(model.args, prompts, schedule(LENS), tiled(kernel), **options), model)
        model_of = tiny_model(model.args, seed=2, attend=tiled(kernel))
        with torch.inference_mode():
            want = model_of.forward(torch.cat(prompts), LENS)
        assert (got - want).abs().max() < 1e-6


def test_bf16_is_what_rounding_makes_of_it(case):
    """The budget is not only a bound: right implementations reach it."""
    model, prompts = case
    half = torch.bfloat16
    stream = LibraryRunner(
        model.args, prompts, layerwise.batched(LENS), tiled(eager), weights=half, compute=half, cached=False
    )
    verdict, _ = judged(model, prompts, stream, half)
    assert 0.5 < verdict.ratio < 1.5


def test_near_ties_of_a_router_are_no_mistake(tmp_path):
    """Where rounding alone decides between two experts, either choice is right, also one that no draw makes."""
    half = torch.bfloat16
    model, _ = assemble(folder_of(SHIPPED / "mixtral.safetensors", tmp_path), device="cpu", execution="eager")
    prompts = random_prompts(model.args, verify.LENS, 0)
    truth = Truth(model.args, prompts)
    true = logprobs(run(truth, model))
    schedule = layerwise.batched(verify.LENS)
    right = LibraryRunner(model.args, prompts, schedule, tiled(sdpa), weights=half, compute=half, cached=False)
    errors = measured(true, run(right, model))

    def ratio(exact):
        budget = error_budget(model.args, prompts, half, half, exact=exact)
        routers = [layers_of(model, one, truth if exact else None) for one in budget]
        return judge(errors, measured(true, *routers), LIMITS[half], verify.LENS)

    assert ratio(None).ratio > LIMITS[half]  # one token of 186 goes to another expert, and to that in no draw
    assert ratio(truth).passes


def layers_of(model, stream, exact):
    """`run`, with the truth one layer ahead where the stream looks at it."""
    state = model.state_dict()
    for one in (exact, stream) if exact else (stream,):
        one.embed(state["tok_embeddings.weight"])
    for i in range(model.args.n_layers):
        at = f"layers.{i}."
        for one in (exact, stream) if exact else (stream,):
            one.layer(i, {name.removeprefix(at): w for name, w in state.items() if name.startswith(at)})
    return torch.cat(list(stream.head(state["norm.weight"], state["output.weight"], 16)))


def test_rounding_is_tried_several_times(case):
    """Draws differ, each is the same every time, what is exact stays exact, and few positions have more of them."""
    model, prompts = case
    half = torch.bfloat16
    some = error_budget(model.args, prompts, half, half)
    assert len(some) == num_draws(prompts) == 9
    first, second, again = (run(one, model) for one in (*some[:2], Truth(model.args, prompts, half, half, draw=1)))
    assert not torch.equal(first, second)
    assert torch.equal(second, again)
    embedded = []
    for draw in range(2):
        one = Truth(model.args, prompts, half, half, note=lambda name, x: embedded.append(x), draw=draw)
        one.embed(model.state_dict()["tok_embeddings.weight"])
    assert torch.equal(*embedded)
    assert [num_draws([torch.zeros(n)]) for n in (1, 20, 50, 100, 125, 5000)] == [16, 16, 10, 5, 4, 4]


def test_a_coarse_cache_moves_every_routers_logits_alike():
    """So the draw of such a budget takes the experts that implementations take, and no others by chance."""
    args, prompts = tiny_args(moe=Moe(8, 2)), [torch.arange(1, 51)]
    logits, exact = torch.rand(50, 8, dtype=torch.float64), Truth(args, prompts)
    exact._router = logits + 0.1 * torch.rand(50, 8, dtype=torch.float64)
    (coarse,) = error_budget(args, prompts, None, torch.float32, torch.int8, exact=exact)
    assert torch.equal(coarse._order(logits), logits)
    assert not torch.equal(error_budget(args, prompts, None, torch.float32, exact=exact)[0]._order(logits), logits)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_sums_are_off_as_sums_in_fp32_are(compute):
    """By the root of their length, and by how large their terms are, not by how large the sum is; never if exact."""
    args, prompts = tiny_args(), [torch.tensor([1, 2])]
    exact, rounded = (Truth(args, prompts, compute=dtype) for dtype in (None, compute))
    numbers = np.random.default_rng(0)
    for n in (64, 400):
        x, weight = (torch.from_numpy(numbers.standard_normal((300, n), dtype=np.float32)) for _ in range(2))
        x[:, 0] = 1e4  # a massive activation, whose share cancels
        weight[:, 1], x[:, 1] = -weight[:, 0], 1e4
        want = x.double() @ weight.double().T
        assert torch.equal(exact._product(x.double(), weight), want)
        off = rounded._product(x.double(), weight) - want
        terms = (x.double().square() @ weight.double().square().T).sqrt()
        unit = SUMS * n**0.5 * torch.finfo(torch.float32).eps / 2
        assert float((off / terms).square().mean().sqrt()) == pytest.approx(unit, rel=0.02)
        assert float((off / terms).abs().max()) < 1.8 * unit
        assert float(off.abs().mean() / want.abs().mean()) > 100 * torch.finfo(torch.float32).eps
        # What it stands for: fp32 itself.
        real = ((x @ weight.T).double() - want) / terms
        assert 0.1 < float(real.square().mean().sqrt()) / unit < 2


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_scores_and_norms_are_rounded_to_fp32(compute, monkeypatch):
    """Two scores of 10,000 that fp32 cannot tell apart weigh the same; a norm divides by an fp32 root."""
    monkeypatch.setattr("mistral.oracle.truth.SUMS", 0.0)
    monkeypatch.setattr("mistral.oracle.truth.SHAKEN", 0.0)
    args = tiny_args(head_dim=4, n_heads=1, n_kv_heads=1)
    q = torch.tensor([[[2e4, 0, 0, 0]]] * 2, dtype=torch.float64)
    k = torch.tensor([[[1.0, 0, 0, 0]], [[1.0 + 1e-8, 0, 0, 0]]], dtype=torch.float64)
    v = torch.tensor([[[0.0] * 4], [[1.0] * 4]], dtype=torch.float64)
    prompts = [torch.tensor([1, 2])]
    exact, rounded = (Truth(args, prompts, compute=dtype) for dtype in (None, compute))
    assert (rounded._attend(q, k, v, window=None)[1] == 0.5).all()
    assert (exact._attend(q, k, v, window=None)[1] > 0.5 + 1e-5).all()

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((500, 24))).to(compute).double()
    root = np.float32(1 / np.sqrt(np.float32((x.numpy() ** 2).mean(-1) + args.norm_eps).astype(float)))
    want = torch.from_numpy(x.numpy() * root.astype(float)[:, None]).to(compute).double()
    assert torch.equal(rounded._norm(x, torch.ones(24)), want)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "scale", "seed"),
    [
        # Scores in the thousands: every right implementation rounds them, and the norms before them, alike.
        ({"dim": 96, "n_layers": 8, "head_dim": 32, "hidden_dim": 5, "n_heads": 3, "n_kv_heads": 1}, 2.0, 5),
        # Three words: the largest error of few.
        ({"dim": 10, "n_layers": 8, "head_dim": 4, "hidden_dim": 5, "n_heads": 2, "vocab_size": 3}, None, 58),
    ],
)
def test_right_models_of_odd_shapes_pass(shape, scale, seed, tmp_path):
    """They did not: by 61 times, of 16 then, and 2.8 of 2."""
    params = {"n_kv_heads": 1, "vocab_size": 60, "sliding_window": 64, **shape}
    state = odd_shapes.draw_weights(tiny_args(**params), scale, seed)
    report = verify.verify(read_folder(make_folder(tmp_path / "odd", state, tokenizer=False, **params)))
    assert report.passes, verify.as_text(report)


@pytest.mark.long
def test_the_tool_that_draws_odd_shapes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["odd_shapes", "--models", "2"])
    assert odd_shapes.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 variants whose dtype cannot hold their numbers; 0 beyond their limit"
    assert [line.split()[0] for line in lines[1:-1]] == ["bf16", "fp32", "fp64"]
    monkeypatch.setattr("mistral.oracle.verify.LIMITS", dict.fromkeys(LIMITS, 0.1))
    assert odd_shapes.main() == 1
    assert "seed 0: one_file_ref, its own, fp32: " in capsys.readouterr().out


def test_a_mistake_is_beyond_the_budget_and_is_placed():
    """A window one too narrow: prompt 0 parts from the truth at the first position that it hides a key from."""
    model = tiny_model(tiny_args(n_layers=3), seed=2)
    prompts = ragged(LENS, model.args.vocab_size, seed=2)
    wrong = tiny_args(n_layers=3, sliding_window=4)
    for dtype in (torch.float32, torch.float64):
        stream = LibraryRunner(
            wrong, prompts, layerwise.batched(LENS), tiled(sdpa), weights=dtype, compute=dtype, cached=False
        )
        verdict, _ = judged(model, prompts, stream, dtype)
        assert not verdict.passes
        assert verdict.first == (0, 4)
        assert verdict.ratio > 100


def test_numbers_that_are_none_fail():
    true = torch.zeros(4, 3, dtype=torch.float64).log_softmax(-1)
    bad = torch.zeros(4, 3)
    bad[2, 1] = float("nan")
    errors = measured(true, bad)
    assert errors.largest == float("inf")
    assert errors.kl == float("inf")
    assert not judge(errors, measured(true, torch.zeros(4, 3)), LIMITS[torch.float32], [4]).passes
    assert judge(errors, measured(true, torch.zeros(4, 3)), LIMITS[torch.float32], [3, 1]).first == (0, 2)


def test_a_budget_that_is_infinite_explains_nothing():
    """A finite error is no smaller for it."""
    true = torch.zeros(4, 3, dtype=torch.float64).log_softmax(-1)
    endless, wrong = measured(true, torch.full((4, 3), float("nan"))), measured(true, torch.eye(4, 3) * 100)
    assert endless.largest == float("inf") > wrong.largest
    assert not judge(wrong, endless, LIMITS[torch.float32], [4]).passes


def test_places():
    assert [place(row, [2, 0, 1]) for row in range(3)] == [(0, 0), (0, 1), (2, 0)]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model", n_layers=3, vocab_size=61, sliding_window=[None, 80, 5], tokenizer=False)


def test_the_command_passes_on_a_right_model(folder, capsys):
    assert cli.main(["verify", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passes"]
    rows = report["rows"]
    assert {row["window"] for row in rows} == {f"none x1 + {w} x1 + 5 x1 layers" for w in (80, 64)}
    assert {row["name"] for row in rows} >= {"one_file_ref", "whole", "batched", "chunked", "stepwise"}
    assert {row["compute"] for row in rows} == {"fp64", "fp32", "bf16"}
    assert any("--full" in note for note in report["notes"])


@pytest.mark.long
def test_full_rolls_the_real_window(folder, capsys):
    assert cli.main(["verify", str(folder), "--full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["prompts"]) > 80 + 79
    assert len({row["window"] for row in report["rows"]}) == 1


def test_the_command_fails_where_the_model_is_wrong(tmp_path, capsys, monkeypatch):
    """A mistake in the library, not in the truth."""
    import mistral.attention

    folder = make_folder(tmp_path / "model", vocab_size=61, sliding_window=[None, 5], tokenizer=False)
    right = mistral.window.visible
    monkeypatch.setattr(mistral.attention, "visible", lambda q, k, w: right(q, k, w and w - 1))
    assert cli.main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    lines = [line for line in out.splitlines() if line.startswith(("one_file_ref", "transformers"))]
    assert lines
    assert all(line.endswith("pass") for line in lines)


def test_weights_that_are_not_finite_are_an_error(tmp_path, capsys):
    state = random_state()
    state["layers.1.feed_forward.w3.weight"][3, 2] = float("inf")
    folder = make_folder(tmp_path / "bad", state)
    assert cli.main(["verify", str(folder)]) == 2
    assert "layers.1.feed_forward.w3.weight has 1 number that is not finite" in capsys.readouterr().err


@pytest.mark.long
def test_a_dtype_that_overflows_is_named(tmp_path, capsys):
    state = {name: w * 300_000 if name.endswith("w2.weight") else w for name, w in random_state().items()}
    folder = make_folder(tmp_path / "large", {name: w.half() for name, w in state.items()}, tokenizer=False)
    assert cli.main(["verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert "fp16 cannot hold this model's numbers: they overflow however it is computed" in report["notes"]
    assert {row["compute"] for row in report["rows"] if not row["passes"]} == {"fp16"}


@pytest.mark.long
def test_weights_in_few_bits_are_verified_as_meant(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "few"), "--to", "mistral", "--quant", "int8"]) == 0
    assert cli.main(["verify", str(tmp_path / "few")]) == 0


@pytest.mark.long
def test_progress_reaches_its_total(folder):
    told = []
    verify.verify(read_folder(folder), progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert len({total for _, total in told}) == 1


def rows_off(*each: float) -> tuple[Tensor, Tensor]:
    """The log-probs of rows of three tokens, and logits that are off by so much."""
    true = torch.zeros(len(each), 3, dtype=torch.float64).log_softmax(-1)
    return true, true + torch.tensor(each, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0, 0.0])


def test_a_sensitive_position_counts_as_one():
    """It may be off by its own budget several times, and hides nothing at the others."""
    true, first = rows_off(1e-6, 1e-6, 1e-6, 1e-6, 1e-3)
    budget = measured(true, first, rows_off(2e-6, 2e-6, 2e-6, 2e-6, 3e-4)[1])

    def verdict(*each: float):
        return judge(measured(true, rows_off(*each)[1]), budget, 5.0, [3, 2])

    unlucky = verdict(1e-6, 1e-6, 1e-6, 1e-6, 5e-3)
    assert unlucky.passes
    assert 2 < unlucky.ratio < 4
    wrong = verdict(2e-5, 2e-5, 2e-5, 2e-5, 1e-3)
    assert not wrong.passes
    assert wrong.first is None
    assert 10 < wrong.ratio < 15
    alone = verdict(1e-6, 1e-6, 1e-6, 1e-6, 1.01 * LARGEST * 5e-3)
    assert alone.first == (1, 1)
    assert not alone.passes


def test_a_position_that_rounding_does_not_change_is_measured_by_the_others():
    true, drawn = rows_off(0.0, 1e-6, 1e-6)
    errors = measured(true, rows_off(1e-6, 1e-6, 1e-6)[1])
    assert judge(errors, measured(true, drawn, drawn), 5.0, [3]).ratio == pytest.approx(1, rel=1e-3)


def test_pairs_that_round_alike_share_a_budget(tmp_path):
    """What is stored in bf16 is the same in fp32 and float64; in fp16 it is not."""
    state = {name: w.bfloat16() for name, w in random_state().items()}
    reading = WeightReader(read_folder(make_folder(tmp_path / "bf16", state, tokenizer=False)))
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

    def of(read: WeightReader, weights: torch.dtype, compute: torch.dtype, cache: torch.dtype | None = None):
        return verify._rounding(read, verify.Variant("", "", (weights, compute), None, cache=cache))

    assert {of(reading, *pair) for pair in ((bf16, fp32), (fp32, fp32), (fp64, fp64))} == {(None, fp32, None)}
    assert of(reading, fp16, fp16) == of(reading, fp16, fp16, fp16) == (fp16, fp16, None)
    assert of(reading, bf16, fp32, torch.int8) == (None, fp32, torch.int8)
    state["norm.weight"] = state["norm.weight"].float()  # one is enough
    mixed = WeightReader(read_folder(make_folder(tmp_path / "mixed", state, tokenizer=False)))
    assert of(mixed, bf16, fp32) == (bf16, fp32, None)
    assert of(mixed, fp32, fp32) == (None, fp32, None)
