"""Conversations as ids: which template a model's chats are written in, and Mistral's own, through mistral-common.

Text that looks like a control token stays text; control ids come from here alone. Knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mistral.chat import remembered, tool_messages
from mistral.chat.jinja import JinjaTemplate
from mistral.chat.messages import BETWEEN, TOOL, Message, TemplateError, checked, joined, valid, with_something
from mistral.chat.thinking import for_mistral_common
from mistral.chat.tools import Form, Tool
from mistral.formats.tokenizers import JSON, WITH_TOOLS, FolderTemplate, chat_templates, why_version
from mistral.thinking import ThoughtIds
from mistral.tokenizer import Tokenizer, require_tokenizer
from mistral.util.arguments import path_of, require_kind
from mistral.util.errors import FormatError, printable, short_repr
from mistral.util.files import decode_text, read_limited, reason_of

# What mistral-common makes of plain conversations is the same in v2 and v3; tekken and SentencePiece are told apart
# by the tokenizer itself.
VERSIONS = ("v1", "v2", "v3", "v7", "v11", "v13", "v15")
OF_TEKKEN = ("v11", "v13", "v15")  # there are no other tokenizers of these
NAMES = (*VERSIONS, "mistrallite")
OF_BYTES = "-tekken"  # behind a version in a template's name: of tokenizers whose words are made of bytes
RELEASE = "the release"  # the source of a template
PROMPTER, ASSISTANT = 32002, 32001  # MistralLite's added tokens


class Template(Protocol):
    """How a kind of model wants its conversations written.

    Attributes:
        name: what it is called.
        source: what decided for it: "--template", the folder's file, "the release".
        ends: ids that it writes after an answer; they end one, beside those of `formats.tokenizers.eos_ids`.
        tool_form: how calls of functions are written; None where it has no place for them.
        thought_ids: what begins and ends a thought; None where it has no place for them.
        efforts: values of `reasoning_effort` that it has a place for.
    """

    name: str
    source: str

    @property
    def ends(self) -> frozenset[int]: ...
    @property
    def tool_form(self) -> Form | None: ...
    @property
    def thought_ids(self) -> ThoughtIds | None: ...
    @property
    def efforts(self) -> tuple[str, ...]: ...

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), effort: str | None = None
    ) -> list[int]:
        """Ids of a conversation, bos included where it belongs, up to where the model writes the next answer (after
        an answer that comes last: up to its end). Neighbours of one role are joined by an empty line, in Jinja where
        the template refuses them; there a system prompt without text is left out too.

        Args:
            tools: functions that the model may call.
            effort: one of `efforts`; None: the tokenizer's or the template's default.

        Raises:
            TemplateError: no place for a system prompt, for tools, for a thought or for an effort, an unknown role, or
                text that is not valid Unicode.
        """

    def encode_fim(self, prefix: str, suffix: str) -> list[int]:
        """Ids after which the model writes what belongs between two texts.

        Raises:
            TemplateError: this kind of model cannot.
        """


def find_template(
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    release: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Template:
    """The template of a model's conversations: the one that is named, else the folder's own, else the release's.

    Without a chat template in the folder the tokenizer file says which: tokenizer.model.vN by its name, a bare
    tokenizer.model by the control tokens in it, tekken.json by its version. MistralLite's tokenizer is that of v1, so
    there the release decides; so it does for a tokenizer.json.

    Args:
        name: one of NAMES, also as in `Template.name`; a template of the folder by its name or its file; or a file in
            Jinja. It comes before all else.
        release: the template of the release that was recognised, if one was.
        folder: where the model is; None where it brings no template.

    Raises:
        TemplateError: an unknown name, one the tokenizer has no control tokens for, or a version of later releases.
        TokenizerError: a broken file in the folder, or no tokenizer.
    """
    require_tokenizer(tokenizer)
    require_kind("name", name, str | None, "a name, or a file in Jinja", TemplateError)
    place = None if folder is None else path_of("folder", folder, TemplateError)
    if name is not None and (version := _version_of(tokenizer, name)):
        return _of_mistral(tokenizer, version, "--template")
    own = {} if place is None else chat_templates(place)
    if name is not None and (found := _named(name, own)):
        return _of_folder(tokenizer, found, folder, "--template")
    if name is not None:
        choices = ", ".join([*NAMES, *map(printable, own)])
        raise TemplateError(f"no template is called {short_repr(name)}: {choices}, or a file that ends in .jinja")
    if "default" in own:
        return _of_folder(tokenizer, own["default"], folder, own["default"].file, own.get(WITH_TOOLS))
    if own:
        raise TemplateError(f"the folder has several templates and no default: --template {' or '.join(own)}")
    if release is not None and (release == "mistrallite" or tokenizer.is_json):
        return _of_mistral(tokenizer, release.removesuffix(OF_BYTES), RELEASE)
    return _of_mistral(tokenizer, tokenizer.version, tokenizer.path.name)


def assumed(template: Template, tokenizer: Tokenizer) -> str | None:
    """A note on a template that nothing named: which was taken, and why. None where the caller named it, a file of the
    folder has it, or the tokenizer's file states its version."""
    if template.source == RELEASE:
        return f"no chat template is in the folder: {template.name} is assumed, that of the release"
    if template.source != tokenizer.path.name or isinstance(template, JinjaTemplate):
        return None
    why = why_version(tokenizer.path.name, tokenizer.kind, tokenizer.version)
    if not why.startswith("assumed"):
        return None
    return f"no chat template is in the folder: {template.name} is {why} (--template takes another)"


