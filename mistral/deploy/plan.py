"""What a recipe is filled in with: flags, memory, GPUs, and where the model comes from, decided once for a folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral.args import ModelArgs
from mistral.formats.folder import Folder, read_folder
from mistral.formats.huggingface import LENGTH
from mistral.formats.inspect import ITEMSIZE, inspect_folder
from mistral.formats.layout import trained_length
from mistral.formats.vllm import ACCEPTABLE, flags_of, notes, preflight
from mistral.util import memory
from mistral.util.dtypes import full_name
from mistral.util.errors import UsageError, short_repr

VERSION = "0.33.0"  # of vLLM, in every recipe
GIB = 1 << 30
# Memory of a GPU in GiB, a little less than there is; SkyPilot's names. From the smallest.
GPUS = {"L4": 22, "A10G": 22, "A100": 39, "L40S": 44, "A100-80GB": 79, "H100": 79, "H200": 140}
FIRST_CHOICE = ("L4", "L40S", "H100", "H200")  # one of these, or several of the last two
MOST_GPUS = 8  # of one machine
SHARE = 0.9  # of a GPU's memory that vLLM takes
BESIDE = 2 * GIB  # activations and captured graphs, on each GPU
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"


@dataclass(frozen=True)
class Wanted:
    """What may be asked for; None: it is decided by the folder.

    Args:
        name: what clients call the model.
        hub_id: where the machine that serves gets the model from; None: the folder is brought there.
        dtype: float32, bfloat16 or float16.
        max_model_len: the most positions of a sequence.
        gpu, gpus: the kind, and how many.
        accept: words of findings that are no reason to refuse.
    """

    name: str | None = None
    hub_id: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    gpu: str | None = None
    gpus: int | None = None
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deployment:
    """A folder, as recipes have it.

    Args:
        name: of the model, for clients.
        slug: of the things made for it: letters, digits and dashes.
        folder: on this machine, absolute; None where the hub has it.
        hub_id, revision: on the hub.
        flags: of `vllm serve`, after the model.
        max_model_len, dtype, gpu, gpus: see `Wanted`.
        weights, cache: bytes, of the cache for one sequence of that length.
        about: the model in a sentence.
        notes: what should be known, a sentence each.
    """

    name: str
    slug: str
    folder: str | None
    hub_id: str | None
    revision: str | None
    flags: tuple[str, ...]
    max_model_len: int
    dtype: str
    gpu: str
    gpus: int
    weights: int
    cache: int
    about: str
    notes: tuple[str, ...]
    version: str = VERSION

    @property
    def disk(self) -> int:
        """GiB of disk for the model and what is compiled for it."""
        return 20 + round(1.5 * self.weights / GIB)

    @property
    def model(self) -> str:
        """What vLLM is given in a container: the hub's id, or where the folder is mounted."""
        return self.hub_id or f"/models/{self.slug}"


def plan(folder: str | None, wanted: Wanted) -> Deployment:
    """A deployment of a folder.

    Raises:
        FormatError, HubError, ParamsError, WeightsError: no model in it.
        UsageError: vLLM would change it in silence, or it does not fit.
    """
    if unknown := [word for word in wanted.accept if word not in ACCEPTABLE]:
        raise UsageError(f"--accept is {short_repr(unknown[0])}; it must be {', '.join(ACCEPTABLE)}")
    report = inspect_folder(folder)
    found = read_folder(report["folder"])
    refused = [f for f in preflight(found, report) if f.fatal or f.what not in _accepted(wanted)]
    if refused:
        what = "; ".join(finding.text for finding in refused)
        words = sorted({finding.what for finding in refused if not finding.fatal})
        accept = f" (--accept {' --accept '.join(words)} to have it so)" if words and len(words) == len(refused) else ""
        raise UsageError(f"vLLM would not compute what {report['folder']} says: {what}{accept}")
    dtype, dtype_notes = _dtype(found, report, wanted.dtype)
    length, length_notes = _length(found, wanted.max_model_len)
    weights, cache = _weights(found, report, dtype), found.args.cache_bytes(length, dtype)
    gpu, gpus = _gpus(found.args, weights, cache, wanted)
    name, hub_id, revision = _name(report["folder"], wanted)
    flags = [*flags_of(found, report).replace("_", "-").split(), "--served-model-name", name, "--dtype", dtype]
    flags += ["--max-model-len", str(length), "--tensor-parallel-size", str(gpus)]
    flags += ["--gpu-memory-utilization", str(SHARE)]
    if revision is not None:
        flags += ["--revision", revision]
    accepted = (f"accepted: {f.text}" for f in preflight(found, report))
    return Deployment(
        name,
        _slug(name),
        None if hub_id is not None else str(Path(report["folder"]).absolute()),
        hub_id,
        revision,
        tuple(flags),
        length,
        dtype,
        gpu,
        gpus,
        weights,
        cache,
        _about(report, dtype, weights, cache, length),
        (*dtype_notes, *length_notes, *accepted, *notes(found, report)),
    )


def _accepted(wanted: Wanted) -> Collection[str]:
    return {*wanted.accept, *(("dtype",) if wanted.dtype is not None else ())}


