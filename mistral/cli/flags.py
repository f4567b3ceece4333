"""Command lines checked against a function's signature, before the function runs.

Fire calls first and complains about a misspelled flag after, and it reads prompts as Python. Here
every flag is matched and converted by its annotation, and Fire, which then dispatches the command, gets a
line that it cannot misread.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from mistral.util.english import did_you_mean
from mistral.util.errors import UsageError
from mistral.util.flat import parcels_of
from mistral.util.other_names import called_here

NUMBERS = {
    int: r"[+-]?[0-9]{1,300}",
    float: r"[+-]?([0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|nan|inf)",
}
# The kinds of annotations that can be typed as flags; others (a callable, say) are for Python alone.
KINDS: dict[str, type] = {
    "str": str,
    "str | int": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list[str]": list,
    "tuple[str, ...]": list,
    "tuple[tuple[int, float], ...]": dict,
}
# Kinds whose flag may be repeated: texts, and pairs ID:NUMBER.
REPEATED = (list, dict)
# A short flag stands for the first of its flags that a command has.
SHORT = (
    *(("-o", "output"), ("-n", "max_tokens"), ("-t", "temperature"), ("-s", "seed")),
    *(("-p", "prompts"), ("-n", "generate"), ("-d", "contexts"), ("-r", "repeats"), ("-t", "threads")),  # llama-bench's
)
# Switches that stand for a value of another flag.
SHORT_FORMS = {"deterministic": ("execution", "bitwise")}
# The dash of flags, and what word processors and web pages make of one or two of them.
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
# Words that nobody puts after a switch as a prompt.
BOOLEANS = ("true", "false", "on", "off", "yes", "no", "0", "1")
RENAMED = {
    "kernels": "--execution kernels, or --execution eager for --kernels=false",
    "mistake": "--mutant",
    "also": "several INPUTs before OUTPUT",
}
# Understood by every command.
COMMON = {"quiet": "print no notes and no statistics, only results and errors", "verbose": "print more about errors"}


def parse(
    command: Callable[..., None], words: Sequence[str], disambiguate: Callable[[str], str] | None = None
) -> list[str]:
    """The words of a command line as `--name=value`, each checked and of its parameter's type.

    `--name value`, `--name=value`, `--name` for switches, dashes or underscores within names, and
    `--` before words that are not flags; the short flags of `SHORT`. A flag of type list may be repeated.

    Args:
        disambiguate: names the parameter meant by a single word where several could be; None takes the first.

    Raises:
        UsageError: an unknown or repeated flag, a missing, ill-typed or impossible value, an unexpected argument.
    """
    parameters = {p.name: p for p in inspect.signature(command).parameters.values() if kind_of(p)}
    given, positionals = _split(words, parameters)
    literal = words[words.index("--") + 1 :] if "--" in words else ()
    _check_parcels(command, given)
    for name, value in _place(positionals, parameters, given, disambiguate, literal).items():
        given[name] = value
    needed = [p for p in parameters.values() if p.default is p.empty and p.name not in given]
    missing = [f"--{p.name}" if p.kind is p.KEYWORD_ONLY else p.name.upper() for p in needed]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")
    return [f"--{name}={json.dumps(value)}" for name, value in given.items()]


def _split(words: Sequence[str], parameters: dict[str, inspect.Parameter]) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags, converted, and the words that are no flags."""
    given: dict[str, Any] = {}
    positionals: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            return given, positionals + queue
        short, equals, value = word.partition("=")
        if (long := long_of(short, parameters)) is not None:
            word = f"--{long}{equals}{value}"
        elif (long := long_of(word[:2], parameters)) is not None and _is_number(word[2:], parameters[long]):
            word = f"--{long}={word[2:]}"  # -n3
        if word == "-" and "prompt" in parameters:
            continue  # stdin, which is read where no word is the prompt
        if not word.startswith("--") or word[2:3].isspace():  # a dash and a space begin a list, or a sentence
            _refuse_dashes(word, parameters)
            positionals.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name in SHORT_FORMS and SHORT_FORMS[name][0] in parameters:
            if _switch(flag, equals, value, queue) == "true":
                _put(given, *SHORT_FORMS[name], f"--{flag}")
            continue
        if name in COMMON and equals:
            raise UsageError(f"--{flag} is a switch: give it no value")
        if name not in parameters:
            raise UsageError(f"no flag --{_quoted(flag, value, parameters) or flag + _suggestion(name, parameters)}")
        kind = kind_of(parameters[name])
        if kind is bool:
            value = _switch(flag, equals, value, queue)
        elif not equals:
            value = _next(flag, queue, kind in NUMBERS)
        if kind in REPEATED:
            if not value:
                raise UsageError(f"--{flag} is empty")
            given.setdefault(name, []).append(convert(f"--{flag}", value, kind))
        else:
            _put(given, name, convert(f"--{flag}", value, kind), f"--{flag}")
    return given, positionals


