"""Conversations: only what is new is taken in, and every answer is that of a fresh conversation with the same turns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.chat.conversation import Chat, _take_back
from mistral.chat.messages import Message, TemplateError, Thought
from mistral.chat.templates import find_template
from mistral.formats.folder import BUNDLED
from mistral.model import Transformer
from mistral.request import GenerationError
from mistral.tokenizer import Tokenizer
from mistral.util.errors import MistralError, UsageError
from tests.support.tiny import tiny_args, tiny_model

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"
OPTIONS = {"temperature": 0, "max_tokens": 6}
WINDOWS: tuple[Any, ...] = (None, 5, 40, (None, 6))


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return Tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3")


def make_chat(words: Tokenizer, window: Any = 5, model_seed: int = 0, **options: Any) -> Chat:
    args = tiny_args(vocab_size=words.n_words, sliding_window=window)
    return Chat(tiny_model(args, model_seed), words, find_template(words), **{**OPTIONS, **options})


def ask(chat: Chat, question: str) -> str:
    return "".join(piece.text for piece in chat.answer(question))


def watched(model: Transformer) -> list[list[int]]:
    """The ids of each step from now on."""
    steps: list[list[int]] = []
    step = model.step
    model.step = lambda ids, *rest: (steps.append(ids.tolist()), step(ids, *rest))[1]  # type: ignore
    return steps


@pytest.mark.parametrize("window", WINDOWS)
def test_a_new_turn_takes_in_only_what_is_new(v1: Tokenizer, window: Any) -> None:
    chat = make_chat(v1, window)
    steps = watched(chat.model)
    for question in ("Who are you?", "Where do you live?", "And when?"):
        before = chat.template.encode_chat(chat.messages) if chat.messages else []
        steps.clear()
        ask(chat, question)
        ids = chat.template.encode_chat(chat.messages[:-1])
        assert repr(chat) == f"<Chat of {len(chat.messages)} messages: template v1>"
        (first, *others), made = steps, chat.messages[-1].ids
        assert (chat.messages[-2], made is None) == (Message("user", question), False)
        # The last token of an answer was made and never taken in; with eos after it, that makes two.
        assert first == ids[max(0, len(before) - 2) :]
        assert (chat.prefilled_tokens, chat.cached_tokens) == (len(first), len(ids) - len(first))
        assert others == [[i] for i in made[: len(made) - (len(made) == 6)]]  # type: ignore[index]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happened_an_answer_is_that_of_a_fresh_conversation(v1: Tokenizer, window: Any, seed: int) -> None:
    dice = random.Random(seed)
    chat = make_chat(v1, window, seed)
    words = ["king", "queen", "wolf", "forest", "gold", "three", "little", "daughter", "who", "where"]
    for _ in range(14):
        act = dice.choice(["ask"] * 5 + ["undo", "undo", "system", "reset"])
        if act == "undo" and chat.messages:
            chat.undo()
        elif act == "system":
            chat.set_system(" ".join(dice.sample(words, dice.randint(0, 3))))
        elif act == "reset" and dice.random() < 0.3:
            chat.reset()
        else:
            question = " ".join(dice.choices(words, k=dice.randint(1, 8)))
            fresh = Chat(chat.model, v1, chat.template, system=chat.system, **OPTIONS)  # type: ignore[arg-type]
            fresh.messages = list(chat.messages)
            assert ask(chat, question) == ask(fresh, question)
            assert chat.messages == fresh.messages
            assert fresh.cached_tokens == 0
            assert chat.prefilled_tokens + chat.cached_tokens == fresh.prefilled_tokens


def test_the_system_prompt_of_v3_moves_with_the_turns(v3: Tokenizer) -> None:
    chat = make_chat(v3, None, system="Be brief.")
    ask(chat, "Hi")
    first = chat.prefilled_tokens
    ask(chat, "Bye")
    assert chat.cached_tokens == 2  # bos and [INST]: what follows was the system prompt, and is the question now
    assert first == len(chat.template.encode_chat([Message("system", "Be brief."), Message("user", "Hi")]))
    chat.set_system("")
    ask(chat, "More")
    fresh = Chat(chat.model, v3, chat.template, **OPTIONS)  # type: ignore[arg-type]
    fresh.messages = chat.messages[:-2]
    ask(fresh, "More")
    assert fresh.messages == chat.messages


@pytest.mark.parametrize("file", ["tokenizer.model.v1", "tekken_240718.json"])
def test_the_text_that_streams_is_the_text_of_the_ids(file: str) -> None:
    words = Tokenizer(DATA / file)
    chat = make_chat(words, temperature=2.0, top_p=1.0, seed=5, max_tokens=25)
    for question in ("Hi", "Bye", "Hm"):
        assert ask(chat, question) == chat.messages[-1].content == words.decode(chat.messages[-1].ids or [])


def test_an_answer_draws_with_its_own_seed(v1: Tokenizer) -> None:
    chat, again = (make_chat(v1, temperature=1.0, seed=7) for _ in range(2))
    texts = [ask(chat, "Hi"), ask(chat, "Hi")]
    chat.undo()
    texts.append(ask(chat, "Hi"))  # another try at the same question
    assert len(set(texts)) == 3
    again.answers = 2
    again.messages = chat.messages[:2]
    assert ask(again, "Hi") == texts[2]
    assert chat.answers == 3


# --- answers that end early


class Breaks(Exception):
    pass


def interrupted(chat: Chat, question: str, how: str) -> None:
    """An answer that ends in the middle: after some tokens, or within a step."""
    if how == "between steps":

        def stop(taken: int, total: int) -> None:
            if chat._cache.lengths[0] > total:
                raise Breaks

        with pytest.raises(Breaks):
            list(chat.answer(question, stop))
    elif how == "within a step":
        layer, calls = chat.model.layers[1], []
        forward = layer.forward

        def broken(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append(len(x))
            if len(calls) == 3:
                raise Breaks
            return forward(x, *rest)

        layer.forward = broken
        with pytest.raises(Breaks):
            list(chat.answer(question))
        layer.forward = forward
    else:
        pieces: Iterator[Any] = chat.answer(question)
        next(pieces)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["between steps", "within a step", "closed"])
@pytest.mark.parametrize("window", [None, 5])
def test_an_answer_that_was_broken_off_stays_as_far_as_it_came(v1: Tokenizer, window: Any, how: str) -> None:
    chat = make_chat(v1, window)
    ask(chat, "Who are you?")
    interrupted(chat, "Where do you live?", how)
    assert len(chat.messages) == 4
    assert 0 < len(chat.messages[3].ids or []) < 6
    fresh = Chat(chat.model, v1, chat.template, **OPTIONS)  # type: ignore[arg-type]
    fresh.messages = list(chat.messages)
    assert ask(chat, "And when?") == ask(fresh, "And when?")
    assert (chat.cached_tokens > 0) == (how != "within a step")  # a broken step takes the cache with it


@pytest.mark.parametrize("then", ["answer", "resume", "undo", "reset", "set_system", "set_adapter"])
def test_whatever_is_asked_ends_an_answer_that_nobody_reads_on(v3: Tokenizer, then: str) -> None:
    """Two answers at once would write their keys into one cache, and join the conversation in another order."""
    chat = make_chat(v3)
    open_one = chat.answer("Who are you?")
    begun = next(open_one).text
    if then == "answer":
        ask(chat, "Where do you live?")
        assert [m.content for m in chat.messages][:3] == ["Who are you?", begun, "Where do you live?"]
    elif then == "resume":
        assert "".join(piece.text for piece in chat.resume())
        assert [m.role for m in chat.messages] == ["user", "assistant"]
    elif then == "undo":
        assert chat.undo().content == "Who are you?"
        assert chat.messages == []
    elif then == "reset":
        chat.reset()
        assert chat.messages == []
    elif then == "set_system":
        chat.set_system("Be brief.")
    else:
        chat.set_adapter(None)
    assert list(open_one) == []
    fresh = make_chat(v3, system=chat.system)
    fresh.messages = list(chat.messages)
    fresh.answers, fresh.seed = chat.answers, chat.seed
    assert ask(chat, "And when?") == ask(fresh, "And when?")


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_an_answer_that_goes_on_has_the_text_of_its_ids(v1: Tokenizer, most: int) -> None:
    """Cut within a character, its bytes came out as U+FFFD, which a template that writes texts put into the prompt."""
    text = "a永🙂 日"
    wanted = [*v1.encode(text, bos=False), v1.eos_id]

    def give(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        begun.append(len(prompt))
        forced = torch.full_like(logits, -torch.inf)
        forced[wanted[len(prompt) + len(output) - begun[0]]] = 0
        return forced

    begun: list[int] = []
    whole = make_chat(v1, max_tokens=len(wanted), logits_processor=give)
    assert ask(whole, "Who are you?") == text
    begun.clear()
    chat = make_chat(v1, max_tokens=most, logits_processor=give)
    pieces = [ask(chat, "Who are you?")]
    while len(chat.messages[-1].ids or []) < len(wanted) - 1:
        pieces.append("".join(piece.text for piece in chat.resume()))
    assert any("\ufffd" in piece for piece in pieces)
    assert chat.messages == whole.messages


def test_a_thought_that_goes_on_is_told_without_its_broken_end() -> None:
    answer = Message("assistant", "\ufffd", thinking=(Thought("so\ufffd", closed=False),))
    _take_back(answer, "\ufffd")
    assert (answer.content, answer.thinking[0].text) == ("\ufffd", "so")
    closed = Message("assistant", "so\ufffd", thinking=(Thought("\ufffd"),))
    _take_back(closed, "\ufffd")
    assert (closed.content, closed.thinking[0].text) == ("so", "\ufffd")


def test_going_on_that_nobody_reads_loses_nothing(v3: Tokenizer) -> None:
    chat = make_chat(v3)
    ask(chat, "Who are you?")
    before = [replace(message) for message in chat.messages]
    chat.resume()
    assert chat.messages == before
    assert "".join(piece.text for piece in chat.resume())
    assert [m.role for m in chat.messages] == ["user", "assistant"]


def test_what_is_no_text_is_named(v1: Tokenizer) -> None:
    chat: Any = make_chat(v1)
    with pytest.raises(GenerationError, match="a question is text, and not None"):
        chat.answer(None)
    with pytest.raises(GenerationError, match="a system prompt is text, and not 5"):
        chat.set_system(5)
    with pytest.raises(UsageError, match="no adapter is called 'x'"):
        chat.set_adapter("x")
    with pytest.raises(UsageError, match=r"params is \{'max_tokens': 3\}; it must be SamplingParams"):
        make_chat(v1, params={"max_tokens": 3})


def test_a_question_without_an_answer_is_none(v1: Tokenizer) -> None:
    chat = make_chat(v1)

    def stop(taken: int, total: int) -> None:
        raise Breaks

    with pytest.raises(Breaks):
        list(chat.answer("Who are you?", stop))
    assert chat.messages == []
    assert ask(chat, "Who are you?") == ask(make_chat(v1), "Who are you?")


def test_an_answer_may_be_empty(v1: Tokenizer) -> None:
    chat = make_chat(v1)
    with torch.no_grad():
        chat.model.output.weight.zero_()
        chat.model.norm.weight.fill_(1)
    chat.model.logits = lambda h: torch.nn.functional.one_hot(  # type: ignore[method-assign]
        torch.full((len(h),), v1.eos_id), v1.n_words
    ).float()
    assert ask(chat, "Hi") == ""
    assert chat.messages == [Message("user", "Hi"), Message("assistant", "", [])]
    ask(chat, "Bye")
    assert chat.cached_tokens == len(chat.template.encode_chat([Message("user", "Hi")]))


def test_stop_strings_end_an_answer(v1: Tokenizer) -> None:
    text = ask(make_chat(v1, max_tokens=12), "Who are you?")
    stop = text[3:5]
    chat = make_chat(v1, max_tokens=12, stop=[stop])
    assert ask(chat, "Who are you?") == text[: text.index(stop)] == chat.messages[1].content
    ask(chat, "More")
    fresh = make_chat(v1, max_tokens=12, stop=[stop])
    fresh.messages = chat.messages[:2]
    ask(fresh, "More")
    assert fresh.messages == chat.messages


# --- what cannot be


def test_errors_leave_the_conversation_as_it_was(v1: Tokenizer) -> None:
    chat = make_chat(v1)
    with pytest.raises(GenerationError, match="nothing to undo"):
        chat.undo()
    ask(chat, "Hi")
    messages = list(chat.messages)
    with pytest.raises(TemplateError, match="not valid Unicode"):
        chat.answer("\ud800")
    assert (chat.messages, chat.answers) == (messages, 1)
    fresh = make_chat(v1)
    fresh.messages = messages[:]
    assert ask(chat, "Bye") == ask(fresh, "Bye")


def test_templates_of_other_models(v1: Tokenizer) -> None:
    model = tiny_model(tiny_args(vocab_size=v1.n_words))
    lite = find_template(v1, name="mistrallite")
    with pytest.raises(TemplateError, match="has the id 32002, outside the vocabulary of 4096"):
        Chat(model, v1, lite)
    with pytest.raises(TemplateError, match="no place for a system prompt"):
        Chat(model, v1, lite, system="Be brief.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logit_bias": {99_999: 1}}, "logit_bias has the id 99999, outside the vocabulary of 4096"),
        ({"n": 2}, "n is 2; a conversation has one answer to a question"),
        ({"top_logprobs": 5000}, "top_logprobs is 5000; the vocabulary has only 4096 tokens"),
        ({"max_tokens": 10**15}, "keys and values of an answer of 1000000000000000 tokens need"),
    ],
)
def test_parameters_that_no_answer_could_have_are_refused_when_they_are_set(
    v1: Tokenizer, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(MistralError, match=said):
        make_chat(v1, None, **change)
    chat = make_chat(v1, None)
    before = chat.params
    with pytest.raises(MistralError, match=said):
        chat.params = replace(before, **change)
    assert chat.params is before
    assert ask(chat, "Hi")


def test_the_largest_seed_is_followed_by_the_smallest(v1: Tokenizer) -> None:
    largest = 2**63 - 1
    chat = make_chat(v1, seed=largest, temperature=5.0, top_p=1.0)
    ask(chat, "Hi")
    second = ask(chat, "And?")
    other = make_chat(v1, seed=-largest, temperature=5.0, top_p=1.0)
    other.messages = [replace(message) for message in chat.messages[:2]]
    assert ask(other, "And?") == second


@pytest.mark.parametrize("messages", [5, None, "Hi", ["Hi"], [{"role": "user", "content": "Hi"}]])
def test_messages_that_are_none_are_refused_when_they_are_set(v1: Tokenizer, messages: Any) -> None:
    chat = make_chat(v1, None)
    ask(chat, "Hi")
    before = list(chat.messages)
    with pytest.raises(TemplateError, match=r"^messages is .*; it must be a list of Message\(role, content\)$"):
        chat.messages = messages
    assert chat.messages == before
    chat.messages = before[:0]
    assert ask(chat, "Hi")
    chat.messages = tuple(before)
    assert chat.messages == before
    assert ask(chat, "And?")
