"""Two processes that divide a model (gloo) against one that has all of it. One pair of processes runs every model."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mistral
from mistral.args import ModelArgs, Moe, QueryScaling, Yarn
from mistral.formats.adapter import read_adapter
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.merge import merge_into
from mistral.loader.assemble import assemble
from mistral.loader.load import load
from mistral.loader.options import LoadOptions, OptionError
from mistral.model import Transformer
from mistral.parallel import launch
from mistral.parallel.shard import Shard, Slice, shard_of_this_process
from mistral.parameters import parameters
from mistral.quant.linear import QuantizedLinear
from mistral.util import memory
from tests.formats.test_quantized_hf import KINDS as HF_KINDS
from tests.formats.test_quantized_hf import mistrals
from tests.formats.test_quantized_hf import write as write_quantized
from tests.support.adapters import write_peft
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder
from tests.support.gguf_files import gguf_args, write_gguf
from tests.support.tiny import (
    TOLERANCE,
    Schedule,
    all_at_once,
    distance,
    in_chunks,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    whole,
)

LENS = [17, 3, 11]  # windows of 5 roll, and rows end one after the other
# Inputs beside quantized weights are rounded to 16 bits: what lies between two of their steps may go either way.
QUANT_TOLERANCE = 1e-4
SCHEDULES: dict[str, Schedule] = {
    "at once": all_at_once(LENS),
    "in chunks": in_chunks(LENS, 4),
    "decoded": prefill_then_decode(LENS, 9),
}
WIDE = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "hidden_dim": 512, "vocab_size": 62}
SHAPES: dict[str, ModelArgs] = {
    "dense": tiny_args(vocab_size=62),
    "mixtral": tiny_args(vocab_size=62, moe=Moe(4, 2)),
    "tied": tiny_args(vocab_size=62, tied_embeddings=True, llama_4_scaling=QueryScaling(4, 0.3)),
    "yarn": tiny_args(vocab_size=62, yarn=Yarn(4.0, 8), sliding_window=[None, 5]),
    "int4": tiny_args(**WIDE),
    "tied int8": tiny_args(**WIDE, tied_embeddings=True),  # 31 rows of the table each: no whole blocks
    "mixtral int8": tiny_args(**WIDE, moe=Moe(2, 1)),
}
OPTIONS = LoadOptions(device="cpu", execution="eager")
QUANTIZED = ("AWQ", "GPTQ, act order", "fp8, blocks")


def options_for(name: str) -> LoadOptions:
    quant = name.split()[-1]
    return replace(OPTIONS, quant=quant if quant in ("int8", "int4") else None)


def model_of(name: str) -> Transformer:
    """A random model, with the largest weight of each row of wo and w2 in both halves: of int8, the scales agree."""
    model = tiny_model(SHAPES[name.removesuffix(" hf")])
    if "int8" in name:
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if path.endswith(("wo.weight", "w2.weight")):
                    half = weight.shape[1] // 2
                    weight[:, 3] = weight[:, half + 5] = weight.abs().amax()
    if name == "tied int8":  # logits of ordinary size
        with torch.no_grad():
            model.tok_embeddings.weight *= 0.05
    return model


def played(model: Transformer, quantized: bool) -> dict[str, list[Tensor]]:
    """Logits of every schedule: from a cache, also one that has rolled and been rewound, and without one."""
    prompts = ragged(LENS, model.args.vocab_size)
    with torch.inference_mode():
        if quantized:  # what rounds is slow, and the products are the same in every schedule
            return {"in chunks": play(model, prompts, SCHEDULES["in chunks"], make_cache(model, len(LENS)))}
        found = {name: play(model, prompts, each, make_cache(model, len(LENS))) for name, each in SCHEDULES.items()}
        cache = make_cache(model, 1)
        model.forward(prompts[0], [len(prompts[0])], cache)
        cache.rewind(0, len(prompts[0]) - 1)
        found["rewound"] = [model.forward(prompts[0][-1:], [1], cache)]
        return {**found, "no cache": whole(model, prompts)}


def divided(folders: dict[str, str]) -> dict[str, Any]:
    """On every rank: each model's logits and weights, the bytes read of it, and whether all ranks had the same."""
    shard = shard_of_this_process()
    assert shard is not None
    found: dict[str, Any] = {"left": [None, None]}
    left = {0: 100, 1: 60}[shard.rank]  # bytes that this rank sees
    with mock.patch.object(memory, "_available", return_value=left):
        dist.all_gather_object(found["left"], memory.available("cpu"))
    for name, folder in folders.items():
        model, run = assemble(read_folder(folder), shard, options=replace(options_for(name), parallel=2))
        read: list[int] = []
        part = shard.part(read_folder(folder)).weights
        for tensor in part.readers:
            part.get(tensor, read.append)
        logits = played(model, run.quant is not None)
        bits = [t.numpy().tobytes() for ts in logits.values() for t in ts]
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, (sum(read), bits, rounded(model)))
        bytes_read, their_bits, weights = zip(*everyones, strict=True)
        found[name] = logits, bytes_read, their_bits[0] == their_bits[1], weights, run.notes
    return found


