"""Every endpoint as OpenAI's own client sees it, beside what the library computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from mistral import cli, complete
from mistral.engine import Engine
from mistral.sampling_params import SamplingParams
from tests.support.folders import make_folder, random_state
from tests.support.serving import Running, serving

EACH = {"continuous_usage_stats": True}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(most=2000) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def scores(running: Running, prompt: str) -> list[float]:
    engine = Engine(running.loaded.model, eos_ids=(), score_prompts=True)
    request = engine.add(running.loaded.tokenizer.encode(prompt), SamplingParams(max_tokens=0))
    while not engine.done:
        engine.step()
    return request.prompt_logprobs


def test_the_model_is_listed(client: openai.OpenAI, running: Running) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_extra["windows"], model.model_extra["chat"]) == ("mistral-bundled", [64] * 6, True)
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_what_complete_gives(client: openai.OpenAI, running: Running) -> None:
    model, tokenizer = running.loaded.model, running.loaded.tokenizer
    prompts = ["The king", "Once upon a time there was a"]
    want = complete(prompts, model, tokenizer, max_tokens=12, temperature=0.8, top_p=0.9, seed=3, n=2)
    got = client.completions.create(
        model="mistral-bundled", prompt=prompts, max_tokens=12, temperature=0.8, top_p=0.9, seed=3, n=2, logprobs=0
    )
    assert [c.text for c in got.choices] == [w.text for w in want]
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    for choice, w in zip(got.choices, want, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(w.logprobs, abs=1e-4)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.finish_reason == w.finish_reason
    assert got.usage.completion_tokens == sum(len(w.tokens) for w in want)
    assert got.usage.prompt_tokens == sum(len(tokenizer.encode(p)) for p in prompts)


def test_ids_are_taken_as_they_are_and_given_back(client: openai.OpenAI, running: Running) -> None:
    ids = running.loaded.tokenizer.encode("The wolf said")
    for prompt in (ids, [ids, ids]):
        got = client.completions.create(
            model="mistral-bundled", prompt=prompt, max_tokens=5, temperature=0, extra_body={"return_token_ids": True}
        )
        (want,) = complete([ids], running.loaded.model, running.loaded.tokenizer, max_tokens=5, temperature=0)
        for choice in got.choices:
            assert choice.model_extra["prompt_token_ids"] == ids
            assert choice.model_extra["token_ids"] == want.tokens


@pytest.mark.parametrize("most", [0, 1, 6])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(client: openai.OpenAI, running: Running, most: int, stream: bool) -> None:
    prompt = "Once upon a time there was a fox – a clever one"
    asked = {"prompt": prompt, "max_tokens": most, "temperature": 0, "echo": True, "logprobs": 2}
    got = client.completions.create(model="mistral-bundled", stream=stream, **asked)
    choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
    logprobs = [x for c in choices if c.logprobs for x in c.logprobs.token_logprobs]
    tops = [x for c in choices if c.logprobs for x in c.logprobs.top_logprobs]
    offsets = [x for c in choices if c.logprobs for x in c.logprobs.text_offset]
    want = scores(running, prompt)
    assert logprobs[0] is None
    assert logprobs[1 : len(want) + 1] == pytest.approx(want, abs=1e-9)
    assert len(logprobs) == len(want) + 1 + most
    assert all(2 <= len(top) <= 3 for top in tops[1:])
    text = "".join(c.text for c in choices)
    assert text.startswith(prompt)
    assert (len(text) > len(prompt)) == (most > 0)
    assert offsets == sorted(offsets)
    tokens = [x for c in choices if c.logprobs for x in c.logprobs.tokens]
    for at, token in zip(offsets[len(want) + 1 :], tokens[len(want) + 1 :], strict=True):
        assert text[at : at + len(token)] == token
    assert choices[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 2])
def test_the_echo_of_ids_that_end_within_a_character(
    client: openai.OpenAI, running: Running, most: int, stream: bool
) -> None:
    """What is generated may complete it: its bytes are no character of the echo, and come once."""
    ids = running.loaded.tokenizer.encode("a🙂")[:-1]
    asked = {"prompt": ids, "max_tokens": most, "temperature": 0, "echo": True, "logprobs": 0}
    got = client.completions.create(model="mistral-bundled", stream=stream, **asked)
    choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
    text = "".join(c.text for c in choices)
    shown = running.loaded.tokenizer.decode(ids)
    assert (text.startswith(shown), text.count("\ufffd")) == (True, shown.count("\ufffd"))
    offsets = [x for c in choices if c.logprobs for x in c.logprobs.text_offset]
    assert len(offsets) == len(ids) + most
    assert offsets[len(ids) - 3 : len(ids)] == [1, 1, 1]  # of the bytes, behind the "a"


def test_prompt_logprobs_as_vllm_has_them(client: openai.OpenAI, running: Running) -> None:
    extra = {"prompt_logprobs": 3}
    got = client.completions.create(model="mistral-bundled", prompt="The king was", max_tokens=1, extra_body=extra)
    told = got.choices[0].model_extra["prompt_logprobs"]
    ids = running.loaded.tokenizer.encode("The king was")
    assert told[0] is None
    assert [row[str(i)]["logprob"] for row, i in zip(told[1:], ids[1:], strict=True)] == pytest.approx(
        scores(running, "The king was"), abs=1e-9
    )
    for row in told[1:]:
        assert len(row) in (3, 4)
        assert {1, 2, 3} <= {entry["rank"] for entry in row.values()}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_it(client: openai.OpenAI, stream: bool) -> None:
    whole = client.completions.create(model="mistral-bundled", prompt="The king", max_tokens=20, temperature=0)
    stop = whole.choices[0].text[8:12]
    got = client.completions.create(
        model="mistral-bundled", prompt="The king", max_tokens=20, temperature=0, stop=[stop, "@@"], stream=stream
    )
    choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
    assert "".join(c.text for c in choices) == whole.choices[0].text.partition(stop)[0]
    assert choices[-1].finish_reason == "stop"


def test_sampling_fields_do_what_they_say(client: openai.OpenAI, running: Running) -> None:
    (bang,) = running.loaded.tokenizer.encode("x!", bos=False)[-1:]
    base = {"model": "mistral-bundled", "prompt": "The king", "max_tokens": 4, "temperature": 0}
    assert client.completions.create(**base, logit_bias={str(bang): 100}).choices[0].text == "!!!!"
    plain = client.completions.create(**base).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": 1, "repetition_penalty": 1.0}):
        got = client.completions.create(**{**base, "temperature": 2}, extra_body=extra)
        assert got.choices[0].text == plain
    assert client.completions.create(**base, frequency_penalty=2, presence_penalty=2).choices[0].text


def test_a_conversation(client: openai.OpenAI, running: Running) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who is the king?"}]
    asked = {"model": "mistral-bundled", "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked, max_completion_tokens=15)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
    parts = list(
        client.chat.completions.create(**asked, max_tokens=15, stream=True, stream_options={"include_usage": True})
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == choice.message.content
    assert [t.token for p in parts if p.choices and p.choices[0].logprobs for t in p.choices[0].logprobs.content] == [
        t.token for t in choice.logprobs.content
    ]
    assert parts[-1].choices == []
    assert all(p.usage is None for p in parts[:-1])
    assert parts[-1].usage.completion_tokens == 15
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_prefix_is_not_computed_again(client: openai.OpenAI, running: Running) -> None:
    messages = [{"role": "user", "content": "Tell me about the fox and the crow in the wood"}]
    first = client.chat.completions.create(model="mistral-bundled", messages=messages, max_tokens=3, temperature=0)
    again = client.chat.completions.create(model="mistral-bundled", messages=messages, max_tokens=3, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.choices[0].message.content == first.choices[0].message.content
    ids = running.loaded.tokenizer.encode("Once there were a wolf")
    extra = {"return_token_ids": True, "ignore_eos": True}
    made = client.completions.create(model="mistral-bundled", prompt=ids, max_tokens=5, extra_body=extra)
    ids += made.choices[0].model_extra["token_ids"]
    longer = client.completions.create(model="mistral-bundled", prompt=[*ids, 300], max_tokens=1)
    assert longer.usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # the last one was never processed
    for _ in range(2):  # after the first, two rows hold the prompt
        several = client.completions.create(model="mistral-bundled", prompt=ids, max_tokens=1, n=2)
    assert several.usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # of the prompt, not of each sample
    scored = client.completions.create(model="mistral-bundled", prompt="The king", max_tokens=1, echo=True, logprobs=1)
    assert scored.usage.prompt_tokens_details.cached_tokens == 0


def test_text_to_ids_and_back(running: Running) -> None:
    for body in ({"prompt": "The königin"}, {"messages": [{"role": "user", "content": "Who?"}]}):
        told = httpx.post(f"{running.url}/tokenize", json=body, timeout=60).json()
        assert told["count"] == len(told["tokens"])
    ids = httpx.post(f"{running.url}/tokenize", json={"prompt": "The königin"}, timeout=60).json()["tokens"]
    assert ids == running.loaded.tokenizer.encode("The königin")
    assert httpx.post(f"{running.url}/detokenize", json={"tokens": ids}, timeout=60).json() == {"prompt": "The königin"}


def test_metrics_health_and_document(running: Running) -> None:
    assert httpx.get(f"{running.url}/health", timeout=60).json() == {"status": "ok"}
    text = httpx.get(f"{running.url}/metrics", timeout=60).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert all(math.isfinite(float(value)) for value in values.values())
    assert float(values["mistral_rows"]) == 4
    document = httpx.get(f"{running.url}/openapi.json", timeout=60).json()
    assert "/v1/chat/completions" in document["paths"]


FORMAT = "response_format"
FOO = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "a", "max_token": 1}, "max_token"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ("completions", {"prompt": "a", "n": 0}, "n"),
        ("completions", {"prompt": "a", "stop": ""}, "stop"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("completions", {"prompt": [5000]}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ("completions", {"prompt": "a", "response_format": FOO}, FORMAT),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "response_format": FOO}, FORMAT),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "functions": [{}]}, "functions"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "chef", "content": "a"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ("completions", {"prompt": "a", "stream": True, "stream_options": EACH}, "stream_options"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(running: Running, path: str, body: object, param: str | None) -> None:
    told = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}  # httpx writes no surrogates
    answer = httpx.post(f"{running.url}/v1/{path}", timeout=60, **told)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]
    if param == "max_token":
        assert error["message"] == "no field is called 'max_token'; did you mean max_tokens?"


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": False, "top_logprobs": 0},
        {"stream_options": None, "temperature": None, "tools": None},
        {"safety_identifier": "a", "prompt_cache_key": "b", "user": "c"},
        {"store": False, "metadata": {}, "service_tier": "auto"},
        {"messages": [{"role": "user", "content": []}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
                {"role": "user", "content": "b"},
            ]
        },
    ],
)
def test_what_asks_for_nothing_is_as_good_as_absent(running: Running, more: dict[str, object]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **more}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_usage_in_each_part_of_a_stream(client: openai.OpenAI) -> None:
    parts = list(
        client.completions.create(
            model="mistral-bundled",
            prompt="The king",
            n=2,
            seed=1,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True, **EACH},
            extra_body={"ignore_eos": True},
        )
    )
    made = [part.usage.completion_tokens for part in parts]
    assert made == sorted(made)
    assert (made[0], made[-2:]) == (1, [8, 8])
    assert {part.usage.prompt_tokens for part in parts} == {3}


def test_a_slash_too_many_is_forgiven(running: Running) -> None:
    assert httpx.get(f"{running.url}/v1/models/", timeout=60).json()["object"] == "list"
    with httpx.Client(follow_redirects=True, timeout=60) as follows:
        answer = follows.post(f"{running.url}/v1/completions/", json={"prompt": "a", "max_tokens": 1})
    assert answer.json()["object"] == "text_completion"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="mistral-bundled is"):
        client.completions.create(model="gpt-4", prompt="a")


def test_who_speaks_may_be_named(running: Running) -> None:
    """Mistral's own templates have no place for it."""
    told = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hm"}
    ids = []
    for names in ({}, {"name": "Ada"}):
        messages = [{**message, **names} for message in told]
        answer = httpx.post(f"{running.url}/tokenize", json={"messages": messages}, timeout=60)
        ids.append(answer.json()["tokens"])
    assert ids[0] == ids[1]
    bad = httpx.post(f"{running.url}/tokenize", json={"messages": [{**told[0], "name": 5}]}, timeout=60)
    assert bad.json()["error"]["param"] == "messages"


