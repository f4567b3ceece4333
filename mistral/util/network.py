"""Why a server cannot be asked, in words, whichever library asked it. Runs without torch."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator
from http.client import HTTPException

BROKEN_OFF = "the connection was broken off: is the server up, and its address one of https://?"


def unreachable(error: BaseException) -> str:
    """What is behind an error of a connection, without numbers and names of Python's; what to do, where that is clear.

    Args:
        error: of http.client, urllib, httpx or the system; those that it came from are looked at too.
    """
    for one in _behind(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {one.verify_message}"
        if isinstance(one, ssl.SSLError):
            return "it does not speak TLS: is its address one of http://, without the s?"
        if isinstance(one, socket.gaierror):
            return "no machine of this name is known"
        if isinstance(one, ConnectionRefusedError):
            return "nobody listens there: is the server started, and the port right?"
        if isinstance(one, TimeoutError):
            return "no answer in time"
        if isinstance(one, ConnectionError):
            return BROKEN_OFF
        if isinstance(one, HTTPException) or type(one).__name__ == "RemoteProtocolError":  # httpx's
            if "disconnected" in str(one):
                return BROKEN_OFF
            return "what it answers is not HTTP: is that the port of the server, and its address one of https://?"
        if isinstance(one, OSError) and one.errno is not None:
            return os.strerror(one.errno)
    return " ".join(str(error).split()) or "no reason is known"


def behind_v1(address: str) -> str:
    """What the address of a server has too much: a path that requests add themselves; "" if it has nothing of these."""
    found = re.search(r"/v1/((v1|models|completions|chat|chat/completions)/?)$", address)
    return "" if found is None else found[1].rstrip("/")


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from: as a cause, a context, a reason (urllib) or in a group."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [getattr(one, "reason", None), one.__cause__, one.__context__]
        waiting += getattr(one, "exceptions", ())
