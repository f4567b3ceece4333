"""What a folder is: the facts of `read_folder`, what it takes to run it, and what looks wrong.

Reads headers, the small JSON files and the tokenizer's vocabulary; no tensor. Refuses only what cannot be a
model; all else that is odd is reported under "suspicious". Needs no PyTorch, except for a file of torch.save.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.fast.layout import BLOCKS, QUANTS, bytes_of
from mistral.formats.broken import broken_files
from mistral.formats.folder import BUNDLED, Folder, read_folder, short
from mistral.formats.gguf import multiplied_as_they_are
from mistral.formats.hub import locate
from mistral.formats.jinja import NotJinja, compile_template
from mistral.formats.layout import ParamsError, trained_length
from mistral.formats.layouts import LAYOUTS
from mistral.formats.releases import COMPARED, PARTS, RELEASES, Release, identify
from mistral.formats.tokenizers import (
    chat_templates,
    end_beside,
    ends_of,
    eos_ids,
    is_gguf_file,
    missing_tokens,
    other_tokenizers,
    read_tokenizer,
    suggested_sampling,
    tokenizer_files,
    tokenizer_kind,
    tokenizer_notes,
    why_version,
)
from mistral.formats.vllm import serving
from mistral.formats.weights import Stored, file_names
from mistral.formats.words import text_notes
from mistral.parameters import EMBEDDINGS, active, parameters
from mistral.special_tokens import read_special_tokens
from mistral.tekken import tekken_controls, tekken_words
from mistral.tokenizer import Tokenizer, TokenizerError
from mistral.util import memory
from mistral.util.errors import Unavailable
from mistral.util.files import read_limited
from mistral.util.parsed import parse_json

POSITIONS = (2048, 8192, 32768, 131072)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Ends of the names of weights that are not read, and of downloads that have not ended.
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
UNFINISHED = (".part", ".partial", ".incomplete", ".tmp", ".crdownload", ".aria2", ".download")


def inspect_folder(folder: str | PathLike[str] | None = None) -> dict[str, Any]:
    """Everything there is to say about a folder, ready for JSON.

    Sizes are in bytes; `memory.cache` is of one sequence. None is the bundled model, and a hub id
    (see `hub.locate`) is fetched, weights included.

    Raises:
        FormatError, HubError, ParamsError, WeightsError: no model in it, or one whose parts do not fit together.
    """
    found = read_folder(short(BUNDLED) if folder is None else locate(folder))
    path, args = found.path, found.args
    tokenizer = _tokenizer(path)
    known = tokenizer["words"] is not None
    release, odd = identify(args, tokenizer["kind"] if known else None, tokenizer["version"])
    files = _files(found, tokenizer["file"])
    dtypes = _dtypes(found.tensors)
    twice = broken_files(path).get(tokenizer["file"]) if tokenizer["error"] else None  # the error names it too
    suspicious = [
        *(note for note in found.notes if note != twice),
        *odd,
        *_about_shape(found, release),
        *_about_tokenizer(path, tokenizer, args, release),
        *_about_templates(path),
        *_about_files(
            path, files, dtypes, found.quant is not None or any(t.widened or t.computed for t in found.tensors.values())
        ),
    ]
    report = {
        "folder": str(path),
        "release": None if release is None else _release(release, tokenizer["version"]),
        "layout": found.layout.name,
        "files": files,
        "bytes": sum(f["bytes"] for f in files),
        "parameters": found.parameters,
        "dtypes": dtypes,
        "shape": {name: getattr(args, name) for name in COMPARED if name not in ("rope_theta", "sliding_window")},
        "parts": {
            **{name: None if (part := getattr(args, name)) is None else asdict(part) for name in PARTS},
            "tied_embeddings": args.tied_embeddings,
        },
        "active_parameters": active(args),
        "window": {"text": args.window_text, "layers": list(args.windows), "rule": found.layout.window_rule(found.raw)},
        "rope_theta": {"value": args.rope_theta, "rule": args.theta_rule},
        "trained_length": trained_length(found.raw),
        "tokenizer": tokenizer,
        "ends": _ends(path, tokenizer, args.vocab_size),
        "template": _template(path, tokenizer, release),
        "memory": _memory(found),
        "suspicious": list(dict.fromkeys(suspicious)),
    }
    return report | {"serve": serving(found, report)}


def _memory(found: Folder) -> dict[str, Any]:
    """Bytes of the weights in each dtype, of those that may be fewer, and of the cache of one sequence."""
    return {
        "weights": {
            dtype: _weight_bytes(found, found.quant, _rest_itemsize(found) if found.quant else n)
            for dtype, n in ITEMSIZE.items()
        },
        "quantized": _quantized_bytes(found),
        "blocks": _blocks(found),
        "cache": [
            {"positions": n, "bytes": {dtype: found.args.cache_bytes(n, dtype) for dtype in (*ITEMSIZE, "int8")}}
            for n in POSITIONS
        ],
    }


def _weight_bytes(found: Folder, quant: str | None, itemsize: int) -> int:
    return sum(bytes_of(parameter, quant, itemsize) for parameter in parameters(found.args).values())


def _quantized_bytes(found: Folder) -> dict[str, int]:
    """What the weights take with --quant, which leaves norms, and embeddings that are not tied, as they are stored."""
    return {} if found.quant is not None else {q: _weight_bytes(found, q, _rest_itemsize(found)) for q in QUANTS}


def _rest_itemsize(found: Folder) -> int:
    """Bytes of a number of what stays as it is stored beside quantized weights: embeddings and norms."""
    # A table that is tied is quantized too; norms are not.
    embeddings = found.weights.tensors.get(EMBEDDINGS) or found.weights.tensors["norm.weight"]
    return embeddings.nbytes // embeddings.parameters if not embeddings.widened else 4


def _blocks(found: Folder) -> dict[str, Any] | None:
    """What stays as it is in the file on a CPU, blocks of few bits: types, and bytes with all other weights."""
    kept = multiplied_as_they_are(found.weights, found.args)
    if not kept:
        return None
    known = parameters(found.args)
    size = sum(BLOCKS[kind].nbytes(*known[name].shape) for name, kind in kept.items())
    size += sum(tensor.nbytes for name, tensor in found.tensors.items() if not tensor.widened)
    size += sum(4 * known[name].numel for name, tensor in found.tensors.items() if tensor.widened and name not in kept)
    return {"types": sorted(set(kept.values())), "bytes": size}


def _release(release: Release, tokenizer_version: str | None) -> dict[str, Any]:
    same = [r for r in RELEASES if r is release or (tokenizer_version is None and r.shape == release.shape)]
    return {
        "name": release.name,
        "variants": [variant for one in same for variant in one.variants],
        "template": release.template,
        "tokenizer": release.tokenizer_file,
        "files": list(release.files),
        "md5": dict(release.md5),
    }


def _dtypes(tensors: dict[str, Stored]) -> dict[str, dict[str, int]]:
    """Tensors and parameters of each dtype, type of blocks, or way of being quantized."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        kind = tensor.computed or (tensor.dtype_name if tensor.widened else str(tensor.dtype))
        count = found.setdefault(kind, {"tensors": 0, "parameters": 0})
        count["tensors"] += 1
        count["parameters"] += tensor.parameters
    return found


