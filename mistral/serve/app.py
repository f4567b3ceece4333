"""The server as a Starlette application: its paths, what they answer, and clients that go away."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistral.request import BrokenLogits
from mistral.serve import guard
from mistral.serve.answers import Answer, Piece
from mistral.serve.document import document
from mistral.serve.fields import ApiError
from mistral.serve.guard import HostGuard, Json, KeyGuard, error_answer, headers_of_page, read_json
from mistral.serve.metrics import as_prometheus
from mistral.serve.protocol import Asked, Served, read_chat, read_completion, read_detokenize, read_tokenize
from mistral.serve.worker import Busy, Ended, Event, Job, Worker, deliver
from mistral.util.errors import Fatal, MistralError

log = logging.getLogger("mistral")
R = TypeVar("R")
NO_ADDRESS = "nothing is at this address: POST to /v1/chat/completions or /v1/completions, or GET /v1/models"


class Gone(Exception):
    """The client has closed its connection."""


class Server:
    """What answers requests.

    Args:
        served: the model, as clients see it.
        worker: generates.
    """

    def __init__(self, served: Served, worker: Worker) -> None:
        self.served, self.worker = served, worker
        self.answered: Counter[tuple[str, int]] = Counter()
        self._began = int(time.time())
        self._one_at_a_time = threading.Lock()  # encoding: not every tokenizer is safe for several threads
        page = files("mistral.serve").joinpath("chat.html").read_text(encoding="utf-8")
        self._page, self._page_headers = page, headers_of_page({tag: _hash(page, tag) for tag in ("script", "style")})

    # Answers at once.

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def health(self, request: Request) -> Response:
        dead = self.worker.dead is not None
        return Json({"status": "the engine has died" if dead else "ok"}, status_code=503 if dead else 200)

    async def models(self, request: Request) -> Response:
        names = (self.served.name, *self.served.adapters)
        return Json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not name:  # a slash too many
            return await self.models(request)
        return Json(self._model(self.served.adapter_of(name) or self.served.name))

    def _model(self, name: str) -> dict[str, Any]:
        """The model, or, by its name, an adapter of it."""
        served = self.served
        about = {"id": name, "object": "model", "created": self._began, "owned_by": "mistral"}
        about |= {"root": name, "parent": None if name == served.name else served.name}
        chat = served.template is not None
        return {**about, "max_model_len": served.context, "windows": served.windows, "chat": chat}

    async def metrics(self, request: Request) -> Response:
        text = as_prometheus(self.worker, self.answered)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return Json(document())

    async def tokenize(self, request: Request) -> Response:
        ids = await self._read(request, read_tokenize)
        return Json({"count": len(ids), "max_model_len": self.served.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        return Json({"prompt": await self._read(request, read_detokenize)})

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            "this model continues text and was not trained to embed it: vectors of its hidden states would compare "
            "badly, so there are none; use an embedding model",
            status=404,
            code="no_embeddings",
        )

    async def _read(self, request: Request, read: Callable[[Any, Served], R]) -> R:
        """What a body asks for; a long prompt is encoded beside the event loop."""
        body = await read_json(request)

        def locked() -> R:
            with self._one_at_a_time:
                return read(body, self.served)

        return await run_in_threadpool(locked)

    # Generated text.

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, await self._read(request, read_completion))

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, await self._read(request, read_chat))

    async def _generate(self, request: Request, asked: Asked) -> Response:
        events = asyncio.Queue[tuple[int, Event]]()

        def tell(index: int) -> Callable[[Event], None]:
            return lambda event: events.put_nowait((index, event))

        answer = Answer(asked, self.served, tell)
        jobs = [choice.job for choice in answer.choices]
        if len(jobs) > self.worker.rows + self.worker.max_queue:
            raise ApiError(f"{len(jobs)} continuations are more than this server queues: ask for fewer", "n")
        self.worker.submit(jobs)
        handed_over = False
        try:
            pieces = _pieces(answer, events)
            if asked.stream:
                # The first event decides: what fails before it is an error with a status of its own.
                first = await _unless_gone(request, anext(pieces))
                handed_over = True
                return _Stream(_server_sent(answer, first, pieces), lambda: self.worker.cancel(jobs))
            found: list[list[Piece]] = [[] for _ in jobs]
            return Json(await _unless_gone(request, _collect(answer, pieces, found)))
        finally:
            if not handed_over:
                self.worker.cancel(jobs)


async def _pieces(answer: Answer, events: asyncio.Queue[tuple[int, Event]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all choices as they come, until each has ended."""
    left = len(answer.choices)
    while left:
        index, event = await events.get()
        if event.error is not None:
            raise event.error
        left -= event.last
        yield index, answer.choices[index].take(event)


