"""How `serve` ends: after what runs, or at once, and never in a heap of lines."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mistral import cli
from tests.support.commands import ENVIRONMENT
from tests.support.folders import ROOT
from tests.support.serving import answers, free_port, soon


def serve(port: str, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "main", "serve", "--port", port, "--quiet"]
    with open(log, "wb") as file:
        return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=file)


@pytest.mark.long
def test_ctrl_c_lets_what_runs_finish_and_a_second_one_does_not(tmp_path: Path) -> None:
    port = free_port()
    for twice in (False, True):
        log = tmp_path / f"log{twice}"
        process = serve(str(port), log)
        url = f"http://127.0.0.1:{port}"
        try:
            assert soon(lambda process=process, url=url: process.poll() is not None or answers(url))
            assert process.poll() is None, log.read_text()
            most = 10**6 if twice else 200
            body = {"prompt": "a", "max_tokens": most, "stream": True, "ignore_eos": True}
            said = []
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                said.append(next(lines))
                process.send_signal(signal.SIGINT)
                if twice:  # two at the same time would be one
                    assert soon(lambda url=url: not answers(url))
                    process.send_signal(signal.SIGINT)
                try:
                    said += [line for line in lines if line]
                except httpx.RemoteProtocolError:
                    said.append("cut short")
            assert said[-1] == ("cut short" if twice else "data: [DONE]")
            assert process.wait(60) == 0
            assert log.read_text() == ""  # quiet: not even where it listens, and nothing of its end
        finally:
            process.kill()
            process.wait()


def test_an_address_that_is_taken_is_found_before_the_model_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "nowhere", "--port", str(port)]) == 2
    assert capfd.readouterr().err == f"error: 127.0.0.1:{port} cannot be listened on: Address already in use\n"
