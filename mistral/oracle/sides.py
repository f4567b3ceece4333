"""What can be compared: a folder, a pack, a server, arrays in a file. Each is a side, and gives its evidence.

Knows nothing about what comparing is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats.folder import Folder, read_folder
from mistral.formats.hub import locate
from mistral.formats.merge import has_adapter
from mistral.formats.tokenizers import has_tokenizer, load_tokenizer
from mistral.loader.assemble import assemble
from mistral.loader.load import as_read
from mistral.loader.options import CACHE_NAMES, LoadOptions
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.oracle import pack
from mistral.oracle.inputs import QuantizedReader, WeightReader
from mistral.oracle.metrics import Progress
from mistral.oracle.mutants import mutated
from mistral.oracle.outputs import ErrorBudget, Outputs, fingerprint, reference_outputs
from mistral.oracle.servers import Server
from mistral.oracle.trace import names
from mistral.parameters import OUTPUT
from mistral.tokenizer import Tokenizer
from mistral.util.errors import FormatError
from mistral.util.files import by_utf8_name
from mistral.util.network import behind_v1

AS_IT_IS = LoadOptions()
# What is read of an .npz, besides activations, whose names have dots.
NAMES = ("prompt_ids", "prompt_lens", "logits", "logprobs", "tok_embeddings", "norm", "output")


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
    """A folder in either layout, or a pack's weights: the truth about them, and the model for mutants.

    Args:
        cache: dtype in which the other side keeps keys and values, where it is coarser than its arithmetic.

    Attributes:
        progress: told how much of what is being computed of it is done, and how much there is.
    """

    def __init__(self, found: Folder, name: str, cache: torch.dtype | None = None) -> None:
        super().__init__(name, args=found.args)
        self.found, self.cache = found, cache
        self.progress: Progress | None = None
        self.reading = WeightReader(found)
        self._tokenizer: Tokenizer | None = None

    @property
    def stored(self) -> torch.dtype:
        """Dtype of the weights on disk."""
        return self.reading.get(OUTPUT).dtype

    @property
    def adapted(self) -> bool:
        """Whether an adapter is merged into the weights while they are read."""
        return has_adapter(self.found)

    def tokenizer(self) -> Tokenizer | None:
        """That of the folder, if it has one; read once."""
        found = self.found
        if self._tokenizer is None and has_tokenizer(found.words):
            self._tokenizer = load_tokenizer(found.words, found.args.vocab_size, found.path)
        return self._tokenizer

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        return reference_outputs(self.reading, self.found.args, prompts, progress=self.progress)[0]

    def rounded(self, prompts: Sequence[Tensor], weights: torch.dtype, compute: torch.dtype) -> ErrorBudget:
        """The error budget of these dtypes, and of the cache."""
        dtypes = (weights, compute) if self.cache in (None, compute) else (weights, compute, self.cache)
        return reference_outputs(self.reading, self.found.args, prompts, [dtypes], self.progress)[1][0]

    def in_few_bits(self, prompts: Sequence[Tensor], kind: str) -> Outputs:
        """What would be true if the weights of products were rounded as `--quant` rounds them."""
        reading = QuantizedReader(self.found, kind)
        return reference_outputs(reading, self.found.args, prompts, progress=self.progress)[0]

    def model(self, mutant: str | None = None) -> Transformer:
        """The library's own, on its plain path, in float64.

        Args:
            mutant: a mistake to be made while weights are read.
        """
        with nullcontext() if mutant is None else mutated(mutant):
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

        with by_utf8_name(path) as named:
            return load_file(named)
    except Exception as error:  # numpy and safetensors raise what their zip and JSON readers happen to raise
        raise FormatError(f"{path} cannot be read as arrays: {' '.join(str(error).split())[:200]}") from None


def _tensor(array: np.ndarray) -> Tensor:
    """Of any order of bytes."""
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _some(found: Mapping[str, object]) -> str:
    return ", ".join(list(found)[:8]) + (", .." if len(found) > 8 else "") if found else "nothing"


class ServerSide(Side):
    """An OpenAI-style server; see `servers.Server`."""

    def __init__(self, url: str, model: str | None = None, key: str | None = None) -> None:
        super().__init__(re.sub(r"/v1/?$", "", url).rstrip("/"))
        self.server = Server(self.name, model, key)

    def evidence(self, prompts: Sequence[Tensor]) -> Outputs:
        return self.server.evidence(prompts)


def side(what: str, model: str | None = None, options: LoadOptions = AS_IT_IS, key: str | None = None) -> Side:
    """The side that a word means: a URL, a file, a folder or a hub id.

    Args:
        model: the name that a server has for the model; None takes the first it lists.
        key: that a server wants.
        options: the window and the adapter of a folder or a GGUF file, see `load.as_read`; and `cache_dtype`.

    Raises:
        ValueError: a subclass that says what is wrong with it.
    """
    if re.match(r"https?://", what):
        if behind := behind_v1(what):
            raise FormatError(f"{what} goes on behind /v1 with {behind}: give the address up to /v1")
        return ServerSide(what, model, key)
    path = Path(what)
    if re.match(r"(localhost|[\w.-]+\.\w+|\[[0-9a-f:]+\]):\d+", what) and not path.exists():
        raise FormatError(f"no such folder: {what}; a server's address begins with http://, as http://{what}")
    if path.is_file():
        if pack.is_pack(path):
            return PackSide(path)
        if path.suffix in (".npz", ".safetensors"):
            return ArraysSide(path)
        if path.suffix == ".gguf":
            return _folder_side(read_folder(path), what, options)
        raise FormatError(f"{what} is none of: a folder, a .gguf file, a pack, a server's URL, an .npz, a trace")
    if path.suffix in (".npz", ".safetensors") and not path.exists():
        raise FormatError(f"no such file: {what}")
    return _folder_side(read_folder(locate(what)), what, options)


def _folder_side(found: Folder, name: str, options: LoadOptions) -> FolderSide:
    asked = [] if options.sliding_window == "auto" else [f"window {options.sliding_window or 'none'}"]
    asked += [f"adapter {word}" for word in options.adapter]
    cache = CACHE_NAMES.get(options.cache_dtype or "auto")
    kept = None if cache is None else getattr(torch, cache)
    return FolderSide(as_read(found, options), f"{name} ({', '.join(asked)})" if asked else name, kept)


def known(args: ModelArgs, prints: Mapping[str, Tensor]) -> list[str]:
    """The names of activations in the order in which a model makes them, as far as there are."""
    return [name for name in names(args) if name in prints]
