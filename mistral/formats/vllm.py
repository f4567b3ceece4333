"""How vLLM serves a folder, and what it would make of it that this library does not: refused, or noted.

The one place that decides: `inspect` prints what is here, and `deploy` fills in recipes by it. Each difference was seen
with vLLM 0.32.0: in what it makes of such a folder, or in its source (see docs/deployment.md). Runs without torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mistral.args import ModelArgs
from mistral.formats.folder import Folder
from mistral.formats.layout import ParamsError
from mistral.formats.layouts import LAYOUTS, NATIVE, WRITABLE

VLLM_THETA = 1e4  # what vLLM takes where params.json has no rope_theta
OTHER_TEMPLATE = "mistrallite"  # the one among ours that mistral-common has not

OWN_TOKENIZER = "--tokenizer_mode mistral"  # what has vLLM use mistral-common
# So that no file of the folder sets a temperature for requests that give none.
OWN_DEFAULTS = "--generation_config vllm"

ACCEPTABLE = ("window", "theta", "dtype", "template")  # words of findings that --accept takes


@dataclass(frozen=True)
class Finding:
    """Something that vLLM does otherwise.

    Args:
        what: a word for it, which --accept takes.
        text: what vLLM does, and what to do.
        fatal: whether vLLM cannot serve the folder at all: then it cannot be accepted.
        mended: whether `convert` writes a folder of which it is no longer true.
    """

    what: str
    text: str
    fatal: bool = False
    mended: bool = False


class Command(NamedTuple):
    """How vLLM would be started, whatever it makes of the folder then.

    Args:
        convert: what to run first; None: nothing.
        why: for what reason.
        folder: what it serves.
        flags: what follows.
    """

    convert: str | None
    why: str | None
    folder: str
    flags: str


def serving(found: Folder, report: dict[str, Any]) -> dict[str, Any]:
    """What `inspect` reports: the commands that have vLLM serve a folder as it is meant, in order.

    Args:
        found, report: as in `preflight`.

    Returns:
        commands: none where `deploy` refuses the folder, unless they convert it first and that is enough.
        convert_first: why the first of them converts, if it does.
        refused: why there are none: what, text and fatal of each `Finding`.
        notes: what is worth a word beside them.
    """
    findings, command = preflight(found, report), _command(found, report)
    left = [f for f in findings if command is None or command.convert is None or not f.mended]
    if command is None or left:
        refused = [{"what": f.what, "text": f.text, "fatal": f.fatal} for f in findings]
        return {"commands": [], "convert_first": None, "refused": refused, "notes": []}
    first = [] if command.convert is None else [command.convert]
    return {
        "commands": [*first, f"vllm serve {as_argument(command.folder)} {command.flags}"],
        "convert_first": command.why,
        "refused": [],
        "notes": list(_notes(found, report)),
    }


def _command(found: Folder, report: dict[str, Any]) -> Command | None:
    """How it would be started; None where vLLM reads no such tokenizer or weights."""
    tokenizer, template, path = report["tokenizer"], report["template"], found.path
    others = (path / "tokenizer.json").is_file() and found.layout is not NATIVE  # vLLM reads it, we may not
    if (tokenizer["error"] is not None and not others) or found.quant is not None:
        return None
    folder, given = str(path), found.layout.serving(path, found.args, found.weights.files)
    if given.convert_first is None:
        return Command(None, None, folder, f"{given.flags} {OWN_DEFAULTS}")
    # vLLM has Mistral's layout read with one of Mistral's own tokenizers, and conversations written by that.
    own = tokenizer["kind"] == "tokenizers" or _has_template(template)
    mixed = len(set(found.args.windows)) > 1  # which it reads in Mistral's layout alone
    target = WRITABLE["hf"] if (own and not mixed) or _is_native_moe(found) else NATIVE
    folder = f"{folder}-converted"
    flags = target.serving(Path(folder), found.args, ()).flags
    if target is not NATIVE:  # its tokenizer.json will be there
        flags = flags.removeprefix(f"{OWN_TOKENIZER} ")
    convert = f"python -m main convert {as_argument(str(path))} {as_argument(folder)} --to {target.to}"
    return Command(convert, given.convert_first, folder, f"{flags} {OWN_DEFAULTS}")


def _has_template(template: dict[str, str] | None) -> bool:
    """Whether the model brings a chat template of its own."""
    return template is not None and template["rule"].startswith("of the folder")


def _is_native_moe(found: Folder) -> bool:
    return found.args.moe is not None and found.layout is NATIVE


def as_argument(path: str) -> str:
    """A path as a word of a command line, whatever is in its name."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def preflight(found: Folder, report: dict[str, Any]) -> list[Finding]:
    """What is to be refused.

    Args:
        found, report: a folder, and what `inspect_folder` says of it, at least tokenizer, template and dtypes.
    """
    convert = (
        f"python -m main convert {as_argument(report['folder'])} {as_argument(report['folder'] + '-converted')} --to"
    )
    return [
        *_files(found, report, convert),
        *_window(found, convert),
        *_numbers(found, report, convert),
        *_text(found, report, convert),
    ]


