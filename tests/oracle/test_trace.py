"""trace: every activation under its name, and what a plan says."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from mistral import cli
from mistral.loader.load import load
from mistral.oracle.trace import names, noted, plans, trace
from mistral.oracle.truth import Truth
from mistral.window import visible
from tests.oracle.test_verify import run
from tests.support.folders import make_folder
from tests.support.tiny import ragged, tiny_args, tiny_model

LENS = [23, 1, 6]


@pytest.mark.parametrize("window", [5, None, (None, 4, 7)])
def test_activations_are_those_of_the_truth(window):
    """The library's, by hooks, and those of a model that was written without it: the same names, the same numbers."""
    model = tiny_model(tiny_args(n_layers=3, sliding_window=window), seed=1)
    prompts = ragged(LENS, model.args.vocab_size, seed=1)
    want: dict = {}
    logits = run(Truth(model.args, prompts, note=want.__setitem__), model)
    got = trace(model, torch.cat(prompts), LENS)
    assert list(got) == [*want, "output"] == names(model.args)
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert (got[name] - value).abs().max() < 1e-5, name
    assert (got["output"] - logits).abs().max() < 1e-5


def test_names_are_the_checkpoints():
    model = tiny_model(tiny_args())
    weights = {name.removesuffix(".weight") for name in model.state_dict()}
    assert weights <= set(names(model.args))


def test_hooks_go_also_where_a_forward_fails():
    model = tiny_model(tiny_args())
    attend = [layer.attention.attend for layer in model.layers]
    seen: list = []
    with pytest.raises(ValueError), noted(model, lambda name, _: seen.append(name)):
        model.forward(torch.tensor([10**6]), [1])
    assert [layer.attention.attend for layer in model.layers] == attend
    count = len(seen)
    model.forward(torch.tensor([1]), [1])
    assert len(seen) == count


def test_a_file(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    out = tmp_path / "t.safetensors"
    assert cli.main(["trace", str(folder), "Once upon a time", "-o", str(out), "--dtype", "float64"]) == 0
    tensors = load_file(out)
    loaded = load(folder, dtype="float64", kernels=False)
    ids = tensors["prompt_ids"]
    assert ids[0] == loaded.tokenizer.bos_id
    assert tensors["prompt_lens"].tolist() == [len(ids)]
    assert set(tensors) == {"prompt_ids", "prompt_lens", *names(loaded.args)}
    assert tensors["layers.1.feed_forward.gated"].shape == (len(ids), 40)
    assert tensors["layers.1.feed_forward.gated"].dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(tensors["output"], loaded.model.forward(ids, [len(ids)]))


def test_a_prompt_that_is_piped(tmp_path, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon"))
    folder = make_folder(tmp_path / "model")
    assert cli.main(["trace", str(folder), "--output", str(tmp_path / "t.safetensors")]) == 0
    assert len(load_file(tmp_path / "t.safetensors")["prompt_ids"]) > 1


def test_a_file_of_prompts(tmp_path):
    """Packed into one forward: each has the activations that it has alone, in the rows that prompt_lens says."""
    folder = make_folder(tmp_path / "model")
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "t.safetensors"
    lines.write_text('[1, 5, 9, 4, 7, 8, 3, 2, 6]\n"Once upon"\n[1]\n')
    assert cli.main(["trace", str(folder), "--file", str(lines), "-o", str(out), "--dtype", "float64"]) == 0
    tensors = load_file(out)
    lens = tensors["prompt_lens"].tolist()
    loaded = load(folder, dtype="float64", kernels=False)
    prompts = tensors["prompt_ids"].split(lens)
    assert [p.tolist() for p in prompts] == [
        [1, 5, 9, 4, 7, 8, 3, 2, 6],
        loaded.tokenizer.encode("Once upon", bos=True),
        [1],
    ]
    for i, prompt in enumerate(prompts):
        for name, value in trace(loaded.model, prompt, [len(prompt)]).items():
            assert (tensors[name].split(lens)[i] - value).abs().max() < 1e-12, name


@pytest.mark.parametrize("command", ["trace", "pack", "mutants"])
@pytest.mark.parametrize("place", ["missing/file", "taken", "pipe"])
def test_what_cannot_be_written_is_known_before_the_work(command, place, tmp_path, monkeypatch, capsys):
    from mistral.model import Transformer
    from mistral.oracle import pack

    def worked(*args, **kwargs):
        raise AssertionError("it was computed")

    monkeypatch.setattr(Transformer, "forward", worked)
    monkeypatch.setattr(pack, "reference_outputs", worked)
    folder, out = make_folder(tmp_path / "model"), tmp_path / place
    if place == "pipe":  # nor is what is no file replaced by one
        os.mkfifo(out)
    elif place == "taken":  # a folder where a file should be, or a file where a folder should be
        out.touch() if command == "mutants" else out.mkdir()
    elif command == "mutants":
        out.parent.touch()
    words = [str(folder), *(["hello there"] if command == "trace" else []), "-o", str(out)]
    assert cli.main([command, *words]) == 2
    assert str(out) in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))
    assert place != "pipe" or out.is_fifo()


@pytest.mark.parametrize("window", [None, 1, 3, 200])
@pytest.mark.parametrize("chunk", [None, 1, 4, 150])
def test_a_plan_shows_each_query_its_window(window, chunk):
    """Over all tiles, each position is written once, to position % slots, and its mask shows exactly its window."""
    lens = [300, 2, 7]
    seen: list[set[int]] = [set() for _ in lens]
    for step in plans(lens, chunk, window):
        for tile in step["tiles"]:
            row = tile["sequence"]
            for position, slot, mask in zip(tile["positions"], tile["written_to"], tile["mask"], strict=True):
                assert position not in seen[row]
                seen[row].add(position)
                assert tile["held"][slot] == position
                shown = sorted(held for held, bit in zip(tile["held"], mask, strict=True) if bit == "1")
                first = 0 if window is None else max(0, position - window + 1)
                assert shown == list(range(first, position + 1))
    assert seen == [set(range(n)) for n in lens]


def test_a_plan_on_the_command_line(capsys):
    assert cli.main(["trace", "--plan", "7,3", "--chunk_size", "4", "--window", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["window"] == 3
    assert [step["seqlens"] for step in told["steps"]] == [[4, 3], [3, 0]]
    assert told["steps"][1]["starts"] == [4, 3]
    (tile,) = told["steps"][1]["tiles"]
    mask = visible(torch.tensor(tile["positions"]), torch.tensor(tile["held"]), 3)
    assert ["".join(".1"[seen] for seen in line) for line in mask.int().tolist()] == tile["mask"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --output for activations, or --plan"),
        (["--plan", "3", "-o", "x"], "give --output for activations, or --plan"),
        (["--plan", "3,0"], "--plan is '3,0'"),
        (["--plan", "3", "--file", "x"], "--plan does not go with --file"),
        (["hello there", "--file", "x", "-o", "y"], "a prompt and --file"),
        (["--file", "nowhere.jsonl", "-o", "y"], "nowhere.jsonl cannot be read"),
        (["hello there", "--plan", "3"], "--plan does not go with a prompt"),
        (["hello there", "-o", "x", "--window", "3"], "belong to --plan"),
        (["hello there", "-o"], "--output needs a value"),
    ],
)
def test_what_is_refused(words, said, capsys):
    assert cli.main(["trace", *words]) == 2
    assert said in capsys.readouterr().err
