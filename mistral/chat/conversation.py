"""A conversation: its messages, and a cache that is never told more than it needs.

Knows nothing about terminals or files. The ids of the whole conversation are worked out again for every
answer; what the cache holds of them already is kept, whatever has happened in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch

from mistral.adapters import find_adapter
from mistral.chat.messages import Message, TemplateError, behind
from mistral.chat.templates import Template, check_effort, ends_of
from mistral.chat.thinking import add_thought
from mistral.detokenizer import Detokenizer
from mistral.engine import LESS, Progress
from mistral.generate import Piece, stream
from mistral.model import Transformer
from mistral.request import GenerationError, check_params, common_prefix, require_model
from mistral.sampling_params import LARGEST, SamplingParams
from mistral.tokenizer import Tokenizer, outside, require_tokenizer
from mistral.util import memory
from mistral.util.arguments import require_kind
from mistral.util.english import counted
from mistral.util.errors import printable, short_repr
from mistral.util.flat import flat


class Chat:
    """A conversation with a model.

    Args:
        model: the model.
        tokenizer: decodes.
        template: says what surrounds a turn.
        system: the system prompt; "" is none. A `Message` may have thoughts in it, and one without text is an empty
            prompt, for templates that have a prompt of their own where there is none.
        effort: `reasoning_effort`, for templates that have a place for it.
        adapter: the one that answers are computed with, as `stream` takes it.
        chunk_size: see `stream`.
        params: how questions are answered; its fields may also be given by name (`temperature=0`). Answer n draws
            with seed + n; without a seed, one is drawn for the conversation.

    Attributes:
        messages: the conversation, without the system prompt; may be changed between answers.
        seed: what answers draw with; `params.seed` is not looked at again. The largest is followed by the smallest.
        answers: how many were begun, those that were undone included.
        prefilled_tokens, cached_tokens: of the last prompt, those that the model processed, and those that the cache
            held already.

    Raises:
        ValueError: a subclass that names what cannot be.
    """

    @flat(params=SamplingParams())
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: Template,
        *,
        system: str | Message = "",
        effort: str | None = None,
        adapter: str | None = None,
        chunk_size: int | None = None,
        params: SamplingParams,
    ) -> None:
        require_model(model)
        require_tokenizer(tokenizer)
        if not hasattr(template, "encode_chat"):
            advice = "it must be what find_template(tokenizer, folder=loaded.templates) gives"
            raise TemplateError(f"template is {short_repr(template)}; {advice}")
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self._system = _system_message(system)
        self.effort, self._adapter = effort, adapter
        self._thought_end = None if template.thought_ids is None else template.thought_ids.end
        self.chunk_size = chunk_size
        self.seed = int(torch.randint(2**53, (), device="cpu")) if params.seed is None else params.seed
        self.messages: list[Message] = []
        self.answers = 0
        self.prefilled_tokens = self.cached_tokens = 0
        self._held: list[int] = []
        self._open: weakref.ref[Generator[Piece, None, None]] | None = None  # the answer that was begun last
        self._cache = model.make_cache(1)
        self.params = params
        probe = self._encode([Message("user", "")])  # refuses a system prompt that has no place
        if (what := outside(probe, tokenizer, model.args.vocab_size)) is not None:
            raise TemplateError(f"template {template.name} has {what}: it is for other models")

    def __repr__(self) -> str:
        return f"<Chat of {counted(len(self.messages), 'message')}: template {printable(self.template.name)}>"

    @property
    def system(self) -> str:
        """The system prompt, without thoughts."""
        return "" if self._system is None else self._system.content

    @property
    def system_message(self) -> Message | None:
        """The system prompt, if there is one; it may be empty."""
        return self._system

    @property
    def messages(self) -> list[Message]:
        """The conversation, without the system prompt; may be changed, or replaced by another list.

        Raises:
            TemplateError: what it is replaced by is no list of messages.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Message) for message in messages):
            raise TemplateError(f"messages is {short_repr(messages)}; it must be a list of Message(role, content)")
        self._messages = list(messages)

    @property
    def params(self) -> SamplingParams:
        """How questions are answered."""
        return self._params

    @params.setter
    def params(self, params: SamplingParams) -> None:
        self.check(params)
        self._params = params

    def check(self, params: SamplingParams) -> None:
        """Refuse parameters with which no question could be answered.

        Raises:
            GenerationError: more than one answer, or an id that the vocabulary lacks.
            OutOfMemory: keys and values of so many tokens do not fit.
        """
        require_kind("params", params, SamplingParams, error=GenerationError)
        if params.n > 1:
            raise GenerationError(f"n is {params.n}; a conversation has one answer to a question")
        check_params(params, self.model.args.vocab_size)
        needed = self.model.cache_bytes(params.max_tokens) - self._cache.nbytes
        what = f"keys and values of an answer of {params.max_tokens} tokens"
        memory.require(max(0, needed), self.model.device, what, LESS)

    @property
    def adapter(self) -> str | None:
        """The adapter that answers are computed with."""
        return self._adapter

    def set_adapter(self, name: str | None) -> None:
        """Answer with another adapter from now on; what the cache holds was computed with the one before.

        Raises:
            UsageError: the model has no such adapter.
        """
        find_adapter(self.model.adapters, name)
        self._end_answer()
        if name != self._adapter:
            self._adapter, self._held = name, []

    def set_effort(self, effort: str | None) -> None:
        """Change the effort, for the conversation so far too.

        Raises:
            TemplateError: the template has no place for it.
        """
        check_effort(self.template, effort)
        self.effort = effort

    def answer(self, question: str, progress: Progress | None = None) -> Iterator[Piece]:
        """Answer a question, handing out text as it is made, without the space that some tokenizers put first. Thoughts
        are pieces with `thought`.

        Question and answer join the conversation when the iterator ends, is closed or is broken off; a question of
        whose answer no token was made does not. Whatever else is asked of the conversation ends it.

        Args:
            progress: see `stream`.

        Raises:
            ValueError: a subclass that names what cannot be; the conversation is as before.
        """
        asked = Message("user", _text(question, "a question"))
        self._end_answer()
        ids = self._encode([*self.messages, asked])
        return self._opened(self._answer([asked], Message("assistant", ""), ids, self._stream(ids, progress)))

    def _opened(self, answer: Generator[Piece, None, None]) -> Iterator[Piece]:
        self._open = weakref.ref(answer)
        return answer

    def _end_answer(self) -> None:
        """End an answer that somebody has not read to its end: there is one cache, and one order of messages."""
        answer = None if self._open is None else self._open()
        if answer is not None:
            answer.close()

    def _stream(self, ids: list[int], progress: Progress | None) -> Iterator[Piece]:
        """Continue ids; what the cache holds of them already is not processed again."""
        self.cached_tokens = self._cache.rewind(0, common_prefix(self._held, ids[:-1]))
        self.prefilled_tokens = len(ids) - self.cached_tokens
        self._held = ids[: self.cached_tokens]
        pieces = stream(
            [ids],
            self.model,
            self.tokenizer,
            params=replace(self.params, seed=self._next_seed()),
            chunk_size=self.chunk_size,
            eos_ids=ends_of(self.tokenizer, self.template),
            cache=self._cache,
            progress=progress,
            adapter=self._adapter,
            thoughts=self.template.thought_ids,
        )
        self.answers += 1
        return pieces

    def _next_seed(self) -> int:
        span = 2 * LARGEST + 1
        return (self.seed + self.answers + LARGEST) % span - LARGEST

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation behind the system prompt."""
        return self.template.encode_chat(behind(self._system, messages), effort=self.effort)

    def _answer(
        self,
        asked: list[Message],
        answer: Message,
        ids: list[int],
        pieces: Iterator[Piece],
        instead_of: Message | None = None,
    ) -> Generator[Piece, None, None]:
        """Hand out the pieces of an answer, which joins the conversation at the end, what was asked before it.

        One that is gone on with leaves when this is begun: an iterator that nobody reads changes nothing.
        """
        if instead_of is not None and self.messages[-1:] and self.messages[-1] is instead_of:
            self.messages.pop()
        made = answer.ids = answer.ids or []
        ended = False
        try:
            for piece in pieces:
                if piece.token:
                    made.append(piece.token.id)
                text = piece.text
                if piece.thought:
                    add_thought(answer, text, closed=piece.token is not None and piece.token.id == self._thought_end)
                elif not answer.content and text[:1] == " " and self.tokenizer.decode(made)[:1] != " ":
                    text = text[1:]  # as decode has it: a SentencePiece text begins without its first space
                answer.content += "" if piece.thought else text
                ended = ended or piece.finish_reason is not None
                yield replace(piece, text=text)
        finally:
            # Its length moves only with whole steps, so this is true after an interruption too.
            self._held = (ids + made)[: self._cache.lengths[0]]
            if made or ended:
                self.messages += [*asked, answer]

    def resume(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Go on with the last answer, where it stopped; text, as `answer` gives it. A stop string that ended it, which
        the model has written, comes first.

        Raises:
            ValueError: a subclass that names what cannot be; the conversation is as before.
        """
        self._end_answer()
        if not self.messages or self.messages[-1].role != "assistant":
            raise GenerationError("there is no answer to go on with")
        last = self.messages[-1]
        if last.ids is None and last.thinking:
            raise GenerationError("an answer with a thought of which only the text is known cannot be gone on with")
        made = self.tokenizer.encode(last.content, bos=False) if last.ids is None else last.ids
        ids = [*self._encode(self.messages[:-1]), *made]
        begun = replace(last, ids=list(made))
        again = Detokenizer(self.tokenizer, ids).flush()
        _take_back(begun, again)
        pieces = self._stream(ids, progress)
        if untold := self._untold(begun, again):
            pieces = chain([Piece(0, untold, None)], pieces)
        prompt = ids[: len(ids) - len(made)]
        return self._opened(self._answer([], begun, prompt, pieces, instead_of=last))

    def _untold(self, answer: Message, again: str) -> str:
        """What an answer's ids say behind its content: the stop string that ended it, or what may have become one.

        Args:
            again: the end of the text of the ids that will be told again.
        """
        made = answer.ids or []
        if answer.thinking and answer.thinking[-1].closed and self._thought_end in made:
            made = made[len(made) - made[::-1].index(self._thought_end) :]
        elif answer.thinking:
            return ""
        text = self.tokenizer.decode(made).removesuffix(again)
        return text[len(answer.content) :] if text.startswith(answer.content) else ""

    def undo(self) -> Message:
        """Drop the last question and its answer, and return the question.

        Raises:
            GenerationError: there is none.
        """
        self._end_answer()
        last = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=None)
        if last is None:
            raise GenerationError("there is nothing to undo")
        question = self.messages[last]
        del self.messages[last:]
        return question

    def reset(self) -> None:
        """Begin a new conversation, with the same system prompt."""
        self._end_answer()
        self.messages.clear()

    def set_system(self, system: str | Message) -> None:
        """Change the system prompt, for the conversation so far too; "" is none, an empty `Message` an empty prompt.

        Raises:
            TemplateError: the template has no place for one.
        """
        message = _system_message(system)
        self._end_answer()
        self.template.encode_chat(behind(message, [Message("user", "")]))
        self._system = message


def _take_back(answer: Message, end: str) -> None:
    """Drop the bytes of a character that is not whole from the end of an answer: what goes on tells them again."""
    if answer.thinking and not answer.thinking[-1].closed:
        last = answer.thinking[-1]
        answer.thinking = (*answer.thinking[:-1], replace(last, text=last.text.removesuffix(end)))
    else:
        answer.content = answer.content.removesuffix(end)


def _system_message(given: str | Message) -> Message | None:
    if isinstance(given, Message):
        return given
    return Message("system", given) if _text(given, "a system prompt") else None


def _text(given: object, what: str) -> str:
    if not isinstance(given, str):
        raise GenerationError(f"{what} is text, and not {short_repr(given)}")
    return given
