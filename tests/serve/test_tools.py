"""Functions and formats over the protocol, by OpenAI's own client; what the model generates is scripted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from mistral.chat.tools import ID
from mistral.serve import answers
from mistral.tokenizer import Tokenizer
from tests.chat.test_templates import DATA, NAMED
from tests.chat.test_tools import DEFINITIONS, HERMES
from tests.support.folders import make_folder
from tests.support.serving import Running, serving
from tests.support.tokenizer_json import small_tekken, write_tokenizer

ASKED = [{"role": "user", "content": "Weather in Paris?"}]


def tekken_folder(folder: Path) -> Path:
    """A tiny model with a tokenizer of v13."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder.mkdir()
    raw = json.loads(small_tekken(folder / "tekken.json", 3000).read_text())
    early = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    fill = [NAMED.get(i, f"<SPECIAL_{i}>") for i in range(len(early), 1000)]
    named = [{"rank": len(early) + i, "token_str": word, "is_control": True} for i, word in enumerate(fill)]
    raw["special_tokens"], raw["config"]["version"] = [*early, *named], "v13"
    (folder / "tekken.json").write_text(json.dumps(raw))
    return make_folder(folder, tokenizer=False, vocab_size=4000)


def v3_folder(folder: Path) -> Path:
    make_folder(folder, tokenizer=False, vocab_size=32768)
    shutil.copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model.v3")
    return folder


def hermes_folder(folder: Path) -> Path:
    added = ("<|im_start|>", "<|im_end|>")
    write_tokenizer(folder, "byte level", folder.parent, HERMES, added, bos_token="<|endoftext|>")
    return make_folder(folder, tokenizer=False, vocab_size=1000)


KINDS = {"v3": v3_folder, "v13": tekken_folder, "hermes": hermes_folder}


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = KINDS[request.param](tmp_path_factory.mktemp("served") / "model")
    with serving(folder, most=3000) as found:
        yield found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of one of them, for what does not depend on the kind."""
    with serving(v3_folder(tmp_path_factory.mktemp("one") / "model"), most=3000) as found:
        yield found


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Ids of texts and of control tokens."""
    control = tokenizer.control_tokens
    return [i for part in parts for i in ([control[part]] if part in control else tokenizer.encode(part, bos=False))]


