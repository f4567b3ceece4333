"""Which model a folder holds, in one line of hex: the same in either layout, another for every fine-tune."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.formats.adapter import read_adapter
from mistral.formats.adapter_words import own_words
from mistral.formats.folder import read_folder
from mistral.formats.gguf import BlockReader
from mistral.formats.releases import COMPARED
from mistral.formats.tokenizers import tokenizer_content
from mistral.formats.weights import WeightFiles
from mistral.parameters import EMBEDDINGS, OUTPUT, parameters

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(folder: Path, adapter: str | None = None) -> str:
    """A digest of a model's shape, a row of each of its tensors, and its tokenizer; a page of each tensor is read.

    Rows of q and k are left out: in one of the layouts they would have to be put in order first. Of an adapter, a row
    of each of its tensors and the scales count, and its tokenizer where that is used.

    Raises:
        ValueError: a subclass that says what is wrong with the folder.
    """
    found = read_folder(folder)
    digest = hashlib.sha256()
    shape = {name: getattr(found.args, name) for name in COMPARED if name != "sliding_window"}
    digest.update(repr((sorted(shape.items()), found.args.windows)).encode())
    turning = {name for name, parameter in parameters(found.args).items() if parameter.heads is not None}
    # So that a tie that is written out changes nothing.
    tied = {OUTPUT} if found.args.tied_embeddings and EMBEDDINGS in found.weights.tensors else set()
    for name in sorted(found.weights.tensors.keys() | tied):
        if name not in turning:
            row = _first_row(found.weights, EMBEDDINGS if name in tied else name)
            digest.update(name.encode() + row.float().numpy().tobytes())
    digest.update(tokenizer_content(found.path))
    if adapter is not None:
        lora = read_adapter(adapter)
        words, _ = own_words(lora, found.path, found.args)
        if words is not None:
            digest.update(tokenizer_content(words))
        digest.update(repr(sorted((name, pair.scale) for name, pair in lora.pairs.items())).encode())
        for name in sorted(lora.weights.tensors):
            digest.update(name.encode() + lora.weights.get(name)[0].float().numpy().tobytes())
    return digest.hexdigest()


def _first_row(weights: WeightFiles, name: str) -> Tensor:
    """A tensor's first row, or a vector whole; of blocks of few bits no other row is widened."""
    reader = weights.readers[name]
    if isinstance(reader, BlockReader) and len(weights.tensors[name].shape) > 1:
        return weights.read(reader.first, name)
    tensor = weights.get(name)
    return tensor if tensor.dim() == 1 else tensor[0]
