"""A report of `inspect` human-readable. Runs without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistral.formats.layouts import LAYOUTS
from mistral.formats.vllm import as_argument
from mistral.formats.weights import file_names
from mistral.util import memory
from mistral.util.english import counted
from mistral.util.errors import short_repr

KINDS = {"sentencepiece": "SentencePiece", "tekken": "tekken", "tokenizers": "as transformers writes it"}


def as_text(report: dict[str, Any]) -> str:
    """The report human-readable: one fact a line, aligned."""
    lines = [*_facts(report), "", *_table(report), "", "files"]
    width = max(len(_printable(f["name"])) for f in report["files"])
    lines += [
        f"  {_printable(f['name']):{width}}  {memory.as_text(f['bytes']):>9}  {f['role']}" for f in report["files"]
    ]
    lines += ["", "suspicious", *(f"  {said}" for said in report["suspicious"] or ["nothing"])]
    lines += ["", *_served(report["folder"], report["serve"])]
    return "\n".join(line if line.isprintable() else _printable(line) for line in lines)


def _served(folder: str, serve: dict[str, Any]) -> list[str]:
    """How vLLM serves the folder, or why it does not as it is."""
    if serve["commands"]:
        first = serve["convert_first"]
        notes = (f"note: {note}" for note in serve["notes"])
        return [f"served by vLLM{f' once converted: {first}' if first else ''}", *_within([*serve["commands"], *notes])]
    refused = serve["refused"]
    lines = ["not served by vLLM as it is", *_within(finding["text"] for finding in refused)]
    words = sorted({finding["what"] for finding in refused})
    if any(finding["fatal"] for finding in refused):
        return lines
    accept = "".join(f" --accept {word}" for word in words)
    return [*lines, f"all the same: python -m main deploy {as_argument(folder)} --target vllm{accept}"]


def _within(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _facts(report: dict[str, Any]) -> list[str]:
    shape, tokenizer, release = report["shape"], report["tokenizer"], report["release"]
    layout = LAYOUTS[report["layout"]]
    weights = tuple(Path(f["name"]) for f in report["files"] if f["role"] == "weights")
    shape_files = [f["name"] for f in report["files"] if f["role"] == "shape"]
    each = "" if report["window"]["text"].endswith("layers") else " in every layer"
    words = "" if tokenizer["words"] is None else f", {tokenizer['words']} words"
    facts = {
        "folder": report["folder"],
        "release": "none that is known" if release is None else " or ".join(release["variants"]),
        "layout": f"{layout.title}: " + ", ".join((*shape_files, file_names(weights))),
        "parameters": f"{report['parameters'] / 1e6:,.1f} M, stored as {_counted(report['dtypes'])}",
        "shape": f"dim {shape['dim']}, {counted(shape['n_layers'], 'layer')}, hidden_dim {shape['hidden_dim']}, "
        f"{counted(shape['n_heads'], 'head')} of {shape['head_dim']} with {shape['n_kv_heads']} for keys and values, "
        f"vocabulary {shape['vocab_size']}",
        **_parts(report),
        "window": f"{report['window']['text']}{each} ({report['window']['rule']})",
        "rope_theta": f"{report['rope_theta']['value']:g} ({report['rope_theta']['rule']})",
        "tokenizer": f"{tokenizer['file']}: {_kind(tokenizer)}{words}" if tokenizer["file"] else "none",
    }
    if report["ends"]:
        facts["ends"] = ", ".join(_end(end) for end in report["ends"])
    if (blocks := report["memory"]["blocks"]) is not None:
        types, size = ", ".join(blocks["types"]), memory.as_text(blocks["bytes"])
        facts["in memory"] = f"blocks of few bits stay as they are on a CPU ({types}): {size} of weights"
    if report["trained_length"] is not None:
        facts["trained on"] = f"sequences of up to {report['trained_length']:,} tokens, as its files say"
    if report["template"] is not None:
        facts["template"] = f"{report['template']['name']}, {report['template']['rule']}"
    return [f"{name:12}{_printable(fact)}" for name, fact in facts.items()]


def _parts(report: dict[str, Any]) -> dict[str, str]:
    """What not every release has: experts, stretched positions, a tied output."""
    facts, parts = {}, report["parts"]
    if moe := parts["moe"]:
        facts["experts"] = (
            f"{moe['num_experts']} in each layer, {moe['num_experts_per_tok']} for each token, "
            f"which goes through {report['active_parameters'] / 1e6:,.1f} M parameters"
        )
    positions = []
    if yarn := parts["yarn"]:
        positions.append(
            f"stretched {yarn['factor']:g} times from {yarn['original_length']:,} (YaRN), "
            f"cosines and sines times {yarn['attention_factor']:.7g}"
        )
    if grows := parts["llama_4_scaling"]:
        positions.append(f"queries grow beyond {grows['original_length']:,} (beta {grows['beta']:g})")
    if positions:
        facts["positions"] = "; ".join(positions)
    if parts["tied_embeddings"]:
        facts["output"] = "tied to the embeddings"
    return facts


def _end(end: dict[str, Any]) -> str:
    text = "" if end["text"] is None else f" {end['text'] if end['text'].strip() else short_repr(end['text'])}"
    return f"{end['id']}{text} (by {' and '.join(end['from'])})"


def _counted(dtypes: dict[str, dict[str, int]]) -> str:
    """Dtypes, with the number of tensors of each where there are several."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return " and ".join(f"{name} x{count['tensors']}" for name, count in dtypes.items())


def _kind(tokenizer: dict[str, Any]) -> str:
    if tokenizer["kind"] == "tokenizers" and not tokenizer["file"].endswith(".json"):
        return "byte-level BPE"
    return KINDS[tokenizer["kind"]]


def _table(report: dict[str, Any]) -> list[str]:
    needs = report["memory"]
    columns = {"float32": "float32", "bfloat16": "bfloat16, float16"}
    rows = {"weights": needs["weights"]}
    rows |= {f"weights, --quant {quant}": dict.fromkeys(columns, size) for quant, size in needs["quantized"].items()}
    for entry in needs["cache"]:
        what = f"cache of {entry['positions']:,} positions"
        rows |= {what: entry["bytes"], f"{what}, int8": dict.fromkeys(columns, entry["bytes"]["int8"])}
    width = max(map(len, rows))
    lines = [f"{'memory':{width + 2}}" + "".join(f"  {title:>17}" for title in columns.values())]
    for name, sizes in rows.items():
        lines.append(f"  {name:{width}}" + "".join(f"  {memory.as_text(sizes[dtype]):>17}" for dtype in columns))
    return lines


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
