"""tools/compare_vllm.py without vLLM: what passes and what does not, and a server that is only pretended."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

from mistral.formats.inspect import inspect_folder
from tests.support.serving import free_port, soon
from tools import compare_vllm
from tools.compare_vllm import (
    DELTA,
    MARGIN,
    SERVE,
    Comparison,
    Continuation,
    Row,
    ServerError,
    as_text,
    compare,
    continue_there,
    served,
)

OURS = [
    Continuation([5, 6, 7], [-1.0, -2.0, -3.0], [1.0, 0.01, 2.0]),
    Continuation([8, 9, 4], [-1.5, -2.5, -3.5], [0.5, 1.5, 0.02]),
]


def theirs(*changes: tuple[int, int, int, float]) -> list[Continuation]:
    """OURS, but with another token, and a log-probability that is larger by so much, at (prompt, place)."""
    made = [Continuation(list(c.tokens), list(c.logprobs), []) for c in OURS]
    for prompt, place, token, more in changes:
        made[prompt].tokens[place] = token
        made[prompt].logprobs[place] += more
    return made


def test_equal_tokens_pass():
    assert compare(OURS, theirs()) == Comparison(6, 6, None, None, 0.0)
    assert compare(OURS, theirs()).passes


def test_a_difference_where_the_margin_is_small_passes():
    found = compare(OURS, theirs((0, 1, 99, 0.0), (0, 2, 98, 5.0)))  # what follows it is not looked at
    assert found == Comparison(4, 6, (0, 1), 0.01, 0.0)
    assert found.passes


def test_a_difference_where_the_margin_is_large_fails():
    found = compare(OURS, theirs((0, 1, 99, 0.0), (1, 1, 99, 0.0)))
    assert found == Comparison(2, 6, (1, 1), 1.5, 0.0)  # the widest margin of the two prompts
    assert found.margin > MARGIN
    assert not found.passes


def test_logprobs_that_differ_fail():
    assert compare(OURS, theirs((1, 2, 4, DELTA / 2))).passes
    assert not compare(OURS, theirs((1, 2, 4, -2 * DELTA))).passes
    assert not compare(OURS, theirs((1, 2, 4, math.nan))).passes


def test_what_is_missing_is_an_error():
    with pytest.raises(ServerError, match="2 continuations here, 1 there"):
        compare(OURS, theirs()[:1])
    with pytest.raises(ServerError, match="prompt 1: 3 tokens here, 2 there"):
        compare(OURS, [theirs()[0], Continuation([8, 9], [-1.5, -2.5], [])])


def test_table():
    rows = [
        Row("one", "Mistral's", 2, compare(OURS, theirs()), None),
        Row("one", "Hugging Face's", 2, compare(OURS, theirs((1, 0, 3, 0.0))), None),
        Row("two", "Mistral's", 2, None, "it did not start"),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in as_text(rows).splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert lines[2][3:] == ["6/6", "none", "", "0.0e+00", "same"]
    assert lines[3][3:] == ["3/6", "prompt 1, token 0", "0.50000", "0.0e+00", "DIFFERENT"]
    assert lines[4][3:] == ["", "", "", "", "not served"]
    assert [row.passes for row in rows] == [True, False, False]


def test_options_are_those_that_inspect_prints():
    (command,) = inspect_folder()["serve"]["commands"]
    assert f" {SERVE['mistral']} " in command


posix = pytest.mark.skipif(os.name != "posix", reason="ends process groups")
PRETENDER = """#!{python}
import http.server, json, subprocess, sys

port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen(["sleep", "60"])
open("child", "w").write(str(child.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        if self.path != "/v1/completions":
            return self.send_error(404)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = asked["max_tokens"]
        choices = [
            dict(index=i, token_ids=prompt[:1] * n, logprobs=dict(token_logprobs=[-0.5] * n))
            for i, prompt in enumerate(asked["prompt"])
        ]
        self.answer(json.dumps(dict(choices=choices[::-1])).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that only waits to be collected by its parent aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:  # it has ended, or it ends right now
        return False


@posix
def test_a_server_is_asked_and_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_vllm, "free_port", free_port)  # which no other test is given meanwhile
    pretender = tmp_path / "python"
    pretender.write_text(PRETENDER.format(python=sys.executable))
    pretender.chmod(0o755)
    with served(str(pretender), tmp_path, "mistral", 10, tmp_path / "log") as url:
        assert continue_there(url, [[3, 1], [4, 1]], 2) == [
            Continuation([3, 3], [-0.5, -0.5], []),
            Continuation([4, 4], [-0.5, -0.5], []),
        ]
        child = int((tmp_path / "child").read_text())
        if sys.platform == "linux":
            assert is_running(child)
        with pytest.raises(ServerError, match="no completions"):
            continue_there(f"{url}/nowhere", [[3]], 2)
    if sys.platform == "linux":
        assert soon(lambda: not is_running(child))  # a process that was killed may be seen for a moment


@posix
def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(ServerError, match=r"(?s)ended with code 1.*vllm"),
        served(sys.executable, tmp_path, "mistral", 10, tmp_path / "log"),
    ):
        raise AssertionError("it started")
