"""Ranks that follow the first one's steps: what it computes is theirs, and servers and batches work on it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.parallel import lead
from mistral.util.errors import Fatal, UsageError
from tests.support.batches import by_name, request, write_lines
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import ROOT
from tests.support.serving import answers, free_port, soon
from tests.support.tiny import tiny_args, tiny_model

ROWS = 3
Told = list[tuple[Any, ...]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What a leader tells, in place of an exchange."""
    found: Told = []
    monkeypatch.setattr(lead, "_tell", lambda group, what: found.append(what))
    monkeypatch.setattr(lead.dist, "broadcast", lambda h, src: None)
    return found


def leading(**changes: Any) -> tuple[Any, lead.Follower, lead.Leader]:
    """A model that leads, and a follower with the same weights."""
    mine, theirs = (tiny_model(tiny_args(sliding_window=[None, 5], **changes)) for _ in range(2))
    leader = lead.Leader(None)
    leader.load(lambda: SimpleNamespace(model=mine))  # type: ignore[arg-type,return-value]
    return mine, lead.Follower(theirs), leader


@pytest.mark.parametrize("seed", range(6))
def test_a_follower_computes_what_the_first_rank_does(told: Told, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go on, are rewound, forgotten and wiped between steps, as a server gives them away; int8 too."""
    rng = random.Random(seed)
    model, follower, _ = leading()
    for each in (model, follower._model):
        each.kept_in = {torch.float32: torch.int8} if seed % 2 else {}
    cache = model.make_cache(ROWS)
    theirs: list[Tensor] = []
    step = follower._model.step
    monkeypatch.setattr(follower._model, "step", lambda *given: theirs.append(step(*given)) or theirs[-1])
    for _ in range(40):
        for row in range(ROWS):
            now = cache.lengths[row]
            change: Callable[[], object] = rng.choice(
                [
                    lambda: None,
                    lambda: None,
                    lambda row=row, now=now: cache.rewind(row, rng.randint(0, now)),
                    lambda row=row, now=now: cache.rewind(row, max(0, now - 2)),
                    lambda row=row: cache.reset(row),
                    lambda row=row: cache.wipe(row),
                ]
            )
            change()
        lens = [rng.choice((0, 1, 1, 2, 7)) for _ in range(ROWS)]
        lens[rng.randrange(ROWS)] += 1
        plan = cache.plan(lens)
        with torch.inference_mode():
            h = model.step(torch.tensor([rng.randrange(61) for _ in range(sum(lens))]), plan, cache)
        cache.commit(plan)
        what, *rest = told.pop()
        assert what == "step"
        follower.step(*rest)
        assert torch.equal(h, theirs[-1])
        assert follower._cache is not None
        assert follower._cache.lengths == cache.lengths


def test_what_is_broken_in_a_row_is_gone_with_it(told: Told) -> None:
    """A NaN in storage harms the next sequence even where no query sees it, so rows that had one are wiped."""
    model, follower, _ = leading()
    with torch.no_grad():
        for each in (model, follower._model):
            each.tok_embeddings.weight[7] = float("nan")
    follower.step([1, 7, 2], (2, 1), (0, 0))
    assert follower._broken == {0}
    follower.step([3, 4], (1, 1), (0, 1))  # the first rank has wiped the row, and begins again
    assert follower._broken == set()
    assert follower._cache is not None
    assert all(layer.k.isfinite().all() and layer.v.isfinite().all() for layer in follower._cache.layers)


def test_after_a_step_that_failed_there_is_no_other(told: Told) -> None:
    model, _, leader = leading()
    cache = RollingBufferCache(model.args, 1)
    with pytest.raises(Fatal, match="no longer in step"):
        model.step(torch.tensor([1000]), cache.plan([1]), cache)  # no such id
    with pytest.raises(Fatal, match="no longer in step"):
        model.step(torch.tensor([1]), cache.plan([1]), cache)
    assert [what for what, *_ in told] == ["load", "step"]
    leader.end()
    assert [what for what, *_ in told] == ["load", "step"]  # nobody listens


def test_after_ctrl_c_within_a_step_there_is_no_other(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows how far each rank is: the next step must not wait for those that wait for this one."""
    model, _, _ = leading()
    monkeypatch.setattr(lead.dist, "broadcast", lambda h, src: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        model.logits(torch.zeros(1, model.args.dim))
    monkeypatch.setattr(lead.dist, "broadcast", lambda h, src: None)
    with pytest.raises(Fatal, match="no longer in step"):
        model.logits(torch.zeros(1, model.args.dim))


def test_what_cannot_be_loaded_is_said_as_it_is(told: Told) -> None:
    def load() -> Any:
        raise UsageError("no such folder")

    leader = lead.Leader(None)
    with pytest.raises(UsageError, match="no such folder"):
        leader.load(load)
    leader.end()
    assert told == [("load",)]  # the others have failed with it


def test_the_end_is_told_once(told: Told) -> None:
    model, _, leader = leading()
    leader.end()
    assert told[-1] == ("end",)
    with pytest.raises(Fatal, match="is over"):
        model.logits(torch.zeros(1, model.args.dim))


# --- with processes


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def without_chance(line: dict[str, Any]) -> Any:
    body = line["response"]["body"]
    kept = {name: body[name] for name in ("choices", "error") if name in body}
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 3))


