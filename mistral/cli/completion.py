"""completion: a script with which a shell completes commands and flags."""

from __future__ import annotations

import inspect

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
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: str) -> None:
    """Print a script that makes a shell complete the commands and flags of mistral-ref.

    eval "$(mistral-ref completion bash)"
    eval "$(mistral-ref completion zsh)"
    python -m main completion fish > ~/.config/fish/completions/mistral-ref.fish

    SHELL is bash, zsh or fish. For bash and zsh, put the line into the file that the shell reads when it starts.
    """
    from mistral.cli.commands import COMMANDS

    names = {
        command: [p.name for p in inspect.signature(function).parameters.values() if flags.kind_of(p)]
        for command, function in COMMANDS.items()
    }
    if shell == "fish":
        print("\n".join(_fish(names)))
    elif shell in ("bash", "zsh"):
        cases = "\n".join(
            f'    {command}) words="{" ".join(f"--{n}" for n in (*flags_of, *flags.COMMON))}" ;;'
            for command, flags_of in names.items()
        )
        print((ZSH if shell == "zsh" else "") + BASH.format(cases=cases, commands=" ".join(names)), end="")
    else:
        raise UsageError(f"no script for the shell {shell!r}: bash, zsh and fish have one")


def _fish(names: dict[str, list[str]]) -> list[str]:
    from mistral.cli.commands import COMMANDS

    lines = [f"complete -c mistral-ref -n __fish_use_subcommand -f -a {command}" for command in names]
    for command, parameters in names.items():
        texts = help.help_texts(COMMANDS[command])
        for name in parameters:
            what = texts.get(name, name).replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"complete -c mistral-ref -n '__fish_seen_subcommand_from {command}' -l {name} -d '{what}'")
    return lines