def _version_of(tokenizer: Tokenizer, name: str) -> str | None:
    """The one of NAMES that a name is, also as `name` of a template has it, such as v3-tekken; None for others.

    Raises:
        TemplateError: it is that of another kind of tokenizer.
    """
    version = name.removesuffix(OF_BYTES)
    if version not in VERSIONS or name == version:
        return name if name in NAMES else None
    if not tokenizer.is_byte_level:
        raise TemplateError(
            f"template {name} is for a tekken tokenizer, which {tokenizer.path.name} is not: use {version}"
        )
    return version


def _named(name: str, own: Mapping[str, FolderTemplate]) -> FolderTemplate | None:
    """A template of the folder by its name or by the file in which it is, or another file; None where it is neither."""
    if name in own or (name.endswith(".jinja") and os.path.isfile(os.path.expanduser(name))):
        return own.get(name) or _read(name)
    in_file = [template for template in own.values() if template.file == name]
    if in_file:  # the default comes first: the name of a file is what it is called
        return next((template for template in in_file if template.name == "default"), in_file[0])
    return _read(name) if name.endswith(".jinja") else None


def _read(name: str) -> FolderTemplate:
    path = Path(os.path.expanduser(name))
    try:
        text = decode_text(read_limited(path, 1_000_000), printable(name))
    except FormatError as error:
        raise TemplateError(str(error)) from None
    except (OSError, ValueError) as error:
        raise TemplateError(f"{printable(name)} cannot be read: {reason_of(error)}") from None
    return FolderTemplate(path.name, str(path), text)


def _of_folder(
    tokenizer: Tokenizer,
    found: FolderTemplate,
    folder: str | os.PathLike[str] | None,
    source: str,
    with_tools: FolderTemplate | None = None,
) -> JinjaTemplate:
    """A template in Jinja. Such templates are written for the folder's tokenizer.json, if it has one."""
    path = None if folder is None else Path(folder) / JSON
    its_own = tokenizer if path is None or path == tokenizer.path or not path.is_file() else Tokenizer(path)
    name = found.file if found.name == "default" else found.name
    other = None if with_tools is None else partial(_of_folder, its_own, with_tools, folder, with_tools.file)
    fim = partial(_fim, tokenizer)
    return JinjaTemplate(its_own, found.text, name=name, source=source, fim=fim, with_tools=other)


