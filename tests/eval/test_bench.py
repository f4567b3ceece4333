"""`bench`: what it counts and prints. What it measures is a timing, and no test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mistral.args import Moe
from mistral.eval import bench, bench_text
from mistral.loader.load import load
from mistral.parameters import parameters
from mistral.quant.linear import QuantizedLinear
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder, random_state
from tests.support.tiny import tiny_args, tiny_model

QUICK = ("--contexts", "3,9", "--batches", "1,2", "--prompts", "7", "--generate", "4", "--repeats", "1")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(bench, "PROBE", 1 << 12)
    monkeypatch.setattr(bench, "PRODUCT", 16)
    return in_process(capfd)


def test_a_folder(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    report = json.loads(cli("bench", folder, *QUICK, "--json").text)
    rows = [(row["what"], row["context"], row["batch"]) for row in report["rows"]]
    decodes = [("decode", 3, 1), ("decode", 3, 2), ("decode", 9, 1)]
    assert rows == [*decodes, ("generate", 0, 1), ("prefill", 7, 1)]
    for row in report["rows"]:
        assert 0 < row["low"] <= row["rate"] == row["mean"] <= row["high"]
        assert row["limit"] > 0
        assert row["deviation"] == 0
    assert report["load_seconds"] > 0
    assert report["repeats"] == 1
    text = cli("bench", folder, *QUICK).text
    assert f"{folder}: 0.2 M parameters" in text
    assert len(text.splitlines()) == 8 + 2 * len(rows)


TESTS = ["pp7", "tg4", "tg8 @ d3", "tg8 @ d3 x 2", "tg8 @ d9"]


def test_the_table_of_llama_bench(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "1b", tiny_args())
    words = ("-d", "3,9", "--batches", "1,2", "-p", "7", "-n", "4", "-r", "3", "-t", "2")
    report = json.loads(cli("bench", "--shape", "1b", *words, "--json", "--quant", "int8").text)
    for row in report["rows"]:
        assert row["low"] <= row["mean"] <= row["high"]
        assert 0 < row["deviation"] <= row["high"] - row["low"]
    lines = [line for line in bench_text.as_text(report).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert [row[5] for row in cells[2:]] == TESTS
    size, count = f"{report['size_bytes'] / 2**20:.2f} MiB", f"{report['parameters'] / 1e6:.2f} M"
    assert {tuple(row[:5]) for row in cells[2:]} == {("1b int8", size, count, "CPU", "2")}
    for threads, said in ((1, ", 1 thread, torch"), (2, ", 2 threads, torch")):
        assert said in bench_text.as_text({**report, "threads": threads})
    large = bench_text.as_text({**report, "size_bytes": 3 * 2**30, "parameters": 7_241_732_096})
    assert "| 3.00 GiB | 7.24 B | CPU" in large
    for row, line in zip(report["rows"][::-1], [*cells[2:4], *cells[:3:-1]], strict=True):
        assert line[6] == f"{row['mean']:.2f} ± {row['deviation']:.2f}"
    assert report["parameters"] == sum(p.numel for p in parameters(tiny_args()).values())


def test_none_to_generate(cli: Command, tmp_path: Path) -> None:
    report = json.loads(cli("bench", make_folder(tmp_path / "model"), *QUICK[:-4], "-n", "0", "-r", "1", "--json").text)
    assert [row["what"] for row in report["rows"]] == ["decode"] * 3 + ["prefill"]


def test_a_shape(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "7b", tiny_args())
    for quant in ("int8", "int4"):
        text = cli("bench", "--shape", "7B", *QUICK, "--quant", quant).text
        assert f"random weights in the shape 7b; device cpu; weights/compute/cache {quant}/float32/float32" in text
        assert "loaded in" not in text


def test_a_picture(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    folder, picture = make_folder(tmp_path / "model"), tmp_path / "rates.svg"
    cli("bench", folder, *QUICK, "--plot", picture)
    assert "<svg" in picture.read_text()
    monkeypatch.setattr(bench, "report", lambda *_, **__: pytest.fail("it was measured"))
    for path in (tmp_path / "rates.xyz", tmp_path, tmp_path / "missing" / "rates.svg"):
        assert cli("bench", folder, *QUICK, "--plot", path).error.startswith(f"--plot {path}: ")


def test_words_that_are_refused(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    for words, message in (
        (("--contexts", "32,"), "--contexts is '32,'; it must be whole numbers from 0 on, of at most nine digits"),
        (("--batches", "0"), "--batches is '0'"),
        (("--generate", "-1"), "--generate is '-1'"),
        (("--prompts", "1e3"), "--prompts is '1e3'"),
        (("--shape", "7b"), "FOLDER and --shape: give one of them"),
    ):
        assert cli("bench", folder, *words).error.startswith(message)
    assert cli("bench", "--shape", "8b").error == "no shape is called '8b': 7b, 1b, moe"


def test_the_shapes_are_those_they_are_called() -> None:
    sizes = {}
    for name, args in bench.SHAPES.items():
        if args.moe is not None:
            sizes[name] = sum(parameter.numel for parameter in parameters(args).values())
            continue
        layer = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads) + 3 * args.dim * args.hidden_dim
        sizes[name] = args.n_layers * (layer + 2 * args.dim) + 2 * args.vocab_size * args.dim + args.dim
    assert sizes["7b"] == 7_241_732_096
    assert 0.95e9 < sizes["1b"] < 1.05e9
    assert 1.5e9 < sizes["moe"] < 1.6e9


def test_of_experts_the_chosen_ones_count() -> None:
    args = tiny_args(moe=Moe(4, 2))
    model, dense = tiny_model(args), tiny_model(tiny_args())
    expert = 3 * args.dim * args.hidden_dim
    router = 4 * args.dim
    more = args.n_layers * 4 * (expert + router)  # two experts for one
    assert bench.weight_bytes(model) == bench.weight_bytes(dense) + more
    assert bench.weight_bytes(model, 2) == bench.weight_bytes(dense) + more + args.n_layers * 4 * expert
    assert bench.weights_in_products(model) == bench.weights_in_products(dense) + more // 4
    assert bench.weight_bytes(dense, 8) == bench.weight_bytes(dense)


def test_a_table_that_embeddings_and_output_share_counts_once(tmp_path: Path) -> None:
    state = random_state()
    del state["output.weight"]
    folder = make_folder(tmp_path / "tied", state, tied_embeddings=True)
    for quant in (None, "int8"):
        tied = load(folder, device="cpu", quant=quant).model
        shared = sum(tensor.nbytes for tensor in tied.output.state_dict().values())
        every = sum(tensor.nbytes for tensor in tied.state_dict().values())
        assert 0 < shared < bench.stored_bytes(tied) == every - shared
    apart = load(make_folder(tmp_path / "apart"), device="cpu").model
    assert bench.stored_bytes(apart) == sum(tensor.nbytes for tensor in apart.state_dict().values())


def test_what_limits_are_made_of(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    model = load(folder, device="cpu").model
    assert bench.weight_bytes(model) == sum(p.nbytes for p in model.parameters()) - model.tok_embeddings.weight.nbytes
    layers = sum(math.prod(p.shape) for n, p in model.named_parameters() if n.startswith("layers") and p.dim() == 2)
    assert bench.weights_in_products(model) == layers
    int8 = load(folder, device="cpu", quant="int8").model
    assert bench.weights_in_products(int8) == layers
    kept = sum(t.nbytes for m in int8.modules() if isinstance(m, QuantizedLinear) for t in m.buffers())
    norms = sum(p.nbytes for n, p in int8.named_parameters() if "norm" in n)
    assert bench.weight_bytes(int8) == kept + norms


def test_prefill_and_decode_take_in_what_they_say() -> None:
    model = tiny_model(tiny_args())
    seen = []
    plain = model.step

    def spy(ids: torch.Tensor, plan: object, cache: object) -> torch.Tensor:
        seen.append((len(ids), tuple(cache.lengths)))  # type: ignore[attr-defined]
        return plain(ids, plan, cache)  # type: ignore[arg-type]

    model.step = spy  # type: ignore[method-assign]
    assert bench.prefill(model, 11, chunk=4) > 0
    assert seen == [(4, (0,)), (4, (4,)), (3, (8,))]
    seen.clear()
    assert len(bench.decode(model, 20, 3, 2)) == 2
    assert seen == [(3, (20 + i,) * 3) for i in range(3)]