def _files(found: Folder, report: dict[str, Any], convert: str) -> Iterator[Finding]:
    command = _command(found, report)
    if found.quant is not None:
        yield Finding(
            "weights", f"it does not read {found.quant} weights of this library: take what they were made from", True
        )
    elif command is None:
        yield Finding("tokenizer", f"it has no tokenizer: {report['tokenizer']['error']}", True)
    elif command.convert is not None:
        yield Finding("layout", f"{command.why}: run `{command.convert}` first", True, mended=True)
    if _is_native_moe(found):
        text = f"it reads a mixture of experts in Hugging Face's layout: run `{convert} hf` first"
        yield Finding("experts", text, True, mended=True)


def _window(found: Folder, convert: str) -> Iterator[Finding]:
    raw, args = found.raw, found.args
    if found.layout is NATIVE and "_sliding_window" in raw and raw.get("sliding_window") is None and any(args.windows):
        yield Finding(
            "window",
            f"it reads no _sliding_window, and drops the window of {args.window_text}: run `{convert} mistral`, which "
            "writes sliding_window",
            mended=True,
        )
    if isinstance(raw.get("sliding_window"), str):
        text = f"it stops at a sliding_window that is text: run `{convert} mistral`"
        yield Finding("window", text, True, mended=True)
    if len(set(args.windows) - {None}) > 1:
        yield Finding(
            "window", f"it stops at windows of several sizes ({args.window_text}); serve it with `serve`", True
        )


def _numbers(found: Folder, report: dict[str, Any], convert: str) -> Iterator[Finding]:
    if found.layout is NATIVE:
        yield from _left_out(found, convert)
    several = len(report["dtypes"]) > 1 and not any(tensor.widened for tensor in found.tensors.values())
    if several and found.quant is None:
        counts = " and ".join(f"{n['tensors']} {name}" for name, n in report["dtypes"].items())
        yield Finding(
            "dtype", f"weights are of several dtypes ({counts}), and it rounds all to one: name it by --dtype"
        )


def _left_out(found: Folder, convert: str) -> Iterator[Finding]:
    """What params.json leaves out vLLM takes from a config.json beside it, and else from its own defaults."""
    theirs = _other_args(found)
    theta = VLLM_THETA if theirs is None else theirs.rope_theta
    if found.raw.get("rope_theta") is None and theta != found.args.rope_theta:
        yield Finding(
            "theta",
            f"params.json has no rope_theta, and it takes {theta:g} and not {found.args.rope_theta:g}: run "
            f"`{convert} mistral`, which writes it",
            mended=True,
        )
    if theirs is not None and "sliding_window" not in found.raw and theirs.windows != found.args.windows:
        yield Finding(
            "window",
            f"params.json has no sliding_window ({found.args.window_text}), and it takes {theirs.window_text} from "
            f"config.json: remove that, or run `{convert} mistral`",
            mended=True,
        )


def _other_args(found: Folder) -> ModelArgs | None:
    """What another layout's file in the same folder says, if there is one that can be read."""
    for other in LAYOUTS.values():
        if other is not found.layout and other.has_config(found.path):
            try:
                return other.to_args(other.read_config(found.path))[0]
            except ParamsError:
                return None
    return None


def _text(found: Folder, report: dict[str, Any], convert: str) -> Iterator[Finding]:
    template = report["template"]
    if template is None or OWN_TOKENIZER not in flags_of(found, report):
        return
    if _has_template(template):
        mixed = len(set(found.args.windows)) > 1
        advice = "" if mixed else f": run `{convert} hf`, which writes the tokenizer that it reads with the template"
        yield Finding(
            "template",
            "with Mistral's own tokenizer it writes conversations as mistral-common does, not by "
            f"{template['name']}{advice}",
        )
    elif template["name"] == OTHER_TEMPLATE:
        yield Finding("template", f"it has no template {OTHER_TEMPLATE}, and writes conversations in v1")


def flags_of(found: Folder, report: dict[str, Any]) -> str:
    """What vLLM is given for the layout and the tokenizer; empty where it does not serve the folder at all."""
    command = _command(found, report)
    return "" if command is None else command.flags


def notes(found: Folder, report: dict[str, Any]) -> Iterator[str]:
    """What is as it should be, and still worth a word."""
    yield from report["suspicious"]
    yield from _notes(found, report)


def _notes(found: Folder, report: dict[str, Any]) -> Iterator[str]:
    template = report["template"]
    own = OWN_TOKENIZER in flags_of(found, report)
    if template is None or (not own and template["rule"].startswith(("by ", "assumed"))):
        yield "vLLM finds no chat template here: it refuses /v1/chat/completions, unless --chat-template names one"
    if found.layout.vision is not None and any("left aside" in note for note in found.notes):
        yield "vLLM reads images with it too; memory is counted for the text model alone"
