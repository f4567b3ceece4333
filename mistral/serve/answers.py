"""What the server answers, in OpenAI's form: choices as their tokens come, usage, log-probabilities.

Knows nothing about HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mistral.chat.messages import ToolCall
from mistral.chat.tools import Part, ToolReader, Unread
from mistral.detokenizer import Detokenizer, whole_characters
from mistral.grammar import Constraint
from mistral.sampling_params import SamplingParams
from mistral.serve.protocol import Asked, Served
from mistral.serve.words import Numbers, Words
from mistral.serve.worker import Event, Job
from mistral.thinking import ThoughtReader

LEAST = -9999.0  # for a log-probability of minus infinity, which JSON has no word for


def _plain(logprob: float) -> float:
    return max(logprob, LEAST)


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability (None where nothing comes before it) and the most likely ones."""

    id: int
    logprob: float | None
    top: Mapping[int, float]


@dataclass
class Piece:
    """What an event adds to a choice."""

    text: str = ""
    thought: str = ""  # what the model thinks before it answers
    tokens: list[Scored] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # generated ones
    finish: str | None = None
    offsets: list[int] = field(default_factory=list)  # of the tokens, in the choice's text
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # why text that began as a call is none
    problem: str | None = None  # why a text does not fit the format that it must

    def add(self, part: Part) -> None:
        """Put a part of an answer with functions behind what there is."""
        if isinstance(part, ToolCall):
            self.calls.append(part)
        elif isinstance(part, Unread):
            self.text += part.text
            self.errors.append(part.reason)
        else:
            self.text += part


class Choice:
    """One sample of one prompt, from its events.

    Args:
        index: its number in the answer.
        job: of which the events come.
        asked, served: what was asked for, of whom.
        text: of the prompt, where it is echoed and was given as text.
    """

    def __init__(self, index: int, job: Job, asked: Asked, served: Served, text: str | None) -> None:
        self.index, self.job = index, job
        self._asked, self._served, self._prompt = asked, served, text
        self._begun = False
        self._told = 0  # calls in deltas so far
        self._length = 0  # of the text so far
        self.generated = self.thought_tokens = 0
        ids = served.chats().thought_ids if asked.chat else None
        self._thoughts = ThoughtReader(ids, job.prompt_ids)
        tools = asked.tools
        self._reader = ToolReader(tools.form, tools.tools, tools.most) if tools else None

    def take(self, event: Event) -> Piece:
        """What an event adds; the first one brings the echo of the prompt along."""
        piece = Piece(finish=event.finish)
        if not self._begun:
            self._begun = True
            if self._asked.echo:
                self._echo(piece)
        if event.token is not None:
            token = event.token
            piece.tokens.append(Scored(token.id, token.logprob, token.top))
            piece.offsets.append(self._length)
            piece.ids.append(token.id)
            self.generated += 1
        processor, request = self.job.params.logits_processor, self.job.request
        if event.last and request is not None and isinstance(processor, Constraint):
            piece.problem = processor.problem(request.output_ids)
        if self._is_thought(event):
            piece.thought = event.text
            self.thought_tokens += event.token is not None
            event = replace(event, text="")
        if self._reader is None:
            piece.text += event.text
        else:
            self._read(self._reader, event, piece)
        self._length += len(event.text)
        return piece

    def _is_thought(self, event: Event) -> bool:
        """Whether an event's text is thought. A thought ends where a call begins, whether it says so or not."""
        if event.token is None:
            return self._thoughts.take(None)
        calls = self._asked.tools is not None and event.token.id in self._asked.tools.markers
        return self._thoughts.take(event.token.id, ends=calls)

    def _read(self, reader: ToolReader, event: Event, piece: Piece) -> None:
        """Text and calls of an answer that may call functions."""
        assert self._asked.tools is not None
        marker = self._asked.tools.markers.get(event.token.id) if event.token is not None else None
        parts = reader.push(event.text, marker)
        if event.last:
            parts += reader.end()
        for part in parts:
            piece.add(part)
        if piece.finish == "stop" and reader.calls:
            piece.finish = "tool_calls"

    def _echo(self, piece: Piece) -> None:
        tokenizer, ids, request = self._served.tokenizer, self.job.prompt_ids, self.job.request
        # Bytes at its end that may be part of a character come with what is generated.
        piece.text = whole_characters(tokenizer.decode(ids) if self._prompt is None else self._prompt)
        self._length = len(piece.text)
        if self._asked.logprobs is None or request is None:
            return
        decoder, at = Detokenizer(tokenizer), 0
        tops = request.prompt_top or [{}] * (len(ids) - 1)
        scores = zip(ids, [None, *request.prompt_logprobs], [{}, *tops], strict=True)
        for token, logprob, top in scores:
            piece.tokens.append(Scored(token, logprob, top))
            piece.offsets.append(at)
            at += len(decoder.push(token))

    def called(self, piece: Piece) -> dict[str, Any]:
        """The fields of a delta beside its content: a thought, and calls, of which each is whole."""
        begin, self._told = self._told, self._told + len(piece.calls)
        fields = {name: value for name, value in _said(piece).items() if name != "content"}
        if "tool_calls" in fields:
            fields["tool_calls"] = [{"index": begin + i, **call} for i, call in enumerate(fields["tool_calls"])]
        return fields

    def prompt_logprobs(self) -> list[Any] | None:
        """As vLLM has them: for each token of the prompt the most likely ones and itself, by id; None for the first."""
        request, most = self.job.request, self._asked.prompt_logprobs
        if most is None or request is None:
            return None
        tops = request.prompt_top or [{}] * len(request.prompt_logprobs)
        found: list[Any] = [None]
        for token, logprob, top in zip(request.prompt_ids[1:], request.prompt_logprobs, tops, strict=True):
            ranks = {i: rank for rank, i in enumerate(top, 1)}
            shown = {**dict(list(top.items())[:most]), token: logprob}
            found.append(
                {
                    str(i): {
                        "logprob": _plain(value),
                        "rank": ranks.get(i),
                        "decoded_token": self._served.words.text(i),
                    }
                    for i, value in shown.items()
                }
            )
        return found


