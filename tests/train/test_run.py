"""Whole runs: what comes out loads everywhere, a run that was stopped goes on bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral import load
from mistral.cli.finetune import _Line, _Stop
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.weights import WeightsError
from mistral.loader.options import LoadOptions, OptionError
from mistral.train import needs, run
from mistral.train.finish import Finished
from mistral.train.log import read_log
from mistral.train.loop import Diverged, Report
from mistral.train.options import TrainOptions
from mistral.train.run import finetune
from mistral.train.state import STATE, StateError
from mistral.util.errors import MistralError, Unavailable, UsageError
from mistral.util.memory import OutOfMemory
from tests.formats.test_adapter import merged_state
from tests.support.adapters import peft_tensors, write_peft
from tests.support.commands import ENVIRONMENT
from tests.support.folders import PARAMS, ROOT, make_folder, random_state
from tests.support.tiny import ragged

IDS = ragged([11], PARAMS["vocab_size"])[0]  # longer than the window
SMALL: dict[str, Any] = {"seq_len": 40, "steps": 6, "lr": 0.01, "warmup": 0.3}
ANSWERS = ("The king.", "The wolf in the forest.", "A ring of gold.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Who is it? {i}"}, {"role": "assistant", "content": ANSWERS[i % 3]}]}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tune(folder: Path, data: Path, out: Path, more: dict[str, Any] | None = None, **options: Any) -> Finished:
    """A short run; `more` goes to `finetune`, all else to the options."""
    loaded = {name: options.pop(name) for name in ("quant", "adapter", "dtype", "sliding_window") if name in options}
    load_options = LoadOptions(device="cpu", **loaded)
    return finetune(folder, data, out, options=TrainOptions(**{**SMALL, **options}), load=load_options, **more or {})


def logits(folder: Path, **options: Any) -> Tensor:
    with torch.inference_mode():
        return load(folder, device="cpu", **options).model.forward(IDS, [len(IDS)])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- what comes out


@pytest.fixture(scope="module")
def adapter(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "lora"
    done = tune(folder, data, out, {"merge": True}, lora=3, eval_split=0.2)
    assert done.losses[1] < done.losses[0]
    assert done.eval_losses is not None
    assert done.eval_losses[1] < done.eval_losses[0]
    return out


def test_the_adapter_changes_the_model_and_loads_in_every_form(folder: Path, adapter: Path) -> None:
    base, tuned = logits(folder), logits(folder, adapter=adapter)
    assert distance(base, tuned) > 0.01
    assert distance(tuned, logits(folder, adapter=adapter / "mistral-finetune")) == 0
    assert distance(tuned, logits(folder, adapter=adapter, adapter_mode="runtime")) < 1e-5
    assert distance(tuned, logits(adapter / "merged")) < 1e-6
    forms = [merged_state(folder, path) for path in (adapter, adapter / "mistral-finetune")]
    assert all(torch.equal(forms[0][name], forms[1][name]) for name in forms[0])


def test_peft_gives_the_same_logits(folder: Path, adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    convert(folder, tmp_path / "hf", "hf")
    base = transformers.MistralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        got = theirs(IDS[None]).logits[0]
    assert distance(got, logits(folder, adapter=adapter)) < 1e-5


def test_the_config_is_one_that_vllm_accepts(adapter: Path) -> None:
    """vLLM refuses biases, modules to save and DoRA, and wants the names of modules as a list."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 6, "none")
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    names = load_file(adapter / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


def test_the_card_and_the_log(adapter: Path, data: Path) -> None:
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"--data {data} --out {adapter} --lora 3 --seq_len 40 --steps 6" in text
    assert "| trained | LoRA of rank 3, scale 2 |" in text
    assert "held out" in text
    entries = read_log(adapter / "log.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert all(entry["tokens"] > 0 and entry["norm"] > 0 for entry in steps)
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [0, 1, 2, 3, 4, 5, 6]
    assert (adapter / "loss.svg").read_text().count("<svg") == 1
    assert not (adapter / STATE).exists()


def test_targets_may_be_chosen(folder: Path, data: Path, tmp_path: Path) -> None:
    tune(folder, data, tmp_path / "out", lora_targets="wq,v_proj", lora_alpha=5, lora=2, recompute="layers")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["lora_alpha"] == 5
    assert distance(logits(folder), logits(folder, adapter=tmp_path / "out")) > 1e-3


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_a_whole_model_comes_out_as_it_went_in(folder: Path, data: Path, tmp_path: Path, to: str) -> None:
    base = tmp_path / "base"
    convert(folder, base, to)
    done = tune(base, data, tmp_path / "out", full=True, rope_theta=5e4, sliding_window=7)
    assert done.losses[1] < done.losses[0]
    found = read_folder(tmp_path / "out")
    assert found.layout.to == to
    assert (found.args.sliding_window, found.args.rope_theta) == (7, 5e4)
    assert distance(logits(base), logits(tmp_path / "out")) > 0.01
    assert load(tmp_path / "out", device="cpu").tokenizer.encode("The king") == load(base).tokenizer.encode("The king")
    assert "--full" in (tmp_path / "out" / "README.md").read_text()


def test_bf16_weights_are_trained_in_fp32_and_rounded_once(folder: Path, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    convert(folder, base, "mistral", dtype="bfloat16")
    done = tune(base, data, tmp_path / "out", full=True, dtype="bfloat16", lr=1e-4)
    assert "the weights are written in bfloat16, rounded once from float32" in done.notes
    assert not [note for note in done.notes if "carried" in note]  # what is trained is written anew
    assert {tensor.dtype for tensor in read_folder(tmp_path / "out").tensors.values()} == {"bfloat16"}
    assert done.losses[1] < done.losses[0]


def test_control_tokens_that_samples_spell_are_told(folder: Path, tmp_path: Path) -> None:
    """They are learned as text: one who wrote conversations so would not get what was meant."""
    lines = [
        {"text": "<s>The king.</s>"},
        {"prompt": "Who?", "completion": " The wolf.</s>"},
        {"messages": [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "Yes."}]},
        {"text": "No <king> and no [INST], which is none of this tokenizer's."},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    said: list[str] = []
    tune(folder, path, tmp_path / "out", {"say": said.append}, steps=1)
    (note,) = (line for line in said if "spell" in line)
    assert note.startswith(f"note: {path}: 3 samples spell control tokens (</s>, <s>), which are learned as text")


def test_epochs_beside_steps_are_told(folder: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    tune(folder, data, tmp_path / "out", {"say": said.append}, steps=2, epochs=3.0)
    assert "note: epochs 3 has no effect beside steps 2" in said
    tune(folder, data, tmp_path / "again", {"say": said.append}, steps=2)
    assert len([line for line in said if "has no effect" in line]) == 1


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_an_adapter_beside_quantized_weights(folder: Path, data: Path, tmp_path: Path, quant: str) -> None:
    done = tune(folder, data, tmp_path / "out", quant=quant)
    assert done.losses[1] < done.losses[0]
    options: dict[str, Any] = {"quant": quant, "adapter": tmp_path / "out", "adapter_mode": "runtime"}
    assert distance(logits(folder, **options), logits(folder, quant=quant)) > 0.01


def test_training_goes_on_from_an_adapter(folder: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    tune(folder, data, tmp_path / "out", adapter=adapter, steps=1, lr=1e-9)
    assert distance(logits(folder, adapter=tmp_path / "out"), logits(folder, adapter=adapter)) < 1e-5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3
    with pytest.raises(OptionError, match="training goes on with the same: omit --lora"):
        tune(folder, data, tmp_path / "other", adapter=adapter, lora=4)


def test_the_template_of_an_adapter_is_named_where_training_goes_on(folder: Path, data: Path, tmp_path: Path) -> None:
    adapter, said = write_peft(tmp_path / "own"), list[str]()
    shutil.copy(folder / "tokenizer.model", adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tune(folder, data, tmp_path / "out", {"say": said.append}, adapter=adapter, steps=1)
    assert any("has a chat template (chat_template.jinja; --template takes a file)" in line for line in said)


def test_an_adapter_with_weights_of_its_own_is_not_trained_on(folder: Path, data: Path, tmp_path: Path) -> None:
    own = {"base_model.model.lm_head.weight": torch.rand(PARAMS["vocab_size"], 24)}
    adapter = write_peft(tmp_path / "own", peft_tensors() | own, modules_to_save=["lm_head"])
    with pytest.raises(OptionError, match="has lm_head of its own, which is not trained here"):
        tune(folder, data, tmp_path / "out", adapter=adapter)
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    table = {f"{at}A": torch.rand(3, PARAMS["vocab_size"]), f"{at}B": torch.rand(PARAMS["dim"], 3)}
    adapter = write_peft(tmp_path / "table", peft_tensors() | table)
    with pytest.raises(OptionError, match="has a LoRA of embed_tokens, which is not trained here: merge it first"):
        tune(folder, data, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_a_window_of_its_own_is_told(folder: Path, data: Path, tmp_path: Path) -> None:
    done = tune(folder, data, tmp_path / "out", sliding_window=9, steps=1)
    assert "use the adapter with --sliding_window 9, as it was trained" in done.notes


# --- stopped, and gone on


def results(out: Path) -> dict[str, Tensor]:
    found = load_file(out / "adapter_model.safetensors")
    assert found
    return found


def same_bits(one: Path, two: Path) -> bool:
    a, b = results(one), results(two)
    assert a.keys() == b.keys()
    assert any(t.any() for t in a.values())
    return all(torch.equal(a[name], b[name]) for name in a)


def stopping(after: int) -> dict[str, Any]:
    """Arguments that stop a run after a step."""
    seen: list[Report] = []
    return {"on_report": seen.append, "should_stop": lambda: len(seen) == after}


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3, "accumulate": 2, "eval_split": 0.2, "patience": 9}], ids=str
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    folder: Path, data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tune(folder, data, tmp_path / "whole", **options)
    for after in (4, 1):
        out = tmp_path / f"stopped {after}"
        with pytest.raises(KeyboardInterrupt):
            tune(folder, data, out, stopping(after), **options)
        assert (out / STATE).is_file()
        assert not (out / "adapter_config.json").exists()
        (out / f".{STATE}.0123.part").write_bytes(b"half")  # as kill -9 leaves it
        tune(folder, data, out, {"resume": True}, **options)
        assert same_bits(out, tmp_path / "whole")
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        kept = [{**entry, "seconds": 0} for entry in read_log(out / "log.jsonl")]
        assert kept == [{**entry, "seconds": 0} for entry in read_log(tmp_path / "whole" / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.long  # the test above stops a run within this process
def test_a_run_that_was_killed_goes_on_bit_for_bit(folder: Path, data: Path, tmp_path: Path) -> None:
    """kill -9 wherever it is; what was logged after the last save is done again."""
    words = [
        sys.executable,
        "-m",
        "main",
        "finetune",
        str(folder),
        "--data",
        str(data),
        "--seq_len",
        "40",
        "--lr",
        "0.01",
    ]
    words += ["--steps", "240", "--save_every", "7", "--threads", "1", "--device", "cpu", "--out"]
    options: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen([*words, str(tmp_path / "killed")], **options)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not log.is_file() or len(log.read_text().splitlines()) < 10:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "killed" / STATE).is_file()
    assert 10 <= len(read_log(log)) < 240
    again = [*words, str(tmp_path / "killed"), "--resume"]
    subprocess.run(again, check=True, timeout=200, **options)
    subprocess.run([*words, str(tmp_path / "whole")], check=True, timeout=200, **options)
    assert same_bits(tmp_path / "killed", tmp_path / "whole")
    assert [entry["step"] for entry in read_log(log)] == list(range(1, 241))


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "main", "finetune", str(folder), "--data", str(data), "--seq_len", "40"]
    words += ["--steps", "100000", "--device", "cpu", "--out", str(tmp_path / "out")]
    running = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not log.is_file() or not log.read_text():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=200)
    assert running.returncode == 130
    assert "--resume goes on" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / STATE).is_file()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_ends_a_session_asks_for_a_save_as_ctrl_c_does(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It may come twice for one reason, as from the shell and from the system; under nohup it is not heard."""
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("a system without it")
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with _Stop(_Line()) as stop:
            assert not stop.asked
            signal.raise_signal(number)
            assert stop.asked
            signal.raise_signal(number)
            assert not stop.at_once
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with _Stop(_Line()) as stop:
            signal.raise_signal(number)
            assert not stop.asked
    finally:
        signal.signal(number, before)
    assert "--resume goes on" in capfd.readouterr().err


def test_it_stops_where_evaluations_get_worse_and_keeps_the_best(folder: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Once upon a time there was a miller."}) + "\n", encoding="utf-8")
    more = {"eval_data": other}
    done = tune(folder, data, tmp_path / "out", more, patience=2, eval_every=1, steps=60, lr=0.5)
    assert done.progress.step < 60
    evals = [entry["eval_loss"] for entry in read_log(tmp_path / "out" / "log.jsonl") if "eval_loss" in entry]
    best = evals.index(min(evals))
    assert done.progress.best_step == best
    assert len(evals) == best + 3
    assert any(f"those of step {best}" in note for note in done.notes)
    assert f"| weights | those of step {best}, held out {min(evals):.4f}, the best |" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")
    if not best:  # nothing was learned that helps: the adapter is the one of the start
        assert not any(t.any() for name, t in results(tmp_path / "out").items() if "lora_B" in name)


# --- what is refused


def test_another_run_is_not_gone_on_with(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(folder, data, out, stopping(2))
    with pytest.raises(StateError, match="is of another run: lr was 0.01, and is 0.02 now"):
        tune(folder, data, out, {"resume": True}, lr=0.02)
    with pytest.raises(UsageError, match="not empty: give another folder; --resume goes on with the run in it"):
        tune(folder, data, out)
    state = out / STATE
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        tune(folder, data, tmp_path / "evaluated", {**stopping(2), "eval_data": held})
    held.write_text('{"text": "b"}\n', encoding="utf-8")  # at the same place
    with pytest.raises(StateError, match="is of another run: eval_data was"):
        tune(folder, data, tmp_path / "evaluated", {"resume": True, "eval_data": held})
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(StateError, match="is broken"):
        tune(folder, data, out, {"resume": True})


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"full": True}, {"merge": True}, "--merge is for adapters"),
    ({"rope_theta": 1e6}, {}, "rope_theta is part of a model"),
    ({"patience": 2}, {}, "patience needs evaluations"),
    ({"eval_every": 2}, {}, "eval_every needs evaluations"),
    ({"full": True, "quant": "int8"}, {}, "quantized weights cannot be trained"),
    ({"dtype": "float16"}, {}, "float16 needs a loss that is scaled"),
    ({}, {"resume": True}, "no state.safetensors in"),
]


@pytest.mark.parametrize(("options", "more", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_options_that_do_not_go_together(
    folder: Path, data: Path, tmp_path: Path, options: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        tune(folder, data, tmp_path / "out", more, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"full": True, "lora": 4}, "lora is of an adapter, and --full trains all weights"),
        ({"lora_targets": "wq,wx"}, "lora_targets has 'wx'"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be above 0"),  # nothing would be learned
        ({"lora": 0}, "lora is 0; it must be at least 1"),
        ({"seq_len": 1}, "seq_len is 1; it must be at least 2"),
        ({"epochs": 0.0}, "epochs is 0.0; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan; it must be a finite number"),
        ({"eval_split": 0.9}, "eval_split is 0.9; it must be at least 0 and at most 0.5"),
        ({"recompute": "all"}, "recompute 'all' is not one of none, cheap, layers"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        TrainOptions(**options)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"execution": "kernels"}, "execution kernels computes no gradients"),
        ({"attention": "eager"}, "attention eager is not for training"),
        ({"cache_dtype": "int8"}, "cache_dtype int8 is of a cache, and training has none"),
    ],
    ids=str,
)
def test_options_of_generating_are_refused(
    folder: Path, data: Path, tmp_path: Path, load: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        finetune(folder, data, tmp_path / "out", options=TrainOptions(), load=LoadOptions(**load))


def test_memory_and_disk_are_asked_for_first(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mistral.util.memory.available", lambda device: 100_000)
        with pytest.raises(
            OutOfMemory, match=r"training \(.* of weights, .* of gradients, .* but cpu has 100.0 kB left"
        ):
            tune(folder, data, tmp_path / "out")
    full: Callable[[Path], Any] = lambda path: type("Usage", (), {"free": 5000})  # noqa: E731
    monkeypatch.setattr(needs.shutil, "disk_usage", full)
    with pytest.raises(Unavailable, match="of state, twice while it is replaced; .* its disk has 5.0 kB free"):
        tune(folder, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = iter([1.0, float("nan")])
    monkeypatch.setattr("mistral.train.loop.add_gradients", lambda *_: next(nats))
    monkeypatch.setattr("mistral.train.loop.clipped", lambda *_: 1.0)
    monkeypatch.setattr("mistral.train.loop.change", lambda *_: None)
    with pytest.raises(Diverged, match="the loss of step 2 is nan: the learning rate 0.01 may be too high"):
        tune(folder, data, tmp_path / "out")
    nats = iter([float("nan")])
    with pytest.raises(Diverged, match="the loss of step 1 is nan: its weights are finite, but too large even for fl"):
        tune(folder, data, tmp_path / "again")


def test_a_gradient_that_is_no_number_changes_nothing(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is a number, and what is saved stays so: also at the last step, behind which no loss is computed."""
    from mistral.train import loop

    add, steps = loop.add_gradients, []

    def broken(model: Any, batch: Any, total: float) -> float:
        nats = add(model, batch, total)
        steps.append(nats)
        if len(steps) == SMALL["steps"]:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return nats

    monkeypatch.setattr(loop, "add_gradients", broken)
    with pytest.raises(Diverged, match="the gradient's length of step 6 is inf: the learning rate 0.01 may be too"):
        tune(folder, data, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("more", [{}, {"full": True}], ids=str)
def test_broken_weights_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, number: float, more: dict[str, Any]
) -> None:
    state = random_state()
    state["layers.1.feed_forward.w2.weight"][2, 3] = number
    broken = make_folder(tmp_path / "broken", state)
    with pytest.raises(WeightsError, match=r"broken: 1 of the .* of layers.1.feed_forward.w2.weight are NaN or inf"):
        tune(broken, data, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_too_large_are_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    state = random_state()
    state["layers.1.feed_forward.w1.weight"] *= 1e30
    state["layers.1.feed_forward.w3.weight"] *= 1e30
    with pytest.raises(WeightsError, match="the loss before the first step is nan: .* too large even for float32"):
        tune(make_folder(tmp_path / "large", state), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_samples_cost_no_loading(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Setup, "model", lambda self: pytest.fail("a model was loaded"))
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(MistralError, match=r"x.jsonl:2: text must be a text"):
        tune(folder, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
