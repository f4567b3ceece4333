"""An OpenAI-style server as a side of a comparison: what it tells of prompts, in whichever of three ways it knows.

Knows nothing about what comparing is.
"""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from mistral.oracle.outputs import Outputs
from mistral.tokenizer import TokenizerLike, encode
from mistral.util.errors import FormatError, short_repr
from mistral.util.network import unreachable
from mistral.util.parsed import KeyTwice, parse_json

log = logging.getLogger("mistral")
LARGEST = 2**28  # bytes of an answer that are read
READ = 2**16  # bytes of a refusal that are read
MESSAGE = 1000  # characters of it that are shown: advice comes last
PATIENCE = 300  # seconds a server has for one prompt
NAMED = 8  # models of a server that a message names
TOP = 20  # most likely tokens asked of a server

Rows = list[dict[int, float]]  # for each position of a prompt, the tokens after it whose log-probs are told


class Refused(FormatError):
    """A server's answer that tells nothing; another way to ask may."""


class _Unreadable(ValueError):
    """Log-probs that are there, and of no use."""


class Server:
    """Asks for log-probs of prompts given as ids, from /v1/completions.

    vLLM has `prompt_logprobs`. A server that knows nothing of them is asked to echo: then only log-probs of the
    prompts' own tokens are known. One that does not echo either (llama-server) is asked for the token after each
    beginning of a prompt, a request for each.

    Args:
        url: where it is.
        model: the name that it has for the model; None takes the first it lists.
        key: that it wants, or None.

    Attributes:
        tokenizer: gives that of the model, if there is one, for servers that take texts only.
    """

    def __init__(self, url: str, model: str | None = None, key: str | None = None) -> None:
        self.url, self._model = url, model
        self._key = key
        # A proxy that leads to the world does not know this machine's own servers.
        self._near = re.match(r"https?://(localhost|127\.|\[::1\])", url) is not None
        if key is not None and url.startswith("http://") and not self._near:
            log.warning("note: the key goes to %s unencrypted: use https", url)
        self.tokenizer: Callable[[], TokenizerLike | None] = lambda: None
        self._ways: list[Callable[[list[int]], Rows]] = [self._reported, self._echoed, self._echoed_text, self._by_step]

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        """What it says of these prompts.

        Raises:
            FormatError: it cannot be asked, or tells nothing.
        """
        if self._model is None:
            names = self._names(self._ask("/v1/models", None))
            if not names:
                raise FormatError(f"{self.url}/v1/models lists no model: name one with --model")
            self._model = names[0]
        rows = [row for prompt in prompts for row in self._one(prompt.tolist())]
        width = max(1, *(len(row) for row in rows))
        ids = torch.full((len(rows), width), -1)
        values = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
        for i, row in enumerate(rows):
            if any(not 0 <= token < 2**31 for token in row):
                raise FormatError(f"{self.url} tells of tokens with impossible ids")
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
            values[i, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        return Outputs(ids, values)

    def _names(self, listed: Any) -> list[str]:
        """The models of a list."""
        try:
            return [str(one["id"]) for one in listed["data"]]
        except (KeyError, TypeError):
            return []

    def _one(self, ids: list[int]) -> Rows:
        """By the first way that the server knows, which is then the only one tried."""
        said = []
        for way in list(self._ways):
            try:
                rows = way(ids)
            except Refused as error:
                said.append(str(error))
                continue
            self._ways = [way]
            if len(rows) != len(ids):
                raise FormatError(f"{self.url} gave log-probs of {len(rows)} positions for a prompt of {len(ids)} ids")
            return rows
        raise FormatError(f"{self.url} gives no log-probs of prompts: {'; '.join(dict.fromkeys(said))}")

    # Ways to ask. Each gives the rows of a prompt, or raises Refused.

    def _reported(self, ids: list[int]) -> Rows:
        choice = self._choice(ids, prompt_logprobs=TOP, logprobs=TOP)
        if (told := choice.get("prompt_logprobs")) is None:
            raise Refused("it has no prompt_logprobs")
        rows = self._parsed(lambda: [{int(i): _number(e["logprob"]) for i, e in (row or {}).items()} for row in told])
        return [*rows[1:], {}]  # of the token at a position, from the one before

    def _echoed(self, ids: list[int]) -> Rows:
        return self._own(ids, self._choice(ids, echo=True, logprobs=1), 0)

    def _echoed_text(self, ids: list[int]) -> Rows:
        """For a server that takes no ids: the text that they are, if they are that of any."""
        if (tokenizer := self.tokenizer()) is None:
            raise Refused("it may take texts only, for which the other side must have a tokenizer")
        text = tokenizer.decode(ids)
        if encode(tokenizer, text) != ids:
            raise Refused("it may take texts only, and a prompt has ids that are not those of a text: use --file")
        # llama-cpp-python leaves BOS out.
        return self._own(ids, self._choice(text, echo=True, logprobs=1), int(ids[0] == tokenizer.bos_id))

    def _own(self, ids: list[int], choice: dict[str, Any], missing: int) -> Rows:
        """The log-probs of a prompt's own tokens, as an echo has them but for so many at its beginning."""

        def rows() -> Rows:
            own = [None] * missing + choice["logprobs"]["token_logprobs"]
            if len(own) < len(ids):
                raise _Unreadable(f"it has {len(own)} token_logprobs for {len(ids)} ids")
            told = [{i: _number(lp)} if lp is not None else {} for i, lp in zip(ids[1:], own[1:], strict=False)]
            if not any(told) and len(ids) > 2:
                raise KeyError("token_logprobs")
            return [*told, {}]

        return self._parsed(rows)

    def _by_step(self, ids: list[int]) -> Rows:
        """The most likely tokens after each beginning of the prompt."""
        rows = []
        for n in range(1, len(ids) + 1):
            # So that vLLM and its like name tokens by ids; only asked where needed, as a strict server may refuse it.
            choice = self._choice(ids[:n], logprobs=TOP, return_tokens_as_token_ids=True)
            rows.append(self._parsed(partial(_next_tokens, choice)))
        return rows

    def _parsed(self, parse: Callable[[], Any]) -> Any:
        try:
            return parse()
        except KeyError as error:
            raise Refused(f"its answer lacks log-probs: it has no {error.args[0]}") from None
        except _Unreadable as error:
            raise Refused(f"its answer lacks log-probs: {error}") from None
        except (IndexError, TypeError, ValueError, AttributeError, OverflowError):
            raise Refused("its answer lacks log-probs, or has them in a form that is not known") from None

    def _choice(self, prompt: list[int] | str, **more: Any) -> dict[str, Any]:
        asked = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        answer = self._ask("/v1/completions", {**asked, **more})
        found: dict[str, Any] = self._parsed(lambda: dict(answer["choices"][0]))
        return found

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """What it answers.

        Raises:
            Refused: it understood, and does not want to.
            FormatError: it cannot be asked, whatever the way.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            request = Request(self.url + path, data, headers)
            opener = build_opener(*([ProxyHandler({})] if self._near else []))
            with opener.open(request, timeout=PATIENCE) as answer:
                text = answer.read(LARGEST)
        except HTTPError as error:
            raise self._refused(path, error) from None
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise FormatError(f"{self.url}{path} cannot be asked: {_short(unreachable(error))}") from None
        try:
            return parse_json(text)
        except KeyTwice as error:  # of which one value would be compared, and which is not known
            raise FormatError(f"{self.url}{path}: its answer {error}") from None
        except ValueError:
            told = short_repr(text[:60].decode("utf-8", "replace"))
            raise FormatError(
                f"{self.url} is no server of OpenAI's protocol: {path} answers {told}, which is no JSON"
            ) from None

    def _refused(self, path: str, error: HTTPError) -> FormatError:
        """A status that is an error, its cause first."""
        said = f"{self.url}{path} answered {error.code}: {_reason(error)}"
        if error.code in (401, 403):
            wanted = "another key than it was given" if self._key else "a key: put it into the variable of --key_env"
            return FormatError(f"{self.url} wants {wanted} ({said})")
        if error.code == 404 and path == "/v1/models":
            advice = "give the address up to /v1, as http://localhost:8000"
            return FormatError(f"{self.url} has no /v1/models: {advice} ({said})")
        if error.code in (400, 404, 422) and path != "/v1/models":
            try:
                names = self._names(self._ask("/v1/models", None))
            except FormatError:  # some list none
                names = []
            if names and self._model not in names:
                has = ", ".join(names[:NAMED]) + ", .." * (len(names) > NAMED)
                return FormatError(f"{self.url} has no model {short_repr(self._model)}: it has {has} ({said})")
            if error.code == 404:
                return FormatError(f"{self.url} has no {path}: it must be a server of OpenAI's protocol ({said})")
        return Refused(said)


def _reason(error: HTTPError) -> str:
    """What a refusal says: the message in it, in any of the forms that servers have, else its text."""
    try:
        text = error.read(READ).decode("utf-8", "replace")
    except (HTTPException, OSError) as broken:
        return f"and then nothing more ({type(broken).__name__})"
    try:
        told = parse_json(text, object_pairs_hook=None)
        told = told.get("error") or told
        message = told if isinstance(told, str) else told.get("message") or told.get("detail")
    except (ValueError, AttributeError):
        message = None
    return _short(message if isinstance(message, str) else text)


def _short(text: str) -> str:
    """On one line; what is long ends after a whole word."""
    return textwrap.shorten(text, MESSAGE, placeholder=" ...")


def _number(value: Any) -> float:
    return float(value)


def _next_tokens(choice: dict[str, Any]) -> dict[int, float]:
    """The alternatives to the one token that was generated, in any of the forms that servers have."""
    told = choice["logprobs"]
    if "content" in told:  # as for chats; llama-server adds ids
        entry = told["content"][0]
        return {int(e["id"]): _number(e["logprob"]) for e in (entry, *entry["top_logprobs"])}
    found = {}
    for text, logprob in told["top_logprobs"][0].items():
        match = re.fullmatch(r"token_id:(\d{1,9})", text)
        if match is None:
            raise _Unreadable("its tokens have texts and no ids")
        found[int(match[1])] = _number(logprob)
    return found
