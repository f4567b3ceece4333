"""Lines answered by the library's own engine: what the server answers, and lines that fail alone."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral import complete, load
from tests.support.adapters import peft_tensors, write_peft
from tests.support.batches import answers, by_name, request, write_lines
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import ROOT, make_folder, random_state
from tests.support.serving import serving


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def apart_from_chance(body: dict[str, Any]) -> dict[str, Any]:
    """A body without what differs from run to run, its id, its time, and what a row happened to hold; and without the
    mark of the model, which files alone have."""
    kept = {name: value for name, value in body.items() if name not in ("id", "created", "system_fingerprint")}
    if "usage" in kept:
        kept["usage"] = {name: value for name, value in kept["usage"].items() if name != "prompt_tokens_details"}
    return kept


def test_answers_are_the_servers(tmp_path: Path, cli: Command) -> None:
    folder = make_folder(tmp_path / "model")
    rng = random.Random(1)
    chat = "/v1/chat/completions"
    lines = [
        request(f"a{i}", f"{i} kings", max_tokens=rng.randint(1, 9), seed=i, n=1 + i % 3, logprobs=i % 2)
        for i in range(12)
    ]
    lines += [request(f"b{i}", f"{i} wolves", chat, max_tokens=5, seed=i, logprobs=True) for i in range(6)]
    lines += [
        request("echo", "once", echo=True, max_tokens=0, logprobs=2),
        request("two", ["a", "b"], max_tokens=3, temperature=0),
        request("unknown", foo=1),
        request("elsewhere", model="gpt-4o"),
        request("empty", []),
        request("tools", "x", chat, tools=[{}]),
        request("long", "x " * 4_000),
    ]
    path, out = write_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    words = ("batch", path, out, "--model", folder, "--rows", 3, "--execution", "bitwise", "--max_positions", 500)
    done = cli(*words)
    assert done.code == 1
    assert done.out == ""
    assert re.search(r"out.jsonl: 25 of 25 lines, 5 of them errors, [\d.]+ tokens/s\nthe first of this run", done.err)
    found = by_name(out)
    with serving(folder, rows=3, most=500, execution="bitwise") as running:
        for line in lines:
            want = httpx.post(f"{running.url}{line['url']}", json=line["body"], timeout=60)
            got = found[line["custom_id"]]
            assert got["error"] is None
            assert got["response"]["status_code"] == want.status_code
            assert apart_from_chance(got["response"]["body"]) == apart_from_chance(want.json())
    before = out.read_bytes()
    again = cli(*words)  # nothing is left to do: no model is loaded
    assert (again.code, out.read_bytes()) == (1, before)
    assert "loaded" not in again.err
    retried = cli(*words, "--retry")
    assert "5 errors of" in retried.err
    assert len(by_name(out)) == 25


def test_another_model_does_not_go_on(tmp_path: Path, cli: Command) -> None:
    path, out = write_lines(tmp_path / "in", request("a"), request("b", max_tokens=1)), tmp_path / "out"
    folder = make_folder(tmp_path / "one")
    assert cli("batch", path, out, "--model", folder).code == 0
    write_lines(path, request("a"), request("b", max_tokens=1), request("c"))
    assert (
        "has answers of one, and this is two" in cli("batch", path, out, "--model", make_folder(tmp_path / "two")).err
    )
    assert cli("batch", path, out, "--model", tmp_path / "two", "--name", "one").code == 0
    assert set(by_name(out)) == {"a", "b", "c"}


def test_another_model_of_the_same_name_does_not_go_on(tmp_path: Path, cli: Command) -> None:
    """Folders have the same name, or are the same with other weights or another adapter."""
    path, out = write_lines(tmp_path / "in", request("a", max_tokens=1)), tmp_path / "out"
    one, two = make_folder(tmp_path / "1" / "m"), make_folder(tmp_path / "2" / "m", random_state(seed=1))
    plain = ("batch", path, out, "--model", one)
    lora, other = (write_peft(tmp_path / name, peft_tensors(seed=seed)) for seed, name in enumerate("xy"))
    assert cli(*plain).code == 0
    (mark,) = {one["response"]["body"]["system_fingerprint"] for one in answers(out)}
    assert mark.startswith("fp_mistral_")
    said = "has answers of another model, or with other adapters (m), than m as it is now: give another output"
    for left in (0, 1):
        write_lines(path, request("a", max_tokens=1), *[request("b", max_tokens=1)] * left)
        before = out.read_bytes()
        for more in (("--model", two), ("--model", one, "--adapter", lora)):
            for retry in ((), ("--retry",)):
                assert said in cli("batch", path, out, *more, *retry).error
        assert out.read_bytes() == before
    assert cli(*plain).code == 0
    assert set(by_name(out)) == {"a", "b"}
    one.rename(tmp_path / "moved")
    assert cli("batch", path, out, "--model", tmp_path / "moved").code == 0  # nothing is left, and it is the same one
    adapted = ("batch", path, tmp_path / "adapted", "--model", tmp_path / "moved", "--adapter")
    assert cli(*adapted, lora).code == 0
    assert cli(*adapted, lora).code == 0
    assert "or with other adapters" in cli(*adapted, other).error
    assert "or with other adapters" in cli(*adapted, lora, "--adapter", other).error


def test_each_line_has_the_adapter_that_its_model_names(tmp_path: Path, cli: Command) -> None:
    base = make_folder(tmp_path / "base", sliding_window=9)
    places = {name: write_peft(tmp_path / name, peft_tensors(seed=seed)) for seed, name in enumerate(("one", "two"))}
    prompt, asked = list(range(5, 28)), {"max_tokens": 6, "temperature": 0, "return_token_ids": True}
    want = {}
    for name, adapter in (("base", None), *places.items()):
        alone = load(base, device="cpu", adapter=adapter)
        want[name] = complete([prompt], alone.model, alone.tokenizer, max_tokens=6, temperature=0)[0].tokens
    assert len(set(map(tuple, want.values()))) == 3
    lines = [request(f"{name} {i}", prompt=prompt, model=name, **asked) for i in range(2) for name in want]
    path, out = write_lines(tmp_path / "in", *lines), tmp_path / "out"
    chosen = [word for name, place in places.items() for word in ("--adapter", f"{name}={place}")]
    assert cli("batch", path, out, "--model", base, *chosen).code == 0
    for line, answered in by_name(out).items():
        body, name = answered["response"]["body"], line.split()[0]
        assert (body["model"], body["choices"][0]["token_ids"]) == (name, want[name])


def test_flags_of_one_way_do_not_go_with_another(tmp_path: Path, cli: Command) -> None:
    path, out = write_lines(tmp_path / "in", request("a")), tmp_path / "out"
    for flags in (("--model", "x"), ("--dtype", "bfloat16"), ("--ray",), ("--name", "x")):
        assert "--engine asks a server" in cli("batch", path, out, "--engine", "http://localhost:1", *flags).error
    assert cli("batch", tmp_path / "nothing.jsonl", out).error == f"no file {tmp_path / 'nothing.jsonl'}"
    assert cli("batch", path).error == "missing: OUTPUT"
    assert "--rows cannot go with it" in cli("batch", path, out, "--engine", "http://localhost:1", "--rows", 3).error
    for flag in ("--concurrency", "--attempts", "--timeout"):
        assert (
            cli("batch", path, out, flag, 3).error
            == f"{flag} is about a server: add --engine and its address, or omit it"
        )
    assert cli("batch", path, out, "--workers", 3).error == "--workers is about a Ray cluster: add --ray, or omit it"
    assert cli("batch", "-", out).error == "no file -: INPUT is read twice, which stdin cannot be"
    assert "- is not stdout here" in cli("batch", path, "-").error
    assert "--rows is 0" in cli("batch", path, out, "--rows", 0).error
    assert not out.exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_ctrl_c_ends_it_and_the_same_command_goes_on(tmp_path: Path, cli: Command) -> None:
    lines = [request(f"r{i}", max_tokens=5 if i < 6 else 400, ignore_eos=True) for i in range(12)]
    path, out = write_lines(tmp_path / "in", *lines), tmp_path / "out"
    command = [sys.executable, "-m", "main", "batch", str(path), str(out), "--rows", "2", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and (not out.exists() or len(out.read_bytes().splitlines()) < 6):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"of 12 lines, [\d.]+ tokens/s; the same command goes on from there", said)
    assert "Traceback" not in said
    assert 6 <= len(answers(out)) < 12
    assert cli(*command[3:]).code == 0
    assert set(by_name(out)) == {line["custom_id"] for line in lines}
