"""Many at once: each client gets what it gets alone, whoever else comes, goes away or fails."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch

from mistral.cache import RollingBufferCache
from mistral.engine import Engine
from mistral.model import Transformer
from mistral.request import GenerationError
from mistral.sampling_params import SamplingParams
from mistral.serve.worker import Ended, Event, Job, Worker
from tests.support.commands import ENVIRONMENT
from tests.support.folders import BUNDLED, ROOT, make_folder
from tests.support.serving import Running, answers, as_sent, connected, free_port, serving, soon
from tests.support.tiny import tiny_args, tiny_model
from tools.many_clients import Asked, ask, ask_at_once, differences, make_requests


def idle(running: Running) -> bool:
    """Whether all rows become free, soon."""
    return soon(lambda: running.worker.busy == (0, 0))


def test_fifty_at_once_get_what_they_get_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    requests = make_requests(random.Random(1), 50, longest=25)
    with serving(folder, execution="bitwise", rows=5) as running:
        got = ask_at_once(running.url, requests)
        assert idle(running)
        assert running.worker.counts.cached_tokens > 0
        assert differences(requests, got, running.loaded) == []
    left = [ids for request, ids in zip(requests, got, strict=True) if request.leaves_after is not None]
    assert len(left) > 10
    assert all(left)


LONG = {"prompt": [1, 5, 6], "max_tokens": 100_000, "ignore_eos": True}


def test_a_client_that_vanishes_frees_its_row(tmp_path: Path) -> None:
    with serving(make_folder(tmp_path / "model"), rows=1) as running:
        with connected(running.url) as client:  # not streamed
            client.sendall(as_sent(running.url, LONG))
            assert soon(lambda: running.worker.busy == (1, 0))
        assert idle(running)
        assert ask(running.url, Asked({**LONG, "return_token_ids": True}, 2))
        assert idle(running)
        assert running.worker.counts.cancelled == 2


def test_a_full_queue_says_try_again(tmp_path: Path) -> None:
    with serving(make_folder(tmp_path / "model"), rows=1, max_queue=1) as running, ExitStack() as clients:
        for busy in ((1, 0), (1, 1)):
            clients.enter_context(connected(running.url)).sendall(as_sent(running.url, LONG))
            assert soon(lambda busy=busy: running.worker.busy == busy)
        with ThreadPoolExecutor(3) as pool:
            urls = [f"{running.url}/v1/completions"] * 3
            answers = list(pool.map(lambda url: httpx.post(url, json=LONG, timeout=60), urls))
        assert [answer.status_code for answer in answers] == [429] * 3
        assert answers[0].headers["retry-after"] == "1"
        assert "1 continuation waits already, of 1 that may: try again later" in answers[0].text
        assert answers[0].json()["error"]["type"] == "rate_limit_error"
        too_many = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "n": 3}, timeout=60)
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
        assert running.worker.busy == (1, 1)
        running.worker.max_queue = 0
        none = httpx.post(f"{running.url}/v1/completions", json=LONG, timeout=60)
        assert "no row is free, and none may wait: try again later" in none.text


# NaN: the engine, then the worker.


def poisoned(window: int | None = 5) -> Transformer:
    model = tiny_model(tiny_args(sliding_window=window))
    with torch.no_grad():
        model.tok_embeddings.weight[9] = math.nan
    return model


GREEDY = SamplingParams(max_tokens=4, temperature=0)


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("score", [False, True])
def test_logits_that_are_not_numbers_end_their_own_request_alone(window: int | None, score: bool) -> None:
    model = poisoned(window)
    (alone,) = [run(Engine(model, eos_ids=()), [[3, 4, 5, 6]])]
    engine = Engine(model, eos_ids=(), cache=RollingBufferCache(model.args, 2), score_prompts=score)
    bad = engine.add([5, 9, 6, 7, 8, 8, 8], GREEDY)
    assert run(engine, [[3, 4, 5, 6]]) == alone
    assert (bad.finish, bad.output_ids, bad.row) == ("error", [], None)
    assert isinstance(bad.error, GenerationError)
    assert "are NaN" in str(bad.error)
    # A row reads as many slots as the longest beside it: also those where the NaN were, though it sees none of them.
    long = [7, 8, 7, 6, 5, 4, 3, 8, 7, 6, 5]
    assert run(engine, [[3, 4], long]) == run(Engine(model, eos_ids=()), [[3, 4]]) + run(
        Engine(model, eos_ids=()), [long]
    )


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    requests = [engine.add(prompt, GREEDY) for prompt in prompts]
    while not engine.done:
        engine.step()
    return [request.output_ids for request in requests]


def test_scores_are_a_matter_of_the_request() -> None:
    model = tiny_model(tiny_args())
    engine = Engine(model, eos_ids=())
    plain = engine.add([3, 4, 5, 6], GREEDY)
    scored = engine.add([3, 4, 5, 6], SamplingParams(max_tokens=1, temperature=0, top_logprobs=3), score=True)
    while not engine.done:
        engine.step()
    assert plain.prompt_logprobs == []
    true = model(torch.tensor([3, 4, 5, 6]), [4]).double().log_softmax(-1)
    assert scored.prompt_logprobs == pytest.approx([true[i, t].item() for i, t in enumerate((4, 5, 6))], abs=1e-6)
    for i, top in enumerate(scored.prompt_top):
        assert list(top) == true[i].topk(3).indices.tolist()
        assert list(top.values()) == pytest.approx(true[i].topk(3).values.tolist(), abs=1e-6)


def work(worker: Worker, *prompts: list[int]) -> list[list[Event]]:
    """The events of each prompt."""
    found: list[list[Event]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def tell(i: int, event: Event) -> None:
        found[i].append(event)
        if event.last:
            ended[i].set()

    for i, prompt in enumerate(prompts):
        worker.submit([Job(prompt, GREEDY, frozenset(), lambda event, i=i: tell(i, event))])
    assert all(event.wait(120) for event in ended)
    return found


class Letters:
    bos_id, eos_id = 1, 2

    def encode(self, s: str) -> list[int]:
        return [ord(c) - 96 for c in s]

    def decode(self, t: list[int]) -> str:
        return "".join(chr(i + 96) for i in t)


def test_a_prompt_that_is_cancelled_half_way_leaves_nothing_in_its_row() -> None:
    """Nobody has seen whether its numbers are NaN. They would harm the row's next sequence, which reads as many slots
    as a longer one beside it."""
    worker = Worker(poisoned(None), Letters(), rows=2, max_queue=9, chunk_size=2)
    found: list[Event] = []
    prompts = [3, 4] * 10, [5, 9, 6, 7, 8, 8, 8, 8, 8, 8], [3, 4, 5, 6]
    beside, gone, after = (Job(ids, GREEDY, frozenset(), found.append if len(ids) == 4 else id) for ids in prompts)
    worker.submit([beside, gone])
    for _ in range(3):  # six of their tokens
        worker._next()
        worker._step()
    worker.cancel([gone])
    worker.submit([after])
    while not (found and found[-1].last):
        worker._next()
        worker._step()
        worker._hand_over()
    assert ids_of(found) == run(Engine(poisoned(None), eos_ids=()), [[3, 4, 5, 6]])[0]


def ids_of(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token is not None]


def test_a_failure_of_one_or_of_all_leaves_the_worker_working(monkeypatch: pytest.MonkeyPatch) -> None:
    model = poisoned()
    worker = Worker(model, Letters(), rows=2, max_queue=9)
    worker.start()
    (first,) = work(worker, [3, 4, 5, 6])
    good, bad = work(worker, [3, 4, 5, 6], [5, 9, 6])
    assert ids_of(good) == ids_of(first)
    assert isinstance(bad[-1].error, GenerationError)
    step = Engine.step

    def broken(engine: Engine) -> object:
        monkeypatch.setattr(Engine, "step", step)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Engine, "step", broken)
    ((event,),) = work(worker, [3, 4, 5, 6])
    assert str(event.error) == "out of luck"
    assert ids_of(work(worker, [3, 4, 5, 6])[0]) == ids_of(first)
    assert worker.dead is None
    worker.close()
    with pytest.raises(Ended, match="shutting down"):
        worker.submit([])


def test_sigterm_lets_what_runs_finish() -> None:
    port = free_port()
    command = [sys.executable, "-m", "main", "serve", str(BUNDLED), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    url, ids, told, asked_to_end = f"http://127.0.0.1:{port}", 0, "", False
    try:
        assert soon(lambda: server.poll() is not None or answers(url))
        body = {"prompt": "The king", "max_tokens": 150, "ignore_eos": True, "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                told = line or told
                if line.startswith("data: {"):
                    ids += len(json.loads(line[6:])["choices"][0]["token_ids"])
                if ids and not asked_to_end:
                    server.send_signal(signal.SIGTERM)
                    asked_to_end = True
        assert (ids, told) == (150, "data: [DONE]")
        assert server.wait(120) == 0
    finally:
        server.kill()
        _, said = server.communicate()
    assert "serving mistral-bundled" in said
    assert "Traceback" not in said
