"""What is served to whom, decided once: the model as clients see it, addresses, keys."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
from asyncio import CancelledError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server, getaddrinfo, has_dualstack_ipv6
from socket import socket as Socket
from urllib.parse import urlsplit

from mistral.chat.templates import find_template
from mistral.formats.folder import BUNDLED
from mistral.loader.load import Loaded
from mistral.serve.protocol import Served
from mistral.serve.words import Words
from mistral.tokenizer import require_tokenizer
from mistral.util import memory
from mistral.util.english import did_you_mean
from mistral.util.errors import MistralError, Unavailable, UsageError, printable, short_repr
from mistral.util.files import spelled_out

log = logging.getLogger("mistral")
LONGEST = 1 << 20  # positions of a sequence where neither training nor memory sets a limit
SHARE = 0.8  # of the memory left, that keys and values may take
GRACE = 60  # seconds that requests have to finish once the server is told to end


@dataclass(frozen=True)
class Listen:
    """Where to listen, and to whom.

    Args:
        host, port: the address.
        api_key: what clients must bring.
        cors: origins of pages elsewhere.
        hosts: names that Host may have; None: any.
    """

    host: str
    port: int
    api_key: str | None
    cors: tuple[str, ...]
    hosts: frozenset[str] | None

    @property
    def url(self) -> str:
        """Of the server."""
        name = "localhost" if self.host in ("0.0.0.0", "::") else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"

    def socket(self) -> Socket:
        """What listens there.

        Raises:
            UsageError: the address cannot be listened on.
        """
        family = AF_INET6 if ":" in self.host else AF_INET
        try:
            both = self.host.strip("[]") == "::" and has_dualstack_ipv6()  # every address, of either kind
            return create_server((self.host.strip("[]"), self.port), family=family, dualstack_ipv6=both)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise UsageError(f"{self.host}:{self.port} cannot be listened on: {reason}") from None

    @classmethod
    def of(cls, host: str, port: int, api_key: str | None, cors: Sequence[str], names: Sequence[str]) -> Listen:
        """From a command line.

        Raises:
            UsageError: an open host without a key, or something that is no port, key or origin.
        """
        key = api_key if api_key is not None else os.environ.get("MISTRAL_API_KEY") or None
        if port > 65535:
            raise UsageError(f"--port is {port}; it must be at most 65535")
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise UsageError("--api_key must be letters, digits and signs, without spaces")
        for origin in cors:
            parts = urlsplit(origin)
            whole = parts.scheme in ("http", "https") and parts.netloc and origin == f"{parts.scheme}://{parts.netloc}"
            if origin == "*" and key is None:
                raise UsageError("--cors '*' lets every page ask: it needs --api_key")
            if origin != "*" and not whole:
                raise UsageError(f"--cors is {short_repr(origin)}; it must be an origin, as https://example.org")
        near = _is_loopback(host)
        if not near and not _is_known(host):
            advice = did_you_mean(host, ("localhost",)) or ": give a name or an address of this machine"
            raise UsageError(f"--host {printable(host) or repr(host)} is not known{advice}")
        if not near and key is None:
            raise UsageError(f"--host {printable(host)} lets others reach this server: it needs --api_key")
        hosts = frozenset({"localhost", "127.0.0.1", "::1", host.strip("[]").lower(), *(n.lower() for n in names)})
        return cls(host, port, key, tuple(cors), hosts if near or names else None)


def _is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_known(host: str) -> bool:
    """Whether a host is an address, or a name that has one."""
    try:
        return bool(getaddrinfo(host.strip("[]") or None, None))
    except (OSError, UnicodeError):
        return False


def served_of(loaded: Loaded, *, rows: int, most: int | None, name: str | None, template: str | None) -> Served:
    """A loaded model as clients see it.

    Args:
        rows: sequences at once, each of which needs room.
        most: positions of a sequence; None: as many as it was trained on, or as memory holds.
        name: what clients call it; None: after the folder.
        template: of conversations, by name; None: the model's own.

    Raises:
        MistralError: not even one position fits, there is no tokenizer, or a template that was named does not go with
            the model.
    """
    require_tokenizer(loaded.tokenizer)
    if name == "":
        raise UsageError("--name is empty; give what clients call the model, or omit it")
    release = None if loaded.release is None else loaded.release.template
    found, why = None, ""
    try:
        found = find_template(loaded.tokenizer, name=template, release=release, folder=loaded.templates)
    except MistralError as error:
        if template is not None:
            raise
        why = str(error)
    called = name or model_name(loaded.folder)
    adapters = () if loaded.model.adapters is None else loaded.model.adapters.names
    if called in adapters:
        raise UsageError(f"the model and an adapter are both called {called}: give --name, or --adapter NAME=FOLDER")
    return Served(
        called,
        adapters,
        loaded.tokenizer,
        Words(loaded.tokenizer),
        found,
        why,
        tuple(loaded.args.windows),
        loaded.args.vocab_size,
        _context(loaded, rows, most),
    )


def _context(loaded: Loaded, rows: int, most: int | None) -> int:
    """The most positions that each of `rows` sequences may have."""
    wanted = most or loaded.trained_length or LONGEST
    left = memory.available(loaded.model.device)
    if left is None:
        return wanted
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        fits = rows * loaded.model.cache_bytes(middle) <= SHARE * left
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < 1 or (most is not None and low < most):
        needed = memory.as_text(rows * loaded.model.cache_bytes(wanted))
        raise memory.OutOfMemory(
            f"keys and values of {rows} sequences of {wanted} positions need {needed}, and {memory.as_text(left)} "
            "are left: lower --rows or --max_positions"
        )
    return low


def model_name(folder: Path) -> str:
    """What clients call the model of a folder: the folder's name, or owner/name in a hub's cache."""
    if folder.resolve() == BUNDLED.resolve():
        return "mistral-bundled"
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else spelled_out(folder.resolve().name)


def run(loaded: Loaded, served: Served, listen: Listen, *, rows: int, max_queue: int, chunk_size: int | None) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that run then are finished first. For the main thread.

    Raises:
        Unavailable: starlette or uvicorn is missing.
        UsageError: the address cannot be listened on.
    """
    try:
        import uvicorn

        from mistral.serve.app import make_app
    except ImportError as error:
        raise Unavailable(f"serve needs starlette and uvicorn ({error}): pip install starlette uvicorn") from None
    from mistral.serve.worker import Worker

    worker = Worker(loaded.model, loaded.tokenizer, rows=rows, max_queue=max_queue, chunk_size=chunk_size)
    app = make_app(served, worker, hosts=listen.hosts, api_key=listen.api_key, cors=listen.cors)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, server_header=False
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    with listen.socket() as socket:
        log.warning("serving %s, up to %d positions, %d rows: %s/", served.name, served.context, rows, listen.url)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn has its own, and raises the signal again when all is done
        uvicorn.Server(config).run(sockets=[socket])
        worker.abandon()  # nothing is left to do, unless a second Ctrl-C has cut it short


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log says what is not known: that a second Ctrl-C cuts answers short is, and so is who
    was given up."""
    if record.exc_info is not None and isinstance(record.exc_info[1], CancelledError):
        return False
    text = record.getMessage()
    return not any(known in text for known in ("CancelledError", "without completing response"))
