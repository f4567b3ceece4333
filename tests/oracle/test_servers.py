"""Servers as sides of compare: each way in which they tell log-probs, and a plain reason where they tell none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral import cli
from mistral.formats.folder import read_folder
from mistral.formats.tokenizers import has_tokenizer, load_tokenizer
from mistral.loader.assemble import assemble
from mistral.oracle import pack
from tests.oracle.test_compare import PARAMS, hot
from tests.support.folders import make_folder

WINDOW = 5
TEXTS = ["Once upon a time there was a king", "The wolf"]


class Server(BaseHTTPRequestHandler):
    """As much of an OpenAI-style server as tells log-probs, in the style of one of them."""

    model: Any = None
    style = "vllm"
    tokenizer: Any = None

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = asked["prompt"]
        if self.style == "none" or (self.style == "texts" and isinstance(given, list)):
            return self.answer(422, {"error": "no such thing"})
        if isinstance(given, str):
            given = self.tokenizer.encode(given)
        ids = torch.tensor(given)
        with torch.inference_mode():
            scores = self.model.forward(ids, [len(ids)]).double().log_softmax(-1)
        code, choice = getattr(self, self.style.replace("-", "_"))(asked, ids, scores)
        self.answer(code, {"choices": [choice], "usage": {"completion_tokens": 1}} if code == 200 else choice)
        return None

    # What the choice is, by style.

    def vllm(self, asked: dict[str, Any], ids: Tensor, scores: Tensor) -> tuple[int, Any]:
        told: list[Any] = [None]
        for row, i in zip(scores, ids[1:].tolist(), strict=False):
            best = {int(j): float(row[j]) for j in row.topk(asked["prompt_logprobs"]).indices} | {i: float(row[i])}
            told.append({str(j): {"logprob": lp, "rank": 1} for j, lp in best.items()})
        return 200, {"prompt_logprobs": told}

    def echo(self, asked: dict[str, Any], ids: Tensor, scores: Tensor) -> tuple[int, Any]:
        own = [None, *(float(row[i]) for row, i in zip(scores, ids[1:], strict=False)), -1.0]
        return 200, {"logprobs": {"token_logprobs": own} if asked.get("echo") else None}

    def texts(self, asked: dict[str, Any], ids: Tensor, scores: Tensor) -> tuple[int, Any]:
        """llama-cpp-python: BOS has no entry, and the first token after it no number."""
        _, choice = self.echo(asked, ids, scores)
        if choice["logprobs"]:
            choice["logprobs"]["token_logprobs"] = [None, *choice["logprobs"]["token_logprobs"][2:]]
        return 200, choice

    def llama_server(self, asked: dict[str, Any], ids: Tensor, scores: Tensor) -> tuple[int, Any]:
        if asked.get("echo"):
            return 400, {"error": {"message": "Only no echo is supported"}}
        if "logprobs" not in asked:
            return 200, {"logprobs": None}
        best = [{"id": int(i), "logprob": float(scores[-1][i])} for i in scores[-1].topk(asked["logprobs"]).indices]
        return 200, {"logprobs": {"content": [{**best[0], "token": "x", "top_logprobs": best}]}}

    def by_number(self, asked: dict[str, Any], ids: Tensor, scores: Tensor) -> tuple[int, Any]:
        if asked.get("echo"):
            return 400, {}
        names = "token_id:{}" if self.style == "by_number" else "word {}"
        best = {names.format(int(i)): float(scores[-1][i]) for i in scores[-1].topk(asked.get("logprobs", 1)).indices}
        return 200, {"logprobs": {"top_logprobs": [best]}}

    by_word = by_number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("right") / "model")


def small(place: Path, window: int = WINDOW) -> Path:
    """A folder of few words, and without a tokenizer."""
    return make_folder(place, hot(), tokenizer=False, **PARAMS | {"sliding_window": window})


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("words") / "model", sliding_window=WINDOW)


Start = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Start]:
    servers = []

    def start(folder: Path, style: str = "vllm") -> str:
        model, _ = assemble(read_folder(folder), device="cpu", execution="eager")
        words = load_tokenizer(folder, model.args.vocab_size) if has_tokenizer(folder) else None
        handler = type("Handler", (Server,), {"model": model, "style": style, "tokenizer": words})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asks it for TLS breaks off
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    code = cli.main(["compare", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    found: dict[str, Any] = json.loads(captured.out)
    assert (code == 0) is found["same"]
    return found


POSITIONS = 40 + 1 + 9 + 23
STYLES = {
    "vllm": POSITIONS - 4,  # the token after a prompt's last is not told
    "echo": POSITIONS - 4,
    "llama-server": POSITIONS,
    "by_number": POSITIONS,
}


@pytest.mark.parametrize("style", STYLES)
def test_a_server(folder: Path, serve: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str) -> None:
    url, packed = serve(folder, style), tmp_path / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(packed), "--weights"]) == 0
    for sides in ((folder, url), (url + "/v1", packed)):
        told = ask(capsys, *sides)
        assert told["same"]
        assert told["positions_compared"] == STYLES[style]
        assert told["top1_agreement"] == (None if style == "echo" else 1)  # of what is told, and of nothing else


@pytest.mark.parametrize("style", STYLES)
def test_a_server_with_a_mistake(
    folder: Path, serve: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    told = ask(capsys, folder, serve(small(tmp_path / "wrong", WINDOW + 1), style))
    assert list(told["mistakes"]) == ["window_one_more"]


def test_a_server_that_takes_texts_only(
    with_words: Path, serve: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, url, file = with_words, serve(with_words, "texts"), tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    told = ask(capsys, folder, url, "--file", file)
    assert told["same"]
    assert told["positions_compared"] == sum(told["prompts"]) - 2 * len(TEXTS)
    wrong = make_folder(tmp_path / "wrong", sliding_window=WINDOW + 1)
    told = ask(capsys, folder, serve(wrong, "texts"), "--file", file)
    assert list(told["mistakes"]) == ["window_one_more"]
    assert cli.main(["compare", str(folder), url]) == 2
    assert "a prompt has ids that are not those of a text: use --file" in capsys.readouterr().err


def test_servers_that_cannot_be_asked(folder: Path, serve: Start, capsys: pytest.CaptureFixture[str]) -> None:
    for url, said in (
        (serve(folder, "none"), "answered 422"),
        (serve(folder, "by_word"), "its tokens have texts and no ids"),
        ("http://127.0.0.1:9", "cannot be asked: nobody listens there"),
        (serve(folder).replace("http", "https"), "cannot be asked: it does not speak TLS"),
        ("http://nowhere.invalid", "cannot be asked: no machine of this name is known"),
    ):
        assert cli.main(["compare", str(folder), url]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert said in error


def test_what_is_asked_for_wrongly_is_said_first(
    folder: Path, serve: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)

    def error(url: str, *words: str) -> str:
        assert cli.main(["compare", str(folder), url, *words]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix(f"error: {url} ")

    url = serve(folder)
    no_such = {"error": {"message": "The model `foo` does not exist."}}
    monkeypatch.setattr(Server, "vllm", lambda *_: (404, no_such))
    assert error(url, "--model", "foo") == (
        f"has no model 'foo': it has tiny ({url}/v1/completions answered 404: The model `foo` does not exist.)"
    )
    assert error(url, "--model", "tiny").startswith("has no /v1/completions: it must be a server of OpenAI's protocol")
    monkeypatch.setattr(Server, "do_GET", lambda self: self.answer(404, {"detail": "Not Found"}))
    assert error(url).startswith("has no /v1/models: give the address up to /v1, as http://localhost:8000 (")
    monkeypatch.setattr(Server, "do_GET", lambda self: self.answer(401, {"error": {"message": "who?"}}))
    assert error(url) == f"wants a key: put it into the variable of --key_env ({url}/v1/models answered 401: who?)"
    monkeypatch.setenv("MY_KEY", "secret")
    assert error(url, "--key_env", "MY_KEY").startswith("wants another key than it was given (")
    monkeypatch.setattr(Server, "do_GET", lambda self: self.answer(200, b"<html>hello</html>"))
    assert error(url) == "is no server of OpenAI's protocol: /v1/models answers '<html>hello</html>', which is no JSON"
    twice = b'{"data": [{"id": "tiny", "id": "huge"}]}'
    monkeypatch.setattr(Server, "do_GET", lambda self: self.answer(200, twice))
    assert "/v1/models: its answer has the key 'id' twice in one object" in error(url)


def test_a_key_is_sent(folder: Path, serve: Start, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    keys = []
    answer = Server.answer
    monkeypatch.setattr(
        Server, "answer", lambda self, *rest: (keys.append(self.headers["Authorization"]), answer(self, *rest))[1]
    )
    monkeypatch.setenv("MY_KEY", "secret")
    assert ask(capsys, folder, serve(folder), "--key_env", "MY_KEY")["same"]
    assert set(keys) == {"Bearer secret"}


def test_an_address_without_http(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(folder), "localhost:8000"]) == 2
    want = "no such folder: localhost:8000; a server's address begins with http://, as http://localhost:8000"
    assert capsys.readouterr().err == f"error: {want}\n"
    url = "http://localhost:8000/v1/completions"
    assert cli.main(["compare", str(folder), url]) == 2
    want = f"{url} goes on behind /v1 with completions: give the address up to /v1"
    assert capsys.readouterr().err == f"error: {want}\n"


@pytest.mark.parametrize("form", [{"error": {"message": "{}"}}, {"message": "{}"}, {"error": "{}"}, None])
def test_a_refusal_is_told_in_whole_words(
    folder: Path, serve: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    short, long = "no such field: " + "misunderstanding, " * 40 + "leave it out", "misunderstanding " * 200
    for message in (short, long):
        body = message if form is None else json.loads(json.dumps(form).replace("{}", message))
        monkeypatch.setattr(Server, "vllm", lambda *_, body=body: (400, body))
        assert cli.main(["compare", str(folder), serve(folder, "vllm")]) == 2
        told = capsys.readouterr().err.splitlines()[-1].partition("answered 400: ")[2].partition("; it may")[0]
        if message is short:
            assert told.strip('"') == short
        else:
            assert set(told.strip('"').split()) == {"misunderstanding", "..."}
            assert len(told) < 1010


def test_a_pack_has_no_texts(folder: Path, serve: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "x.safetensors"
    assert cli.main(["pack", str(folder), "-o", str(packed)]) == 0
    assert pack.is_pack(packed)
    assert cli.main(["compare", str(packed), serve(folder, "texts")]) == 2
    assert "for which the other side must have a tokenizer" in capsys.readouterr().err
