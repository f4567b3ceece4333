"""Who may ask, and what no body may do: a stranger's Host, a page from elsewhere, a missing key, nonsense."""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mistral.serve import guard
from mistral.serve.app import _Stream
from mistral.serve.settings import Listen, model_name
from mistral.util.errors import UsageError
from tests.support.folders import make_folder
from tests.support.serving import Running, as_sent, connected, free_port, serving, soon
from tools.fuzz.bodies import make_body, violation

KEY = "a-long-secret"
PAGE = "https://example.org"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = make_folder(tmp_path_factory.mktemp("served") / "model")
    with serving(folder, api_key=KEY, cors=(PAGE,), most=300) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found


@pytest.mark.parametrize(
    "given", [{}, *({"Authorization": text} for text in (f"Bearer {KEY}x", KEY, "Bearer", f"Basic {KEY}"))]
)
def test_without_the_key_nothing_is_told(running: Running, given: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics", "/nowhere"):
        answer = httpx.get(running.url + path, headers=given, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/", "/health"):
        assert httpx.get(running.url + path, timeout=60).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "localhost@evil.example", "[::1"])
def test_a_name_that_is_not_ours_is_refused(client: httpx.Client, host: str) -> None:
    answer = client.get("/v1/models", headers={"Host": host})
    assert answer.status_code in (400, 403)
    for ours in ("LOCALHOST:1", "[::1]:8000", "127.0.0.1"):
        assert client.get("/v1/models", headers={"Host": ours}).status_code == 200


def test_pages_from_elsewhere_may_not_ask_unless_they_are_named(client: httpx.Client, running: Running) -> None:
    assert client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "null"}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": running.url}).status_code == 200
    named = client.get("/v1/models", headers={"Origin": PAGE})
    assert named.headers["access-control-allow-origin"] == PAGE
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang,x-stainless-os"  # OpenAI's
    asked["Access-Control-Request-Private-Network"] = "true"  # a page of the internet asks a machine beside the browser
    may = httpx.options(f"{running.url}/v1/completions", headers=asked, timeout=60)
    assert may.status_code == 200
    assert "x-stainless-os" in may.headers["access-control-allow-headers"]
    assert may.headers["access-control-allow-private-network"] == "true"
    assert named.headers["access-control-expose-headers"] == "Retry-After"  # which its client waits for
    asked["Origin"] = "https://evil.example"
    assert httpx.options(f"{running.url}/v1/completions", headers=asked, timeout=60).status_code == 403
    form = client.post("/v1/completions", content='{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert form.status_code == 415


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
def test_every_address_of_this_machine_is_also_the_old_ones() -> None:
    listen = Listen.of("::", free_port(), KEY, [], [])
    with listen.socket(), socket.create_connection(("127.0.0.1", listen.port), timeout=60):
        pass


def test_another_method_is_told_which_there_are(client: httpx.Client) -> None:
    for path, methods in (("/v1/completions", {"POST"}), ("/health", {"GET", "HEAD"})):
        answer = client.request("TRACE", path)
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, methods)


