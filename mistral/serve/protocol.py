"""What bodies of requests mean: prompts as ids, and how each is continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mistral.chat.templates import Template, ends_of
from mistral.chat.tools import Tool
from mistral.grammar import Grammar, Grammars
from mistral.sampling_params import SamplingParams
from mistral.serve.fields import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    SAMPLING,
    TOKENIZE,
    ApiError,
    Kind,
    blamed,
    fields_of,
    is_ids,
    is_int,
    is_number,
)
from mistral.serve.formats import format_field, read_format, whole
from mistral.serve.tools import ToolUse, read_messages, read_tools
from mistral.serve.words import Words
from mistral.tokenizer import Tokenizer, outside
from mistral.util.errors import MistralError, short_repr

COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024  # generated where a request does not say
MOST_LOGPROBS = 20
MOST_PROMPTS = 256  # prompts times n of a request


@dataclass(frozen=True)
class Served:
    """The model that is served.

    Args:
        name: what clients call it.
        adapters: what they call it with each of the adapters beside its weights.
        tokenizer, words: of the model.
        template: of conversations; None where it has none.
        no_template: why not.
        windows: of each layer.
        vocab_size: of the model.
        context: the most positions of a sequence.
    """

    name: str
    adapters: tuple[str, ...]
    tokenizer: Tokenizer
    words: Words
    template: Template | None
    no_template: str
    windows: tuple[int | None, ...]
    vocab_size: int
    context: int
    _grammars: dict[frozenset[int], Grammars] = field(default_factory=dict, repr=False)

    def ends(self, chat: bool) -> frozenset[int]:
        """Ids that end a continuation."""
        return ends_of(self.tokenizer, self.chats() if chat else None)

    def grammars(self, chat: bool) -> Grammars:
        """What makes grammars of answers.

        Raises:
            MistralError: llguidance is missing.
        """
        ends = self.ends(chat)
        if ends not in self._grammars:
            self._grammars[ends] = Grammars(self.tokenizer, ends)
        return self._grammars[ends]

    def adapter_of(self, model: str | None) -> str:
        """The adapter that a model id means; "" for none. Without an id it is the only one, or none of several.

        Raises:
            ApiError: there is no such model.
        """
        if model is None:
            return self.adapters[0] if len(self.adapters) == 1 else ""
        if model in (self.name, *self.adapters):
            return "" if model == self.name else model
        here = ", ".join((self.name, *self.adapters))
        message = f"the model {short_repr(model)} is not here: {here} {'are' if self.adapters else 'is'}"
        raise ApiError(message, "model", status=404, code="model_not_found")

    def chats(self) -> Template:
        """The template.

        Raises:
            ApiError: there is none.
        """
        if self.template is None:
            raise ApiError(f"this model has no chat template: {self.no_template}; use /v1/completions")
        return self.template


@dataclass(frozen=True)
class Asked:
    """What a request for generated text asks for.

    Args:
        chat: whether it is a conversation.
        prompts, texts: ids of each prompt, and its text as it is echoed; None: what the ids decode to.
        params: how each is continued.
        adapter: the one that it is computed with; "" for none.
        eos_ids: ids that end a continuation.
        include_usage, usage_in_each: whether a stream ends with the usage, and has it in each of its parts.
        logprobs: alternatives to report at each token; None: no log-probabilities at all.
        prompt_logprobs: as vLLM has it, for the prompt; None: none.
        tools: what is said of functions; None: none is offered.
        grammar: what the answer must fit.
    """

    chat: bool
    prompts: list[list[int]]
    texts: list[str | None]
    params: SamplingParams
    eos_ids: frozenset[int]
    stream: bool = False
    include_usage: bool = False
    usage_in_each: bool = False
    echo: bool = False
    adapter: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    tools: ToolUse | None = None
    grammar: Grammar | None = None

    @property
    def score(self) -> bool:
        """Whether log-probabilities of the prompts are wanted."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)


def _given(body: Any, known: Mapping[str, Kind], served: Served) -> dict[str, Any]:
    """The fields of a body, for the model that is served."""
    given = fields_of(body, known)
    served.adapter_of(given.get("model"))
    return given