class Answer:
    """The choices of a request, and the documents made of them.

    Args:
        asked, served: what was asked for, of whom.
        tell: what a job of choice i tells its events to.
    """

    def __init__(self, asked: Asked, served: Served, tell: Callable[[int], Callable[[Event], None]]) -> None:
        self.asked, self.served = asked, served
        self.choices: list[Choice] = []
        for ids, text in zip(asked.prompts, asked.texts, strict=True):
            for sample in range(asked.params.n):
                index = len(self.choices)
                job = Job(ids, _params(asked), asked.eos_ids, tell(index), sample, asked.score, trim=asked.chat)
                thoughts = served.chats().thought_ids if asked.chat else None
                marks = () if thoughts is None else (thoughts.begin, thoughts.end)
                job.markers = {*marks, *(asked.tools.markers if asked.tools else ())}
                job.adapter = asked.adapter
                self.choices.append(Choice(index, job, asked, served, text))
        self._words = Numbers(served.words) if asked.return_tokens_as_token_ids else served.words
        self._head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": asked.adapter or served.name,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens: of each prompt once, of every sample."""
        n = self.asked.params.n
        prompt, made = sum(map(len, self.asked.prompts)), sum(choice.generated for choice in self.choices)
        thought = sum(choice.thought_tokens for choice in self.choices)
        firsts = range(0, len(self.choices), n)
        cached = sum(max(choice.job.cached for choice in self.choices[i : i + n]) for i in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}),
        }

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The document of an answer that is not streamed, from all pieces of each choice."""
        choices = []
        for choice, its in zip(self.choices, pieces, strict=True):
            joined = _joined(its)
            one = self._choice(choice, joined)
            if self.asked.chat:
                one["message"] = {"role": "assistant", "refusal": None, **_said(joined)}
            else:
                one["text"] = joined.text
            choices.append(one | self._ids(choice, joined) | self._of_prompt(choice))
        kind = "chat.completion" if self.asked.chat else "text_completion"
        whole = {**self._head, "object": kind, "choices": choices, "usage": self.usage()}
        if self.asked.chat and self.asked.return_token_ids:
            whole["prompt_token_ids"] = self.asked.prompts[0]
        if self.asked.chat and self.asked.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self.choices[0].prompt_logprobs()
        return whole

    def chunk(self, choice: Choice, piece: Piece, first: bool) -> dict[str, Any] | None:
        """The document of a piece, where answers are streamed; None if it has nothing to say yet."""
        told = piece.tokens and (self.asked.logprobs is not None or self.asked.return_token_ids)
        if not (piece.text or piece.thought or piece.calls or piece.finish or told or first):
            return None
        one = self._choice(choice, piece)
        if self.asked.chat:
            role = {"role": "assistant"} if first else {}
            one["delta"] = role | ({"content": piece.text} if piece.text or first else {}) | choice.called(piece)
        else:
            one["text"] = piece.text
        one |= self._ids(choice, piece, first) | (self._of_prompt(choice) if first else {})
        return self._part([one])

    def last_chunk(self) -> dict[str, Any]:
        """The document that has the usage, and no choice."""
        return {**self._part([]), "usage": self.usage()}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        part = {**self._head, "object": kind, "choices": choices}
        usage = self.usage() if self.asked.usage_in_each else None
        return {**part, "usage": usage} if self.asked.include_usage else part

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        one: dict[str, Any] = {"index": choice.index, "finish_reason": piece.finish, "logprobs": None}
        if self.asked.logprobs is not None and piece.tokens:
            shape = _chat_logprobs if self.asked.chat else _completion_logprobs
            one["logprobs"] = shape(piece, self.asked.logprobs, self._words)
        return one if piece.problem is None else {**one, "format_error": piece.problem}

    def _ids(self, choice: Choice, piece: Piece, first: bool = True) -> dict[str, Any]:
        if not self.asked.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": choice.job.prompt_ids} if first and not self.asked.chat else {}
        return {"token_ids": piece.ids, **prompt}

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        if self.asked.chat or self.asked.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": choice.prompt_logprobs()}


def _params(asked: Asked) -> SamplingParams:
    """How one sample is continued: a grammar's constraint is its own."""
    return asked.params if asked.grammar is None else replace(asked.params, logits_processor=asked.grammar.constraint())


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    return Piece(
        "".join(p.text for p in pieces),
        "".join(p.thought for p in pieces),
        [t for p in pieces for t in p.tokens],
        [i for p in pieces for i in p.ids],
        pieces[-1].finish,
        [at for p in pieces for at in p.offsets],
        [call for p in pieces for call in p.calls],
        [error for p in pieces for error in p.errors],
        pieces[-1].problem,
    )


