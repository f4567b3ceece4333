"""What can be compared: a folder, a pack, a server, arrays in a file. Each is a side, and gives its evidence.

Knows nothing about what comparing is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats.folder import Folder, read_folder
from mistral.formats.hub import locate
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.oracle import pack
from mistral.oracle.inputs import WeightReader
from mistral.oracle.outputs import ErrorBudget, Outputs, fingerprint, reference_outputs
from mistral.oracle.trace import names
from mistral.parameters import OUTPUT
from mistral.util.errors import FormatError

LARGEST = 2**28  # bytes of an answer that are read
PATIENCE = 300  # seconds a server has for one prompt
# What is read of an .npz, besides activations, whose names have dots.
NAMES = ("prompt_ids", "prompt_lens", "logits", "logprobs", "tok_embeddings", "norm", "output")
TOP = 20  # most likely tokens asked of a server


class Side:
    """One of two that are compared.

    Args:
        name: human-readable.
        prompts: the ones that it speaks of; None where it takes any.
        args: the model's shape, where it is known.
    """

    def __init__(self, name: str, prompts: list[Tensor] | None = None, args: ModelArgs | None = None) -> None:
        self.name, self.prompts, self.args = name, prompts, args

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        """What it says of these prompts: its own, where it has any."""
        raise NotImplementedError


class FolderSide(Side):
    """A folder in either layout, or a pack's weights: the truth about them, and the model for mutants."""

    def __init__(self, found: Folder, name: str) -> None:
        super().__init__(name, args=found.args)
        self.found = found
        self.reading = WeightReader(found)

    @property
    def stored(self) -> torch.dtype:
        """Dtype of the weights on disk."""
        return self.reading.get(OUTPUT).dtype

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        return reference_outputs(self.reading, self.found.args, prompts)[0]

    def rounded(self, prompts: Sequence[Tensor], weights: torch.dtype, compute: torch.dtype) -> ErrorBudget:
        """The error budget of these dtypes."""
        return reference_outputs(self.reading, self.found.args, prompts, [(weights, compute)])[1][0]

    def model(self) -> Transformer:
        """The library's own, on its plain path, in float64."""
        from mistral.loader.load import assemble

        return assemble(self.found, device="cpu", dtype="float64", execution="eager")[0]


class PackSide(Side):
    """A golden pack. With weights, it also has their model."""

    def __init__(self, path: Path) -> None:
        self.pack = pack.read(path)
        super().__init__(f"{path} (pack)", self.pack.prompts, self.pack.args)

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        p = self.pack
        # The token after a prompt's last position is -1, of which nothing is told.
        ids = torch.cat([p.top_ids, pack.following(p.prompts)[:, None]], 1)
        return Outputs(ids, torch.cat([p.top_logprobs, p.next_logprobs[:, None]], 1), p.prints)


class ArraysSide(Side):
    """An .npz, or a file that `trace` wrote: prompt_ids [T], and logits or logprobs [T, V].

    Perhaps also prompt_lens, where the ids are several prompts one after the other, and activations [T, width]
    under the names that `trace` gives them, in Mistral's order of rows.
    """

    def __init__(self, path: Path) -> None:
        found = _arrays(path)
        name = next((name for name in ("logprobs", "logits", "output") if name in found), None)
        if name is None or "prompt_ids" not in found:
            raise FormatError(f"{path} must have prompt_ids [T], and logits or logprobs [T, V]; it has {_some(found)}")
        scores, ids = found[name], found["prompt_ids"]
        given = found.get("prompt_lens", torch.tensor([ids.numel()]))
        whole = not any(x.is_floating_point() or x.is_complex() for x in (ids, given))
        if not (whole and ids.dim() == given.dim() == 1 and scores.is_floating_point()):
            raise FormatError(f"{path}: prompt_ids and prompt_lens must be whole numbers in one dimension, {name} real")
        lens = given.tolist()
        if scores.dim() != 2 or len(scores) != len(ids) or sum(lens) != len(ids) or min(lens, default=0) < 1:
            raise FormatError(
                f"{path}: {len(ids)} prompt_ids in prompts of {lens!r:.60}, and {name} of shape {list(scores.shape)}; "
                "they must be [T, V], a row for each id"
            )
        super().__init__(str(path), list(ids.long().split(lens)))
        activations = {n: x for n, x in found.items() if "." in n or n in ("tok_embeddings", "norm", "output")}
        fitting = {n: x for n, x in activations.items() if x.dim() == 2 and len(x) == len(ids)}
        # Log-probs are taken as they are: one that does not sum to 1 is a mistake.
        told = scores.double() if name == "logprobs" else logprobs(scores)
        # A prompt's first row may have no number: an engine that leaves out BOS says nothing there.
        silent = torch.zeros(len(ids), dtype=torch.bool)
        silent[given.cumsum(0) - given] = True
        silent &= scores.isnan().all(-1)
        self._evidence = Outputs(None, told, {n: fingerprint(x) for n, x in fitting.items()}, ~silent)

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        return self._evidence


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as opened:  # a pickle may hold code
                wanted = [n for n in opened.files if n in NAMES or "." in n]
                return {name: _tensor(opened[name]) for name in wanted}
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # numpy and safetensors raise what their zip and JSON readers happen to raise
        raise FormatError(f"{path} cannot be read as arrays: {' '.join(str(error).split())[:200]}") from None