def read_completion(body: Any, served: Served) -> Asked:
    """What a body of /v1/completions asks for.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    given = _given(body, COMPLETION, served)
    if "prompt" not in given:
        raise ApiError("prompt is missing", "prompt")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise ApiError("best_of is not supported by this server: leave it out", "best_of", code="unsupported_field")
    if "suffix" in given and given.get("echo"):
        raise ApiError("suffix and echo: give one of them", "suffix")
    prompts, texts = _prompts(given, served)
    logprobs = given.get("logprobs")
    grammars = partial(served.grammars, False)
    with blamed(format_field(given)):
        rule = read_format(given, grammars)
        grammar = None if rule is None else whole(rule, grammars())
    most = given.get("max_tokens", COMPLETION_TOKENS)
    return _asked(given, served, prompts, texts, logprobs, most, chat=False, grammar=grammar)


def read_chat(body: Any, served: Served) -> Asked:
    """What a body of /v1/chat/completions asks for.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    given = _given(body, CHAT, served)
    if "messages" not in given:
        raise ApiError("messages is missing", "messages")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
    grammars = partial(served.grammars, True)
    with blamed(format_field(given)):
        rule = read_format(given, grammars)
    tools = read_tools(given, served.chats(), served.tokenizer, grammars, rule)
    ids = _conversation(given, served, tools.tools if tools else ())
    if given["messages"][-1].get("role") == "assistant":
        raise ApiError("the last message is an answer already: end with the user's", "messages")
    if "max_tokens" in given and given.get("max_completion_tokens", given["max_tokens"]) != given["max_tokens"]:
        raise ApiError("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    most = max(0, min(CHAT_TOKENS, served.context - len(ids))) if most is None else most
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    with blamed(format_field(given)):
        grammar = tools.grammar if tools else None if rule is None else whole(rule, grammars())
    return _asked(given, served, [ids], [None], logprobs, most, chat=True, tools=tools, grammar=grammar)


def read_tokenize(body: Any, served: Served) -> list[int]:
    """The ids of a text or of a conversation.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    given = _given(body, TOKENIZE, served)
    if ("prompt" in given) == ("messages" in given):
        raise ApiError("give prompt or messages", "prompt")
    if "prompt" in given:
        for name in sorted({"add_generation_prompt", "tools", "reasoning_effort"} & given.keys()):
            raise ApiError(f"{name} goes with messages", name)
        with blamed("prompt"):
            return served.tokenizer.encode(given["prompt"], bos=given.get("add_special_tokens", True))
    if given.get("add_special_tokens"):
        raise ApiError("add_special_tokens goes with prompt: the template has its own", "add_special_tokens")
    with blamed("tools"):
        tools = [Tool(tool) for tool in given.get("tools", [])]
    ids = _conversation(given, served, tools)
    answered = given["messages"][-1].get("role") == "assistant"
    if given.get("add_generation_prompt", not answered) == answered:
        ends = "an answer, after which nothing is to be generated" if answered else "a question, which asks for one"
        raise ApiError(f"the conversation ends with {ends}: leave it out", "add_generation_prompt")
    return ids


def read_detokenize(body: Any, served: Served) -> str:
    """The text of ids.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    given = _given(body, DETOKENIZE, served)
    if "tokens" not in given:
        raise ApiError("tokens is missing", "tokens")
    _check_ids(given["tokens"], "tokens", served)
    return served.tokenizer.decode(given["tokens"])


def _prompts(given: dict[str, Any], served: Served) -> tuple[list[list[int]], list[str | None]]:
    """Ids and texts of the prompts of a completion."""
    prompt = given["prompt"]
    several = prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]
    prompts: list[list[int]] = []
    texts: list[str | None] = []
    for one in several:
        if isinstance(one, str):
            suffix = given.get("suffix")
            with blamed("suffix"):
                fim = None if suffix is None else served.chats().encode_fim(one, suffix)
            with blamed("prompt"):
                ids = served.tokenizer.encode(one) if fim is None else fim
            _check_ids(ids, "prompt", served)
            prompts.append(ids)
            texts.append(one)
        elif "suffix" in given:
            raise ApiError("suffix needs a prompt that is text", "suffix")
        else:
            _check_ids(one, "prompt", served)
            prompts.append(one)
            texts.append(None)
    if not all(prompts):
        raise ApiError("a prompt has no tokens: give at least one", "prompt")
    return prompts, texts


def _conversation(given: Mapping[str, Any], served: Served, tools: Sequence[Tool]) -> list[int]:
    template, effort = served.chats(), given.get("reasoning_effort")
    try:
        with blamed("messages", "reasoning_effort"):
            ids = template.encode_chat(read_messages(given["messages"]), tools, effort)
    except RecursionError:
        raise ApiError("the messages are nested too deep", "messages") from None
    _check_ids(ids, "messages", served)
    return ids