def _refuse_dashes(word: str, parameters: dict[str, inspect.Parameter]) -> None:
    """Refuse a word that is no flag, and looks as if it was meant as one: a dash, a letter, and no space.

    A lone dash, a number and "- an item" are words like others.

    Raises:
        UsageError: it names the flag that is like it, or those that there are.
    """
    bare = word.lstrip(DASHES)
    name = bare.partition("=")[0].replace("-", "_")
    if word[:1] != "-":
        if bare != word and (name in parameters or long_of(f"-{name}", parameters)):  # as a word processor writes it
            what = f"{word} begins with {word[0]!r}, which is no dash of a flag"
            raise UsageError(f"{what}: type - or --{_or(parameters)}")
        return
    if name in parameters:
        raise UsageError(f"{word}: long flags begin with two dashes{_or(parameters)}")
    first, space, value = word.partition(" ")
    long = long_of(first, parameters)
    if long is not None and space and _is_number(value.strip(), parameters[long]):
        raise UsageError(f"{word!r} is one word: write {first} and its value without quotes{_or(parameters)}")
    if not bare[:1].isalpha() or re.search(r"\s", word):
        return
    if len(name) == 1:
        other = called_here(name, list(parameters))
        near = [other] if other is not None else [common for common in COMMON if common[0] == name]
        meant = f"; did you mean --{near[0]}?" if near else ""
    else:
        known_names = [n for n in (*parameters, *COMMON, *SHORT_FORMS) if len(n) > 1]
        meant = did_you_mean(name, known_names, "--")
    long = long_of(word[:2], parameters)
    if not meant and long is not None and word[2:3] not in ("", "="):  # -nx
        convert(word[:2], word[2:], kind_of(parameters[long]))
    short = [f"{s} (--{long_of(s, parameters)})" for s in dict(SHORT) if long_of(s, parameters)]
    known = f"; short flags of this command: {', '.join(short)}; see --help" if short else "; see --help"
    raise UsageError(f"no flag {word.partition('=')[0]}{meant or known}{_or(parameters)}")


def _or(parameters: Collection[str]) -> str:
    """What to do where a word was meant as a prompt, for commands that take one."""
    return "; for a prompt, put -- before it" if "prompt" in parameters else ""


def _quoted(flag: str, value: str, parameters: dict[str, inspect.Parameter]) -> str:
    """What to say of a flag and its value in one pair of quotes; "" if it is something else."""
    first, *rest = flag.split(maxsplit=1)
    if not rest or first.replace("-", "_") not in parameters:
        return ""
    return f"{flag}{'=' * bool(value)}{value}: write --{first} and its value without quotes, or each in its own"


def _next(flag: str, queue: list[str], number: bool) -> str:
    """The word after a flag as its value.

    Raises:
        UsageError: there is none, or it is another flag.
    """
    word = queue[0] if queue else "--"
    if (word.startswith("--") and not word[2:3].isspace()) or word in dict(SHORT):
        however = "" if word == "--" or number else f"; if {word} is the value, write --{flag}={word}"
        raise UsageError(f"--{flag} needs a value{however}")
    return queue.pop(0)


def long_of(short: str, names: Collection[str]) -> str | None:
    """The flag that a short one stands for, of those that a command has."""
    return next((long for flag, long in SHORT if flag == short and long in names), None)


def _is_number(text: str, parameter: inspect.Parameter) -> bool:
    pattern = NUMBERS.get(kind_of(parameter) or str)
    return pattern is not None and re.fullmatch(pattern, text) is not None


def _put(given: dict[str, Any], name: str, value: Any, flag: str) -> None:
    if name in given:
        short = next((s for s, (long, _) in SHORT_FORMS.items() if long == name), None)
        if short is not None and given[name] != value:
            means = f"--{short} is short for --{name} {SHORT_FORMS[short][1]}"
            raise UsageError(f"--{name} is given as {given[name]} and as {value} ({means}): give one of them")
        raise UsageError(f"{flag} is given twice")
    given[name] = value


def _switch(flag: str, equals: str, value: str, queue: list[str]) -> str:
    """ "true" or "false" for a switch."""
    if not equals:
        if queue and queue[0].lower() in BOOLEANS:
            raise UsageError(f"--{flag} {queue[0]}: write --{flag}=true or --{flag}=false, without a space")
        return "true"
    return "true" if convert(f"--{flag}", value, bool) else "false"