def _fim(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Fill-in-the-middle by the tokenizer's version, whatever the template of conversations."""
    return _of_mistral(tokenizer, tokenizer.version, "").encode_fim(prefix, suffix)


def _of_mistral(tokenizer: Tokenizer, name: str, source: str) -> Template:
    if name == "mistrallite":
        return MistralLite(tokenizer, source)
    if name not in VERSIONS:
        raise TemplateError(
            f"{tokenizer.path.name} is of version {name}, which later releases have; known are {', '.join(VERSIONS)}"
        )
    if name != "v1" and not tokenizer.has_control("[INST]"):
        raise TemplateError(f"template {name} needs the control token [INST], which {tokenizer.path.name} lacks")
    if tokenizer.bos_id < 0:
        raise TemplateError(f"template {name} begins with a bos, which {tokenizer.path.name} lacks")
    if name in OF_TEKKEN and not (tokenizer.is_tekken and tokenizer.has_control("[ARGS]")):
        raise TemplateError(
            f"template {name} needs a tekken tokenizer of its version, which {tokenizer.path.name} is not"
        )
    return MistralCommon(tokenizer, name, source)


def _full_name(tokenizer: Tokenizer, version: str) -> str:
    return f"{version}{OF_BYTES}" if tokenizer.is_byte_level else version


class MistralCommon:
    """The templates of Mistral's own releases, as mistral-common writes them.

    A system prompt goes into the first question in v1, into the last in v2 and v3, and stays in its place since v7.
    From v15 on settings come before the first question: those that the tokenizer file has as defaults.

    Attributes:
        version: "v1", "v2", ..

    Raises:
        TemplateError: the tokenizer lacks what the version needs.
    """

    def __init__(self, tokenizer: Tokenizer, version: str, source: str = "") -> None:
        inner = remembered.remember(tokenizer.for_mistral_common(version))
        from mistral_common.tokens.tokenizers import instruct

        self.name, self.source = _full_name(tokenizer, version), source
        self.ends = frozenset({tokenizer.eos_id})
        self._tokenizer = tokenizer
        kinds = {
            "v1": instruct.InstructTokenizerV1,
            "v2": instruct.InstructTokenizerV2,
            "v3": instruct.InstructTokenizerV3,
            "v7": instruct.InstructTokenizerV7,
            "v11": instruct.InstructTokenizerV11,
            "v13": instruct.InstructTokenizerV13,
            "v15": instruct.InstructTokenizerV15,
        }
        try:
            self._instruct: Any = kinds[version](inner)
        except ValueError as error:  # some other control token is missing
            raise TemplateError(
                f"template {version} does not go with {tokenizer.path.name}: {printable(str(error))}"
            ) from None
        self.version, self._inner = version, inner
        self._system_in_place = version not in ("v1", "v2", "v3")
        self._settings = _settings(inner) if version == "v15" else {}
        begin, end = (getattr(self._instruct, name, None) for name in ("BEGIN_THINK", "END_THINK"))  # v13 and later
        self.thought_ids = None if begin is None or end is None else ThoughtIds(begin, end)

    @property
    def efforts(self) -> tuple[str, ...]:
        effort = self._inner.model_settings_builder.reasoning_effort if self.version == "v15" else None
        return () if effort is None else tuple(map(str, effort.values))

    @property
    def tool_form(self) -> Form | None:
        return None if self.version == "v1" else "args" if self.version in OF_TEKKEN else "list"

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), effort: str | None = None
    ) -> list[int]:
        from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage

        check_effort(self, effort)
        settings = self._settings if effort is None else _settings(self._inner, effort)
        messages = checked(messages)
        self.check_thoughts(messages)
        found, system = joined(messages, ("user", "assistant")), None
        if not self._system_in_place:
            system = BETWEEN.join(m.content for m in found if m.role == "system" and m.content) or None
            found = [m for m in found if m.role != "system"]
            if not found or found[0].role != "user":
                found.insert(0, Message("user", ""))
        offered = tool_messages.offered(tools)
        users = [i for i, message in enumerate(found) if message.role == "user"] or [-1]
        if tools or any(m.tool_calls or m.role == TOOL for m in found):
            found = tool_messages.prepared(found, self.version, users[-1])
        ids = list(self._instruct.start())
        for i, message in enumerate(found):
            if message.role == "user":
                user = UserMessage(content=message.content)
                last, first = i == users[-1], i == users[0]
                more = {"system_prompt": system, **settings}
                ids += self._instruct.encode_user_message(user, offered, last, first, **more)[0]
            elif message.role == TOOL:
                ids += self._instruct.encode_tool_message(tool_messages.result(message), i < users[-1])[0]
            elif message.tool_calls:
                ids += self._instruct.encode_assistant_message(tool_messages.answer(message), i < users[-1])
            elif message.role == "assistant":
                ids += [*self._answer(message), self._tokenizer.eos_id]
            else:
                ids += self._instruct.encode_system_message(SystemMessage(content=for_mistral_common(message) or ""))[0]
        return ids

    def check_thoughts(self, messages: Sequence[Message]) -> None:
        """Refuse thoughts where the version has no place for them.

        Raises:
            TemplateError: it has none.
        """
        with_some = [message for message in messages if message.thinking]
        if with_some and self.thought_ids is None:
            raise TemplateError(f"template {self.name} has no place for thoughts: leave reasoning_content out")
        if self.version == "v15" and any(message.role == "system" for message in with_some):
            raise TemplateError("template v15 has no place for a thought in a system prompt: leave it out")

    def _answer(self, message: Message) -> list[int]:
        from mistral_common.protocol.instruct.messages import AssistantMessage

        content = for_mistral_common(message)
        if message.ids is not None or not content:
            return message.ids or []
        written = AssistantMessage(content=content, prefix=True)  # a prefix has no eos behind it
        return list(self._instruct.encode_assistant_message(written, False))

    @property
    def parts(self) -> tuple[Any, bool, dict[str, Any]]:
        """What writes messages, of mistral-common; whether a system prompt stays in place; settings of a question.

        Fine-tuning asks for messages one at a time, to know whose each id is.
        """
        return self._instruct, self._system_in_place, self._settings

    def encode_fim(self, prefix: str, suffix: str) -> list[int]:
        from mistral_common.protocol.fim.request import FIMRequest

        if not (self._tokenizer.has_control("[PREFIX]") and self._tokenizer.has_control("[SUFFIX]")):
            raise TemplateError(
                f"{self._tokenizer.path.name} has no [PREFIX] and [SUFFIX]: fill-in-the-middle is for Codestral and "
                "its like"
            )
        request = FIMRequest(prompt=valid(prefix), suffix=valid(suffix))
        return list(self._instruct.encode_fim(request).tokens)


