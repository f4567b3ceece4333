"""Golden packs: what a model says of prompts, in one file that any program can be checked against.

The numbers are the truth's, in float64. docs/packs.md has the format, and a reader of twenty lines. `python -m main
pack FOLDER -o FILE` writes one; small ones with their weights ship in mistral/oracle/packs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral import __version__
from mistral.args import ModelArgs
from mistral.formats.folder import Folder
from mistral.formats.layouts import LAYOUTS, NATIVE
from mistral.formats.tokenizers import tokenizer_files
from mistral.formats.weights import WeightFiles, check_tensors, open_safetensors
from mistral.oracle import arrays
from mistral.oracle.inputs import WeightReader, require_ids
from mistral.oracle.metrics import Progress, short
from mistral.oracle.outputs import PRINTS, ErrorBudget, reference_outputs
from mistral.parameters import OUTPUT, parameters
from mistral.util import errors, files
from mistral.util.errors import FormatError

FORMAT, VERSION = "mistral oracle pack", 2
READABLE = (1, VERSION)
WIDER = 2  # times the limits of today: those by which packs of version 1 were judged, in fp32 and fp64
SHIPPED = Path(__file__).with_name("packs")
WEIGHTS = "weights."  # before the names of weights in the file
ACTIVATIONS = "activations."
# Dtypes of weights and arithmetic whose error budgets a pack has; weights as they are stored, or narrower.
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


class PackError(FormatError):
    """A pack that cannot be made, or is not whole."""


@dataclass(frozen=True)
class Pack:
    """What is in a pack.

    Args:
        path: where it was read.
        args: the model's shape, every rule applied.
        prompts: [n] int64 ids of each.
        top_ids, top_logprobs: [T, k] the most likely tokens after each position and their log-probs, most likely first.
        next_logprobs: [T] log-prob of the prompt's own next token; nan at the end of each prompt.
        prints: fingerprints [T, PRINTS] of activations by name, in the order in which they are made.
        budgets: its error budgets, by the dtypes of weights and arithmetic.
        facts: everything else that it says of itself.
    """

    path: Path
    args: ModelArgs
    prompts: list[Tensor]
    top_ids: Tensor
    top_logprobs: Tensor
    next_logprobs: Tensor
    prints: dict[str, Tensor]
    budgets: list[ErrorBudget]
    facts: dict[str, Any]


def pack(
    found: Folder,
    path: str | PathLike[str],
    prompts: Sequence[Tensor],
    *,
    top: int = 20,
    weights: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the truth about a model's prompts, a layer at a time.

    Args:
        prompts: [n] int64 ids of each, at least one.
        top: most likely tokens to keep of each position.
        weights: also put the weights into the file.
        progress: told how much of the work is done, and how much there is.

    Raises:
        PackError: more tokens asked for than there are.
        FormatError: the file cannot be written.
        UsageError, WeightsError: an id that the model does not know; weights that are not finite, or cannot be read.
    """
    args = found.args
    if not 1 <= top <= args.vocab_size:
        raise PackError(f"top is {top}; it must be between 1 and the vocabulary's {args.vocab_size}")
    require_ids(prompts, args)
    files.require_writable(path)
    reading = WeightReader(found)
    stored = reading.get(OUTPUT).dtype
    pairs = [(min(stored, compute, key=lambda dtype: dtype.itemsize), compute) for compute in COMPUTE]
    true, budgets = reference_outputs(reading, args, prompts, pairs, progress)
    # A stable sort, because topk breaks ties anyhow; the lowest id comes first.
    values, order = true.logprobs.sort(dim=-1, descending=True, stable=True)
    tensors = {
        "prompt_ids": torch.cat(list(prompts)),
        "prompt_lens": torch.tensor([len(p) for p in prompts]),
        "top_ids": order[:, :top],
        "top_logprobs": values[:, :top],
        "next_logprobs": next_logprobs(true.logprobs, prompts),
        **{ACTIVATIONS + name: x for name, x in true.prints.items()},
    }
    if weights:
        tensors |= {WEIGHTS + name: reading.get(name).clone() for name in parameters(args)}
    return arrays.write(path, tensors, _facts(found, stored, list(true.prints), budgets))


def following(prompts: Sequence[Tensor]) -> Tensor:
    """[T] the token after each position; -1 at the end of each prompt."""
    return torch.cat([torch.cat([p[1:], torch.tensor([-1])]) for p in prompts])