def _params(given: Mapping[str, Any], served: Served, logprobs: int | None, most: int) -> SamplingParams:
    """How each prompt is continued: with `most` tokens, and as many alternatives as `logprobs` and the body ask for.

    Raises:
        ApiError: a value that cannot be.
    """
    settings = {name: given[name] for name in SAMPLING if name in given}
    if settings.get("top_k") == -1:  # as vLLM says all
        settings["top_k"] = 0
    try:
        return SamplingParams(
            **{"temperature": 1.0, "top_p": 1.0, **settings},
            max_tokens=most,
            stop=given.get("stop", ()),
            logit_bias=_bias(given.get("logit_bias", {}), served),
            top_logprobs=max(logprobs or 0, given.get("prompt_logprobs") or 0),
        )
    except MistralError as error:  # whose message begins with the field
        field = str(error).partition(" ")[0]
        raise ApiError(str(error), field if field in given else None) from None


def _check_room(longest: int, most: int, served: Served, prompt: str) -> None:
    """Refuse what has more positions than the model has here; `prompt` is the field that prompts are in.

    Raises:
        ApiError: it has.
    """
    if longest + max(0, most - 1) > served.context:
        raise ApiError(
            f"a prompt of {longest} token{'s' * (longest != 1)} and {most} to generate are more than the "
            f"{served.context} positions that this model has here: shorten the prompt, or lower max_tokens",
            "max_tokens" if longest <= served.context else prompt,
            code="context_length_exceeded",
        )


def _asked(
    given: dict[str, Any],
    served: Served,
    prompts: list[list[int]],
    texts: list[str | None],
    logprobs: int | None,
    most: int,
    *,
    chat: bool,
    tools: ToolUse | None = None,
    grammar: Grammar | None,
) -> Asked:
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if is_int(given.get(name)):
            _at_most(name, given[name], 0, min(MOST_LOGPROBS, served.vocab_size))
    usage = _usage(given)
    params = _params(given, served, logprobs, most)
    _at_most("n", params.n * len(prompts), 1, MOST_PROMPTS)
    _check_room(max(map(len, prompts)), most, served, "messages" if chat else "prompt")
    return Asked(
        chat,
        prompts,
        texts,
        params,
        frozenset() if given.get("ignore_eos") else served.ends(chat),
        stream=given.get("stream", False),
        include_usage="include_usage" in usage,
        usage_in_each="continuous_usage_stats" in usage,
        echo=given.get("echo", False),
        adapter=served.adapter_of(given.get("model")),
        logprobs=logprobs,
        prompt_logprobs=given.get("prompt_logprobs"),
        return_token_ids=given.get("return_token_ids", False),
        return_tokens_as_token_ids=given.get("return_tokens_as_token_ids", False),
        tools=tools,
        grammar=grammar,
    )


def _usage(given: Mapping[str, Any]) -> set[str]:
    """What `stream_options` asks for."""
    options = {name: value for name, value in given.get("stream_options", {}).items() if value is not None}
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    for name, value in options.items():
        if name not in known or not isinstance(value, bool):
            about = f"{short_repr(name)}, which is not known" if name not in known else f"{name}, which is no boolean"
            raise ApiError(f"stream_options has {about}: true or false for include_usage", "stream_options")
    wanted = {name for name, value in options.items() if value}
    if options and not given.get("stream"):
        raise ApiError("stream_options goes with stream", "stream_options")
    if "include_obfuscation" in wanted:
        raise ApiError("include_obfuscation is not supported by this server: leave it out", "stream_options")
    if wanted == {"continuous_usage_stats"}:
        raise ApiError("continuous_usage_stats needs include_usage: true", "stream_options")
    return wanted


def _bias(given: dict[str, Any], served: Served) -> tuple[tuple[int, float], ...]:
    """Biases by id; JSON has names that are text."""
    found = {}
    for name, bias in given.items():
        if not name.isascii() or not name.isdecimal() or len(name) > 9 or int(name) >= served.vocab_size:
            raise ApiError(f"logit_bias has {short_repr(name)}, which is no id of this model", "logit_bias")
        if not is_number(bias):
            raise ApiError(f"logit_bias of {name} must be a number", "logit_bias")
        found[int(name)] = bias
    return tuple(found.items())


def _check_ids(ids: list[int], name: str, served: Served) -> None:
    if (what := outside(ids, served.tokenizer, served.vocab_size)) is not None:
        raise ApiError(f"{name} has {what}", name)


def _at_most(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ApiError(f"{name} comes to {short_repr(value)}; it must be between {least} and {most}", name)