def ends_of(tokenizer: Tokenizer, template: Template | None) -> frozenset[int]:
    """Ids that end a text: those of the tokenizer and, in a conversation, what its template writes after an answer."""
    from mistral.generate import eos_of

    return eos_of(tokenizer) | (frozenset() if template is None else template.ends)


def check_effort(template: Template, effort: str | None) -> None:
    """Refuse a `reasoning_effort` that a template has no place for.

    Raises:
        TemplateError: it has none, or another value.
    """
    if effort is not None and effort not in template.efforts:
        has = f"has {', '.join(template.efforts)}" if template.efforts else "has no place for one: leave it out"
        raise TemplateError(f"reasoning_effort is {short_repr(effort)}; template {template.name} {has}")


def _settings(tokenizer: Any, effort: str | None = None) -> dict[str, Any]:
    """The settings of a conversation, as an argument of mistral-common's; those of which nothing is said have defaults.

    Raises:
        TemplateError: the tokenizer file does not say what they are.
    """
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    if (builder := tokenizer.model_settings_builder) is None:
        raise TemplateError("the tokenizer file is of version v15, but has no model_settings_builder: fetch it again")
    asked: Any = effort  # one of its own names for them, or refused by it
    request: Any = ChatCompletionRequest(messages=[UserMessage(content="")], reasoning_effort=asked)
    return {"settings": builder.build_settings(request)}


class MistralLite:
    """`<|prompter|>question</s><|assistant|>`, where all three are ids; meant for greedy answers of up to 400 tokens.

    Raises:
        TemplateError: the tokenizer is not that of v1.
    """

    name = "mistrallite"
    tool_form: Form | None = None
    thought_ids: ThoughtIds | None = None
    efforts: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, source: str = "") -> None:
        if tokenizer.is_byte_level or tokenizer.n_words > ASSISTANT - 1:
            raise TemplateError(
                f"template mistrallite needs a tokenizer of 32000 words, which {tokenizer.path.name} is not"
            )
        self.source = source
        self.ends = frozenset({tokenizer.eos_id})
        self._tokenizer = tokenizer

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), effort: str | None = None
    ) -> list[int]:
        check_effort(self, effort)
        messages = with_something(checked(messages))
        ids, eos = [self._tokenizer.bos_id], self._tokenizer.eos_id
        if any(message.thinking for message in messages):
            raise TemplateError("MistralLite has no place for thoughts: leave them out")
        if tools or any(message.tool_calls or message.role == TOOL for message in messages):
            raise TemplateError("MistralLite has no place for tools: leave them out")
        for message in joined(messages):
            if message.role == "system":
                raise TemplateError("MistralLite has no place for a system prompt: leave it out")
            if message.role == "user":
                ids += [PROMPTER, *self._tokenizer.encode(message.content, bos=False), eos, ASSISTANT]
            else:
                answer = message.ids
                ids += [*(self._tokenizer.encode(message.content, bos=False) if answer is None else answer), eos]
        return ids

    def encode_fim(self, prefix: str, suffix: str) -> list[int]:
        raise TemplateError("MistralLite does not fill in the middle: that is for Codestral and its like")