def _tokenizer(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"file": None, "kind": None, "version": None, "words": None, "error": None}
    if is_gguf_file(path):
        return facts | _tokenizer_of_gguf(path)
    paths = tokenizer_files(path)
    if not paths:
        expected = "tokenizer.model, tokenizer.model.v3, tekken.json or tokenizer.json"
        return facts | {"error": f"no tokenizer in {path}: expected {expected}"}
    facts |= {"file": paths[0].name, "kind": tokenizer_kind(paths[0])}
    try:
        words, version = _words_and_version(paths[0])
        return facts | {"words": words, "version": version}
    except TokenizerError as error:
        return facts | {"error": str(error)}


def _tokenizer_of_gguf(path: Path) -> dict[str, Any]:
    try:
        made = read_tokenizer(path)
    except TokenizerError as error:
        return {"error": str(error)}
    return {"file": made.path.name, "kind": made.kind, "version": made.version, "words": made.n_words}


def _ends(path: Path, tokenizer: dict[str, Any], vocab_size: int) -> list[dict[str, Any]]:
    """What ends a sequence: the id, its text (None: unknown) and what names it."""
    if tokenizer["error"] is not None or tokenizer["file"] is None:
        ends, texts = ends_of(path, None, vocab_size)[0], dict[int, str]()
    elif tokenizer["kind"] == "tekken":  # which mistral-common takes seconds to read
        eos = 2  # of all of them
        ends, texts = ends_of(path, None, vocab_size)[0], tekken_controls(path / tokenizer["file"])
        ends[eos] = [tokenizer["file"], *ends.get(eos, ())]
        for i, file in end_beside(path, vocab_size).items():
            ends[i] = [file, *ends.get(i, ())]
            texts[i] = read_special_tokens(path).names["eos_token"]
    else:
        own = read_tokenizer(path)
        own.settle_eos(eos_ids(path, None, vocab_size)[0])
        ends, texts = ends_of(path, own, vocab_size)[0], {i: text for text, i in own.added_tokens.items()}
        texts |= {i: own.decode([i]) for i in ends if i not in texts and i < own.n_words}
    return [{"id": i, "text": texts.get(i), "from": ends[i]} for i in sorted(ends)]


