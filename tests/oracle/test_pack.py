"""Packs: true of their own weights, whole, readable without us, refused where they are not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral import cli
from mistral.formats.folder import read_folder
from mistral.loader.assemble import assemble
from mistral.logprobs import logprobs
from mistral.oracle import pack
from mistral.oracle.compare import SINGLE
from mistral.oracle.metrics import LIMITS
from mistral.oracle.outputs import fingerprint
from mistral.oracle.trace import names
from mistral.util.errors import FormatError
from tests.support.folders import ROOT, make_folder
from tests.support.truth import truth

SHIPPED = sorted(pack.SHIPPED.glob("*.safetensors"))
DOCS = (ROOT / "docs" / "packs.md").read_text(encoding="utf-8")


def model_in(path, tmp_path):
    return assemble(pack.folder_of(path, tmp_path), device="cpu", execution="eager")[0]


def test_what_ships_is_what_the_docs_list():
    listed = re.findall(r"^\| `([\w-]+)` \| ", DOCS, re.M)
    assert {path.stem for path in SHIPPED} <= set(listed)
    assert len(SHIPPED) == 13


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_pack_is_true(path, tmp_path):
    """By the float64 numpy model of the tests, from the weights in the pack and the args it states."""
    told = pack.read(path)
    state = {n.removeprefix("weights."): t for n, t in load_file(path).items() if n.startswith("weights.")}
    args = argparse_like(told.facts["args"])
    state.setdefault("output.weight", state["tok_embeddings.weight"])  # where it is tied
    rows = [truth(state, args, prompt) for prompt in told.prompts]
    scores = np.concatenate([scores for scores, _ in rows])
    assert np.abs(np.take_along_axis(scores, told.top_ids.numpy(), 1) - told.top_logprobs.numpy()).max() < 1e-12
    assert np.sort(scores, 1)[:, ::-1][:, :20] == pytest.approx(told.top_logprobs.numpy(), abs=1e-12)
    following = pack.following(told.prompts).numpy()
    own = np.where(following < 0, np.nan, scores[np.arange(len(scores)), following])
    assert np.nan_to_num(own - told.next_logprobs.numpy(), nan=0.0).max() < 1e-12
    assert np.isnan(told.next_logprobs.numpy()).sum() == len(told.prompts)
    for i in range(args.n_layers):
        hidden = torch.from_numpy(np.concatenate([h[i] for _, h in rows]))
        assert (fingerprint(hidden) - told.prints[f"layers.{i}"]).abs().max() < 1e-12
    assert list(told.prints) == names(told.args)


def argparse_like(args):
    import types

    parts = {name: argparse_like(value) if isinstance(value, dict) else value for name, value in args.items()}
    return types.SimpleNamespace(**parts)


def test_the_rules_of_theta_are_all_there():
    thetas = {path.stem: pack.read(path).args.rope_theta for path in SHIPPED}
    assert thetas["theta-windowed"] == 1e4
    assert thetas["theta-full"] == 1e6
    assert thetas["theta-hf"] == 5e5
    assert thetas["theta-hf-parameters"] == 2e4
    assert thetas["theta-hf-absent"] == 1e4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_our_model_is_within_the_packs_budget(path, tmp_path):
    told = pack.read(path)
    model = model_in(path, tmp_path)
    with torch.inference_mode():
        scores = logprobs(model.forward(torch.cat(told.prompts), [len(p) for p in told.prompts]))
    apart = (scores.gather(1, told.top_ids) - told.top_logprobs).abs().max()
    budget = next(b for b in told.budgets if b.of.endswith("/fp32"))
    assert apart < SINGLE * LIMITS[torch.float32] * budget.logprobs
    assert budget.logprobs < 1e-5


def code(number):
    return re.findall(r"```python\n(.*?)```", DOCS, re.S)[number]


def test_the_reader_in_the_docs_reads_one(tmp_path):
    """Twenty lines, numpy alone: right numbers pass, a window of one key more does not."""
    reader = tmp_path / "reader.py"
    reader.write_text(code(0))
    assert len([line for line in code(0).splitlines() if line.strip()]) <= 20
    path = pack.SHIPPED / "window.safetensors"
    told = pack.read(path)
    state = {n.removeprefix("weights."): t for n, t in load_file(path).items() if n.startswith("weights.")}
    for window, beyond in ((7, False), (8, True)):
        args = argparse_like({**told.facts["args"], "sliding_window": window})
        scores = np.concatenate([truth(state, args, p)[0] for p in told.prompts])
        np.savez(tmp_path / "mine.npz", logprobs=scores)
        done = subprocess.run(
            [sys.executable, str(reader), str(path), str(tmp_path / "mine.npz")],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        assert ("beyond 7.5 times at rows []" in done.stdout) is not beyond, done.stdout
        if beyond:
            assert "rows [ 7 " in done.stdout  # the first query that has 8 keys before and at it


def test_the_fingerprint_in_the_docs_is_ours():
    space: dict = {"np": np}
    exec(code(1), space)
    x = torch.randn(5, 77, generator=torch.Generator().manual_seed(0)).double()
    assert np.abs(space["fingerprint"](x.numpy()) - fingerprint(x).numpy()).max() < 1e-13


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model", sliding_window=5, tokenizer=True)


def test_a_pack_of_a_folder(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.safetensors"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pack", str(folder), "-o", "x.safetensors", "--top", "3"]) == 0
    assert "wrote x.safetensors: 4 prompts, " in capsys.readouterr().err  # by the name that was given
    told = pack.read(out)
    assert [len(p) for p in told.prompts] == [40, 1, 9, 23]
    assert told.top_ids.shape == (73, 3)
    assert set(told.facts["provenance"]["files"]) == {"params.json", "consolidated.safetensors", "tokenizer.model"}
    assert not any(name.startswith("weights.") for name in load_file(out))
    assert cli.main(["verify", str(out)]) == 2
    assert "has no weights" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"model", "x.safetensors"}


def test_prompts_of_a_file(folder, tmp_path, capsys):
    out, file = tmp_path / "x.safetensors", tmp_path / "p.jsonl"
    file.write_text('"Once upon a time"\n{"prompt": [1, 5, 9]}\n')
    assert cli.main(["pack", str(folder), "-o", str(out), "--file", str(file)]) == 0
    told = pack.read(out)
    assert told.prompts[1].tolist() == [1, 5, 9]
    assert told.prompts[0][0] == 1
    assert len(told.prompts[0]) > 3
    file.write_text('{"prompt": [1, 5]}\n')
    assert cli.main(["pack", str(folder), "-o", str(out), "--file", str(file)]) == 0
    assert "which therefore hides nothing: give longer ones" in capsys.readouterr().err  # --full is for random prompts


def test_a_pack_becomes_a_folder_in_either_layout(tmp_path):
    path = pack.SHIPPED / "theta-hf.safetensors"
    for layout in ("hf", "mistral"):
        assert cli.main(["convert", str(path), str(tmp_path / layout), "--to", layout]) == 0
        found = read_folder(tmp_path / layout)
        assert found.args.rope_theta == 5e5
        assert found.args == pack.read(path).args
        want = {n.removeprefix("weights."): t for n, t in load_file(path).items() if n.startswith("weights.")}
        assert all(torch.equal(found.weights.get(name), w) for name, w in want.items())


@pytest.mark.long
def test_verify_takes_a_pack(capsys):
    assert cli.main(["verify", str(pack.SHIPPED / "per-layer.safetensors")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top", "0"], "--top is 0"),
        (["--top", "5000"], "top is 5000; it must be between 1 and the vocabulary's 4096"),
    ],
)
def test_what_cannot_be_packed(folder, tmp_path, capsys, words, said):
    out = tmp_path / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(out), *words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written(folder, tmp_path, capsys):
    assert cli.main(["pack", str(folder), "-o", str(tmp_path / "no" / "x.safetensors")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_ids_outside_the_vocabulary(folder, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("[1, 4096]\n")
    assert cli.main(["pack", str(folder), "-o", str(tmp_path / "x.safetensors"), "--file", str(file)]) == 2
    assert "line 1 has the id 4096, outside the vocabulary of 4096" in capsys.readouterr().err


def spoilt(tmp_path, change) -> Path:
    """A shipped pack, with its tensors and facts changed."""
    from mistral.oracle.arrays import facts_of

    source = pack.SHIPPED / "window.safetensors"
    tensors, facts = load_file(source), facts_of(source)
    change(tensors, facts)
    path = tmp_path / "spoilt.safetensors"
    save_file(tensors, path, metadata={k: json.dumps(v) for k, v in facts.items()})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, f: f.update(format="something"), "is no mistral oracle pack"),
        (lambda t, f: f.update(version=3), "of version 3 of the format; this reads 1 and 2"),
        (lambda t, f: t.pop("top_ids"), "not a whole pack"),
        (lambda t, f: t.update(prompt_lens=torch.tensor([3, 4])), "not a whole pack"),
        (lambda t, f: f.update(activations=["nothing"]), "not a whole pack"),
        (lambda t, f: f.update(error_budgets=3), "not a whole pack"),
        (lambda t, f: f["config"].pop("dim"), "dim"),
        (lambda t, f: t.update(top_ids=t["top_ids"][:, :3].clone()), "not a whole pack"),
    ],
)
def test_a_pack_that_is_not_whole_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pack.read(spoilt(tmp_path, change))


def test_files_that_are_no_packs(tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(3)}, plain)
    assert not pack.is_pack(plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((pack.SHIPPED / "window.safetensors").read_bytes()[:5000])
    assert not pack.is_pack(cut)
    with pytest.raises(FormatError):
        pack.read(cut)
    assert not pack.is_pack(tmp_path)


def test_a_pack_of_version_1_is_still_read(tmp_path: Path) -> None:
    from mistral.oracle.arrays import facts_of

    source = pack.SHIPPED / "window.safetensors"
    tensors, facts = load_file(source), facts_of(source)
    facts["version"] = 1
    facts["unavoidable"] = facts.pop("error_budgets")
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, metadata={k: json.dumps(v) for k, v in facts.items()})
    for was, now in zip(pack.read(old).budgets, pack.read(source).budgets, strict=True):
        factor = 2 if was.of.endswith(("fp32", "fp64")) else 1
        assert (was.of, was.rms, was.logprobs) == (now.of, factor * now.rms, factor * now.logprobs)
        assert was.prints == {name: factor * x for name, x in now.prints.items()}


@pytest.mark.parametrize("flag", [["--full"], ["--seed", "3"]])
@pytest.mark.parametrize("command", ["pack", "compare", "mutants"])
def test_what_random_prompts_are_like_goes_with_no_file(command, flag, folder, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [1, 5]}\n')
    more = {"compare": [str(folder)], "mutants": ["--mutant", "no_window", "-o", str(tmp_path / "o")]}
    words = [command, str(folder), *more.get(command, ["-o", str(tmp_path / "x.safetensors")])]
    assert cli.main([*words, "--file", str(file), *flag]) == 2
    assert f"error: {flag[0]} is about random prompts, and --file gives others" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--full"], ["--seed", "3"]])
def test_what_random_prompts_are_like_goes_with_no_prompts_of_a_pack(flag, folder, tmp_path, capsys):
    packed = tmp_path / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(packed), "--weights"]) == 0
    for words in (["compare", packed, folder], ["compare", folder, packed], ["mutants", packed, "-o", tmp_path / "o"]):
        assert cli.main([*map(str, words), *flag]) == 2
        assert f"error: {flag[0]} is about random prompts, and {packed}" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert cli.main(["mutants", *flag]) == 2
    assert "error: give --output" in capsys.readouterr().err
