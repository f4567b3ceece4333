"""Models on the Hugging Face hub: an id, `owner/name` or `owner/name@revision`, becomes a folder on disk.

Of the weights one layout is fetched, the one that `read_folder` would read, into the cache that Hugging
Face's libraries share. Of GGUF files one type is, `owner/name:Q4_K_M` where there are several. huggingface_hub is
imported where an id is given, and not before.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from mistral.formats.elsewhere import kind_of
from mistral.formats.layout import Layout
from mistral.formats.layouts import LAYOUTS
from mistral.util import memory
from mistral.util.english import some_names
from mistral.util.errors import Unavailable, UsageError

log = logging.getLogger("mistral")

PART = r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
# What ends as a file does is no repository.
ID = re.compile(
    rf"(?![^@:]*(--|\.\.|\.(git|gguf|safetensors|pth|jsonl?|txt)(@|$))){PART}/{PART}(@[^\s:]+)?(:[\w.-]+)?", re.ASCII
)
# What is fetched besides weights: shape, tokenizer, templates and what people should read; never code.
WANTED = re.compile(
    r"(params|config|generation_config)\.json"
    r"|tokenizer\.model(\.v\w+)?|tekken\.json|tokenizer(_config)?\.json|added_tokens\.json|special_tokens_map\.json"
    r"|chat_template\.\w+|README\.md|LICEN[CS]E[\w.-]*"
)
PIECE = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)  # of a GGUF file that was split
KIND = re.compile(r"[-._]((?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|FP16|MXFP4\w*))$", re.IGNORECASE)  # llama.cpp's types
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(Unavailable):
    """A model that cannot be had from the hub; what is complete in the cache stays there."""


@dataclass(frozen=True)
class _Choice:
    """The files to fetch: the layout's that gives the shape, the other small ones, the weights."""

    layout: Layout
    small: tuple[str, ...]
    weights: tuple[str, ...]


def is_hub_id(word: str) -> bool:
    """Whether a word is an id (`owner/name`, and `@revision`, `:TYPE`), and no path into a folder that is here."""
    return ID.fullmatch(word) is not None and not os.path.isdir(word.partition("/")[0])


def locate(folder: str | PathLike[str]) -> Path:
    """The folder meant: a path as it is, or the snapshot of a hub id (of GGUF the file), fetched if need be.

    A path that is there wins over a hub id, and a Path is never one. Where there is a folder called as the
    id's owner, a path may be meant, and nothing is fetched. What is fetched is logged as a warning, before it is.

    Raises:
        UsageError: what is neither text nor a path.
        HubError: huggingface_hub, the network, the repository, access to it, its revision, weights that are
            read here, or room on the disk is lacking.
        ParamsError: the repository's model has a shape that is not supported.
    """
    if not isinstance(folder, str | PathLike):
        raise UsageError(f"the folder is {folder!r:.60}; it must be a path or a hub id")
    if not isinstance(folder, str) or not ID.fullmatch(folder) or os.path.lexists(folder):
        return Path(folder)
    where, _, kind = folder.partition(":")
    repo, _, revision = where.partition("@")
    if not is_hub_id(folder):
        raise HubError(
            f"no such folder: {folder}; it is not looked for on the hub, because there is a folder "
            f"{repo.partition('/')[0]} here: for the hub's, run this elsewhere"
        )
    try:
        from huggingface_hub import errors
    except ImportError:
        raise HubError(
            f"no such folder: {folder}; to have it fetched from the Hugging Face hub, "
            "pip install huggingface_hub (or mistral-oracle-ref[hub])"
        ) from None
    try:
        names = _list(repo, revision or None)
    except (OSError, errors.HTTPError, json.JSONDecodeError) as error:
        reason = _out_of_reach(error)
        if reason is None:
            raise HubError(_explain(error, repo, revision)) from None
        return _cached(repo, revision or None, kind, reason)
    try:
        if kind or _choose(names) is None:
            return _fetch_gguf(repo, revision or None, gguf_files(repo, names, kind))
        return _fetch(repo, revision or None, names)
    except (OSError, errors.HTTPError, RuntimeError) as error:  # RuntimeError: of the library for Xet storage
        raise HubError(_explain(error, repo, revision)) from None


def _list(repo: str, revision: str | None) -> list[str]:
    """The repository's files, by name."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [file.rfilename for file in info.siblings or ()]


def _fetch(repo: str, revision: str | None, names: list[str]) -> Path:
    """Have all that is wanted in the cache; one file after the other, so that Ctrl-C takes effect at once."""
    from huggingface_hub import hf_hub_download

    choice = _choose(names)
    assert choice is not None
    # The first file says which commit the revision is; that, the cache remembers for when there is no network.
    config = Path(hf_hub_download(repo, choice.layout.config, revision=revision))
    commit = config.parent.name
    choice.layout.to_args(choice.layout.read_config(config.parent))  # refused before its weights are fetched
    # Weights come last: a snapshot that has them all is complete.
    wanted = (*choice.small, *choice.weights)
    _announce(repo, commit, wanted)
    for name in wanted:
        hf_hub_download(repo, name, revision=commit)
    return config.parent


def _fetch_gguf(repo: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Have the parts of a GGUF file in the cache; the first one's path."""
    from huggingface_hub import hf_hub_download

    _announce(repo, revision, files)
    there = [Path(hf_hub_download(repo, name, revision=revision)) for name in files]  # all of them
    return there[0]