def _about(report: dict[str, Any], dtype: str, weights: int, cache: int, length: int) -> str:
    release = report["release"]
    known = "" if release is None else f"{' or '.join(release['variants'])}, "
    return (
        f"{known}{report['parameters'] / 1e6:,.1f} M parameters, window {report['window']['text']}: "
        f"{memory.as_text(weights)} of weights in {dtype}, {memory.as_text(cache)} of keys and values for a sequence "
        f"of {length} positions"
    )


def _dtype(found: Folder, report: dict[str, Any], wanted: str | None) -> tuple[str, list[str]]:
    wanted = None if wanted is None else full_name(wanted)
    if wanted is not None and wanted not in ITEMSIZE:
        raise UsageError(f"--dtype is {wanted!r}; it must be {', '.join(ITEMSIZE)}")
    if any(tensor.widened for tensor in found.tensors.values()):  # quantized: the arithmetic is what is asked
        stored = str(found.raw.get("dtype") or found.raw.get("torch_dtype") or "float16")
    else:
        stored = max(report["dtypes"], key=lambda name: report["dtypes"][name]["parameters"]).removeprefix("torch.")
    dtype = wanted or (stored if stored in ITEMSIZE else "float32" if "float32" in stored else "bfloat16")
    if dtype != stored:
        return dtype, [f"weights are stored as {stored}: vLLM rounds them to {dtype}"]
    return dtype, []


def _length(found: Folder, wanted: int | None) -> tuple[int, list[str]]:
    trained = trained_length(found.raw)
    if wanted is None:
        if trained is not None:
            return trained, []
        said = f"{found.layout.config} does not say how long sequences may be: {LENGTH} is assumed (--max_model_len)"
        return LENGTH, [said]
    if trained is not None and wanted > trained:
        raise UsageError(f"--max_model_len is {wanted}; the model was trained on {trained} at most")
    return wanted, []


def _weights(found: Folder, report: dict[str, Any], dtype: str) -> int:
    if any(tensor.widened for tensor in found.tensors.values()):  # vLLM keeps them as they are
        return sum(file["bytes"] for file in report["files"] if file["role"] == "weights")
    return int(report["memory"]["weights"][dtype])


def _gpus(args: ModelArgs, weights: int, cache: int, wanted: Wanted) -> tuple[str, int]:
    """The kind of GPU, and how many: the fewest of the smallest."""
    if wanted.gpu is not None and wanted.gpu not in GPUS:
        raise UsageError(f"--gpu is {wanted.gpu!r}; known are {', '.join(GPUS)}")
    if wanted.gpus is not None and not _splits(args, wanted.gpus):
        raise UsageError(f"--gpus is {wanted.gpus}; {args.n_heads} heads over {args.n_kv_heads} do not split so")
    counts = [n for n in (1, 2, 4, MOST_GPUS) if _splits(args, n)] if wanted.gpus is None else [wanted.gpus]
    for n in counts:
        kinds = (wanted.gpu,) if wanted.gpu is not None else FIRST_CHOICE if n == 1 or wanted.gpus else FIRST_CHOICE[2:]
        for kind in kinds:
            if (weights + cache) / n + BESIDE <= SHARE * GPUS[kind] * GIB:
                return kind, n
    room = f"{counts[-1]} {wanted.gpu or FIRST_CHOICE[-1]}"
    raise UsageError(
        f"{memory.as_text(weights)} of weights and {memory.as_text(cache)} of keys and values do not fit {room}: "
        "lower --max_model_len, or name other GPUs with --gpu and --gpus"
    )


def _splits(args: ModelArgs, n: int) -> bool:
    return args.n_heads % n == 0 and (args.n_kv_heads % n == 0 or n % args.n_kv_heads == 0)


def _slug(name: str) -> str:
    """As Kubernetes and clouds take names: letters, digits and dashes, a letter first."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.rpartition("/")[2].lower()).strip("-")
    plain = slug[0].isalpha() and slug not in (
        "y",
        "n",
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
    )  # as in YAML
    return (slug if plain else f"m-{slug}")[:40].strip("-")


def _name(folder: str, wanted: Wanted) -> tuple[str, str | None, str | None]:
    """The model's name, and its id and revision on the hub."""
    hub_id, revision = wanted.hub_id, None
    if hub_id is not None:
        hub_id, _, revision = hub_id.partition("@")
        if not re.fullmatch(NAME, hub_id) or "/" not in hub_id:
            raise UsageError(f"--hub_id is {wanted.hub_id!r}; it must be owner/name, or owner/name@revision")
    own = Path(folder).absolute().name
    if hub_id is None and not str(Path(folder).absolute()).isprintable():
        raise UsageError(f"the folder's name has characters that recipes cannot hold: {short_repr(folder)}; rename it")
    name = wanted.name or hub_id or re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-._")
    if not re.fullmatch(NAME, name) or len(name) > 96:
        raise UsageError(f"the model needs a name of letters, digits, dots and dashes, not {name!r}: give --name")
    return name, hub_id, revision or None
