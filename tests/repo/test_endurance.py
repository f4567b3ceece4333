"""Long runs, made short: memory that stays, a rolled cache that does not drift, an undo far back, ids in a file."""

from __future__ import annotations

import gc
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import endurance
from benchmarks.resumable import State
from mistral.engine import Engine
from mistral.loader.load import Loaded, load
from mistral.sampling_params import SamplingParams
from mistral.util.errors import FormatError
from tests.support.folders import BUNDLED
from tests.support.tiny import tiny_args, tiny_model


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(BUNDLED, device="cpu")


def test_a_rolled_cache_does_not_drift(loaded: Loaded) -> None:
    """After several times layers x W tokens, decoded one by one, it is as exact as a fresh prefill."""
    exact = load(BUNDLED, device="cpu", dtype="float64", execution="eager").model
    found = endurance.stream(loaded, exact, 900, places=2, block=400, minutes=5)
    assert found["tokens"] == 900
    assert [point["tokens"] for point in found["points"]] == [400, 800]
    assert [place["position"] for place in found["drift"]] == [449, 899]
    for place in found["drift"]:
        assert 0 < place["rolled"] <= endurance.TIMES * place["fresh"] < 1e-4
    lines = list(endurance.summary("stream", found))
    assert lines[0] == "stream: 900 tokens"
    assert "drift: 2 places" in lines[-1]


def test_what_a_drift_would_look_like(loaded: Loaded) -> None:
    """The comparison notices a cache of which one key is off by a little."""
    model = loaded.model
    exact = load(BUNDLED, device="cpu", dtype="float64", execution="eager").model
    from mistral.cache import RollingBufferCache

    ids = torch.randint(3, 4096, (500,), generator=torch.Generator().manual_seed(0))
    cache = RollingBufferCache(model.args, 2)
    with torch.inference_mode():
        model.forward_partial(ids, [500], cache)
    right = endurance.compare(model, exact, cache, ids.tolist(), 7)
    cache.layers[-1].k[0, 499 % cache.layers[-1].capacity] += 0.01
    wrong = endurance.compare(model, exact, cache, ids.tolist(), 7)
    assert wrong["fresh"] == right["fresh"]
    assert wrong["rolled"] > 10 * endurance.TIMES * right["fresh"]


def test_memory_of_a_stream_grows_by_its_ids_alone() -> None:
    engine = Engine(tiny_model(tiny_args()), eos_ids=())
    request = engine.add([3], SamplingParams(max_tokens=900, temperature=0))
    blocks = []
    while not engine.done:
        engine.step()
        if len(request.output_ids) % 200 == 0:
            gc.collect()  # what is no longer held may still be there
            blocks.append(sys.getallocatedblocks())
    assert max(request.output_ids) < 257  # these ints are Python's own: no block each
    # One object kept in every step would be 200 each time; caches grow by some 100, but not each time.
    assert min(after - before for before, after in itertools.pairwise(blocks)) < 200 / 2


def test_a_conversation_with_undo(loaded: Loaded) -> None:
    found = endurance.talk(loaded, 800, undo_every=3, answer=20, question=100, block=200, minutes=5)
    assert found["tokens"] >= 800
    assert found["processed"] > found["tokens"]
    assert found["undone"]
    for undone in found["undone"]:  # the buffer has rolled: the whole conversation is prefilled again
        assert undone["prefilled"] > undone["length"] - 100
    assert any("undo: " in line for line in endurance.summary("chat", found))


def test_a_prompt_in_a_file(loaded: Loaded, tmp_path: Path) -> None:
    found = endurance.prompt(loaded.model, 3000, block=1000, minutes=5)
    assert found["tokens"] == 3000
    assert found["perplexity"] > 100  # of random ids
    pytest.importorskip("matplotlib")
    endurance.plot("prompt", {**found, "processor": "x"}, str(tmp_path / "p.svg"))
    assert "<svg" in (tmp_path / "p.svg").read_text()


class Killed(State):
    """Keeps a state, and the run ends right behind it."""

    def save(self, held: dict[str, Any]) -> None:
        super().save(held)
        raise KeyboardInterrupt


@pytest.mark.parametrize("window", [5, None])
def test_a_stream_goes_on_in_another_process(tmp_path: Path, window: int | None) -> None:
    """Token by token and key by key what a run that was never stopped generates."""
    tiny = SimpleNamespace(model=tiny_model(tiny_args(sliding_window=window)))
    exact = tiny_model(tiny_args(sliding_window=window)).double()

    def run(state: State) -> dict[str, Any]:
        return endurance.stream(tiny, exact, 90, places=2, block=20, minutes=5, state=state)  # type: ignore[arg-type]

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    whole = run(State(one))
    for tokens in (20, 40):
        assert run(Killed(two))["tokens"] == tokens
    found = run(State(two))
    assert found["tokens"] == whole["tokens"] == 90
    assert [p["tokens"] for p in found["points"]] == [p["tokens"] for p in whole["points"]] == [20, 40, 60, 80]
    assert [p["sitting"] for p in found["points"]] == [1, 2, 3, 3]
    assert found["drift"] == whole["drift"]
    assert len(whole["drift"]) == 2
    a, b = State(one).held, State(two).held
    assert torch.equal(a["ids"], b["ids"])
    for x, y in zip(a["row"]["layers"], b["row"]["layers"], strict=True):
        assert all(map(torch.equal, x, y))
    assert "in 3 processes" in next(endurance.summary("stream", found))


def test_a_prompt_goes_on_in_another_process(tmp_path: Path) -> None:
    model = tiny_model(tiny_args())
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    endurance.prompt(model, 9000, 2000, 5, State(one))
    assert endurance.prompt(model, 9000, 2000, 5, Killed(two))["perplexity"] is None
    assert endurance.prompt(model, 9000, 2000, 5, State(two))["tokens"] == 9000
    a, b = State(one).held["row"], State(two).held["row"]
    assert a["length"] == b["length"] == 8192
    for x, y in zip(a["layers"], b["layers"], strict=True):
        assert all(map(torch.equal, x, y))


def test_a_conversation_goes_on_in_another_process(loaded: Loaded, tmp_path: Path) -> None:
    def run(state: State) -> dict[str, Any]:
        return endurance.talk(loaded, 400, undo_every=3, answer=10, question=100, block=100, minutes=5, state=state)

    whole = run(State())
    file = str(tmp_path / "state")
    assert run(Killed(file))["tokens"] < 200
    found = run(State(file))
    assert found["tokens"] == whole["tokens"]
    assert found["turns"] == whole["turns"]
    assert found["processed"] > whole["processed"]  # what there was is prefilled again
    assert [u["length"] for u in found["undone"]] == [u["length"] for u in whole["undone"]]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    State(str(file), {"what": "stream", "tokens": 5}).save({})
    with pytest.raises(FormatError, match="a run with tokens 5, and this one has 6"):
        State(str(file), {"what": "stream", "tokens": 6})
    file.write_text("no state")
    with pytest.raises(FormatError, match="holds no state"):
        State(str(file))
