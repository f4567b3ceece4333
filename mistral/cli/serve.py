"""`serve`: a local server that speaks OpenAI's protocol, with a page to chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mistral.cli import flags
from mistral.cli.parallel import divisible, in_first
from mistral.cli.prompts import note_if_assumed, open_model
from mistral.cli.terminal import echo_err
from mistral.loader.options import LoadOptions
from mistral.util.flat import flat

if TYPE_CHECKING:
    from mistral.loader.load import Loaded


@flat(options=LoadOptions(), omit=("max_batch_size",))
@divisible
def serve(
    folder: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    cors: list[str] | None = None,
    allow_host: list[str] | None = None,
    rows: int = 8,
    max_queue: int = 64,
    max_positions: int | None = None,
    name: str | None = None,
    template: str | None = None,
    chunk_size: int | None = None,
    options: LoadOptions,
) -> None:
    """Serve a model over HTTP, in OpenAI's protocol, with a page to chat at /.

    python -m main serve
    python -m main serve mistral-7B-Instruct-v0.3 --dtype bfloat16 --port 8080
    python -m main serve mistral-7B-Instruct-v0.3 --host 0.0.0.0 --api_key "$KEY"

    Then http://127.0.0.1:8000/ is the page, and http://127.0.0.1:8000/v1 what OpenAI's clients take as base_url.
    Requests run as one batch; the beginning of a prompt that a row holds already is not computed again. Ctrl-C or
    SIGTERM lets what runs finish first; a second one does not.

    Args:
        host: address to listen on; one that others can reach needs --api_key
        port: to listen on
        api_key: what clients must bring, as Authorization: Bearer KEY; default: MISTRAL_API_KEY, if it is set
        cors: origin of a page elsewhere that may ask, as https://example.org; may be repeated
        allow_host: another name that this server is reached by; may be repeated
        rows: the most sequences in a step
        max_queue: the most that wait for a row; more are answered with 429
        max_positions: the most tokens of a prompt and its answer; default: the training length, or what memory holds
        name: of the model, for clients; default: that of the folder
        template: of conversations: v1 to v15, mistrallite or a .jinja file; default: the one that goes with the model
        chunk_size: most prompt tokens of a sequence in a step; default: 512 of all, GPU: 2048; changes rounding only
    """
    flags.require_at_least(1, port=port, rows=rows, chunk_size=chunk_size, max_positions=max_positions)
    flags.require_at_least(0, max_queue=max_queue)
    from mistral.serve.settings import Listen, run, served_of

    listen = Listen.of(host, port, api_key, cors or [], allow_host or [])
    listen.socket().close()  # what is taken is found before the model is loaded

    def in_front(load: Callable[[], Loaded]) -> None:
        loaded = load()
        served = served_of(loaded, rows=rows, most=max_positions, name=name, template=template)
        if served.template is None:
            echo_err(f"note: no chat completions: {served.no_template}")
        note_if_assumed(served.template, loaded.tokenizer)
        run(loaded, served, listen, rows=rows, max_queue=max_queue, chunk_size=chunk_size)

    in_first(partial(open_model, folder, replace(options, max_batch_size=rows)), in_front)
