"""Text that fits a JSON schema or a grammar, and no other: masks over the logits, by the library llguidance.

Knows nothing about the engine: a `Constraint` is a `SamplingParams.logits_processor`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mistral.sampling_params import SamplingError
from mistral.tokenizer import Tokenizer
from mistral.util.arguments import require_kind, whole_numbers
from mistral.util.errors import Unavailable, printable, short_repr

if TYPE_CHECKING:
    from torch import Tensor

SPACE = "/[ \\t\\r\\n]{1,4}/"  # before a value; SentencePiece begins a text with a space
BETWEEN = "[ \\t\\r\\n]{1,32}"  # inside a value; without a limit small models write spaces for ever
NEVER = "\u263a"  # in front of a text, so that SentencePiece puts no space there


class Grammars:
    """What makes grammars for a tokenizer.

    Args:
        tokenizer: of the model.
        ends: ids that end a text; the grammar decides when they may come.

    Raises:
        Unavailable: llguidance is missing.
        SamplingError: nothing ends a text, or an argument of another type.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise Unavailable(f"JSON by grammar needs llguidance ({error}): pip install llguidance") from None
        require_kind("tokenizer", tokenizer, Tokenizer, "a Tokenizer, as load() gives it", SamplingError)
        ends = whole_numbers("ends", ends, SamplingError)
        if not ends:
            raise SamplingError("no token ends a text of this model, so no grammar can be completed")
        self._ends = sorted(ends)
        wrapper = llguidance.TokenizerWrapper(_Words(tokenizer, self._ends[0]))
        self._words = llguidance.LLTokenizer(wrapper, eos_token=self._ends)

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """Values that fit a JSON schema.

        Raises:
            SamplingError: it is none, or uses what llguidance does not know.
        """
        return self.lark(f"start: {json_rule(schema)}")

    def regex(self, pattern: str) -> Grammar:
        """Texts that a regular expression matches as a whole. Raises as `json` does."""
        return self.lark(f"start: {regex_rule(pattern)}")

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of some texts."""
        return self.lark(f"start: {choice_rule(texts)}")

    def lark(self, text: str, after: int | None = None) -> Grammar:
        """Texts of a grammar in llguidance's form of Lark.

        Args:
            after: an id after whose first appearance the grammar begins; None: at once.
        """
        import llguidance

        return self._of(llguidance.LLMatcher.grammar_from_lark(_valid(text)), after)

    def _of(self, source: str, after: int | None = None) -> Grammar:
        import llguidance

        problem = llguidance.LLMatcher.validate_grammar(source, self._words)
        if problem:
            first = next((line for line in problem.splitlines() if line.strip()), problem)
            reason = [line for line in problem.splitlines() if line.startswith("error: ")]  # of a regular expression
            told = " ".join([*first.split(), *reason[-1:]])
            why = "it is nested too deeply" if "recursion limit" in first else printable(told, 300)
            raise SamplingError(f"the grammar cannot be used: {why}")
        return Grammar(self._words, source, tuple(self._ends), after)


@dataclass(frozen=True)
class Grammar:
    """A grammar that was checked; `constraint()` is for one or more requests."""

    words: Any = field(repr=False)
    source: str
    ends: tuple[int, ...]
    after: int | None = None

    def constraint(self) -> Constraint:
        """A logits processor."""
        return Constraint(self)


def _valid(text: object) -> str:
    require_kind("the grammar", text, str, "text", SamplingError)
    assert isinstance(text, str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingError("the grammar is not valid Unicode") from None
    return text


def json_rule(schema: Mapping[str, Any]) -> str:
    """Values that fit a JSON schema, as the right side of a rule in llguidance's form of Lark.

    Raises:
        SamplingError: nested too deep.
    """
    return f"{SPACE}? %json {as_text(schema)}"


def regex_rule(pattern: str) -> str:
    """Texts that a regular expression matches as a whole; as above, for whoever has made `Grammars`."""
    import llguidance

    (only,) = json.loads(llguidance.LLMatcher.grammar_from_regex(_valid(pattern)))["grammars"]
    return str(only["lark_grammar"]).removeprefix("start: ")


def choice_rule(texts: Sequence[str]) -> str:
    """One of some texts; as above.

    Raises:
        SamplingError: none, or something else than texts.
    """
    require_kind("choice", texts, list | tuple, "a list of texts", SamplingError)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise SamplingError(f"choice is {short_repr(texts)}; it must be a list of texts, at least one")
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def as_text(schema: Mapping[str, Any]) -> str:
    """A schema as JSON, for a grammar that limits the spaces in values.

    Raises:
        SamplingError: nested too deep.
    """
    require_kind("schema", schema, Mapping, "a JSON schema, as a dict", SamplingError)
    try:
        return json.dumps({**schema, "x-guidance": {"whitespace_pattern": BETWEEN}})
    except RecursionError:
        raise SamplingError("the schema is nested too deep") from None
    except (TypeError, ValueError) as error:
        raise SamplingError(f"the schema is no JSON: {error}") from None


class Constraint:
    """Leaves of the logits of each step those of tokens that the grammar allows next; the others are minus infinity.

    Requests may share one: each is known by its list of output ids. It never raises for what was generated. Where
    llguidance gives up, the text ends, which is then not complete.
    """

    MOST = 256  # requests that are remembered

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._states: dict[int, _State] = {}

    def problem(self, output_ids: list[int]) -> str | None:
        """Why llguidance gave up on the request with these output ids; None if it did not."""
        state = self._states.get(id(output_ids))
        return None if state is None else state.problem

    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
        """See `sampling_params.LogitsProcessor`."""
        state = self._states.get(id(output_ids))
        if state is None or not state.continues(output_ids):
            while len(self._states) >= self.MOST:
                del self._states[next(iter(self._states))]
            state = self._states[id(output_ids)] = _State(self._grammar)
        allowed = state.allowed(output_ids)
        if allowed is None:
            return logits
        import torch

        mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
        mask[allowed[allowed < len(mask)]] = True
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))


class _State:
    """How far a request is in a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        import llguidance

        self._grammar = grammar
        self._matcher = llguidance.LLMatcher(grammar.words, grammar.source, log_level=0)
        self._seen: list[int] = []
        self._inside = grammar.after is None

    def continues(self, output_ids: list[int]) -> bool:
        return output_ids[: len(self._seen)] == self._seen

    @property
    def problem(self) -> str | None:
        """Why there is no going on."""
        if not self._matcher.is_error():
            return None
        reason = str(self._matcher.get_error()).splitlines() or ["no reason given"]
        return f"llguidance gave up: {printable(reason[0], 200)}"

    def allowed(self, output_ids: list[int]) -> Tensor | None:
        """Ids that may come next; None: all."""
        import numpy as np
        import torch

        for token in output_ids[len(self._seen) :]:
            if self._inside:
                self._matcher.consume_token(token)
            self._inside = self._inside or token == self._grammar.after
        self._seen = list(output_ids)
        if not self._inside:
            return None
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            found = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if len(found) and not self._matcher.is_error():
                return torch.from_numpy(found)
        return torch.tensor(self._grammar.ends)


class _Words:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, eos_id
        words = tokenizer.token_bytes()
        self.special_token_ids = [i for i, word in enumerate(words) if word is None]
        self.tokens = [f"<special_{i}>".encode() if word is None else word for i, word in enumerate(words)]
        self._skip = tokenizer.encode(NEVER, bos=False)

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(NEVER + text, bos=False)
        if ids[: len(self._skip)] == self._skip:
            return ids[len(self._skip) :]
        return self._tokenizer.encode(text, bos=False)
