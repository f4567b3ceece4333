"""What the oracle reads: a folder's weights, a layer at a time and checked, and prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mistral import quant
from mistral.args import ModelArgs
from mistral.fast.layout import stored_as
from mistral.formats.folder import Folder
from mistral.oracle.layerwise import LayerwiseRunner
from mistral.parameters import EMBEDDINGS, OUTPUT, Parameter, parameters
from mistral.quant.linear import QuantizedLinear
from mistral.util.english import counted
from mistral.util.errors import UsageError
from mistral.util.threads import Sharing

SHORT_WINDOW = 512  # prompts go beyond windows up to this one unless longer ones are asked for


def random_prompts(args: ModelArgs, lens: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random ids, with 1 in front, which is bos in all of Mistral's tokenizers: [n] int64 for each length."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    prompts = [torch.randint(args.vocab_size, (n,), generator=generator) for n in lens]
    for prompt in prompts:
        prompt[0] = min(1, args.vocab_size - 1)
    return prompts


def prompts_for(args: ModelArgs, full: bool = False, seed: int = 0) -> list[Tensor]:
    """Random prompts of four lengths, the longest of which goes beyond the windows.

    Args:
        full: also where a window is so wide that this takes long.
    """
    widest = max((w for w in args.windows if w is not None and (full or w <= SHORT_WINDOW)), default=0)
    return random_prompts(args, (max(40, widest + 24), 1, 9, 23), seed)


def inside(args: ModelArgs, lens: Sequence[int]) -> str:
    """A note where no prompt is long enough for a window to matter; else an empty string."""
    wide = min((w for w in args.windows if w is not None and w >= max(lens)), default=None)
    return "" if wide is None else f"no prompt is longer than the window of {wide}, which therefore hides nothing"


def require_ids(prompts: Sequence[Tensor], args: ModelArgs) -> None:
    """Refuse prompts that a model cannot be asked.

    Raises:
        UsageError: one without ids, or with one that the vocabulary has not.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt) or int(prompt.min()) < 0 or int(prompt.max()) >= args.vocab_size:
            raise UsageError(f"prompt {i} must have ids, all in 0..{args.vocab_size - 1}")


class WeightReader:
    """The weights of a folder, whatever its layout: tensors by Mistral's names, checked to be finite."""

    def __init__(self, found: Folder) -> None:
        self._found = found
        self._parameters = parameters(found.args)

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU; where it is stored quantized, the weights that are meant, in fp32.

        A tied output is the embeddings.

        Raises:
            UsageError: it has numbers that are not finite.
        """
        found = self._found
        parameter = self._parameter(name)
        if found.has_quantized(parameter):
            assert found.quant is not None
            parts = [found.weights.get(part) for part in stored_as(parameter, found.quant)]
            module: QuantizedLinear = quant.from_stored(parameter, found.quant, parts)
            weight = module.rows(0, parameter.shape[0])
        else:
            weight = found.weights.get(parameter.name)
        if count := int((~torch.isfinite(weight)).sum()):
            raise UsageError(f"{name} has {counted(count, 'number that is', 'numbers that are')} not finite")
        return weight

    def _parameter(self, name: str) -> Parameter:
        return self._parameters[EMBEDDINGS if name == OUTPUT and self._found.args.tied_embeddings else name]

    def fit(self, dtype: torch.dtype) -> bool:
        """Whether every weight, as `get` gives it, is the same number in a dtype."""
        stored = {torch.float32}
        if self._found.quant is None:
            stored = {getattr(torch, str(self._found.weights.tensors[name].dtype)) for name in self._parameters}
        return all(torch.promote_types(one, dtype) == dtype for one in stored)

    def layer(self, i: int) -> dict[str, Tensor]:
        """The tensors of a layer, by their names in it."""
        at = f"layers.{i}."
        return {p.name.removeprefix(at): self.get(p.name) for p in self._parameters.values() if p.layer == i}


class QuantizedReader(WeightReader):
    """The weights as they would be after `--quant`: those of products rounded to few bits, and meant so."""

    def __init__(self, found: Folder, kind: str) -> None:
        super().__init__(found)
        self._kind = kind

    def get(self, name: str) -> Tensor:
        """One tensor, rounded where it is a product's."""
        weight, parameter = super().get(name), self._parameter(name)
        if not parameter.quantized:
            return weight
        return quant.quantize(parameter, weight, self._kind).rows(0, len(weight))


def through(
    reading: WeightReader, streams: Sequence[tuple[LayerwiseRunner, torch.dtype | None]], n_layers: int
) -> Iterator[None]:
    """Take streams through all layers, each given weights of its dtype; yields after each one's step."""
    embeddings, sharing = reading.get(EMBEDDINGS), Sharing()
    for stream, _ in streams:
        stream.embed(embeddings)
        yield
    del embeddings
    for i in range(n_layers):
        stored = reading.layer(i)
        cast, dtype = stored, None
        for stream, wanted in streams:
            if wanted != dtype:
                # One at a time, and streams of one dtype are neighbours.
                cast = stored if wanted is None else {name: w.to(wanted) for name, w in stored.items()}
                dtype = wanted
            with sharing():
                stream.layer(i, cast)
            yield