def _template(path: Path, tokenizer: dict[str, Any], release: Release | None) -> dict[str, str] | None:
    """What a conversation is written in, and by which rule that is known; as `chat.templates.find_template` decides."""
    try:
        own = chat_templates(path)
    except TokenizerError as error:
        return {"name": "broken", "rule": str(error)}
    if own:
        found = own.get("default")
        rule = f"one of {', '.join(own)} by --template" if found is None else "of the folder, in Jinja"
        return {"name": "none by default" if found is None else found.file, "rule": rule}
    version, kind = tokenizer["version"], tokenizer["kind"]
    # A tokenizer.json has no version, and that of MistralLite is another release's.
    if release is not None and (version is None or release.added_words or kind == "tokenizers"):
        return {"name": release.template, "rule": "assumed from the release's instruct variants"}
    if version is None:
        return None
    rule = why_version(tokenizer["file"], kind, version)
    return {"name": f"{version}-tekken" if kind == "tekken" else version, "rule": rule}


def _words_and_version(path: Path) -> tuple[int, str | None]:
    if tokenizer_kind(path) != "tekken":
        tokenizer = Tokenizer(path)
        return tokenizer.n_words, tokenizer.version
    words = tekken_words(path)  # looks at the file first
    version = parse_json(read_limited(path))["config"].get("version")
    return words, version if isinstance(version, str) else None


def _files(found: Folder, tokenizer: str | None) -> list[dict[str, Any]]:
    """Name, size and role of every file; sizes of links are those of what they point to."""
    roles = {} if tokenizer is None else {tokenizer: "tokenizer"}
    roles |= {found.source: "shape"} | {f.name: "weights" for f in found.weights.files}  # one file may be all
    roles |= dict.fromkeys(found.layout.indexes, "index")
    files = []
    for file in found.weights.files if found.path.is_file() else sorted(found.path.iterdir()):
        if file.is_file():
            role = roles.get(file.name) or ("leftover" if file.name.endswith(WEIGHTS + UNFINISHED) else "other")
            files.append({"name": file.name, "bytes": file.stat().st_size, "role": role})
    return files


def _about_shape(found: Folder, release: Release | None) -> list[str]:
    said = []
    args, source, raw = found.args, found.source, found.raw
    if release is None and args.theta_rule.startswith("absent"):
        said.append(f"rope_theta is {args.theta_rule}: no release tells whether {args.rope_theta:g} is right")
    said += found.layout.odd(raw)
    if isinstance(raw.get("sliding_window"), str):
        said.append(f"{source} gives sliding_window as text, which other programs refuse: write a number or null")
    for other in LAYOUTS.values():
        if other is found.layout or not other.has_config(found.path):
            continue
        try:
            theirs, _ = other.to_args(other.read_config(found.path))
        except ParamsError as error:
            said.append(f"{other.config} is there too, ignored, and wrong: {error}")
        else:
            said += _differences(args, theirs, source, other.config)
    return said