def test_embeddings_are_refused_in_one_line(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="was not trained to embed"):
        client.embeddings.create(model="mistral-bundled", input="a")


def test_tokens_by_their_ids(client: openai.OpenAI, running: Running) -> None:
    more = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    got = client.completions.create(
        model="mistral-bundled", prompt="The king", max_tokens=3, temperature=0, logprobs=2, extra_body=more
    )
    (choice,) = got.choices
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.model_extra["token_ids"]]
    for token, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert max(top, key=top.get) == token
        assert all(name.startswith("token_id:") for name in top)
    messages = [{"role": "user", "content": "The king"}]
    asked = {"messages": messages, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    plain, numbered = (
        client.chat.completions.create(model="mistral-bundled", **asked, extra_body=body).choices[0]
        for body in ({}, more)
    )
    ids = numbered.model_extra["token_ids"]
    assert [one.token for one in numbered.logprobs.content] == [f"token_id:{i}" for i in ids]
    assert [one.bytes for one in numbered.logprobs.content] == [one.bytes for one in plain.logprobs.content]
    assert [one.token for one in numbered.logprobs.content] != [one.token for one in plain.logprobs.content]


def test_compared_with_its_own_folder_it_is_the_same(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(running.loaded.folder), running.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"]


def test_weights_that_are_broken_are_the_servers_fault(tmp_path: Path) -> None:
    state = random_state()
    state["tok_embeddings.weight"][9] = math.nan
    with serving(make_folder(tmp_path / "m", state)) as found:
        prompts = [[3, 4, 5, 6], [5, 9, 6], [5, 6, 7]]
        asked = [{"prompt": prompt, "max_tokens": 2, "temperature": 0, "logit_bias": {"9": -100}} for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda one: httpx.post(f"{found.url}/v1/completions", json=one, timeout=60), asked))
    assert [one.status_code for one in got] == [200, 500, 200]
    error = got[1].json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "broken_logits")
    assert "NaN" in error["message"]
