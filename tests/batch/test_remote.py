"""Lines answered by a server: again where it is busy, not where it says no, and nothing lost when it is killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from mistral.batch.remote import _retry_after
from tests.support.batches import Reply, by_name, completion, pretending, request, write_lines
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import ROOT
from tests.support.serving import free_port


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("mistral.batch.remote.FIRST_WAIT", 0.01)
    monkeypatch.delenv("MISTRAL_API_KEY", raising=False)
    return in_process(capfd)


def well(number: int, body: dict[str, Any]) -> Reply:
    return 200, {"x-request-id": f"id{number}"}, completion(body["prompt"])


def test_bodies_are_sent_as_they_are(tmp_path: Path, cli: Command) -> None:
    lines = [request(f"r{i}", f"p{i} é", model="m", max_tokens=i, anything={"at": "all"}) for i in range(20)]
    path, out = write_lines(tmp_path / "in", *lines), tmp_path / "out"
    with pretending(well) as server:
        assert cli("batch", path, out, "--engine", f"{server.url}/v1/", "--concurrency", 3).code == 0
    assert sorted(server.asked, key=str) == sorted((line["body"] for line in lines), key=str)
    found = by_name(out)
    assert {name: one["response"]["body"]["choices"][0]["text"] for name, one in found.items()} == {
        line["custom_id"]: line["body"]["prompt"] for line in lines
    }
    assert {one["response"]["request_id"] for one in found.values()} == {f"id{i}" for i in range(1, 21)}
    assert server.keys == [None] * 20


def test_a_busy_server_is_asked_again(tmp_path: Path, cli: Command, caplog: pytest.LogCaptureFixture) -> None:
    def busy(number: int, body: dict[str, Any]) -> Reply:
        if number <= 3:
            return (429, 503, 500)[number - 1], {"Retry-After": "0.05"}, {"error": {"message": "busy"}}
        return well(number, body)

    path, out = write_lines(tmp_path / "in", request("a"), request("b")), tmp_path / "out"
    with pretending(busy) as server:
        done = cli("batch", path, out, "--engine", server.url, "--concurrency", 1)
    assert done.code == 0
    assert len(server.asked) == 5
    assert "note: the server answers 429; lines are sent again" in caplog.messages
    assert set(by_name(out)) == {"a", "b"}


def test_what_stays_wrong_is_written(tmp_path: Path, cli: Command) -> None:
    def stubborn(number: int, body: dict[str, Any]) -> Reply:
        kind = body["prompt"]
        if kind == "busy":
            return 503, {}, b"<html>busy</html>"
        if kind == "no":
            return 400, {}, {"error": {"message": "not like this"}}
        if kind == "garbage":
            return 200, {}, b"{NaN"
        if kind == "twice":
            return 200, {}, b'{"usage": {}, "usage": {"total_tokens": 3}}'
        return well(number, body)

    kinds = ("busy", "no", "garbage", "twice", "good")
    path, out = write_lines(tmp_path / "in", *(request(kind, kind) for kind in kinds)), tmp_path / "out"
    with pretending(stubborn) as server:
        done = cli("batch", path, out, "--engine", server.url, "--attempts", 2)
    assert done.code == 1
    asked = [body["prompt"] for body in server.asked]
    assert {kind: asked.count(kind) for kind in kinds} == dict.fromkeys(kinds, 1) | {"busy": 2}
    found = by_name(out)
    assert found["busy"]["response"]["status_code"] == 503
    assert found["busy"]["response"]["body"] == {"error": {"message": "<html>busy</html>"}}
    assert found["no"]["response"] == {
        "status_code": 400,
        "request_id": None,
        "body": {"error": {"message": "not like this"}},
    }
    assert found["garbage"]["error"] == {"code": "invalid_response", "message": "the answer is not JSON: '{NaN'"}
    assert found["twice"]["error"]["message"].startswith("the answer has the key 'usage' twice in one object")
    assert found["good"]["error"] is None


def test_an_answer_that_does_not_come_is_not_waited_for(tmp_path: Path, cli: Command) -> None:
    ended = threading.Event()

    def silent(number: int, body: dict[str, Any]) -> Reply:
        ended.wait(120)
        return well(number, body)

    path, out = write_lines(tmp_path / "in", request("slow", "slow")), tmp_path / "out"
    with pretending(silent) as server:
        done = cli("batch", path, out, "--engine", server.url, "--attempts", 2, "--timeout", 1)
        ended.set()
    assert done.code == 1
    assert len(server.asked) == 2
    found = by_name(out)
    assert found["slow"]["error"] == {"code": "timeout", "message": "no answer within 1 seconds, 2 times"}


def test_a_server_that_is_not_there_ends_the_job_and_no_line(tmp_path: Path, cli: Command) -> None:
    port = free_port()
    path, out = write_lines(tmp_path / "in", request("a"), "bad"), tmp_path / "out"
    done = cli("batch", path, out, "--engine", f"http://127.0.0.1:{port}", "--attempts", 2, "--concurrency", 1)
    assert done.code == 2
    assert f"error: nobody answers at http://127.0.0.1:{port}: nobody listens there: is the server started" in done.err
    assert "0 of 2 lines; the same command goes on" in done.err
    assert not out.exists()  # an output that stays empty is removed


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((401, {}, {"error": {"message": "who are you"}}), "wants a key: see --key_env"),
        ((301, {"Location": "https://elsewhere"}, b""), "sends to https://elsewhere (status 301): give that address"),
        ((404, {}, {"detail": "Not Found"}), "answers 404 to /v1/completions, without a reason: is it the address of"),
        ((403, {}, b"no"), "answers 403 to /v1/completions, without a reason"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), "it answers /v1/completions with a web page"),
        ((429, {"Retry-After": "86400"}, {}), "asks to wait 86400 seconds"),
    ],
)
def test_what_all_lines_would_meet_ends_the_job(tmp_path: Path, cli: Command, reply: Reply, said: str) -> None:
    path, out = write_lines(tmp_path / "in", request("a"), request("b")), tmp_path / "out"
    with pretending(lambda number, body: reply) as server:
        done = cli("batch", path, out, "--engine", server.url)
    assert done.code == 2
    assert said in done.err
    assert not out.exists()


def test_the_key_is_sent_and_never_shown(tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_lines(tmp_path / "in", request("a")), tmp_path / "out"
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with pretending(lambda number, body: (400, {}, {"error": {"message": "no"}})) as server:
        done = cli("batch", path, out, "--engine", server.url, "--key_env", "MY_KEY", "--verbose")
    assert server.keys == ["Bearer sk-secret"]
    assert "secret" not in done.err + out.read_text()
    for url in (
        "http://me:sk-secret@localhost:1",
        "localhost:8000",
        "ftp://x",
        "http://x:y",
        "http://x/?a=1",
        "http://x/v1/v1",
        "http://",
    ):
        error = cli("batch", path, tmp_path / "out2", "--engine", url, "--key_env", "MY_KEY").err
        assert "error: --engine " in error, url
        assert "secret" not in error
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    assert "secret" not in cli("batch", path, tmp_path / "out2", "--engine", server.url, "--key_env", "MY_KEY").err


def test_retry_after_is_a_number_or_a_date() -> None:
    assert [_retry_after(given) for given in (None, "2", "-1", "soon", "nonsense, 99 Foo")] == [0, 2, 0, 0, 0]
    began = time.time()
    seconds = _retry_after(formatdate(began + 60, usegmt=True))
    assert 59 - (time.time() - began) < seconds <= 60  # dates are whole seconds
    assert _retry_after(formatdate(time.time() - 60)) == 0


KILLS = 3


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_killed_again_and_again_every_line_is_there_once(tmp_path: Path) -> None:
    """Three times of tools/batch_kills.py's hundred."""
    lines = [request(f"r{i}", f"p{i}" * 500) for i in range(400)]
    path, out = write_lines(tmp_path / "in", *lines), tmp_path / "out"
    kills, length = 0, 0

    def reply(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.01)
        while len(server.asked) > 64 * (kills + 1) and kills < KILLS:  # a kill that comes late finds work left
            time.sleep(0.01)
        return well(number, body)

    with pretending(reply) as server:
        command = [sys.executable, "-m", "main", "batch", str(path), str(out), "--engine", server.url]
        while kills < KILLS:
            process = subprocess.Popen(
                [*command, "--concurrency", "4"], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
            )
            while process.poll() is None and (not out.exists() or out.stat().st_size < length + 60_000 + kills * 977):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert out.stat().st_size > length
            length = out.stat().st_size
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"has \d+ of 400 lines already", done.stderr)
    assert set(by_name(out)) == {line["custom_id"] for line in lines}
    assert len(server.asked) >= 400