def written(running: Running, *calls: tuple[str, str]) -> list[str]:
    """Calls as the model of this folder writes them."""
    form = running.served.chats().tool_form
    objects = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    if form == "list":
        return ["[TOOL_CALLS]", f"[{', '.join(objects)}]"]
    if form == "args":
        return [part for name, arguments in calls for part in ("[TOOL_CALLS]", name, "[ARGS]", arguments)]
    return ["\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)]


@pytest.fixture
def says(running: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the model generate these texts and control tokens, whatever it is asked."""

    def script(*parts: str) -> None:
        tokenizer = running.loaded.tokenizer
        ids = [*ids_of(tokenizer, *parts), tokenizer.eos_id]

        def force(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor(ids[len(output)]), len(logits)) * 1e4

        plain = answers._params
        monkeypatch.setattr(answers, "_params", lambda asked: answers.replace(plain(asked), logits_processor=force))

    return script


def ask(client: openai.OpenAI, running: Running, stream: bool, **more: Any) -> tuple[dict[str, Any], str, list[Any]]:
    """The message of an answer, why it ended, and its deltas."""
    asked = {"model": running.served.name, "messages": ASKED, "tools": DEFINITIONS, "max_tokens": 400, **more}
    if not stream:
        (choice,) = client.chat.completions.create(**asked).choices
        return choice.message.to_dict(), choice.finish_reason, []
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    finish, deltas = "", []
    for part in client.chat.completions.create(**asked, stream=True):
        delta = part.choices[0].delta.to_dict()
        deltas.append(delta)
        message["content"] = (
            (message["content"] or "") + delta["content"] if delta.get("content") else message["content"]
        )
        for call in delta.get("tool_calls", []):
            assert call.pop("index") == len(message["tool_calls"])
            message["tool_calls"].append(call)
        if "tool_call_error" in delta:
            message["tool_call_error"] = delta["tool_call_error"]
        finish = part.choices[0].finish_reason or finish
    return {k: v for k, v in message.items() if v or k == "content"}, finish, deltas


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results(client: openai.OpenAI, running: Running, says: Any, stream: bool) -> None:
    calls = [("weather", '{"city": "Paris", "days": 2}'), ("time_in", "{}")]
    says(*written(running, *calls))
    message, finish, _ = ask(client, running, stream)
    assert finish == "tool_calls"
    assert message.get("content") is None
    functions = [call["function"] for call in message["tool_calls"]]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == [(n, json.loads(a)) for n, a in calls]
    assert all(call["type"] == "function" and ID.fullmatch(call["id"]) for call in message["tool_calls"])
    # What came back goes in again, with results, as clients send it.
    says("Sunny, ", "12 o'clock.")
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "12"} for call in message["tool_calls"]]
    again = [*ASKED, {"role": "assistant", **message}, *results]
    message, finish, deltas = ask(client, running, stream, messages=again)
    assert (message["content"].split(), finish) == (["Sunny,", "12", "o'clock."], "stop")
    assert "tool_calls" not in message
    assert not stream or len(deltas) > 4  # text is not held back


def test_an_answer_that_is_cut_behind_a_call_says_so(client: openai.OpenAI, running: Running, says: Any) -> None:
    parts = written(running, ("time_in", "{}"))
    says(*parts)
    message, finish, _ = ask(client, running, False, max_tokens=len(ids_of(running.loaded.tokenizer, *parts)))
    assert (len(message["tool_calls"]), finish) == (1, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_text_with_a_note(
    client: openai.OpenAI, running: Running, says: Any, stream: bool
) -> None:
    says(*written(running, ("weather", '{"city": 1}')))
    message, finish, _ = ask(client, running, stream)
    assert finish == "stop"
    assert "'string'" in message["tool_call_error"]
    assert '{"city": 1}' in message["content"]
    says(*written(running, ("time_in", "{}"))[:-1], '[{"nam')
    message, finish, _ = ask(client, running, stream)
    assert ("tool_calls" in message, finish) == (False, "stop")
    assert '[{"nam' in message["content"]
    says(*written(running, ("time_in", "{}"), ("time_in", "{}")))
    message, finish, _ = ask(client, running, stream, parallel_tool_calls=False)
    assert (len(message["tool_calls"]), finish) == (1, "tool_calls")
    assert "parallel_tool_calls" in message["tool_call_error"]


def test_without_tools_nothing_is_a_call(client: openai.OpenAI, running: Running, says: Any) -> None:
    says(*written(running, ("time_in", "{}")))
    for more in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        message, finish, _ = ask(client, running, False, **more)
        assert ("tool_calls" in message, finish) == (False, "stop")


def count(running: Running, **more: Any) -> int:
    answer = httpx.post(f"{running.url}/tokenize", json={"messages": ASKED, **more}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["count"]


def test_tools_are_in_the_prompt(running: Running) -> None:
    assert count(running, tools=DEFINITIONS) > count(running) + 50


# --- by grammar

needs_grammar = pytest.mark.skipif(find_spec("llguidance") is None, reason="llguidance is not installed")


@needs_grammar
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_comes(client: openai.OpenAI, running: Running, choice: Any) -> None:
    short = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {**short, "additionalProperties": False}}}
        for name in ("weather", "time_in")
    ]
    for seed in range(2):
        more = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
        message, finish, _ = ask(client, running, False, **more)
        assert finish == "tool_calls", message
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        assert choice == "required" or call["function"]["name"] == "weather"


@needs_grammar
@pytest.mark.parametrize("stream", [False, True])
def test_answers_fit_a_schema(client: openai.OpenAI, running: Running, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["é", "☃"]}, "b": {"type": "boolean"}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(2):
        more = {"tools": openai.NOT_GIVEN, "response_format": wanted, "seed": seed, "temperature": 2}
        message, finish, _ = ask(client, running, stream, **more)
        assert finish == "stop"
        assert json.loads(message["content"]).keys() == {"a", "b"}


@needs_grammar
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("structured", [False, True])
def test_a_format_is_of_the_text_and_leaves_calls(
    client: openai.OpenAI, running: Running, stream: bool, structured: bool
) -> None:
    """As OpenAI has it: either a call of one of the functions, or text that fits; a bias decides which begins."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    city: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    city["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "weather", "parameters": city, "strict": True}}]
    wanted: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    if structured:
        wanted = {"extra_body": {"structured_outputs": {"regex": ' ?\\{"a": [12]\\}'}}}
    tokenizer = running.loaded.tokenizer
    begins = {"call": ids_of(tokenizer, written(running, ("weather", "{}"))[0])[0], "text": ids_of(tokenizer, "{")[-1]}
    for kind, token in begins.items():
        more = {
            "tools": tools,
            "parallel_tool_calls": False,
            "logit_bias": {str(token): 100},
            "temperature": 1,
            **wanted,
        }
        message, finish, _ = ask(client, running, stream, **more)
        if kind == "text":
            assert (finish, json.loads(message["content"])["a"] in (1, 2)) == ("stop", True), message
            assert "tool_calls" not in message
        else:
            (call,) = message["tool_calls"]
            assert (finish, json.loads(call["function"]["arguments"])["city"]) == ("tool_calls", "Rome")
    message, finish, _ = ask(client, running, stream, tool_choice="required", **{**more, "logit_bias": {}})
    assert finish == "tool_calls", message  # there is no text then


