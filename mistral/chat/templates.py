"""Conversations and gaps as ids, through mistral-common: what surrounds a turn, and where the system prompt goes.

Text that looks like a control token stays text; control ids come from here alone. Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mistral.tokenizer import Tokenizer
from mistral.util.errors import UsageError, printable

# What mistral-common makes of plain conversations is the same in v2 and v3; tekken and SentencePiece are told apart
# by the tokenizer itself.
VERSIONS = ("v1", "v2", "v3", "v7")
NAMES = (*VERSIONS, "mistrallite")
PROMPTER, ASSISTANT = 32002, 32001  # MistralLite's added tokens


class TemplateError(UsageError):
    """A template that does not exist, does not go with the tokenizer, or cannot say what was asked."""


@dataclass
class Turn:
    """A question, and its answer as the model made it.

    Args:
        question: what the user wrote.
        answer: ids made, without eos; None while there is none.
        text: the answer's text.
    """

    question: str
    answer: list[int] | None = None
    text: str = field(default="")


class Template(Protocol):
    """How a kind of model wants its conversations written."""

    name: str

    def conversation(self, system: str, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation up to where the model answers the last turn; "" is no system prompt.

        Raises:
            TemplateError: no place for a system prompt, or text that is not valid Unicode.
        """

    def infill(self, prefix: str, suffix: str) -> list[int]:
        """Ids after which the model writes what belongs between two texts.

        Raises:
            TemplateError: this kind of model cannot.
        """


def find_template(tokenizer: Tokenizer, *, name: str | None = None, release: str | None = None) -> Template:
    """The template that goes with a tokenizer.

    The file says which: tokenizer.model.vN by its name, a bare tokenizer.model by the control tokens in it, tekken.json
    by its version. MistralLite's tokenizer is that of v1, so there the release decides.

    Args:
        name: one of NAMES, to have that one whatever the file says.
        release: the template of the release that was recognised, if one was.

    Raises:
        TemplateError: an unknown name, one the tokenizer has no control tokens for, or a version of later releases.
    """
    if name is not None and name not in NAMES:
        raise TemplateError(f"no template is called {name!r}: {', '.join(NAMES)}")
    if name == "mistrallite" or (name is None and release == "mistrallite"):
        return MistralLite(tokenizer)
    version = name or tokenizer.version
    if version not in VERSIONS:
        raise TemplateError(
            f"{tokenizer.path.name} is of version {version}, which later releases have; known are {', '.join(VERSIONS)}"
        )
    return MistralCommon(tokenizer, version)


class MistralCommon:
    """The templates of Mistral's own releases, as mistral-common writes them.

    In v1 `[INST]` is plain text and the system prompt joins the first question; from v2 on it is a control id, and
    the system prompt joins the last question; in v7 that has a block of its own.
    """

    def __init__(self, tokenizer: Tokenizer, version: str) -> None:
        if version != "v1" and not tokenizer.has_control("[INST]"):
            raise TemplateError(f"template {version} wants the control token [INST], which {tokenizer.path.name} lacks")
        inner = tokenizer.for_mistral_common(version)
        from mistral_common.tokens.tokenizers import instruct

        self.name = f"{version}-tekken" if tokenizer.is_tekken else version
        self._tokenizer = tokenizer
        kinds = {
            "v1": instruct.InstructTokenizerV1,
            "v2": instruct.InstructTokenizerV2,
            "v3": instruct.InstructTokenizerV3,
            "v7": instruct.InstructTokenizerV7,
        }
        try:
            self._instruct: Any = kinds[version](inner)
        except ValueError as error:  # some other control token is missing
            raise TemplateError(
                f"template {version} does not go with {tokenizer.path.name}: {printable(str(error))}"
            ) from None
        self._system_block = version == "v7"

    def conversation(self, system: str, turns: Sequence[Turn]) -> list[int]:
        from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage

        ids = list(self._instruct.start())
        if system and self._system_block:
            ids += self._instruct.encode_system_message(SystemMessage(content=_valid(system)))[0]
        joined = None if self._system_block else _valid(system) or None
        for i, turn in enumerate(turns):
            message = UserMessage(content=_valid(turn.question))
            last, first = i == len(turns) - 1, i == 0
            ids += self._instruct.encode_user_message(message, None, last, first, system_prompt=joined)[0]
            if turn.answer is not None:
                ids += [*turn.answer, self._tokenizer.eos_id]
        return ids

    def infill(self, prefix: str, suffix: str) -> list[int]:
        from mistral_common.protocol.fim.request import FIMRequest

        if not (self._tokenizer.has_control("[PREFIX]") and self._tokenizer.has_control("[SUFFIX]")):
            raise TemplateError(
                f"{self._tokenizer.path.name} has no [PREFIX] and [SUFFIX]: filling a gap is for Codestral and its like"
            )
        request = FIMRequest(prompt=_valid(prefix), suffix=_valid(suffix))
        return list(self._instruct.encode_fim(request).tokens)


class MistralLite:
    """`<|prompter|>question</s><|assistant|>`, where all three are ids; meant for greedy answers of up to 400 tokens.

    Raises:
        TemplateError: the tokenizer is not that of v1.
    """

    name = "mistrallite"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.is_tekken or tokenizer.n_words > ASSISTANT - 1:
            raise TemplateError(
                f"template mistrallite wants a tokenizer of 32000 words, which {tokenizer.path.name} is not"
            )
        self._tokenizer = tokenizer

    def conversation(self, system: str, turns: Sequence[Turn]) -> list[int]:
        if system:
            raise TemplateError("MistralLite has no place for a system prompt: leave it out")
        eos = self._tokenizer.eos_id
        ids = [self._tokenizer.bos_id]
        for turn in turns:
            ids += [PROMPTER, *self._tokenizer.encode(turn.question, bos=False), eos, ASSISTANT]
            if turn.answer is not None:
                ids += [*turn.answer, eos]
        return ids

    def infill(self, prefix: str, suffix: str) -> list[int]:
        raise TemplateError("MistralLite does not fill gaps: that is for Codestral and its like")


def _valid(text: str) -> str:
    if found := re.search(r"[\ud800-\udfff]", text):
        raise TemplateError(f"the text is not valid Unicode at character {found.start()}")
    return text
