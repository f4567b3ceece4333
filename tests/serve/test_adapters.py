"""Adapters as models of their own: each answers by its id, and no keys are reused across them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral import complete, load
from mistral.serve.settings import served_of
from mistral.util.errors import UsageError
from tests.support.adapters import peft_tensors, write_native, write_peft
from tests.support.folders import make_folder
from tests.support.serving import serving

PROMPT = list(range(5, 28))  # longer than the window


@pytest.mark.parametrize("rows", [1, 4])
def test_each_model_id_has_its_adapter(tmp_path: Path, rows: int) -> None:
    base = make_folder(tmp_path / "base", sliding_window=9)
    one, two = write_peft(tmp_path / "one", peft_tensors(seed=3)), write_native(tmp_path / "two")
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    want = {}
    for name, adapter in (("base", None), ("one", one), ("two", two)):
        alone = load(base, device="cpu", adapter=adapter)
        want[name] = complete([PROMPT], alone.model, alone.tokenizer, max_tokens=6, temperature=0)[0].tokens
    assert len(set(map(tuple, want.values()))) == 3
    with serving(base, rows=rows, adapter=[one, two]) as running:

        def ask(name: str | None) -> tuple[str, list[int]]:
            body = given if name is None else {**given, "model": name}
            found = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
            return found["model"], found["choices"][0]["token_ids"]

        listed = httpx.get(f"{running.url}/v1/models", timeout=60).json()["data"]
        assert [(m["id"], m["parent"]) for m in listed] == [("base", None), ("one", "base"), ("two", "base")]
        assert httpx.get(f"{running.url}/v1/models/two", timeout=60).json()["parent"] == "base"
        missing = httpx.get(f"{running.url}/v1/models/three", timeout=60)
        assert missing.status_code == 404
        assert "base, one, two are" in missing.json()["error"]["message"]
        for name in ("base", "one", "two", "one", "one", "base"):
            assert ask(name) == (name, want[name])
        assert ask(None) == ("base", want["base"])
        names = ["one", "two", "base"] * 4
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, names)) == [(name, want[name]) for name in names]
        refused = httpx.post(f"{running.url}/v1/completions", json={**given, "model": "x"}, timeout=60)
        assert refused.status_code == 404


def test_a_prefix_of_another_adapters_is_computed_again(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", sliding_window=None)
    adapter = write_native(tmp_path / "mine")
    given: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    with serving(base, rows=1, adapter=adapter, adapter_mode="runtime") as running:

        def cached(**more: Any) -> int:
            found = httpx.post(f"{running.url}/v1/completions", json={**given, **more}, timeout=60).json()
            assert found["model"] == more.get("model", "mine")  # without an id it is the only adapter
            count: int = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            return count

        assert cached() == 0
        assert cached() == len(PROMPT) - 1
        assert cached(model="base") == 0
        assert cached(model="base") == len(PROMPT) - 1
        assert cached(model="mine") == 0


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    loaded = load(base, device="cpu", adapter=f"base={write_native(tmp_path / 'x')}", adapter_mode="runtime")
    with pytest.raises(UsageError, match="the model and an adapter are both called base: give --name"):
        served_of(loaded, rows=1, most=None, name=None, template=None)
    with pytest.raises(UsageError, match="--name is empty"):
        served_of(loaded, rows=1, most=None, name="", template=None)
