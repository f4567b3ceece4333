"""The table of commands: names to functions. Each group of commands is a file of its own."""

from __future__ import annotations

from collections.abc import Callable

from mistral.cli.batch import batch
from mistral.cli.bench import bench
from mistral.cli.chat import interactive
from mistral.cli.completion import script
from mistral.cli.deploy import deploy
from mistral.cli.evaluate import evaluate, perplexity
from mistral.cli.finetune import finetune
from mistral.cli.folders import convert, inspect_folder
from mistral.cli.generate import complete, demo
from mistral.cli.oracle import compare, mutants, pack, trace, verify
from mistral.cli.prompts import folder_or_prompt, folder_or_text
from mistral.cli.serve import serve


def completion(shell: str) -> None:
    """Print a script that makes a shell complete the commands and flags of mistral-ref, the installed command.

    eval "$(mistral-ref completion bash)"
    eval "$(mistral-ref completion zsh)"
    python -m main completion fish > ~/.config/fish/completions/mistral-ref.fish

    SHELL is bash, zsh or fish. For bash and zsh, put the line into the file that the shell reads when it starts.
    `python -m main` is not completed: shells know it as python.
    """
    print(script(shell, COMMANDS))


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "interactive": interactive,
    "complete": complete,
    "inspect": inspect_folder,
    "convert": convert,
    "finetune": finetune,
    "serve": serve,
    "batch": batch,
    "deploy": deploy,
    "bench": bench,
    "perplexity": perplexity,
    "eval": evaluate,
    "verify": verify,
    "pack": pack,
    "compare": compare,
    "trace": trace,
    "mutants": mutants,
    "completion": completion,
}
# Which parameter a single word is, where it could be several.
DISAMBIGUATE: dict[str, Callable[[str], str]] = {
    "complete": folder_or_prompt,
    "perplexity": folder_or_text,
    "trace": folder_or_prompt,
}
RENAMED = {"plants": "mutants"}
