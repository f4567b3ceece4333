"""Who may ask: the Host and Origin of a request, its key, and how large its body may be."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mistral.serve.fields import ApiError
from mistral.util.errors import short_repr
from mistral.util.parsed import not_json, parse_json

LARGEST_BODY = 16 << 20  # bytes
PATIENCE = 60.0  # seconds in which a body must have come, or a piece of an answer must have been taken
OPEN = ("/", "/health", "/openapi.json")  # what may be had without a key


class Json(Response):
    """JSON in ASCII, so that half a surrogate pair in somebody's text is no error of ours."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def error_answer(error: ApiError) -> Json:
    """An error in OpenAI's form."""
    return Json(error.body, status_code=error.status, headers=dict(error.headers))


class HostGuard:
    """Refuses requests whose Host is not this server's, or that a page from elsewhere has made.

    A name that somebody else's DNS leads to this machine would make their page "the same origin": hence Host.

    Args:
        app: what is guarded.
        hosts: names that Host may have, of any port; None: any, for a server that others may reach by any name.
        origins: pages that may ask, besides the server's own.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Request(scope))) is not None:
            return await error_answer(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return ApiError(f"the Host of this request is not one of {known}", status=403, code="host")
        origin = request.headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return None
        if urlsplit(origin).netloc.lower() == host.lower() and host:
            return None
        return ApiError("pages of this origin may not ask: name it with --cors", status=403, code="origin")


def _name(host: str) -> str:
    """A Host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class KeyGuard:
    """Refuses requests without the key, where there is one."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            kind, _, given = Request(scope).headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key)
            if kind.lower() != "bearer" or not right:
                error = ApiError(
                    "the API key is missing or wrong: Authorization: Bearer KEY",
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await error_answer(error)(scope, receive, send)
        await self._app(scope, receive, send)


async def read_json(request: Request) -> Any:
    """The JSON of a body.

    Raises:
        ApiError: another content type or encoding, too large, too slow, or not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form of any page may send without asking is refused too
        raise ApiError("the Content-Type must be application/json", status=415)
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(f"the Content-Encoding {short_repr(coding)} is not supported: send plain JSON", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise ApiError(f"the body has more than {LARGEST_BODY} bytes", status=413)
    except TimeoutError:
        raise ApiError(f"the body did not come within {PATIENCE:.0f} seconds", status=408) from None
    try:
        return parse_json(bytes(body), parse_constant=_no_constant)
    except ValueError as error:  # no UTF-8 too
        raise ApiError(f"the body {not_json(error)}"[:300]) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")


def headers_of_page(hashes: Mapping[str, str]) -> dict[str, str]:
    """Headers under which a page may run nothing but its own script and style, by their hashes."""
    rules = {
        "default-src": "'none'",
        "script-src": f"'{hashes['script']}'",
        "style-src": f"'{hashes['style']}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