def _announce(repo: str, revision: str | None, wanted: tuple[str, ...]) -> None:
    """Say what is fetched, if anything is missing, and refuse where the disk has no room for it."""
    from huggingface_hub import hf_hub_download

    files = [hf_hub_download(repo, name, revision=revision, dry_run=True) for name in wanted]
    missing = [file.file_size or 0 for file in files if file.will_download]
    if missing:
        _check_disk(repo, sum(missing))
        plural = "" if len(missing) == 1 else "s"
        log.warning("fetching %s: %d file%s, %s", repo, len(missing), plural, memory.as_text(sum(missing)))


def _cached(repo: str, revision: str | None, kind: str, reason: str) -> Path:
    """The snapshot that the cache has, if it is complete; of a type of GGUF, the file."""
    from huggingface_hub import constants, try_to_load_from_cache

    found_file = _cached_gguf(repo, revision, kind)
    if found_file is not None:
        log.warning("the hub cannot be reached (%s): %s is taken from the cache", reason, repo)
        return found_file
    has = "no"
    for layout in () if kind else LAYOUTS.values():
        found = try_to_load_from_cache(repo, layout.config, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            if _choose([path.name for path in folder.iterdir() if path.exists()]):
                log.warning("the hub cannot be reached (%s): %s is taken from the cache", reason, repo)
                return folder
            has = "only part of"
    at = f" at {revision}" if revision else ""
    advice = "unset it" if reason.startswith("HF_HUB_OFFLINE") else "check the name, or try again with a network"
    unknown = f"no such folder: {repo}; and the hub cannot be reached ({reason})"
    raise HubError(f"{unknown}, and {constants.HF_HUB_CACHE} has {has} {repo}{at}: {advice}")


def _cached_gguf(repo: str, revision: str | None, kind: str) -> Path | None:
    """The GGUF file that the cache has, all its parts; None if it has none, or several that may be meant."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf") if path.exists()]
    if not names or (not kind and _choose([path.name for path in folder.iterdir()]) is not None):
        return None
    return folder / gguf_files(repo, names, kind)[0]


def _check_disk(repo: str, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise HubError(
            f"{repo} needs {memory.as_text(needed)} more in {constants.HF_HUB_CACHE}, but its disk has "
            f"{memory.as_text(free)} free: free some, or set HF_HOME to a folder on another disk"
        )


# --- which files


def _choose(names: Collection[str]) -> _Choice | None:
    """One layout, complete, the preferred one if it is there. None if there is none."""
    here = set(names)
    for layout in LAYOUTS.values():
        for weights in layout.weight_sets(here):
            if weights and here.issuperset((layout.config, *weights)):
                small = {name for name in here if WANTED.fullmatch(name)} - {layout.config}
                return _Choice(layout, tuple(sorted(small)), weights)
    return None


def gguf_files(repo: str, names: Collection[str], kind: str) -> tuple[str, ...]:
    """The GGUF file of a type, in order of its parts.

    Args:
        names: of the repository's files.
        kind: the type, as the file's name ends: "Q4_K_M", in capitals or not; "": the only one there is.

    Raises:
        HubError: there is none, several may be meant, or parts are missing.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and "mmproj" not in name.lower():  # which reads images
            models.setdefault(PIECE.sub("", name), []).append(name)
    if not models:
        raise HubError(_unsupported(repo, names))
    kinds = {model: _kind_in(model) for model in models}
    meant = [model for model, its in kinds.items() if not kind or its.lower() == kind.lower()]
    if len(meant) != 1:
        there = ", ".join(sorted(set(kinds.values())))
        which = f"no GGUF file of type {kind}" if kind and not meant else "several GGUF files"
        raise HubError(
            f"{repo} has {which}: say which, as in {repo}:{kinds[(meant or list(kinds))[0]]} (it has {there})"
        )
    files = models[meant[0]]
    of = PIECE.search(files[0])
    if of is not None and len(files) != int(of[1]):
        raise HubError(f"{repo} has {len(files)} of the {int(of[1])} parts of {meant[0]}")
    return tuple(files)


def _kind_in(model: str) -> str:
    """The type that the name of a GGUF file ends with; without one, the name."""
    stem = model.rpartition("/")[2].removesuffix(".gguf")
    found = KIND.search(stem)
    return found[1] if found else stem


def _unsupported(repo: str, names: Collection[str]) -> str:
    """What a repository without weights that are read here has instead, in one line."""
    expected = "expected consolidated.safetensors with params.json, or model.safetensors with config.json"
    if what := kind_of(names):
        return f"{repo} has no weights that are read here ({expected}), but {what}"
    return f"{repo} is no model that is read here: {expected}, but it has {some_names(sorted(names)) or 'no files'}"


# --- what went wrong


def _out_of_reach(error: Exception) -> str | None:
    """Why the hub cannot be asked; None where it has answered."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, json.JSONDecodeError):
        return f"what answers at {constants.ENDPOINT} is no hub"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"it answers {status}" if status == 429 or status >= 500 else None
    return _first_line(error) if isinstance(error, errors.HTTPError) else None


def _explain(error: Exception, repo: str, revision: str) -> str:
    """What an error of huggingface_hub means, and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its conditions on {constants.ENDPOINT}/{repo}, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such folder: {repo}, and no model of that name on the hub that you may see: check the name; "
            f"for one that is private, {LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}: give a branch, a tag or a full commit, as in {repo}@main"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub does not give you {repo} ({error.response.status_code}): {LOG_IN} to a token that may read it"
    if isinstance(error, OSError) and error.errno is not None:
        advice = "free some of it" if error.errno == errno.ENOSPC else "make it writable"
        return f"{constants.HF_HUB_CACHE}: {error.strerror}: {advice}, or set HF_HOME to another folder"
    cause = _first_line(error.__cause__ or error)
    return f"{repo} was not fetched to its end ({cause}): run this again; the files that are complete are kept"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
