"""What vLLM would make of a folder that this library does not: refused, or noted.

Each was seen with vLLM 0.32.0: in what it makes of such a folder, or in its source (see docs/deployment.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mistral.args import ModelArgs
from mistral.formats.folder import Folder
from mistral.formats.layout import ParamsError
from mistral.formats.layouts import LAYOUTS, NATIVE

VLLM_THETA = 1e4  # what vLLM takes where params.json has no rope_theta
OTHER_TEMPLATE = "mistrallite"  # the one among ours that mistral-common has not

OWN_TOKENIZER = "--tokenizer_mode mistral"  # what has vLLM use mistral-common

ACCEPTABLE = ("window", "theta", "dtype", "template")  # words of findings that --accept takes


@dataclass(frozen=True)
class Finding:
    """Something that vLLM does otherwise.

    Args:
        what: a word for it, which --accept takes.
        text: what vLLM does, and what to do.
        fatal: whether vLLM cannot serve the folder at all: then it cannot be accepted.
    """

    what: str
    text: str
    fatal: bool = False


def preflight(found: Folder, report: dict[str, Any]) -> list[Finding]:
    """What is to be refused.

    Args:
        found, report: a folder, and what `inspect_folder` says of it.
    """
    convert = f"python -m main convert {report['folder']} {report['folder']}-converted --to"
    return [
        *_files(found, report, convert),
        *_window(found, convert),
        *_numbers(found, report, convert),
        *_text(report),
    ]


def _files(found: Folder, report: dict[str, Any], convert: str) -> Iterator[Finding]:
    if found.quant is not None:
        yield Finding("weights", f"it does not read {found.quant} weights of this library: take those before", True)
    elif report["serve"]["convert_first"] is not None:
        first = report["serve"]["commands"][0] if report["serve"]["commands"] else f"{convert} hf"
        yield Finding("layout", f"{report['serve']['convert_first']}: run `{first}` first", True)
    if not report["serve"]["commands"] and found.quant is None:
        yield Finding("tokenizer", f"it has no tokenizer: {report['tokenizer']['error']}", True)
    if found.args.moe is not None and found.layout is NATIVE:
        yield Finding(
            "experts", f"it reads a mixture of experts in Hugging Face's layout: run `{convert} hf` first", True
        )


def _window(found: Folder, convert: str) -> Iterator[Finding]:
    raw, args = found.raw, found.args
    if found.layout is NATIVE and "_sliding_window" in raw and raw.get("sliding_window") is None and any(args.windows):
        yield Finding(
            "window",
            f"it reads no _sliding_window, and drops the window of {args.window_text}: run `{convert} mistral`, which "
            "writes sliding_window",
        )
    if isinstance(raw.get("sliding_window"), str):
        yield Finding("window", f"it stops at a sliding_window that is text: run `{convert} mistral`", True)
    if len(set(args.windows) - {None}) > 1:
        yield Finding(
            "window", f"it stops at windows of several sizes ({args.window_text}); serve it with `serve`", True
        )


def _numbers(found: Folder, report: dict[str, Any], convert: str) -> Iterator[Finding]:
    if found.layout is NATIVE:
        yield from _left_out(found, convert)
    if len(report["dtypes"]) > 1 and not any(tensor.widened for tensor in found.tensors.values()):
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
        )
    if theirs is not None and "sliding_window" not in found.raw and theirs.windows != found.args.windows:
        yield Finding(
            "window",
            f"params.json has no sliding_window ({found.args.window_text}), and it takes {theirs.window_text} from "
            f"config.json: remove that, or run `{convert} mistral`",
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


def _text(report: dict[str, Any]) -> Iterator[Finding]:
    template = report["template"]
    if template is None or OWN_TOKENIZER not in flags_of(report):
        return
    if template["rule"].startswith("of the folder"):
        yield Finding(
            "template",
            f"with Mistral's own tokenizer it writes conversations as mistral-common does, not by {template['name']}",
        )
    elif template["name"] == OTHER_TEMPLATE:
        yield Finding("template", f"it has no template {OTHER_TEMPLATE}, and writes conversations in v1")


def flags_of(report: dict[str, Any]) -> str:
    """What `inspect` gives vLLM for the layout and the tokenizer; empty where it does not serve the folder."""
    commands = report["serve"]["commands"]
    return commands[-1][commands[-1].index(" --") + 1 :] if commands and " --" in commands[-1] else ""


def notes(found: Folder, report: dict[str, Any]) -> Iterator[str]:
    """What is as it should be, and still worth a word."""
    yield from report["suspicious"]
    flags = flags_of(report)
    template = report["template"]
    if template is None or (OWN_TOKENIZER not in flags and template["rule"].startswith(("by ", "assumed"))):
        yield "vLLM finds no chat template here: it refuses /v1/chat/completions, unless --chat-template names one"
    if found.layout.vision is not None and any("left aside" in note for note in found.notes):
        yield "vLLM reads images with it too; memory is counted for the text model alone"
