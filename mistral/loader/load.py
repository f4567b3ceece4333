"""A folder into memory: find, check everything, see that it fits, then load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.args import ModelArgs
from mistral.fast.layout import bytes_of, is_quantized, stored_as
from mistral.formats.folder import BUNDLED, Folder, read_folder, short
from mistral.formats.hub import locate
from mistral.formats.releases import Release, identify
from mistral.formats.tokenizers import load_tokenizer, missing_tokens, tokenizer_kind
from mistral.formats.weights import Stored, file_names
from mistral.loader.options import OptionError
from mistral.parameters import EMBEDDINGS, OUTPUT, expected_shapes
from mistral.tokenizer import Tokenizer
from mistral.util import memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mistral.loader.runtime import Runtime
    from mistral.model import Transformer


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and what is known about it.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the folder's.
        args, runtime: its shape, and how it runs.
        folder, files: where it came from.
        parameters: how many weights there are.
        release: the release that it is, as far as its shape tells; None if it is none that is known.
        notes: what was assumed or left aside and what is odd, a sentence each.
    """

    model: Transformer
    tokenizer: Tokenizer
    args: ModelArgs
    runtime: Runtime
    folder: Path
    files: tuple[Path, ...]
    parameters: int
    release: Release | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: what was loaded, from where, and every choice that was made."""
        args = self.args
        return (
            f"{short(self.folder)}: {self.parameters / 1e6:.1f} M parameters from {file_names(self.files)}; "
            f"{self.runtime.describe()}; "
            f"window {args.window_text}; rope_theta {args.rope_theta:g} ({args.theta_rule}); "
            f"tokenizer {self.tokenizer.path.name}"
        )


def load(
    folder: str | PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
    max_batch_size: int = 0,
) -> Loaded:
    """Load a folder, in Mistral's layout or Hugging Face's: shape, weights, tokenizer.

    Everything is checked against headers before a tensor is read, and memory before it is taken.

    Args:
        folder: a path, or a hub id (see `hub.locate`); None is the small model that ships.
        device, dtype, attention, kernels: see `runtime.resolve`; None lets it choose.
        quant: "int8" or "int4" rounds the weights of products as they are loaded; None leaves them as they are.
        deterministic: give a sequence the same bits in any batch and chunks, on any number of threads; a CPU in fp32.
        max_batch_size: most sequences in one forward; 0 sets no limit.

    Raises:
        ValueError: a subclass that names what is wrong with the folder, the options or the memory.
    """
    found = read_folder(BUNDLED if folder is None else locate(folder), max_batch_size)
    tokenizer = load_tokenizer(found.path, found.args.vocab_size)
    release, odd = identify(found.args, tokenizer_kind(tokenizer.path), tokenizer.version)
    model, run = assemble(
        found,
        device=device,
        dtype=dtype,
        attention=attention,
        kernels=kernels,
        quant=quant,
        deterministic=deterministic,
    )
    spare = missing_tokens(found.args, tokenizer.n_words, release)
    padded = (f"the model knows {spare} ids that the tokenizer has no word for: they have no text",) if spare else ()
    notes = (*found.notes, *odd, *padded, *run.notes)
    files, parameters = found.weights.files, found.parameters
    return Loaded(model, tokenizer, found.args, run, found.path, files, parameters, release, notes)


def assemble(
    found: Folder,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    kernels: bool | None = None,
    quant: str | None = None,
    deterministic: bool = False,
) -> tuple[Transformer, Runtime]:
    """The model that a folder holds, in memory, and how it runs; see `load`.

    Raises:
        ValueError: a subclass that names what is wrong with the options or the memory.
    """
    import torch

    from mistral.loader import runtime
    from mistral.model import Transformer

    args = found.args
    (stored, _), *_ = Counter(t.dtype for n, t in found.tensors.items() if n.endswith(".weight")).most_common()
    assert stored is not None
    if found.quant is not None and quant not in (None, found.quant):
        raise OptionError(f"the weights of {found.path} have been rounded to {found.quant}: leave out quant")
    run = runtime.resolve(
        device,
        dtype,
        attention,
        kernels,
        quant or found.quant,
        deterministic,
        stored=getattr(torch, stored),
        parameters=found.parameters,
        head_dim=args.head_dim,
    )
    smaller = ["--dtype bfloat16"] if run.weights.itemsize > 2 and not run.quant else []
    few_bits = run.device.type == "cuda" or (run.kernels and run.compute == torch.float32)
    smaller += ["--quant int8"] if few_bits and not run.quant else []
    memory.require(
        _size_in_memory(found, run),
        run.device,
        f"the weights in {run.quant or str(run.weights).removeprefix('torch.')}",
        f"use {', '.join([*smaller, 'another --device'])}, or a smaller model",
    )
    kind: type[Transformer] = Transformer
    if run.decode:
        from mistral.fast.decode import FastTransformer

        kind = FastTransformer
    if run.captured:
        from mistral.fast.cuda_graph import CudaGraphTransformer

        kind = CudaGraphTransformer
    if run.deterministic:
        from mistral.fast import bitwise

        kind = bitwise.BitwiseTransformer
    with torch.device("meta"):
        # Where weights and arithmetic agree the model follows its weights, as `.to()` moves them.
        model = kind(args, run.attend, None if run.decode or run.weights == run.compute else run.compute)
    _fill(model, found, run)
    if run.deterministic:
        bitwise.self_test(model)
    return model, run


def _size_in_memory(found: Folder, run: Runtime) -> int:
    """Bytes of the weights once they are loaded."""
    if run.quant is None:
        return sum(tensor.parameters * _kept(tensor, run).itemsize for tensor in found.tensors.values())
    return sum(bytes_of(name, s, run.quant, run.weights.itemsize) for name, s in expected_shapes(found.args).items())


def _kept(tensor: Stored, run: Runtime) -> torch.dtype:
    """The dtype in which a tensor is kept: where weights stay as they are stored, each has its own, up to that of the
    arithmetic; a checkpoint may mix them."""
    import torch

    own: torch.dtype = getattr(torch, str(tensor.dtype))
    fits = run.weights != run.compute and torch.promote_types(own, run.compute) == run.compute
    return own if fits else run.compute


def _fill(model: Transformer, found: Folder, run: Runtime) -> None:
    """Give a model on the meta device its weights: each is in memory, on its device, before the next is read."""
    from tqdm import tqdm

    from mistral.fast.linear import use_kernels
    from mistral.quant import from_stored, put_quantized, quantize
    from mistral.quant.linear import QuantizedLinear

    tensors: dict[str, Tensor] = {}
    few_bits: dict[str, QuantizedLinear] = {}
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        shapes = expected_shapes(found.args)
        for name in found.tensors if found.quant is None else shapes:
            # No name for what is read: its part of the file is let go before the next one is mapped.
            if found.quant is not None and is_quantized(name):
                parts = stored_as(name, shapes[name], found.quant)
                stored = [found.weights.get(part, bar.update) for part in parts]
                few_bits[name] = from_stored(name, shapes[name], found.quant, stored, run.device)
            elif run.quant is not None and is_quantized(name):
                weight = found.weights.get(name, bar.update)
                few_bits[name] = quantize(name, weight, run.quant, run.device)
            else:
                # Beside weights that are rounded, those that are not are copied: one page of theirs would keep its
                # whole part of the file in memory.
                own = run.quant is not None and found.quant is None
                weight = found.weights.get(name, bar.update)
                tensors[name] = weight.to(run.device, _kept(found.weights.tensors[name], run), copy=own)
    if found.tied:
        tensors[OUTPUT] = tensors[EMBEDDINGS]
    if few_bits:
        tensors |= put_quantized(model, few_bits)
        for module in few_bits.values():
            module.by_kernels = run.kernels
    model.load_state_dict(tensors, strict=True, assign=True)
    if found.tied:  # one parameter, also to those who count them, train them or move them
        model.output.weight = model.tok_embeddings.weight
    if run.kernels:
        use_kernels(model)
    model.eval()