def _said(piece: Piece) -> dict[str, Any]:
    """Content, thought and calls of a message."""
    said: dict[str, Any] = {"content": piece.text if piece.text or not piece.calls else None}
    if piece.thought:
        said["reasoning_content"] = piece.thought
    if piece.calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in piece.calls]
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(piece.calls, functions, strict=True)
        ]
    return said | ({"tool_call_error": "; ".join(piece.errors)} if piece.errors else {})


def _completion_logprobs(piece: Piece, most: int, words: Words | Numbers) -> dict[str, Any]:
    tops: list[dict[str, float] | None] = []
    for token in piece.tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        shown: dict[str, float] = {}
        for i, logprob in [*list(token.top.items())[:most], (token.id, token.logprob)]:
            shown.setdefault(words.text(i), _plain(logprob))
        tops.append(shown)
    return {
        "tokens": [words.text(token.id) for token in piece.tokens],
        "token_logprobs": [None if token.logprob is None else _plain(token.logprob) for token in piece.tokens],
        "top_logprobs": tops,
        "text_offset": piece.offsets,
    }


def _chat_logprobs(piece: Piece, most: int, words: Words | Numbers) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, encoded = words.of(token)
        return {"token": text, "logprob": _plain(logprob), "bytes": encoded}

    return {
        "content": [
            {
                **entry(token.id, token.logprob or 0.0),
                "top_logprobs": [entry(i, logprob) for i, logprob in list(token.top.items())[:most]],
            }
            for token in piece.tokens
        ],
        "refusal": None,
    }
