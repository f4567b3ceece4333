"""Lines of a batch answered by a server that speaks OpenAI's protocol: many at once, and again where it asks for that.

A key goes into the header of requests and nowhere else. httpx is imported where a server is asked, and not before.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mistral.batch.job import Write
from mistral.batch.lines import Answered, Line, answer, failure
from mistral.util.errors import Unavailable, UsageError, printable, short_repr
from mistral.util.network import behind_v1, unreachable
from mistral.util.parsed import KeyTwice, parse_json

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("mistral")
AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # statuses after which the same request may go well
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, where the server does not say
PATIENCE = 300.0  # seconds that a server may ask to wait


class Remote:
    """Answers lines through a server.

    Args:
        url: of the server, with or without /v1 at its end.
        key: that it wants, or None.
        concurrency: the most requests at once.
        attempts: how often a line is sent before its error is written.
        timeout: seconds that an answer may take.

    Raises:
        UsageError: no URL of a server.
        Unavailable: httpx is missing.
    """

    def __init__(self, url: str, key: str | None, *, concurrency: int, attempts: int, timeout: float) -> None:
        try:
            import httpx
        except ImportError as error:
            raise Unavailable(f"--engine needs httpx ({error}): pip install httpx") from None
        self._httpx = httpx
        parts = _parts(url)
        self._base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._near = _is_near(parts.hostname or "")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
            if parts.scheme == "http" and not self._near:
                log.warning("note: the key goes to %s unencrypted: use https", parts.hostname)
        self._concurrency, self._attempts, self._timeout = concurrency, attempts, timeout
        self._told: set[str] = set()

    def __call__(self, lines: Iterator[Line], write: Write) -> None:
        """Answer all lines; see `job.Runner`.

        Raises:
            Unavailable: nobody listens at the address, the key is refused, or the server asks to wait too long.
        """
        asyncio.run(self._all(lines, write))

    async def _all(self, lines: Iterator[Line], write: Write) -> None:
        limits = self._httpx.Limits(max_connections=self._concurrency)
        timeout = self._httpx.Timeout(self._timeout, connect=min(30, self._timeout), pool=None)
        # What is on this machine is not asked for through a proxy.
        async with self._httpx.AsyncClient(
            headers=self._headers, timeout=timeout, limits=limits, trust_env=not self._near
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(self._some(client, lines, write))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None

    async def _some(self, client: httpx.AsyncClient, lines: Iterator[Line], write: Write) -> None:
        for line in lines:  # which all tasks share
            write(await self._ask(client, line))

    async def _ask(self, client: httpx.AsyncClient, line: Line) -> Answered:
        """What is written for a line, after as many attempts as it takes, or as there may be."""
        for attempt in range(self._attempts):
            last = attempt == self._attempts - 1
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            try:
                response = await client.post(self._base + line.url, json=line.body)
            except self._httpx.ConnectError as error:
                if last:
                    raise Unavailable(f"nobody answers at {self._base}: {unreachable(error)}") from None
                self._tell("cannot be reached")
            except self._httpx.TimeoutException:
                if last:
                    return failure(line, "timeout", f"no answer within {self._timeout:g} seconds, {attempt + 1} times")
                self._tell(f"takes longer than {self._timeout:g} seconds")
            except self._httpx.HTTPError as error:
                if last:
                    return failure(line, "connection_error", unreachable(error))
                self._tell("breaks connections off")
            else:
                if response.status_code not in AGAIN or last:
                    return self._answered(line, response)
                self._tell(f"answers {response.status_code}")
                wait = max(wait, _retry_after(response.headers.get("retry-after")))
                if wait > PATIENCE:
                    raise Unavailable(f"{self._base} asks to wait {wait:.0f} seconds: run the same command again then")
            await asyncio.sleep(wait)
        raise AssertionError("at least one attempt")

    def _answered(self, line: Line, response: httpx.Response) -> Answered:
        status = response.status_code
        if status == 401:
            wanted = "another key than it was given" if "Authorization" in self._headers else "a key: see --key_env"
            raise Unavailable(f"{self._base} wants {wanted} (status 401)")
        if 300 <= status < 400:
            there = response.headers.get("location", "somewhere else")
            raise Unavailable(f"{self._base} sends to {printable(there)} (status {status}): give that address")
        try:
            body: Any = parse_json(response.content, parse_constant=_no_constant)
            wrong = ""
        except ValueError as error:
            body = None
            shown = f"is not JSON: {short_repr(response.text[:60])}"
            wrong = f"the answer {error if isinstance(error, KeyTwice) else shown}"
        explained = isinstance(body, dict) and "error" in body
        if status in (403, 404, 405) and not explained:  # nothing that is about this line alone
            advice = "is it the address of a server of OpenAI's protocol, up to its /v1?"
            raise Unavailable(f"{self._base} answers {status} to {line.url}, without a reason: {advice}")
        if body is None and "html" in response.headers.get("content-type", "") and status == 200:
            raise Unavailable(f"{self._base} is no server of OpenAI's protocol: it answers {line.url} with a web page")
        if body is None and status == 200:
            return failure(line, "invalid_response", wrong)
        if body is None:
            body = {"error": {"message": response.text[:1000]}}
        request_id = response.headers.get("x-request-id") or (body.get("id") if isinstance(body, dict) else None)
        return answer(line, response.status_code, request_id, body)

    def _tell(self, what: str) -> None:
        """A note, once for each kind of trouble."""
        if what not in self._told:
            self._told.add(what)
            log.warning("note: the server %s; lines are sent again", what)


def _parts(url: str) -> Any:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises where it is no number)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError("--engine must be the address of a server, as http://127.0.0.1:8000")
    if behind := behind_v1(parts.path):
        raise UsageError(f"--engine goes on behind /v1 with {behind}: give the address up to /v1")
    if parts.username or parts.password:
        raise UsageError("--engine has a name or password in it: put the key into a variable, see --key_env")
    return parts


def _is_near(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(given: str | None) -> float:
    """Seconds to wait as a header says: a number, or a date."""
    if given is None:
        return 0.0
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return 0.0


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")