def test_a_batch_over_two_ranks(tmp_path: Path, command: Command) -> None:
    """More lines than rows, beginnings in common, samples, scores, and lines that are refused."""
    lines = [request(f"a{i}", f"Once there was {i % 3}", max_tokens=2 + i, seed=i, logprobs=1) for i in range(6)]
    lines += [request("n", "The king", n=3, max_tokens=5, seed=1), request("no", "x", max_tokens=10**6)]
    lines += [request("echo", "The king had a daughter", echo=True, max_tokens=0, logprobs=2)]
    path = write_lines(tmp_path / "in.jsonl", *lines)
    found = []
    for name, more in (("two", ("--parallel", 2)), ("one", ())):
        words = ("batch", path, tmp_path / name, "--rows", 2, "--device", "cpu", "--max_positions", 500, *more)
        done = command(*words)
        assert done.code == 1, done  # one line is refused
        assert ("note: 2 ranks (gloo) divide the model" in done.err) == (name == "two")
        found.append({name: without_chance(line) for name, line in by_name(tmp_path / name).items()})
    assert found[0] == found[1]
    again = command("batch", path, tmp_path / "two", "--device", "cpu", "--parallel", 2)
    assert (again.code, "loaded" in again.err) == (1, False)  # nothing is left, so nothing is loaded
    assert command("batch", path, tmp_path / "x", "--ray", "--parallel", 2).error.startswith("--ray gives each worker")


@pytest.mark.long
def test_a_conversation_over_two_ranks(command: Command) -> None:
    """Turns that are answered again, taken back and continued: the others' keys follow."""
    typed = "Tell me of the king.\n/retry\nAnd then?\n/undo\nAnd who?\n/continue\n"
    words = ("interactive", "--instruct", "--max_tokens", 40, "--seed", 3, "--device", "cpu")
    two, one = (command(*words, *more, stdin=typed) for more in (("--parallel", 2), ()))
    assert two.text == one.text
    assert "note: 2 ranks (gloo) divide the model" in two.err


def children_of(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_rank(process: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["asked to", "a rank is killed"])
def test_a_server_over_two_ranks(end: str, tmp_path: Path) -> None:
    port = free_port()
    words = [sys.executable, "-m", "main", "serve", "--parallel", "2", "--device", "cpu", "--rows", "2"]
    words += ["--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        assert soon(lambda: process.poll() is not None or answers(url))
        assert process.poll() is None, (tmp_path / "log").read_text()
        asked = {"prompt": "The king had three daughters", "max_tokens": 40, "temperature": 0, "logprobs": 1}

        def ask(body: dict[str, Any]) -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        alone = ask(asked).json()["choices"][0]["text"]
        with ThreadPoolExecutor(5) as pool:
            texts = [answer.json()["choices"][0]["text"] for answer in pool.map(ask, [asked] * 5)]
        assert set(texts) == {alone}
        more = {**asked, "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=more, timeout=60) as gone:
            next(gone.iter_lines())
        assert ask(asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        ranks = [child for child in children_of(process.pid) if is_rank(child)]
        assert len(ranks) == 1
        if end == "a rank is killed":
            os.kill(ranks[0], signal.SIGKILL)
            assert ask(asked).status_code == 503
            assert httpx.get(f"{url}/health", timeout=60).status_code == 503
            assert ask(asked).status_code == 503
        else:
            os.kill(ranks[0], signal.SIGTERM)  # as a whole group of processes gets it
            assert ask(asked).json()["choices"][0]["text"] == alone
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not Path(f"/proc/{ranks[0]}").exists()
    finally:
        process.kill()
