"""Why a server cannot be asked: in words, whichever library's error it is."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from urllib.error import URLError

import pytest

from mistral.util.network import BROKEN_OFF, behind_v1, unreachable


class RemoteProtocolError(Exception):
    """As httpx has it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (URLError(ConnectionRefusedError(111, "Connection refused")), "nobody listens there"),
        (URLError(socket.gaierror(-2, "Name or service not known")), "no machine of this name is known"),
        (URLError(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")), "it does not speak TLS"),
        (TimeoutError("timed out"), "no answer in time"),
        (ConnectionResetError(104, "Connection reset by peer"), BROKEN_OFF),
        (http.client.RemoteDisconnected("Remote end closed connection without response"), BROKEN_OFF),
        (http.client.BadStatusLine("SSH-2.0"), "what it answers is not HTTP"),
        (RemoteProtocolError("Server disconnected without sending a response."), BROKEN_OFF),
        (RemoteProtocolError("illegal status line"), "what it answers is not HTTP"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (ValueError("something\n else"), "something else"),
        (ValueError(), "no reason is known"),
    ],
)
def test_reasons(error: Exception, said: str) -> None:
    assert unreachable(error).startswith(said)
    around = OSError("All connection attempts failed")  # as anyio and httpx wrap it
    around.__cause__ = ExceptionGroup("several", [error])
    if not isinstance(error, ValueError):
        assert unreachable(around).startswith(said)


def test_errors_that_are_each_others_cause() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert unreachable(one) == "one"


@pytest.mark.parametrize(
    ("path", "behind"),
    [
        ("/v1", ""),
        ("/v1/", ""),
        ("/gateway/v1", ""),
        ("", ""),
        ("/v1/v1", "v1"),
        ("/v1/completions", "completions"),
        ("/v1/chat/completions/", "chat/completions"),
        ("/v1/models", "models"),
        ("/v1/deployments/some", ""),
    ],
)
def test_what_an_address_has_too_much(path: str, behind: str) -> None:
    assert behind_v1(f"http://localhost:8000{path}") == behind