def _differences(args: ModelArgs, theirs: ModelArgs, source: str, other: str) -> list[str]:
    names = [n for n in COMPARED if n != "sliding_window" and getattr(args, n) != getattr(theirs, n)]
    said = [f"{n} {getattr(args, n):g} and {getattr(theirs, n):g}" for n in names]
    if args.n_layers == theirs.n_layers and args.windows != theirs.windows:
        said.append(f"window {args.window_text} and {theirs.window_text}")
    return [f"{source}, which was read, and {other} differ: {', '.join(said)}"] if said else []


def _about_tokenizer(path: Path, tokenizer: dict[str, Any], args: ModelArgs, release: Release | None) -> list[str]:
    said = [] if tokenizer["error"] is None else [tokenizer["error"]]
    words, name, notes = tokenizer["words"], tokenizer["file"], list[str]()
    ids = words  # of words and of tokens that were added
    if tokenizer["error"] is None and tokenizer["kind"] != "tekken":  # which mistral-common takes seconds to read
        own = read_tokenizer(path)
        ids, notes = own.n_ids, tokenizer_notes(path, own, args.vocab_size)
        notes += text_notes(path, own, args.vocab_size) + suggested_sampling(path)
    elif path.is_dir() and (others := other_tokenizers(path)):
        notes = [f"several tokenizers: {name} is read, {', '.join(p.name for p in others)} ignored"]
    if tokenizer["error"] is None and tokenizer["kind"] == "tekken":
        notes = [*notes, *text_notes(path, None, args.vocab_size)]
    if words is not None and words > args.vocab_size:
        said.append(f"{name} has {words} words, but the model knows {args.vocab_size}: it is another model's")
    elif words is not None and missing_tokens(args, ids, release):
        has = f"{words} words" + (f" and tokens added up to id {ids - 1}" if ids > words else "")
        said.append(f"{name} has {has}, but the model knows {args.vocab_size}: the ids above have no text")
    return said + notes


def _about_templates(path: Path) -> list[str]:
    """What is no template, of those that the model brings; nothing where jinja2 is missing, which alone can tell."""
    said = []
    try:
        for template in chat_templates(path).values():
            try:
                compile_template(template.text, template.file)
            except NotJinja as error:
                said.append(str(error))
    except TokenizerError as error:
        said += [] if any(name in str(error) for name in broken_files(path)) else [str(error)]
    except Unavailable:
        pass
    return said


def _about_files(
    path: Path, files: list[dict[str, Any]], dtypes: dict[str, dict[str, int]], quantized: bool
) -> list[str]:
    said = []
    left = [f for f in files if f["role"] == "leftover"]
    unfinished = [f["name"] for f in left if f["name"].endswith(UNFINISHED)]
    unread = [f for f in left if f["name"] not in unfinished]
    if unread:
        first = file_names(tuple(Path(f["name"]) for f in unread))
        said.append(f"not read, {memory.as_text(sum(f['bytes'] for f in unread))}: {first}")
    if unfinished:
        said.append(f"a download that has not ended: {', '.join(unfinished)}")
    known = broken_files(path)  # read_folder names those
    for link in sorted(path.iterdir()) if path.is_dir() else ():
        if link.is_symlink() and not link.exists() and link.name not in known:
            said.append(f"{link.name} is a link to a file that is gone")
    if quantized:
        return said
    if len(dtypes) > 1:
        counts = ", ".join(f"{count['tensors']} {name}" for name, count in dtypes.items())
        said.append(f"weights of several dtypes: {counts}")
    for name, times in (("float32", "twice"), ("float64", "four times")):
        if 2 * dtypes.get(name, {}).get("parameters", 0) > sum(count["parameters"] for count in dtypes.values()):
            said.append(f"stored as {name}, {times} the size of bfloat16, which is what the releases have")
    return said


def as_json(report: dict[str, Any]) -> str:
    """The report as one object, on one line, in ASCII whatever the names of files."""
    return json.dumps(report)
