"""A batch job's lines: requests as OpenAI's batch format has them, and what is written for each.

Knows nothing about models or files' places. Runs without torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mistral.util.errors import short_repr
from mistral.util.files import not_text
from mistral.util.parsed import not_json, parse_json

URLS = ("/v1/chat/completions", "/v1/completions")
FIELDS = ("custom_id", "method", "url", "body")
EXAMPLE = (
    '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The king", "max_tokens": 20}}'
)
NOT_JSON = "invalid_json_line"  # the code of a line that is no JSON object
LONGEST = 16 << 20  # bytes of a line: as many as the server takes in a body


@dataclass(frozen=True)
class Line:
    """A request.

    Args:
        id: of its answer: made of the line's bytes, so that the same line has the same one in another run.
        custom_id: by which its author knows the answer.
        url: one of URLS.
        body: what the server would be sent.
    """

    id: str
    custom_id: str
    url: str
    body: dict[str, Any]


class LineError(Exception):
    """A line that is no request.

    Args:
        code: as OpenAI's error files have it.
        message: what is wrong; the file and the number of the line are put before it.
        custom_id: the line's, where it has one.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.custom_id = code, message, custom_id


@dataclass(frozen=True)
class Answered:
    """What is written for a line: an answer of HTTP, which may be an error, or why there is none.

    Args:
        id, custom_id: of the line.
        response: `status_code`, `request_id` and `body`.
        error: `code` and `message`.
    """

    id: str
    custom_id: str | None
    response: dict[str, Any] | None = None
    error: dict[str, str] | None = None

    @property
    def ok(self) -> bool:
        """Whether it was answered, and not with an error."""
        return self.error is None and self.response is not None and self.response["status_code"] == 200

    @property
    def reason(self) -> str:
        """Why it is not ok, in a sentence."""
        if self.error is not None:
            return self.error["message"]
        assert self.response is not None
        body = self.response["body"]
        told = body.get("error") if isinstance(body, dict) else None
        message = told.get("message") if isinstance(told, dict) else None
        return message if isinstance(message, str) else f"status {self.response['status_code']}"

    def as_json(self) -> bytes:
        """The line of the output file, with its end; in ASCII, so that nothing in a text can end a line."""
        fields = {"id": self.id, "custom_id": self.custom_id, "response": self.response, "error": self.error}
        return json.dumps(fields, allow_nan=False).encode() + b"\n"


def answer(line: Line, status: int, request_id: str | None, body: Any) -> Answered:
    """What is written where HTTP has, or would have, answered."""
    return Answered(line.id, line.custom_id, {"status_code": status, "request_id": request_id, "body": body})


def failure(line: Line, code: str, message: str) -> Answered:
    """What is written where there was no answer."""
    return Answered(line.id, line.custom_id, error={"code": code, "message": message})


def id_of(text: bytes, before: int) -> str:
    """The id of a line's answer.

    Args:
        text: the line.
        before: how often the same bytes have come before.
    """
    return "batch_req_" + hashlib.sha256(text + b"\0%d" % before).hexdigest()[:24]


def read_line(text: bytes, line_id: str) -> Line:
    """A line as a request.

    Raises:
        LineError: it is none.
    """
    if len(text) > LONGEST:
        raise LineError("line_too_long", f"it has more than {LONGEST} bytes")
    try:
        fields = parse_json(text.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise LineError(NOT_JSON, f"it is {not_text(error)}") from None
    except ValueError as error:
        raise LineError(NOT_JSON, f"it {not_json(error)}"[:300]) from None
    if not isinstance(fields, dict):
        raise LineError(NOT_JSON, f"it is {_kind(fields)}, and no object such as {EXAMPLE}")
    custom_id = fields.get("custom_id")
    if custom_id is None:
        raise LineError("missing_required_parameter", "it has no custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        what = f"its custom_id is {short_repr(custom_id)}; it must be text that is not empty"
        raise LineError("missing_required_parameter", what)
    for name in fields:
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise LineError("unknown_parameter", f"it has {short_repr(name)}; known are {known}", custom_id)
    for name in FIELDS[1:]:
        if fields.get(name) is None:
            raise LineError("missing_required_parameter", f"it has no {name}", custom_id)
    if fields["method"] != "POST":
        raise LineError("invalid_method", f"its method is {short_repr(fields['method'])}; it must be POST", custom_id)
    url, body = fields["url"], fields["body"]
    if url not in URLS:
        raise LineError("invalid_url", f"its url is {short_repr(url)}; it must be {' or '.join(URLS)}", custom_id)
    if not isinstance(body, dict):
        raise LineError("invalid_request", "its body must be a JSON object", custom_id)
    if body.get("stream"):
        raise LineError("invalid_request", "its body has stream, which a file has no use for", custom_id)
    return Line(line_id, custom_id, url, body)


def _kind(value: object) -> str:
    """What a JSON value is, and the beginning of it."""
    kinds = {str: "a text", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else f"{kinds[type(value)]}, {short_repr(value)}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")
