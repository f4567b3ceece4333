"""Command lines checked against a function's signature, before the function runs.

Fire calls first and complains about a misspelled flag after, and it reads prompts as Python. Here
every flag is matched and converted by its annotation, and Fire, which then dispatches the command, gets a
line that it cannot misread.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fire.decorators

from mistral.util.errors import UsageError

NUMBERS = {
    int: r"[+-]?[0-9]{1,300}",
    float: r"[+-]?([0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|nan|inf)",
}


SHORT = {"-o": "output"}
# Words that nobody puts after a switch as a prompt.
SWITCHED = ("true", "false", "on", "off", "yes", "no", "0", "1")


Ranges = Mapping[str, tuple[float, float]]


def canonical(
    command: Callable[..., None],
    words: Sequence[str],
    ranges: Ranges | None = None,
    lone: Callable[[str], str] | None = None,
) -> list[str]:
    """The words of a command line as `--name=value`, each checked and of its parameter's type.

    `--name value`, `--name=value`, `--name` for switches, dashes or underscores within names, and
    `--` before words that are not flags; `-o` for `--output`. A flag of type list may be repeated.

    Args:
        ranges: the least and the most of each number that has them.
        lone: names the parameter meant by a single word where several could be; None takes the first.

    Raises:
        UsageError: an unknown or repeated flag, a missing, ill-typed or impossible value, a word too many.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    places = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given: dict[str, Any] = {}
    loose: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            loose += queue
            break
        if word in SHORT and SHORT[word] in parameters:
            word = f"--{SHORT[word]}"
        if not word.startswith("--"):
            if word[:1] == "-" and word[1:].partition("=")[0].replace("-", "_") in parameters:
                raise UsageError(f"{word}: flags begin with two dashes; for a prompt, put -- before it")
            loose.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in parameters:
            raise UsageError(f"no flag --{flag}{_suggestion(name, parameters)}")
        kind = _kind(parameters[name])
        if not equals:
            if kind is bool:
                if queue and queue[0].lower() in SWITCHED:
                    raise UsageError(f"--{flag} {queue[0]}: write --{flag}=true or --{flag}=false, without a blank")
                value = "true"
            elif queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            else:
                raise UsageError(f"--{flag} needs a value")
        converted = _convert(f"--{flag}", value, kind)
        if ranges and name in ranges:
            _check_range(f"--{flag}", converted, *ranges[name])
        if kind is list:
            if not value:
                raise UsageError(f"--{flag} is empty")
            given.setdefault(name, []).append(value)
        elif name in given:
            raise UsageError(f"--{flag} is given twice")
        else:
            given[name] = converted
    free = [p for p in places if p.name not in given]
    if lone and len(loose) == 1 and len(free) == len(places):
        free = [parameters[lone(loose[0])]]
    if len(loose) > len(free):
        raise UsageError(f"a word too many: {loose[len(free)]!r} (a prompt of several words wants quotes)")
    for parameter, word in zip(free, loose, strict=False):
        given[parameter.name] = _convert(parameter.name, word, _kind(parameter))
    needed = [p for p in parameters.values() if p.default is p.empty and p.name not in given]
    missing = [f"--{p.name}" if p.kind is p.KEYWORD_ONLY else p.name.upper() for p in needed]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")
    return [f"--{name}={json.dumps(value)}" for name, value in given.items()]


def readable_by_fire(command: Callable[..., None]) -> Callable[..., None]:
    """Have Fire read each value as the JSON that `canonical` wrote, and as nothing else."""
    names = inspect.signature(command).parameters
    return fire.decorators.SetParseFns(**dict.fromkeys(names, json.loads))(command)


def _kind(parameter: inspect.Parameter) -> type:
    annotation = parameter.annotation
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    (kind,) = [o for o in options if o is not types.NoneType]
    return typing.get_origin(kind) or kind


def _convert(what: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{what} is a switch: give it no value, or true or false, not {text!r}")
        return text.lower() == "true"
    if kind in (int, float):
        # Stricter than Python, which takes 1_0, blanks, and the digits of every script.
        if not re.fullmatch(NUMBERS[kind], text):
            article = "a whole number" if kind is int else "a number"
            raise UsageError(f"{what} must be {article}, not {text!r}")
        return kind(text)
    return text


def _check_range(what: str, value: float, least: float, most: float) -> None:
    if not value >= least:  # this way round, what is not a number is refused too
        raise UsageError(f"{what} is {value}; it must be at least {least:g}")
    if value > most:
        raise UsageError(f"{what} is {value}; it must be at most {most:g}")


def _suggestion(name: str, parameters: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, parameters, n=1)
    return f"; did you mean --{close[0]}?" if close else "; see --help, and put -- before a prompt that begins so"


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers above 0 of at most nine digits, with commas between.

    Raises:
        UsageError: something else.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        wanted = "whole numbers of at most nine digits with commas between, such as 32,4096"
        raise UsageError(f"--{name} is {text!r}; it must be {wanted}")
    return [int(n) for n in text.split(",")]