def next_logprobs(scores: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """[T] log-probs, among [T, V], of each prompt's own next token; nan at its end."""
    ids = following(prompts)
    return torch.where(ids < 0, torch.nan, scores.gather(-1, ids.clamp(min=0)[:, None])[:, 0])


def _facts(found: Folder, stored: torch.dtype, names: list[str], budgets: list[ErrorBudget]) -> dict[str, Any]:
    args, (layout, config) = dataclasses.asdict(found.args), _config(found)
    files = [found.path / found.source, *found.weights.files, *tokenizer_files(found.words)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "layout": layout,
        "config": config,
        "args": {name: args[name] for name in args if name not in ("max_batch_size", "theta_rule")},
        "rules": {
            "rope_theta": found.args.theta_rule,
            "window": "query q sees key k if 0 <= q - k < W",
            "notes": list(found.notes),
        },
        "activations": names,
        "error_budgets": {
            u.of: {"rms": u.rms, "largest": u.logprobs, "activations": [u.prints[name] for name in names]}
            for u in budgets
        },
        "provenance": {
            "files": {path.name: _sha256(path) for path in files if path.is_file()},
            "stored": short(stored),
            "compute": "fp64",
            "backend": "mistral.oracle.truth",
            "cache": "none",
            "versions": {
                "mistral-oracle-ref": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        },
    }


def _config(found: Folder) -> tuple[str, dict[str, Any]]:
    """A layout, and what says the shape in it: as the folder does, unless another window was asked for."""
    config = found.layout.plain(found.raw)
    if found.layout.to_args(config)[0] == found.args:
        return found.layout.name, config
    return NATIVE.name, found.args.to_params()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", opener=files.regular) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def read(path: str | PathLike[str]) -> Pack:
    """Read a pack.

    Raises:
        FormatError: it is none, or cannot be read.
        PackError: something is missing from it.
    """
    tensors, facts = arrays.read(Path(path), FORMAT, READABLE)
    try:
        args = _args(facts)
        if args.n_layers > len(facts["activations"]):
            raise ValueError(f"it claims {args.n_layers} layers")
        ids, lens = tensors["prompt_ids"], tensors["prompt_lens"]
        top_ids, top_logprobs, own = (tensors[name] for name in ("top_ids", "top_logprobs", "next_logprobs"))
        prints = {name: tensors[ACTIVATIONS + name] for name in facts["activations"]}
        T, k = top_ids.shape
        for x, shape, dtype in (
            (ids, (T,), torch.int64),
            (lens, (len(lens),), torch.int64),
            (top_ids, (T, k), torch.int64),
            (top_logprobs, (T, k), torch.float64),
            (own, (T,), torch.float64),
            *((x, (T, PRINTS), torch.float64) for x in prints.values()),
        ):
            if x.shape != shape or x.dtype != dtype:
                raise ValueError("its tensors have other shapes or dtypes than they should")
        if not k or not len(lens) or int(lens.min()) < 1 or int(lens.sum()) != T:
            raise ValueError("its tensors do not fit its prompts")
        if any(int(x.min()) < 0 or int(x.max()) >= args.vocab_size for x in (ids, top_ids)):
            raise ValueError(f"it has ids outside the vocabulary of {args.vocab_size}")
        if not all(x.isfinite().all() for x in (top_logprobs, *prints.values())):
            raise ValueError("it has numbers that are not finite")
        prompts = list(ids.split(lens.tolist()))
        budgets = _budgets(facts, list(prints))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError) as error:
        raise PackError(f"{path} is not a whole pack: {_why(error)}") from None
    return Pack(Path(path), args, prompts, top_ids, top_logprobs, own, prints, budgets, facts)


def _why(error: Exception) -> str:
    """In words: some of the errors are ours, others those of looking into what a file holds."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    ours = isinstance(error, ValueError)
    return " ".join(str(error).split()) if ours else "what it holds has other kinds than it should"


def _budgets(facts: dict[str, Any], names: list[str]) -> list[ErrorBudget]:
    """The error budgets. Those of version 1 had another name and exact sums, and limits that were wider."""
    told = facts["error_budgets" if facts["version"] == VERSION else "unavoidable"]
    budgets = []
    for of, u in told.items():
        factor = WIDER if facts["version"] == 1 and of.endswith(("fp32", "fp64")) else 1
        rms, largest, *activations = (factor * _number(x) for x in (u["rms"], u["largest"], *u["activations"]))
        budgets.append(ErrorBudget(of, rms, largest, dict(zip(names, activations, strict=True))))
    return budgets


def _number(value: Any) -> float:
    """A number of at least 0; null, where rounding made it infinite."""
    number = math.inf if value is None else float(value)
    if not number >= 0:
        raise ValueError(f"an error of {number}")
    return number


def _args(facts: dict[str, Any]) -> ModelArgs:
    """The shape, by the rules of the layout that the pack was made from."""
    return LAYOUTS[facts["layout"]].to_args(facts["config"])[0]


def is_pack(path: str | PathLike[str]) -> bool:
    """Whether a file is a pack, of whatever version."""
    try:
        return Path(path).is_file() and arrays.facts_of(Path(path)).get("format") == FORMAT
    except errors.FormatError:
        return False


def folder_of(path: str | PathLike[str], beside: Path) -> Folder:
    """The model in a pack that has its weights, as a folder: what `verify`, `convert` and others take.

    Args:
        beside: a folder with what else belongs to the model, its tokenizer perhaps.

    Raises:
        PackError: it has no weights.
        FormatError, WeightsError: it is no pack, or cannot be read.
    """
    facts = read(path).facts
    files = open_safetensors((Path(path),))
    names = {name.removeprefix(WEIGHTS): name for name in files.tensors if name.startswith(WEIGHTS)}
    if not names:
        raise PackError(f"{path} has no weights: those that `pack --weights` wrote do")
    args = _args(facts)
    if OUTPUT in names:  # whatever its config says of a tie
        args = dataclasses.replace(args, tied_embeddings=False)
    stored = {ours: files.tensors[name] for ours, name in names.items()}
    check_tensors(stored, {name: p.shape for name, p in parameters(args).items()}, str(path), "its config")
    weights = WeightFiles(
        (Path(path),),
        stored,
        {ours: files.readers[name] for ours, name in names.items()},
    )
    raw = {**facts["config"]}
    return Folder(beside, NATIVE, NATIVE.config, raw, args, weights, notes=())