def rounded(model: Transformer) -> dict[str, Tensor]:
    """The quantized weights by name, as the numbers that they stand for."""
    modules = {
        path.replace(".part", "").replace(".table", ""): m
        for path, m in model.named_modules()
        if isinstance(m, QuantizedLinear)
    }
    return {f"{path}.weight": m.rows(0, m.out_features) for path, m in modules.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("parallel")
    made = {}
    for name in SHAPES:
        made[name] = str(place / name.replace(" ", "-"))
        mistral.save(model_of(name), made[name])
    made["mixtral hf"] = str(place / "hf")  # another order of rows, and experts under other names
    convert(made["mixtral"], made["mixtral hf"], to="hf")
    return made | {kind: str(write_quantized(place / kind / "m", kind)[0]) for kind in QUANTIZED}


@pytest.fixture(scope="module")
def results(folders: dict[str, str]) -> dict[str, Any]:
    return launch.run(2, divided, folders)


@pytest.mark.parametrize("name", [*SHAPES, "mixtral hf"])
def test_two_ranks_are_one_model(name: str, folders: dict[str, str], results: dict[str, Any]) -> None:
    alone, _ = assemble(read_folder(folders[name]), options=options_for(name))
    logits, (first, second), equal_bits, weights, notes = results[name]
    tolerance = QUANT_TOLERANCE if options_for(name).quant else TOLERANCE
    for schedule, want in played(alone, options_for(name).quant is not None).items():
        assert distance(logits[schedule], want) < tolerance, schedule
    assert equal_bits  # or the ranks would choose different tokens
    known = parameters(SHAPES[name.removesuffix(" hf")])
    assert first == second == sum(4 * p.numel // (1 if p.split is None else 2) for p in known.values())
    for weight, want in rounded(alone).items():
        each = [part[weight] for part in weights]
        if known[weight].split is not None:
            each = [torch.cat(each, 0 if known[weight].split == "rows" else 1)]
        assert all(torch.equal(one, want) for one in each), weight
    assert notes[0].startswith("2 ranks (gloo) divide the model; each has all of the embeddings")
    assert any("each rank rounds its columns of wo and w2 alone" in note for note in notes) == ("int8" in name)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_two_ranks_are_one_model_of_a_quantized_folder(
    kind: str, folders: dict[str, str], results: dict[str, Any]
) -> None:
    alone, _ = assemble(read_folder(folders[kind]), options=OPTIONS)
    logits, _, equal_bits, _, _ = results[kind]
    for schedule, want in played(alone, False).items():
        assert distance(logits[schedule], want) < TOLERANCE, schedule
    assert equal_bits


def test_all_but_the_embeddings_is_halved() -> None:
    """At the sizes of Mistral 7B a rank reads little more than half of the weights."""
    args = ModelArgs(
        dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5, vocab_size=32000
    )
    total = sum(p.numel for p in parameters(args).values())
    part = sum(p.numel // (1 if p.split is None else 2) for p in parameters(args).values())
    assert 0.5 < part / total < 0.51


@pytest.mark.parametrize("form", ["parts", "pth", "hf", "adapter", "gguf", "fp8 of Mistral's", *HF_KINDS])
def test_the_parts_are_the_whole(form: str, tmp_path: Path) -> None:
    """Also of tensors in several files, of Hugging Face's order, of merged ones and of blocks of few bits."""
    if form == "gguf":
        write_gguf(tmp_path / "m.gguf", "Q4_0", gguf_args(vocab_size=64))
        found = read_folder(tmp_path / "m.gguf")
    elif form == "fp8 of Mistral's":
        found = read_folder(mistrals(tmp_path / "m", rows=True)[0])
    elif form in HF_KINDS:
        found = read_folder(write_quantized(tmp_path / "m", form)[0])
    else:
        found = read_folder(make_folder(tmp_path / "m", form="pth" if form == "pth" else "parts"))
    if form == "hf":
        convert(str(found.path), tmp_path / "hf", to="hf")
        found = read_folder(tmp_path / "hf")
    if form == "adapter":
        found = merge_into(found, read_adapter(write_peft(tmp_path / "lora")))
    parts = [Shard(rank, 2).part(found) for rank in range(2)]
    for name, parameter in parameters(found.args).items():
        each = [part.weights.get(name) for part in parts]
        whole_weight = found.weights.get(name)
        assert [list(t.shape) for t in each] == [list(part.tensors[name].shape) for part in parts]
        if parameter.split is not None:
            each = [torch.cat(each, 0 if parameter.split == "rows" else 1)]
        assert all(torch.equal(one, whole_weight) for one in each), name
        halves = [part.weights.get(name, exact=True) for part in parts]  # as what is quantized again is read
        dim = 0 if parameter.split == "rows" else 1
        exact = halves[0] if parameter.split is None else torch.cat(halves, dim)
        assert torch.equal(exact, found.weights.get(name, exact=True)), name


def test_a_slice_wants_nothing_else_in_memory() -> None:
    told: list[object] = []

    def whole_weight(progress: Any = None) -> Tensor:
        told.append(progress)  # with one, all of it would be brought into memory
        return torch.arange(24.0).view(4, 6)

    count: list[int] = []
    assert Slice(whole_weight, 0, 1, 2)(count.append).tolist() == torch.arange(6.0, 18.0).view(2, 6).tolist()
    columns = Slice(whole_weight, 1, 3, 3)(count.append)
    assert columns.tolist() == torch.arange(24.0).view(4, 6)[:, 3:].tolist()
    assert columns.is_contiguous()
    assert columns.untyped_storage().nbytes() == columns.nbytes
    assert (told, count) == ([None, None], [48, 48])


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"n_kv_heads": 1}, {}, "parallel 2 does not divide n_kv_heads 1: every rank takes as much"),
        ({"hidden_dim": 41}, {}, "hidden_dim 41"),
        ({"vocab_size": 61}, {}, "vocab_size 61"),
        ({}, {"quant": "int4"}, "each rank has 16 columns of wo, and int4 rounds groups of 32"),
        ({}, {"draft": "ngram"}, "parallel 2 has no drafts"),
        ({}, {"adapter": ("a",), "adapter_mode": "runtime"}, "one adapter, merged"),
        ({}, {"adapter": ("a", "b")}, "one adapter, merged"),
        (
            {},
            {"device": "cuda:1"},
            "parallel 2 is for cpu or cuda, where each rank takes a GPU of its own, not for cuda:1",
        ),
        ({}, {"execution": "bitwise"}, "execution bitwise is not possible"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    changes: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    args = tiny_args(**{"vocab_size": 62, **changes})
    mistral.save(tiny_model(args), tmp_path / "m")
    options["adapter"] = tuple(str(small_adapter(tmp_path / name, args)) for name in options.get("adapter", ()))
    with pytest.raises(OptionError, match=said):
        assemble(read_folder(tmp_path / "m"), Shard(0, 2), options=replace(OPTIONS, **options))


def small_adapter(folder: Path, args: ModelArgs) -> Path:
    """LoRA of one matrix."""
    at, wide = "base_model.model.model.layers.0.self_attn.q_proj", args.n_heads * args.head_dim
    tensors = {f"{at}.lora_A.weight": torch.ones(3, args.dim), f"{at}.lora_B.weight": torch.ones(wide, 3)}
    return write_peft(folder, tensors, target_modules=["q_proj"])


def test_stored_quantized_weights_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    convert(folders["dense"], tmp_path / "q", to="mistral", quant="int8")
    with pytest.raises(OptionError, match="stored in int8"):
        assemble(read_folder(tmp_path / "q"), Shard(0, 2), options=OPTIONS)


def test_ranks_see_the_same_memory(results: dict[str, Any]) -> None:
    assert results["left"] == [30, 30]
    assert memory.agree is None
    assert not dist.is_initialized()


def fail(how: str) -> None:
    """Rank 1 stops; rank 0 waits for it."""
    shard = shard_of_this_process()
    if shard is not None and shard.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OptionError("no room here")
    dist.barrier()


def unstarted(*args: object) -> None:
    """A rank that ends before it has met the others."""
    os._exit(5)


def test_a_rank_that_does_not_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_other", unstarted)
    with pytest.raises(launch.RankFailed, match="rank 1 ended with exit code 5"):
        launch.run(2, fail, "not at all")


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "rank 1: no room here$"), ("killed", "rank 1 was ended by SIGKILL; is there enough")]
)
def test_a_rank_that_stops_ends_all(how: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 120)  # a machine may be so busy that it takes a while to end
    with pytest.raises(launch.RankFailed, match=said):
        launch.run(2, fail, how)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def test_commands_give_the_same(command: Command) -> None:
    asked = ("complete", "--max_tokens", 8, "--device", "cpu", "--seed", 3, "--json", "--n", 2)
    text = command(*asked, "--parallel", 2, stdin="Once upon a time")
    assert text.text.count("\n") == 2
    words = [line.partition('"logprobs"')[0] for line in text.out.splitlines()]
    assert words == [
        line.partition('"logprobs"')[0] for line in command(*asked, stdin="Once upon a time").out.splitlines()
    ]
    assert "note: 2 ranks (gloo) divide the model" in text.err


def test_other_commands_refuse(command: Command) -> None:
    for words in (("eval", "--task", "reach"), ("bench",)):
        assert command(*words, "--parallel", 2).error.startswith("no flag --parallel")
    with pytest.raises(OptionError, match="parallel 2 is for complete, interactive, .* and finetune"):
        load(device="cpu", parallel=2)
    assert command("complete", "x", "--parallel", 0).error == "--parallel is 0; it must be at least 1"


def test_torchrun_must_start_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(mistral.UsageError, match="parallel is 2, but torchrun has started 3 processes"):
        launch.run(2, divided, {})