@needs_grammar
def test_completions_fit_a_format(client: openai.OpenAI, running: Running) -> None:
    base = {"model": running.served.name, "prompt": "A", "max_tokens": 50, "temperature": 1, "n": 4, "seed": 5}
    for structured, fits in (
        ({"choice": ["yes", "no – never"]}, lambda text: text in ("yes", "no – never")),
        ({"regex": "[a-c]{3}[0-9]"}, lambda text: len(text) == 4 and text[:3].isalpha() and text[3].isdigit()),
        ({"json": {"type": "boolean"}}, lambda text: text.strip() in ("true", "false")),
    ):
        got = client.completions.create(**base, extra_body={"structured_outputs": structured})
        assert all(fits(choice.text) for choice in got.choices), [choice.text for choice in got.choices]
        assert {choice.finish_reason for choice in got.choices} == {"stop"}
    cut = client.completions.create(
        **{**base, "max_tokens": 1}, extra_body={"response_format": {"type": "json_object"}}
    )
    assert {choice.finish_reason for choice in cut.choices} == {"length"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"tools": [DEFINITIONS[0]] * 2}, "tools"),
        ({"tools": [DEFINITIONS[0]] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": DEFINITIONS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": DEFINITIONS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "xml"}, "tools": DEFINITIONS, "tool_choice": "required"}, "response_format"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_is_refused(one: Running, body: dict[str, Any], param: str | None) -> None:
    answer = httpx.post(f"{one.url}/v1/chat/completions", json={"messages": ASKED, **body}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error


@needs_grammar
@pytest.mark.parametrize(
    "structured",
    [
        {"regex": "("},
        {"json": {"type": "foo"}},
        {"json": {"$ref": "http://127.0.0.1:9/x"}},
        {"json": {"type": "object", "properties": {str(i): {"$ref": "#"} for i in range(50)}, "minProperties": "x"}},
    ],
)
def test_grammars_that_cannot_be_are_refused(one: Running, structured: dict[str, Any]) -> None:
    body = {"prompt": "a", "structured_outputs": structured}
    answer = httpx.post(f"{one.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text


@needs_grammar
@pytest.mark.parametrize("stream", [False, True])
def test_where_the_library_gives_up_the_answer_says_so(
    client: openai.OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(answers.Constraint, "problem", lambda self, output_ids: f"gave up at {len(output_ids)}")
    asked = {"model": running.served.name, "prompt": "a", "extra_body": {"structured_outputs": {"choice": ["yes"]}}}
    got = client.completions.create(**asked, stream=stream)
    choices = [part.choices[0] for part in got] if stream else [got.choices[0]]
    assert choices[-1].model_extra["format_error"].startswith("gave up at ")


# --- fill-in-the-middle, for which the tokenizer's version alone decides


def test_a_gap_is_filled_as_mistral_common_asks_for_it(client: openai.OpenAI, running: Running) -> None:
    asked = {
        "model": running.served.name,
        "prompt": "def f(n):",
        "max_tokens": 3,
        "extra_body": {"return_token_ids": True},
    }
    if not running.loaded.tokenizer.has_control("[SUFFIX]"):
        with pytest.raises(openai.BadRequestError, match="fill-in-the-middle"):
            client.completions.create(**asked, suffix="    return a")
        return
    (choice,) = client.completions.create(**asked, suffix="    return a").choices
    want = running.served.chats().encode_fim("def f(n):", "    return a")
    assert choice.model_extra["prompt_token_ids"] == want
    control = running.loaded.tokenizer.control_tokens
    assert want[:2] == [control["<s>"], control["[SUFFIX]"]]
    with pytest.raises(openai.BadRequestError, match="suffix and echo"):
        client.completions.create(**asked, suffix="a", echo=True)