def test_bodies_have_a_limit(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LARGEST_BODY", 1000)
    answer = client.post("/v1/completions", json={"prompt": "a" * 1000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_body_that_does_not_come_is_not_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    with connected(running.url) as connection:
        connection.sendall(as_sent(running.url, b'{"prompt": ', length=100, key=KEY))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_is_broken_off_is_no_error_of_ours(
    running: Running, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    gone = "/v1/completions", 499
    before = running_count(client, gone)
    with connected(running.url) as connection:
        connection.sendall(as_sent(running.url, b'{"prompt": "a', length=100, key=KEY))
    assert soon(lambda: running_count(client, gone) > before)
    assert running_count(client, gone) == before + 1
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def running_count(client: httpx.Client, which: tuple[str, int]) -> int:
    """How many answers of a path and a status /metrics counts."""
    found = [line for line in client.get("/metrics").text.splitlines() if all(f'"{part}"' in line for part in which)]
    return int(found[0].split()[-1]) if found else 0


def test_a_body_that_is_packed_is_refused_by_its_name(client: httpx.Client) -> None:
    packed, headers = (
        gzip.compress(b'{"prompt": "a"}'),
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    answer = client.post("/v1/completions", content=packed, headers=headers)
    assert (answer.status_code, "'gzip'" in answer.json()["error"]["message"]) == (415, True)


def test_who_takes_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.05)
    released: list[bool] = []

    async def events() -> AsyncIterator[str]:
        yield "data: {}\n\n"

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    stream = _Stream(events(), lambda: released.append(True))
    asyncio.run(asyncio.wait_for(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, never, never), 60))
    assert released == [True]


def test_a_client_that_takes_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its buffers full, it would hold a row to the end of its answer, and the answer would be kept for it."""
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    body = b'{"prompt": "a", "max_tokens": 500000, "stream": true, "ignore_eos": true, "logprobs": 20}'
    with serving(rows=1) as found, socket.socket() as connection:
        server = urlsplit(found.url)
        found.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.hostname, server.port))
        connection.sendall(as_sent(found.url, body))
        assert soon(lambda: "taken nothing" in caplog.text and found.worker.busy == (0, 0))
    assert "taken nothing" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_what_is_no_json_is_refused(client: httpx.Client) -> None:
    for number in (b"NaN", b"Infinity", b"1" * 5000):
        body = b'{"prompt": "a", "temperature": ' + number + b"}"
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, "not JSON" in answer.json()["error"]["message"]) == (400, True)


def test_a_field_that_stands_twice_is_refused(client: httpx.Client) -> None:
    for body in (
        b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}',
        b'{"prompt": "a", "max_tokens": 1, "stream_options": {"max_tokens": 1, "max_tokens": 1}}',
    ):
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        said = answer.json()["error"]["message"]
        assert answer.status_code == 400
        assert said == "the body has the key 'max_tokens' twice in one object, where only one value can count"


def test_a_field_of_another_program_is_told_by_its_name_here(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", "max_new_tokens": 1})
    assert answer.json()["error"]["message"] == "no field is called 'max_new_tokens'; did you mean max_tokens?"


def test_prompts_have_a_limit(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": [1] * 290, "max_tokens": 12})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert client.post("/v1/completions", json={"prompt": [1] * 290, "max_tokens": 11}).status_code == 200


def test_the_page_may_run_its_own_script_alone(running: Running) -> None:
    page = httpx.get(running.url, timeout=60)
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{name} 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert len(re.findall(r"'sha256-[\w+/=]+'", policy)) == 2
    assert "innerHTML" not in page.text
    assert not re.search(r"""(src|href)=|https?://|\son\w+=|style=["']""", page.text)


def test_no_body_is_an_error_of_ours(client: httpx.Client, running: Running) -> None:
    rng, seen = random.Random(0), set()
    for _ in range(500):
        path, content = make_body(rng)
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert violation(answer) is None, (path, content, answer.text)
        seen.add(answer.status_code)
    assert seen == {200, 400, 404}
    assert running.worker.dead is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("0.0.0.0", 1, None, [], []), "needs --api_key"),
        (("::", 1, None, [], []), "needs --api_key"),
        (("example.org", 1, None, [], []), "needs --api_key"),
        (("localhos", 1, None, [], []), "localhos is not known; did you mean localhost"),
        (("nobody.invalid", 1, "key", [], []), "nobody.invalid is not known: give a name or an address"),
        (("127.0.0.1", 65536, None, [], []), "at most 65535"),
        (("127.0.0.1", 1, "", [], []), "letters"),
        (("127.0.0.1", 1, None, ["*"], []), "every page"),
        (("127.0.0.1", 1, None, ["https://a.example/path"], []), "an origin"),
    ],
)
def test_addresses_that_would_be_open_are_refused(
    given: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def addresses(host: str, port: object) -> list[object]:
        if host in ("0.0.0.0", "::", "example.org"):
            return [host]
        raise OSError("Name or service not known")

    monkeypatch.setattr("mistral.serve.settings.getaddrinfo", addresses)
    with pytest.raises(UsageError, match=message):
        Listen.of(*given)


def test_names_of_models() -> None:
    assert model_name(Path("/x/models--mistralai--Mistral-7B-v0.1/snapshots/abc")) == "mistralai/Mistral-7B-v0.1"
    assert model_name(Path("/x/mistral-7B-v0.1")) == "mistral-7B-v0.1"


def test_an_address_that_is_not_there_names_those_that_are() -> None:
    from starlette.exceptions import HTTPException

    from mistral.serve.app import NO_ADDRESS, as_api_error

    assert str(as_api_error(HTTPException(404))) == NO_ADDRESS
    assert str(as_api_error(HTTPException(405, headers={"Allow": "POST"}))) == "the method must be POST"
