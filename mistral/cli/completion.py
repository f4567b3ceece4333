"""The script with which a shell completes commands and flags, from the table of commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from mistral.cli import flags, help
from mistral.util.errors import UsageError

BASH = """\
_mistral_ref() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="{commands}" ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _mistral_ref mistral-ref
"""
Commands = Mapping[str, Callable[..., None]]
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, commands: Commands) -> str:
    """What the shell reads.

    Raises:
        UsageError: there is none for this shell.
    """
    names = {name: list(_flags(command)) for name, command in commands.items()}
    if shell == "fish":
        return "\n".join(_fish(commands, names))
    if shell not in ("bash", "zsh"):
        raise UsageError(f"no script for the shell {shell!r}: bash, zsh and fish have one")
    cases = "\n".join(
        f'    {name}) words="{" ".join(f"--{flag}" for flag in known)}" ;;' for name, known in names.items()
    )
    return (ZSH if shell == "zsh" else "") + BASH.format(cases=cases, commands=" ".join(names)).rstrip()


def _flags(command: Callable[..., None]) -> dict[str, str]:
    """The flags that --help lists, and the text of each."""
    texts = help.help_texts(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(command).parameters.values()
    found = {p.name: texts[p.name] for p in parameters if p.kind is keyword and flags.kind_of(p)}
    short = {s: f"short for --{n} {value}" for s, (n, value) in flags.SHORT_FORMS.items() if n in found}
    return found | short | flags.COMMON


def _fish(commands: Commands, names: dict[str, list[str]]) -> list[str]:
    lines = [f"complete -c mistral-ref -n __fish_use_subcommand -f -a {command}" for command in names]
    for command, parameters in names.items():
        texts = _flags(commands[command])
        for name in parameters:
            what = texts[name].replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"complete -c mistral-ref -n '__fish_seen_subcommand_from {command}' -l {name} -d '{what}'")
    return lines
