"""The OpenAPI document of the server, from the tables of fields that bodies are checked by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral import __version__
from mistral.serve.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, Kind

_GET = {
    "/health": "Whether the engine works",
    "/metrics": "Counts, for Prometheus",
    "/v1/models": "The model that is served",
}
_POST: dict[str, tuple[str, Mapping[str, Kind], tuple[str, ...]]] = {
    "/v1/completions": ("Continue prompts", COMPLETION, ("prompt",)),
    "/v1/chat/completions": ("Answer a conversation", CHAT, ("messages",)),
    "/tokenize": ("Ids of a text or a conversation", TOKENIZE, ()),
    "/detokenize": ("Text of ids", DETOKENIZE, ("tokens",)),
}
_STATUS = {
    "200": "Done",
    "400": "Something in the body cannot be",
    "401": "The key is missing or wrong",
    "403": "The Host or Origin is not allowed",
    "404": "No such model",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "429": "Too many requests wait",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    answers = {status: {"description": text} for status, text in _STATUS.items()}
    paths: dict[str, Any] = {path: {"get": {"summary": text, "responses": answers}} for path, text in _GET.items()}
    for path, (text, fields, required) in _POST.items():
        schema = {
            "type": "object",
            "properties": {name: kind.schema for name, kind in fields.items()},
            "required": list(required),
            "additionalProperties": False,
        }
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": text, "requestBody": body, "responses": answers}}
    info = {"title": "A Mistral model", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths}