def _place(
    positionals: list[str],
    parameters: dict[str, inspect.Parameter],
    given: dict[str, Any],
    disambiguate: Callable[[str], str] | None,
    literal: Sequence[str],
) -> dict[str, Any]:
    """The words that are no flags, by the parameters whose places they take; `literal` are those behind `--`."""
    places = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    free = [p for p in places if p.name not in given]
    if disambiguate and len(positionals) == 1 and len(free) == len(places):
        free = [parameters[disambiguate(positionals[0])]]
    several = next((i for i, p in enumerate(free) if kind_of(p) is list), None)
    if several is not None and len(positionals) > several:
        # All words that the other places leave, as the files before the last word of cp.
        end = several + max(1, len(positionals) - len(free) + 1)
        found = {free[several].name: positionals[several:end]}
        free, positionals = free[:several] + free[several + 1 :], positionals[:several] + positionals[end:]
    else:
        found = {}
    if len(positionals) > len(free):
        extra = positionals[len(free)]
        flag = next((word for word in literal if _is_flag(word, parameters)), None)
        why = _expected(places) if flag is None else f"{flag} is behind --: flags go before it"
        raise UsageError(f"unexpected argument {extra!r} ({why})")
    return found | {p.name: convert(p.name, word, kind_of(p)) for p, word in zip(free, positionals, strict=False)}


def _expected(places: Sequence[inspect.Parameter]) -> str:
    """What a command takes besides flags."""
    names = [p.name.upper() for p in places]
    if "PROMPT" in names:
        return "quote a prompt that contains spaces"
    takes = f"the command takes {' and '.join(names)}" if names else "the command takes flags only"
    return takes + "; quote a name that contains spaces" * bool(names)


def _is_flag(word: str, parameters: Collection[str]) -> bool:
    """Whether a word would be a flag, were it not behind `--`."""
    name = word.partition("=")[0]
    return long_of(name, parameters) is not None or (name[:2] == "--" and name[2:].replace("-", "_") in parameters)


def _check_parcels(command: Callable[..., None], given: dict[str, Any]) -> None:
    """Have the dataclasses check their values now, without torch; their messages get the flags' dashes."""
    for default, shown in parcels_of(command):
        names = [field.name for field in shown if field.name in given]
        try:
            replace(default, **{name: given[name] for name in names})
        except UsageError as error:
            text = str(error)
            raise UsageError(f"--{text}" if text.partition(" ")[0] in names else text) from None


def readable_by_fire(command: Callable[..., None]) -> Callable[..., None]:
    """Have Fire read each value as the JSON that `parse` wrote, and as nothing else."""
    import fire.decorators

    names = inspect.signature(command).parameters
    return fire.decorators.SetParseFns(**dict.fromkeys(names, json.loads))(command)


def kind_of(parameter: inspect.Parameter) -> Any:
    """str, int, float, bool, list or dict (pairs); None if no flag can give such a value."""
    return KINDS.get(str(parameter.annotation).removesuffix(" | None"))


def convert(what: str, text: str, kind: Any) -> Any:
    """A word as a value of a kind.

    Args:
        what: the flag, for messages.

    Raises:
        UsageError: it is none.
    """
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{what} is a switch: give it no value, or true or false, not {text!r}")
        return text.lower() == "true"
    if kind in (int, float):
        # Stricter than Python, which takes 1_0, spaces, and the digits of every script.
        if not re.fullmatch(NUMBERS[kind], text):
            article = "a whole number" if kind is int else "a number"
            raise UsageError(f"{what} must be {article}, not {text!r}")
        return kind(text)
    if kind is dict:
        left, colon, right = text.partition(":")
        if not (colon and re.fullmatch(NUMBERS[int], left) and re.fullmatch(NUMBERS[float], right)):
            raise UsageError(f"{what} must be ID:NUMBER, such as 42:-100, not {text!r}")
        return [int(left), float(right)]
    return text


def _suggestion(name: str, parameters: Collection[str]) -> str:
    if name in RENAMED:
        return f": use {RENAMED[name]}"
    meant = did_you_mean(name, [*parameters, *COMMON, *SHORT_FORMS], "--")
    return meant or "; see --help" + ", and put -- before a prompt that begins so" * ("prompt" in parameters)


def take_common(words: Sequence[str]) -> tuple[list[str], set[str]]:
    """The words without the flags that every command has, and which of them were given."""
    end = words.index("--") if "--" in words else len(words)
    found = {word[2:] for word in words[:end] if word[:2] == "--" and word[2:] in COMMON}
    if len(found) > 1:
        raise UsageError("--quiet and --verbose: give one of them")
    return [w for i, w in enumerate(words) if i >= end or w[2:] not in found or w[:2] != "--"], found


def require_at_least(least: int, **values: int | None) -> None:
    """Refuse the numbers of a command's own flags that are too small.

    Raises:
        UsageError: names the flag.
    """
    for name, value in values.items():
        if value is not None and not least <= value < 2**63:
            raise UsageError(f"--{name} is {value}; it must be at least {least:,} and below 2**63")


def numbers(name: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers, 0 (if that is the least) or above, of at most nine digits, with commas between.

    Raises:
        UsageError: something else.
    """
    one = "[1-9][0-9]{0,8}" if least else "(0|[1-9][0-9]{0,8})"
    if not re.fullmatch(f"{one}(,{one})*", text):
        needed = f"whole numbers from {least} on, of at most nine digits, with commas between, such as 32,4096"
        raise UsageError(f"--{name} is {text!r}; it must be {needed}")
    return [int(n) for n in text.split(",")]