async def _collect(
    answer: Answer, pieces: AsyncIterator[tuple[int, Piece]], found: list[list[Piece]]
) -> dict[str, Any]:
    async for index, piece in pieces:
        found[index].append(piece)
    return answer.whole(found)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of some work, given up where the client goes away first.

    Raises:
        Gone: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Gone
    finally:
        for task in tasks:
            task.cancel()


async def _server_sent(
    answer: Answer, first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[str]:
    """An answer as server-sent events. What fails on the way is an event too: the status has gone out already."""
    begun: set[int] = set()

    def line(index: int, piece: Piece) -> str:
        chunk = answer.chunk(answer.choices[index], piece, index not in begun)
        begun.add(index)
        return "" if chunk is None else _event(chunk)

    try:
        yield line(*first)
        async for index, piece in rest:
            if text := line(index, piece):
                yield text
        if answer.asked.include_usage:
            yield _event(answer.last_chunk())
    except Exception as error:
        yield _event(as_api_error(error).body)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; however it ends, `release` is called. A client that takes none for long is given up."""

    def __init__(self, content: AsyncIterator[str], release: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: Message) -> None:
            async with asyncio.timeout(guard.PATIENCE):
                await send(message)

        try:
            await super().__call__(scope, receive, patient)
        except TimeoutError:  # without its end the connection is closed
            log.warning("a client has taken nothing of an answer for %.0f seconds: its row is free", guard.PATIENCE)
        finally:
            self._release()


def as_api_error(error: Exception) -> ApiError:
    """An error as clients are told of it: ours in full, others without their insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(str(error), status=429, kind="rate_limit_error", code="busy", headers={"Retry-After": "1"})
    if isinstance(error, Ended | Fatal):
        return ApiError(str(error), status=503, kind="server_error", code="ended")
    if isinstance(error, BrokenLogits):  # the same request may do well with a model in order
        return ApiError(str(error), status=500, kind="server_error", code="broken_logits")
    if isinstance(error, MistralError):
        return ApiError(str(error))
    if isinstance(error, HTTPException):
        detail = {404: NO_ADDRESS, 405: f"the method must be {(error.headers or {}).get('Allow', 'another')}"}
        told = detail.get(error.status_code, error.detail)
        return ApiError(told, status=error.status_code, code="http", headers=error.headers)
    return ApiError("the server failed; its log has more", status=500, kind="server_error", code="internal")


def _hash(page: str, tag: str) -> str:
    """What a Content-Security-Policy calls the one inline script or style of a page."""
    (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()


def _soon(loop: asyncio.AbstractEventLoop, told: Sequence[tuple[Job, Event]]) -> None:
    loop.call_soon_threadsafe(deliver, told)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Gone | ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return error_answer(as_api_error(error))


class Counted:
    """Counts answers by path and status; a path that is not ours counts as one, whatever it is."""

    def __init__(self, app: ASGIApp, answered: Counter[tuple[str, int]], paths: Collection[str]) -> None:
        self._app, self._answered, self._paths = app, answered, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._answered[path, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)


def _routes(server: Server) -> list[Route]:
    return [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/openapi.json", server.openapi),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/embeddings", server.embeddings, methods=["POST"]),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/detokenize", server.detokenize, methods=["POST"]),
    ]


def _guards(hosts: Collection[str] | None, api_key: str | None, cors: Collection[str]) -> list[Middleware]:
    """What a request passes before it is answered, in this order. For the arguments see `make_app`."""
    guards = [Middleware(HostGuard, hosts=hosts, origins=cors)]
    if cors:
        guards.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors),
                allow_methods=["*"],
                allow_headers=["*"],  # OpenAI's client has some of its own
                allow_private_network=True,  # a page of the internet may ask a server that is not there
                expose_headers=["Retry-After"],
            )
        )
    if api_key is not None:
        guards.append(Middleware(KeyGuard, key=api_key))
    return guards


def make_app(
    served: Served,
    worker: Worker,
    *,
    hosts: Collection[str] | None,
    api_key: str | None = None,
    cors: Collection[str] = (),
) -> Starlette:
    """The application. The worker starts and ends with it.

    Args:
        served, worker: what is served, and what generates.
        hosts: see `HostGuard`.
        api_key: what clients must bring; None: nothing.
        cors: origins of pages that may ask.
    """
    server = Server(served, worker)
    routes = _routes(server)
    paths = {route.path for route in routes}
    counted = Middleware(Counted, answered=server.answered, paths=paths)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        worker.deliver = lambda told: _soon(loop, told)
        worker.start()
        yield
        await run_in_threadpool(worker.close)

    kinds: tuple[type[Exception], ...] = (ApiError, MistralError, HTTPException, Gone, ClientDisconnect, Exception)
    return Starlette(
        routes=routes,
        middleware=[counted, *_guards(hosts, api_key, cors)],
        lifespan=lifespan,
        exception_handlers=dict.fromkeys(kinds, _on_error),
    )
