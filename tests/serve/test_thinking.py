"""A reasoning model behind the server: thoughts in fields of their own, streamed or not, and taken back in requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")
from mistral.serve import answers  # noqa: E402
from tests.chat.test_tools import DEFINITIONS  # noqa: E402
from tests.support.serving import Running, serving  # noqa: E402
from tests.support.thinker import ANSWER, SYSTEM_PROMPT, THOUGHT, make_thinker  # noqa: E402

THINKING = {"type": "thinking", "thinking": "b"}
ASKED = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(make_thinker(tmp_path_factory.mktemp("served") / "m"), most=2000) as found:
        yield found


def post(running: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> dict[str, Any]:
    return httpx.post(running.url + path, json=body, timeout=60).json()  # type: ignore[no-any-return]


def test_the_thought_is_beside_the_answer(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)
    asked: dict[str, Any] = {"model": running.served.name, "messages": ASKED, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message.to_dict()
    assert (message["content"], message["reasoning_content"]) == (ANSWER, THOUGHT)
    thought, content = "", ""
    for part in client.chat.completions.create(**asked, stream=True):
        delta = part.choices[0].delta.to_dict()
        assert not (delta.get("content") and delta.get("reasoning_content"))
        thought += delta.get("reasoning_content") or ""
        content += delta.get("content") or ""
    assert (content, thought) == (ANSWER, THOUGHT)
    details = whole.usage.completion_tokens_details
    n = len(running.loaded.tokenizer.encode(THOUGHT, bos=False))
    assert details.reasoning_tokens == n + 1  # with the token that ends it


def test_a_thought_that_is_cut_off(running: Running) -> None:
    body = post(running, {"messages": ASKED, "max_tokens": 2, "temperature": 0})
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert THOUGHT.startswith(choice["message"]["reasoning_content"])


@pytest.mark.parametrize(
    "said",
    [
        {"content": ANSWER, "reasoning_content": THOUGHT},
        {"content": ANSWER, "reasoning": THOUGHT},
        {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": ANSWER}]},
    ],
    ids=["reasoning_content", "reasoning", "parts"],
)
def test_a_thought_comes_back_as_mistral_common_writes_it(running: Running, said: dict[str, Any]) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    messages = [*ASKED, {"role": "assistant", **said}, {"role": "user", "content": "And?"}]
    found = post(running, {"messages": messages}, "/tokenize")["tokens"]
    request = ChatCompletionRequest.from_openai(messages=messages)
    assert (
        found
        == MistralTokenizer.from_file(running.loaded.folder / "tekken.json").encode_chat_completion(request).tokens
    )
    control = running.loaded.tokenizer.control_tokens
    assert control["[THINK]"] in found


def test_system_prompts_in_parts(running: Running) -> None:
    before, _, rest = SYSTEM_PROMPT.partition("[THINK]")
    thought, _, after = rest.partition("[/THINK]")
    parts = [
        {"type": "text", "text": before},
        {"type": "thinking", "thinking": thought},
        {"type": "text", "text": after},
    ]
    control = running.loaded.tokenizer.control_tokens
    whole = post(running, {"messages": [{"role": "system", "content": parts}, *ASKED]}, "/tokenize")["tokens"]
    assert whole.count(control["[THINK]"]) == 1
    typed = post(running, {"messages": [{"role": "system", "content": SYSTEM_PROMPT}, *ASKED]}, "/tokenize")["tokens"]
    assert control["[THINK]"] not in typed


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user", "content": "a", "reasoning": "b"}, "has 'reasoning', which is not supported"),
        ({"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}, "differ"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "b"}], "reasoning": "b"},
            "give one of them",
        ),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "b"}]}, "only text is supported"),
        ({"role": "assistant", "content": "a", "reasoning": 3}, "it must be text"),
    ],
)
def test_thoughts_that_are_refused(running: Running, message: dict[str, Any], why: str) -> None:
    body = post(running, {"messages": [*ASKED, message, *ASKED]})
    assert why in body["error"]["message"]


def test_effort_is_refused_where_it_has_no_place(running: Running) -> None:
    body = post(running, {"messages": ASKED, "reasoning_effort": "high"})
    assert body["error"]["param"] == "reasoning_effort"
    assert "reasoning_effort is 'high'; template v13-tekken has no place for one" in body["error"]["message"]


@pytest.mark.parametrize("closed", [True, False])
def test_calls_behind_a_thought(running: Running, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """A call ends a thought, whether the model closed it or not; one that a thought spells is none."""
    import torch

    tokenizer = running.loaded.tokenizer
    control = tokenizer.control_tokens
    spelled = "[TOOL_CALLS]time_in[ARGS]{}"
    parts = ["[THINK]", spelled, *(["[/THINK]"] if closed else []), "[TOOL_CALLS]", "time_in", "[ARGS]", "{}", "</s>"]
    ids = [i for p in parts for i in ([control[p]] if p in control else tokenizer.encode(p, bos=False))]

    def force(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(ids[len(output)]), len(logits)) * 1e4

    plain = answers._params
    monkeypatch.setattr(answers, "_params", lambda asked: answers.replace(plain(asked), logits_processor=force))
    body = post(running, {"messages": ASKED, "tools": DEFINITIONS, "max_tokens": 200})
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls", json.dumps(body)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["time_in"]
    assert choice["message"]["reasoning_content"] == spelled
    assert choice["message"]["content"] is None