def _tensor(array: np.ndarray) -> Tensor:
    """Of any order of bytes."""
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _some(found: Mapping[str, object]) -> str:
    return ", ".join(list(found)[:8]) + (", .." if len(found) > 8 else "") if found else "nothing"


class ServerSide(Side):
    """An OpenAI-style server: log-probs of prompts given as ids, from /v1/completions.

    vLLM is asked for `prompt_logprobs`. A server that knows nothing of them is asked to echo: then only the
    log-probs of the prompts' own tokens are known.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = re.sub(r"/v1/?$", "", url).rstrip("/")
        super().__init__(self.url)
        self._model = model

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        if self._model is None:
            listed = self._ask("/v1/models", None)
            try:
                self._model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise FormatError(f"{self.url}/v1/models lists no model: name one with --model") from None
        rows = [row for prompt in prompts for row in self._one(prompt.tolist())]
        width = max(1, *(len(row) for row in rows))
        ids = torch.full((len(rows), width), -1)
        values = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
        for i, row in enumerate(rows):
            if any(not 0 <= token < 2**31 for token in row):
                raise FormatError(f"{self.url} tells of tokens with impossible ids")
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
            values[i, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        return Outputs(ids, values)

    def _one(self, ids: list[int]) -> list[dict[int, float]]:
        """For each position the tokens after it whose log-probs are told."""
        asked = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0}
        try:
            answer = self._ask("/v1/completions", {**asked, "prompt_logprobs": TOP, "logprobs": TOP})
            told = answer["choices"][0].get("prompt_logprobs")
            if told is None:
                answer = self._ask("/v1/completions", {**asked, "echo": True, "logprobs": 1})
                own = answer["choices"][0]["logprobs"]["token_logprobs"]
                told = [None, *({str(i): {"logprob": lp}} for i, lp in zip(ids[1:], own[1:], strict=False))]
            rows = [{int(i): float(entry["logprob"]) for i, entry in (row or {}).items()} for row in told]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{self.url} gives no log-probs of prompts: {type(error).__name__} {error}") from None
        if len(rows) != len(ids):
            raise FormatError(f"{self.url} gave log-probs of {len(rows)} positions for a prompt of {len(ids)} ids")
        return [*rows[1:], {}]  # of the token at a position, from the one before

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self.url + path, data, {"Content-Type": "application/json"})
            # A proxy that leads to the world does not know this machine's own servers.
            near = re.match(r"https?://(localhost|127\.|\[::1\])", self.url)
            opener = build_opener(*([ProxyHandler({})] if near else []))
            with opener.open(request, timeout=PATIENCE) as answer:
                return json.loads(answer.read(LARGEST))
        except HTTPError as error:
            told = error.read(400).decode("utf-8", "replace")
            raise FormatError(f"{self.url}{path} answered {error.code}: {' '.join(told.split())}") from None
        except (URLError, HTTPException, OSError, ValueError, RecursionError) as error:
            why = getattr(error, "reason", None) or f"{type(error).__name__} {error}"
            raise FormatError(f"{self.url}{path} cannot be asked: {' '.join(str(why).split())[:200]}") from None


def side(what: str, model: str | None = None) -> Side:
    """The side that a word means: a URL, a file, a folder or a hub id.

    Args:
        model: the name that a server has for the model; None takes the first it lists.

    Raises:
        ValueError: a subclass that says what is wrong with it.
    """
    if re.match(r"https?://", what):
        return ServerSide(what, model)
    path = Path(what)
    if path.is_file():
        if pack.is_pack(path):
            return PackSide(path)
        if path.suffix in (".npz", ".safetensors"):
            return ArraysSide(path)
        if path.suffix == ".gguf":
            return FolderSide(read_folder(path), what)
        raise FormatError(f"{what} is none of: a folder, a .gguf file, a pack, a server's URL, an .npz, a trace")
    if path.suffix in (".npz", ".safetensors") and not path.exists():
        raise FormatError(f"no such file: {what}")
    return FolderSide(read_folder(locate(what)), what)


def known(args: ModelArgs, prints: Mapping[str, Tensor]) -> list[str]:
    """The names of activations in the order in which a model makes them, as far as there are."""
    return [name for name in names(args) if name in prints]
